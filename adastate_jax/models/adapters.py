"""Low-rank adapters (LoRA): a small trained change of some linear layers of a frozen transformer.

A layer W x + b becomes W x + b + alpha / rank · up (down x). `up` starts at zero, so before the first update an adapted
network is its base to the bit (in 16 bits, if the compiler leaves out no rounding). The base may be of any dtype, eight
bits among them; nothing of the size of its weights is computed for a gradient. Source: arXiv 2106.09685.
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.checks import require_positive
from adastate_jax.diffusion import draw_normal
from adastate_jax.errors import shown
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.linear import Linear, linear
from adastate_jax.models.quantized import QuantizedLinear
from adastate_jax.sharding import path_name

_LAYERS = (Linear, QuantizedLinear)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers of a network get adapters, and how large these are.

    Attributes:
        rank: of each change; 0 trains all weights instead.
        alpha: changes are scaled by alpha / rank.
        targets: regular expressions, each matched with the end of a layer's path, from a slash on: `query` is every
            query projection, `self_attention/.*` all of self-attention. The default is all of every block.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("query", "key", "value", "output", "ffn_in", "ffn_out")

    def __post_init__(self):
        require_positive(self, "alpha")
        if self.rank < 0:
            raise ValueError(f"rank must be at least 1, or 0 to train all weights, got {self.rank}")
        plain = LoRAConfig.alpha, LoRAConfig.targets
        if not self.rank and (self.alpha, self.targets) != plain:
            raise ValueError("rank is 0, which trains all weights; set rank to at least 1, or leave the rest as it is")
        if not self.targets:
            raise ValueError("targets are none; name some layers, such as query")
        for target in self.targets:
            try:
                re.compile(target)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"targets: {shown(target)} is no regular expression ({error})") from None


@functools.partial(jax.tree_util.register_dataclass, meta_fields=("scale",), data_fields=("down", "up"))
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The change of one layer of every block: scale · down · up.

    Attributes:
        down: [layers, inputs, rank], or without the leading axis of a layer that is there once.
        up: [layers, rank, outputs].
        scale: alpha / rank.
    """

    down: jax.Array
    up: jax.Array
    scale: float


Adapters = dict[str, Adapter]  # by the path of the layer, `blocks/self_attention/query`


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(), data_fields=("base", "adapter"))
@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer and its adapter, in the layer's place."""

    base: Linear | QuantizedLinear
    adapter: Adapter

    def __call__(self, inputs: jax.Array, axes: int = 1) -> jax.Array:
        """[..., inputs] → [..., outputs] in the layer's `dtype`; `axes` as `Linear`'s."""
        down, up, dtype = self.adapter.down, self.adapter.up, self.base.dtype
        hidden = linear(inputs, down, jnp.zeros(down.shape[-1], dtype), dtype, axes)
        change = linear(hidden, up, jnp.zeros(up.shape[-1], dtype), dtype)
        return self.base(inputs, axes) + self.adapter.scale * change


@functools.lru_cache(maxsize=8)
def _layer_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes [layers, inputs, outputs] (or [inputs, outputs]) of the linear layers of a network, by path."""
    plain = dataclasses.replace(config, quantization="")
    found = _layers(jax.eval_shape(lambda: DiT(plain, rngs=nnx.Rngs(0))), _LAYERS)
    return {name: layer.kernel.shape for name, layer in found.items()}


def _layers(network: Any, kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """The layers of these kinds, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(network, is_leaf=lambda x: isinstance(x, kinds))
    return {path_name(path): x for path, x in leaves if isinstance(x, kinds)}


def adapted_shapes(config: DiTConfig, lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """Shapes [layers, inputs, outputs] (or [inputs, outputs]) of the layers that get adapters, by path.

    Raises:
        ValueError: a target matches no layer, or the rank is more than a layer has inputs or outputs.
    """
    shapes, found = _layer_shapes(config), {}
    for target in lora.targets:
        matched = [name for name in shapes if re.search(rf"(^|/)({target})$", name)]
        if not matched:
            raise ValueError(
                f"lora.targets: {shown(target)} is the end of no layer's path; there are {', '.join(shapes)}"
            )
        found |= {name: shapes[name] for name in matched}
    for name, shape in found.items():
        if lora.rank > min(shape[-2:]):
            raise ValueError(
                f"lora.rank {lora.rank} is more than the {shape[-2]} inputs or the {shape[-1]} outputs of {name}; "
                f"choose at most {min(min(shape[-2:]) for shape in found.values())}"
            )
    return {name: found[name] for name in shapes if name in found}


def create_adapters(config: DiTConfig, lora: LoRAConfig, key: jax.Array) -> Adapters:
    """Adapters before the first update, float32: `down` normal of variance 1 / inputs, `up` zero."""

    def create(index: int, shape: tuple[int, ...]) -> Adapter:
        *layers, inputs, outputs = shape
        down = draw_normal(jax.random.fold_in(key, index), (*layers, inputs, lora.rank)) / math.sqrt(inputs)
        return Adapter(down, jnp.zeros((*layers, lora.rank, outputs)), lora.alpha / lora.rank)

    return {name: create(index, shape) for index, (name, shape) in enumerate(adapted_shapes(config, lora).items())}


def join(trained: Any, base: DiT | None) -> DiT:
    """The network of what is trained and what is not: of adapters and their frozen base, or `trained` itself.

    Args:
        trained: `Adapters`, or where `base` is None the whole network.
        base: gets no gradient.
    """
    if base is None:
        return trained

    def adapt(path, layer):
        adapter = trained.get(path_name(path))
        return layer if adapter is None else AdaptedLinear(layer, adapter)

    base = jax.lax.stop_gradient(base)
    return jax.tree_util.tree_map_with_path(adapt, base, is_leaf=lambda x: isinstance(x, _LAYERS))


def split(network: DiT) -> tuple[Any, DiT | None]:
    """What `join` made a network of: (what is trained, base)."""
    adapted = _layers(network, AdaptedLinear)
    if not adapted:
        return network, None
    base = jax.tree.map(
        lambda x: x.base if isinstance(x, AdaptedLinear) else x,
        network,
        is_leaf=lambda x: isinstance(x, AdaptedLinear),
    )
    return {name: layer.adapter for name, layer in adapted.items()}, base


def merge(base: DiT, adapters: Adapters) -> DiT:
    """A network with the changes added to its weights, in float32, and then of its own dtype again.

    base: not quantised.
    """

    def add(path, leaf):
        name = path_name(path).removesuffix("/value")
        adapter = adapters.get(name.removesuffix("/kernel")) if name.endswith("/kernel") else None
        if adapter is None:
            return leaf
        change = jnp.matmul(adapter.down, adapter.up, precision=jax.lax.Precision.HIGHEST)
        return (leaf.astype(jnp.float32) + adapter.scale * change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, base)


def stack(first: Adapters, second: Adapters) -> Adapters:
    """Adapters whose change is the sum of two: theirs side by side, of scale 1."""

    def stacked(*adapters: Adapter | None) -> Adapter:
        there = [adapter for adapter in adapters if adapter is not None]
        down = jnp.concatenate([adapter.down for adapter in there], axis=-1)
        return Adapter(down, jnp.concatenate([adapter.scale * adapter.up for adapter in there], axis=-2), 1.0)

    return {name: stacked(first.get(name), second.get(name)) for name in {**first, **second}}
