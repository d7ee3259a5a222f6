"""Every stage's step on five meshes of 8 virtual devices against one device: the largest difference, and what travels.

    python -m benchmarks.meshes                       20 programs, some minutes on two cores
    python -m benchmarks.meshes --step=student        pretrain, initialize, critic or student

Prints per step and mesh: the largest difference of a new weight, moment or average, and of a loss; bytes that the
program holds per device beside its arguments; the collectives of its text by kind. One in a loop counts once.
"""

import argparse
import collections
import functools
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.config.stages import DistillConfig, InitializeConfig, OptimizerConfig, PretrainConfig
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.sharding import init_sharded, make_mesh, shard_batch, tree_shardings
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.dmd import critic_step, draw_update, student_step
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.state import create_state

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 4": {"data": 2, "fsdp": 4},
    "fsdp 2 x context 2 x model 2": {"fsdp": 2, "context": 2, "model": 2},
    "context 8": {"context": 8},
    "data 2 x context 4": {"data": 2, "context": 4},
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BATCH, FRAMES, SHAPE = 8, 9, (4, 8, 4)
NETWORK = DiTConfig(
    dim=32, ffn_dim=48, num_heads=4, num_layers=2, in_channels=4, out_channels=4, text_dim=12, text_length=5,
    freq_dim=16, remat="none",
)  # fmt: skip
STREAM = StreamConfig(denoising_steps=(1000.0, 500.0))
# Both of Adam's moments show gradients as they are: the first updates are but their signs.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999))
DISTILL = DistillConfig(batch_size=BATCH, rollout_frames=FRAMES, student=OPTIMIZER, critic=OPTIMIZER, ema_start=0)


def make_network(seed: int) -> DiT:
    """All of its weights are random, also those that start at zero."""
    rng = np.random.default_rng(seed)
    model = init_sharded(lambda: DiT(NETWORK, rngs=nnx.Rngs(seed)), make_mesh(devices=jax.devices()[:1]))
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32), model)


def steps(null_text: np.ndarray) -> dict:
    """(states, batch) → (states, scalars) of each stage."""
    key = jax.random.key(1)

    def draws():
        return draw_update(key, BATCH, DISTILL, STREAM, SHAPE)

    return {
        "pretrain": lambda states, batch: pretrain_step(
            states["trained"], batch["latents"], batch["text"], null_text, key, PretrainConfig(optimizer=OPTIMIZER)
        ),
        "initialize": lambda states, batch: initialize_step(
            states["trained"], batch["trajectory"], batch["text"], key, InitializeConfig(optimizer=OPTIMIZER), STREAM
        ),
        "critic": lambda states, batch: critic_step(
            states["trained"], states["other"], batch["text"], draws(), DISTILL, STREAM
        ),
        "student": lambda states, batch: student_step(
            *(states[name] for name in ("trained", "other", "teacher")),
            batch["text"], null_text, jnp.int32(3), draws(), DISTILL, STREAM,
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=("pretrain", "initialize", "critic", "student"))
    chosen = parser.parse_args().step
    jax.config.update("jax_num_cpu_devices", 8)
    normal = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    batch = {
        "latents": normal((BATCH, FRAMES, *SHAPE)),
        "trajectory": normal((BATCH, len(STREAM.sigmas) + 1, FRAMES, *SHAPE)),
        "text": normal((BATCH, NETWORK.text_length, NETWORK.text_dim)),
    }
    states = {
        "trained": create_state(make_network(0), OPTIMIZER, True),
        "other": make_network(10),
        "teacher": make_network(20),
    }
    meshes = {"one device": {}, **MESHES}
    for name, step in steps(np.ones((1, NETWORK.text_length, NETWORK.text_dim), np.float32)).items():
        if chosen not in (None, name):
            continue
        expected = None
        for title, axes in meshes.items():
            mesh = make_mesh(**axes)
            with jax.set_mesh(mesh):
                arguments = jax.device_put(states, tree_shardings(states, mesh)), shard_batch(batch, mesh)
                compiled = jax.jit(step).lower(*arguments).compile()
                found = jax.tree.map(np.asarray, compiled(*arguments))
            expected = found if expected is None else expected
            error = max(
                float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (expected, found)), strict=True)
            )
            counts = collections.Counter(re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", compiled.as_text()))
            travels = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind]) or "nothing travels"
            held = compiled.memory_analysis().temp_size_in_bytes
            print(f"{name:10}  {title:28}  {error:.1e}  {held:>9,} bytes  {travels}", flush=True)


if __name__ == "__main__":
    main()
