"""Every stage's step on five meshes of 8 virtual devices is that of one device; and what travels for it.

    python -m benchmarks.meshes                       20 programs and one device's 4
    python -m benchmarks.meshes --step=student        pretrain, initialize, critic or student

Each is the program that the train command compiles: the state stays split as it was, and is updated in its place.
Prints per step and mesh how far it is from one device: scalars, relative; gradients, relative to the largest entry of
their array; new weights and averages. Then the bytes that a device holds beside its arguments, and how often devices
exchange something, loops multiplied out. A law that is broken is named; the command ends with 1.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import math
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

if __name__ == "__main__":  # before JAX is imported; the tests that use this have settings of their own
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # the flags are those of one XLA
        # Each program runs once: compiling fast matters, running fast does not.
        fast = ("backend_optimization_level=0", "cpu_parallel_codegen_split_count=1", "cpu_use_fusion_emitters=false")
        os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in fast))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from adastate_jax.benchmarking.program import Collective, Program, read_program
from adastate_jax.config.stages import DistillConfig, InitializeConfig, OptimizerConfig, PretrainConfig
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.sharding import init_sharded, make_mesh, path_name, shard_batch, tree_shardings
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.dmd import critic_step, draw_update, student_step
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.stages.run import compile_step
from adastate_jax.training.state import TrainState, create_state

STEPS = ("pretrain", "initialize", "critic", "student")
MESHES = {
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "fsdp 2 x context 2 x model 2": {"fsdp": 2, "context": 2, "model": 2},
    "context 8": {"context": 8},
    "data 2 x context 4": {"data": 2, "context": 4},
}
BATCH, FRAMES, SHAPE = 8, 9, (4, 8, 4)  # three chunks of a stream, eight tokens a frame
NETWORK = DiTConfig(
    dim=32, ffn_dim=48, num_heads=4, num_layers=2, in_channels=4, out_channels=4, text_dim=12, text_length=5,
    freq_dim=16, remat="none",
)  # fmt: skip
STREAM = StreamConfig(denoising_steps=(1000.0, 500.0))
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, betas=(0.9, 0.999))
DISTILL = DistillConfig(batch_size=BATCH, rollout_frames=FRAMES, student=OPTIMIZER, critic=OPTIMIZER, ema_start=0)
# Of the same sums in another order, in float32.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Step:
    """A step as it was compiled and ran on a mesh.

    Attributes:
        state, scalars: what it gave, on the host.
        gradients: that the optimizer took.
        misplaced: what lies elsewhere than the rules say, or whole on a device though a rule splits it.
        program: its text, read.
        collectives: what its devices exchange.
        held: bytes per device beside the arguments.
    """

    state: TrainState
    scalars: Mapping[str, np.ndarray]
    gradients: DiT
    misplaced: list[str]
    program: Program
    collectives: list[Collective]
    held: int


def make_network(seed: int) -> DiT:
    """All of its weights are random, also those that start at zero."""
    rng = np.random.default_rng(seed)
    model = init_sharded(lambda: DiT(NETWORK, rngs=nnx.Rngs(seed)), make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), model)


@functools.cache
def inputs() -> tuple[TrainState, DiT, DiT, dict[str, np.ndarray]]:
    """The state of the network that is trained, two others, and a batch; all on the host.

    The state is in the midst of a run. A first update is the sign of its gradient, even where that is rounding alone;
    later ones are not, because the second moment remembers larger ones.
    """
    state = create_state(make_network(0), OPTIMIZER, True)
    optimizer = tuple(
        part._replace(count=jnp.int32(1000), nu=jax.tree.map(lambda x: jnp.full_like(x, 1e-4), part.nu))
        if isinstance(part, optax.ScaleByAdamState)
        else part
        for part in state.optimizer
    )
    state = dataclasses.replace(state, step=jnp.int32(1000), optimizer=optimizer)
    normal = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    batch = {
        "latents": normal((BATCH, FRAMES, *SHAPE)),
        "trajectory": normal((BATCH, len(STREAM.sigmas) + 1, FRAMES, *SHAPE)),
        "text": normal((BATCH, NETWORK.text_length, NETWORK.text_dim)),
    }
    return jax.tree.map(np.asarray, state), make_network(10), make_network(20), batch


def _function(name: str):
    """(state, another network, teacher, batch) → (state, scalars)."""
    key = jax.random.key(1)
    null_text = jnp.ones((1, NETWORK.text_length, NETWORK.text_dim))

    def draws():
        return draw_update(key, BATCH, DISTILL, STREAM, SHAPE)

    return {
        "pretrain": lambda state, other, teacher, batch: pretrain_step(
            state, batch["latents"], batch["text"], null_text, key, PretrainConfig(optimizer=OPTIMIZER)
        ),
        "initialize": lambda state, other, teacher, batch: initialize_step(
            state, batch["trajectory"], batch["text"], key, InitializeConfig(optimizer=OPTIMIZER), STREAM
        ),
        "critic": lambda state, other, teacher, batch: critic_step(
            state, other, batch["text"], draws(), DISTILL, STREAM
        ),
        "student": lambda state, other, teacher, batch: student_step(
            state, other, teacher, batch["text"], null_text, jnp.int32(3), draws(), DISTILL, STREAM
        ),
    }[name]  # fmt: skip


def run_step(name: str, mesh: jax.sharding.Mesh) -> Step:
    """Compiles a step of `STEPS` for a mesh, and runs it once."""
    *trees, batch = inputs()
    with jax.set_mesh(mesh):
        step = compile_step(types.SimpleNamespace(mesh=mesh), _function(name), trees[0])
        arguments = *(jax.device_put(tree, tree_shardings(tree, mesh)) for tree in trees), shard_batch(batch, mesh)
        compiled = step.lower(*arguments).compile()
        state, scalars = compiled(*arguments)
    program = read_program(compiled.as_text())
    moments = next(part.mu for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))
    return Step(
        state=jax.tree.map(np.asarray, state),
        scalars=jax.tree.map(np.asarray, scalars),
        # The first moment was zero.
        gradients=jax.tree.map(lambda x: np.asarray(x) / (1 - OPTIMIZER.betas[0]), moments),
        misplaced=list(_misplaced(trees, compiled, program, mesh)),
        program=program,
        collectives=program.collectives(mesh),
        held=compiled.memory_analysis().temp_size_in_bytes,
    )


def _misplaced(trees: list, compiled: jax.stages.Compiled, program: Program, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """Arguments and results that lie elsewhere than the rules say, and what a device has whole that should be split."""
    given, (result, _) = compiled.input_shardings[0][: len(trees)], compiled.output_shardings
    arrays = set(re.findall(r"\[([\d,]+)\]", " ".join(i.shape for i, _ in program.instructions())))
    for tree, shardings in (*zip(trees, given, strict=True), (trees[0], result)):
        rules = jax.tree.leaves(tree_shardings(tree, mesh))
        found = jax.tree.leaves(shardings, is_leaf=lambda sharding: sharding is None)  # of what the step has no use for
        for (path, x), sharding, rule in zip(jax.tree_util.tree_leaves_with_path(tree), found, rules, strict=True):
            if sharding is not None and not sharding.is_equivalent_to(rule, x.ndim):
                yield f"{path_name(path)}: lies as {sharding.spec}, not as {rule.spec}"
            stacked = x.ndim > 2 and x.shape[0] == NETWORK.num_layers
            if stacked and rule.shard_shape(x.shape) != x.shape and ",".join(map(str, x.shape)) in arrays:
                yield f"{path_name(path)}: all of {x.shape} is on a device"
    whole = f"{FRAMES},{SHAPE[0] * SHAPE[1] // 4},{NETWORK.dim}"  # a clip's tokens between attentions
    if mesh.shape["context"] > 1 and any(array.endswith(whole) for array in arrays):
        yield f"all tokens of a clip are on a device: {whole}"
    rules = jax.tree.leaves(tree_shardings(trees[0], mesh))
    held = sum(
        math.prod(rule.shard_shape(x.shape)) * x.dtype.itemsize
        for x, rule in zip(jax.tree.leaves(trees[0]), rules, strict=True)
    )
    if (aliased := compiled.memory_analysis().alias_size_in_bytes) != held:
        yield f"the state is not updated in its place: of its {held} bytes, {aliased} are"


def differences(one: Step, other: Step) -> dict[str, float]:
    """How far a step is from another's, the largest of each kind: see the head of this file."""

    def largest(relative: bool, tree: Any, found: Any) -> float:
        pairs = zip(*(map(np.asarray, jax.tree.leaves(leaves)) for leaves in (tree, found)), strict=True)
        return max(float(np.abs(x - y).max() / (np.abs(x).max() if relative else 1.0)) for x, y in pairs)

    return {
        "scalars": largest(True, one.scalars, other.scalars),
        "gradients": largest(True, one.gradients, other.gradients),
        "weights": largest(False, (one.state.params, one.state.ema), (other.state.params, other.state.ema)),
    }


def broken_laws(one: Step, found: Step) -> list[str]:
    """What of a step on a mesh is not as on one device, or does not lie where it should."""
    apart = differences(one, found).items()
    return [f"{what} differ by {size:.1e}" for what, size in apart if not size <= TOLERANCE] + found.misplaced


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=STEPS)
    chosen = parser.parse_args().step
    jax.config.update("jax_num_cpu_devices", 8)
    broken = 0
    print(f"{'':40}scalars  gradients  weights      bytes  exchanges")
    for name in STEPS if chosen is None else (chosen,):
        one = run_step(name, make_mesh(devices=jax.devices()[:1]))
        print(f"{name:11}{'one device':58}{one.held:>10,}")
        for title, axes in MESHES.items():
            found = run_step(name, make_mesh(**axes))
            print(_line(name, title, one, found), flush=True)
            for law in broken_laws(one, found):
                broken += 1
                print(f"{'':11}broken: {law}")
    return 1 if broken else 0


def _line(name: str, title: str, one: Step, found: Step) -> str:
    runs: collections.Counter[str] = collections.Counter()
    for row in found.collectives:
        runs[row.kind] += row.runs
    apart = "  ".join(f"{size:7.1e}" for size in differences(one, found).values())
    return f"{name:11}{title:28} {apart}  {found.held:>12,}  " + ", ".join(f"{k} {n:g}" for k, n in runs.items())


if __name__ == "__main__":
    sys.exit(main())
