"""Networks, what is trained of them, and programs over them by their shapes alone, as these lie on a mesh."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.benchmarking.flops import Flops
from adastate_jax.config.networks import trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.config.stages import OptimizerConfig
from adastate_jax.errors import UserError
from adastate_jax.models.adapters import LoRAConfig
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.sharding import RULES, batch_sharding, replicated
from adastate_jax.training.frozen import abstract_adapters, with_shardings
from adastate_jax.training.state import TrainState, create_state

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program to compile.

    Attributes:
        name: one of `sections.PROGRAMS`.
        mesh: over the target's chips.
        function: jitted.
        arguments: shapes with shardings, and what is static.
        donated: bytes per device of the arguments whose place the results should take.
        resident: bytes per device of what lies there, too, while it runs, but is none of its arguments.
        flops: of all devices together; of a drawn number of denoising steps the mean.
        unknown_turns: of a loop whose turns are drawn, the mean.
    """

    name: str
    mesh: Mesh
    function: Any
    arguments: tuple[Any, ...]
    donated: int
    resident: int
    flops: Flops
    unknown_turns: float = 1.0


def device_bytes(tree: Any) -> int:
    """Bytes that each device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )


def whole(tree: Any, mesh: Mesh) -> Any:
    """Shapes of what every device has all of."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree)


@functools.cache
def _abstract(config: DiTConfig) -> DiT:
    """A transformer's shapes. Kept, because a search over meshes asks for the same ones again and again."""
    return jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))


@functools.cache
def _abstract_state(config: DiTConfig, lora: LoRAConfig, optimizer: OptimizerConfig, ema: bool) -> TrainState:
    """A network's shapes in training, or its adapters', kept as `_abstract`'s are."""
    weights = abstract_adapters(config, lora) if lora.rank else _abstract(config)
    return jax.eval_shape(functools.partial(create_state, optimizer=optimizer, ema=ema), weights)


_KEPT = 64  # networks on meshes: a search asks for those of one mesh with all sizes of micro-batches


@functools.lru_cache(_KEPT)
def _state_on(network: DiTConfig, lora: LoRAConfig, optimizer: OptimizerConfig, ema: bool, mesh: Mesh) -> TrainState:
    return with_shardings(_abstract_state(network, lora, optimizer, ema), mesh)


def state_of(name: str, config: Config, optimizer: OptimizerConfig, ema: bool, mesh: Mesh) -> TrainState:
    """What is trained of a network: shapes of all its weights or of its adapters, of their moments and average."""
    network, lora = trained_sizes(config.network(name)), getattr(config, name).lora
    return _state_on(network, lora, optimizer, ema, mesh)


def base_of(name: str, config: Config, mesh: Mesh) -> DiT | None:
    """Shapes of the frozen weights that a network's adapters are of; None where all weights are trained."""
    return transformer(config.network(name), mesh) if getattr(config, name).lora.rank else None


@functools.lru_cache(_KEPT)
def transformer(config: DiTConfig, mesh: Mesh) -> DiT:
    """A network's shapes."""
    return with_shardings(_abstract(config), mesh)


def require_divided(stage: str, config: Config, mesh: Mesh) -> None:
    """Raises UserError if the samples that a stage computes at once are not split over the mesh."""
    batch, accumulate = (getattr(getattr(config, stage), field) for field in ("batch_size", "accumulate"))
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if batch // accumulate % parts:
        at_once = f"{batch} prompts" + (f", {batch // accumulate} at once," if accumulate > 1 else "")
        raise UserError(f"config.{stage}.batch_size: {at_once} are not split over {parts} devices of the batch")


def text_shape(batch: int, config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Embeddings of a batch's prompts."""
    shape = batch, config.model.text_length, config.model.text_dim
    return jax.ShapeDtypeStruct(shape, jnp.dtype(config.text.dtype), sharding=batch_sharding(mesh))


def key_shape(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A random key."""
    return whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)
