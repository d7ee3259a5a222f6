"""Eight virtual CPU devices for the sharding laws, and small networks that the tests share.

TEST_PLATFORM=cuda (or tpu) runs on what is there instead: for test_accelerator.py, whose tests are left out without it.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

# The tests compile hundreds of small programs once each: compiling fast matters, running fast does not. What a test
# starts as a process inherits this. The flags are those of one XLA: another may not know them, or round differently in
# a loop and out of it.
PLATFORM = os.environ.get("TEST_PLATFORM")
if not PLATFORM and importlib.metadata.version("jaxlib").startswith("0.10."):
    fast = (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",
    )
    os.environ["XLA_FLAGS"] = " ".join([*fast, os.environ.get("XLA_FLAGS", "")])

import jax

if not PLATFORM:
    jax.config.update("jax_num_cpu_devices", 8)  # must precede the first array
jax.config.update("jax_platforms", PLATFORM or "cpu")

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adastate_jax.models.dit import DiT, DiTConfig

SMALL = DiTConfig(
    dim=32,
    ffn_dim=48,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=12,
    text_length=5,
    freq_dim=16,
    remat="none",
)
LATENT_SHAPE = (4, 4, 4)


def make_dit(config: DiTConfig, seed: int) -> DiT:
    """A network all of whose weights are random, also those that start at zero or one."""
    model = jax.jit(lambda: DiT(config, rngs=nnx.Rngs(seed)))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), model)


_MOST_MAPPINGS = 20_000  # of memory; a process may have 65,530, and the compiler crashes for want of more


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees compiled programs, some mappings of memory each, once there are many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def student() -> DiT:
    return make_dit(SMALL, 0)


@pytest.fixture(scope="session")
def critic() -> DiT:
    return make_dit(SMALL, 10)


@pytest.fixture(scope="session")
def teacher() -> DiT:
    return make_dit(SMALL, 20)


@pytest.fixture(scope="session")
def text() -> jax.Array:
    """Embeddings of two prompts [2, T, text_dim], zero past the prompt."""
    embeddings = jax.random.normal(jax.random.key(5), (2, SMALL.text_length, SMALL.text_dim))
    return embeddings * (jnp.arange(SMALL.text_length) < 4)[None, :, None]
