"""What must hold on a GPU or TPU, in the kernels and at the sizes that run there.

TEST_PLATFORM=cuda python -m pytest tests/test_accelerator.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PLATFORM, make_dit

from adastate_jax.models.attention import attention, resolve_backend
from adastate_jax.models.dit import DiTConfig
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.rollout import rollout, stream
from adastate_jax.streaming.schedule import StreamConfig

pytestmark = pytest.mark.skipif(not PLATFORM, reason="runs where TEST_PLATFORM names an accelerator")

# Wan2.1 1.3B's heads, two layers of them, at an eighth of its pixels.
WIDE = DiTConfig(num_layers=2, ffn_dim=2048, text_dim=64, text_length=64, dtype="bfloat16", remat="none")
LATENTS = (16, 26, 16)


def draw(queries: int, keys: int, dtype=jnp.bfloat16) -> list[jax.Array]:
    shapes = [(1, tokens, 4, 128) for tokens in (queries, keys, keys)]
    seeds = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(seed, shape, jnp.float32).astype(dtype) for seed, shape in zip(seeds, shapes, strict=True)
    ]


def exact(*inputs: jax.Array) -> jax.Array:
    return attention(*(x.astype(jnp.float32) for x in inputs), "xla")


def difference(ours, theirs) -> float:
    """The largest, as a share of the largest value; NaN where something is not finite."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert np.abs(theirs).max() > 0.01  # or agreement would mean little
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def test_the_platforms_own_backend_is_chosen():
    own = {"gpu": "cudnn", "tpu": "splash", "cpu": "xla"}
    device = jax.devices()[0]
    assert resolve_backend("auto", device, "bfloat16", 128) == own[device.platform]


@pytest.mark.parametrize(("queries", "keys"), [(4680, 10920), (416, 1560), (100, 130), (1, 512)])
def test_its_attention_is_attention(queries, keys):
    inputs = draw(queries, keys)
    assert difference(jax.jit(attention, static_argnums=3)(*inputs, "auto"), jax.jit(exact)(*inputs)) <= 0.02


def test_its_gradient_is_that_of_attention():
    inputs = draw(416, 1560)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.sin(function(*x).astype(jnp.float32)).sum(), argnums=(0, 1, 2)))(*inputs)

    own = gradients(lambda *x: attention(*x, "auto"))
    for ours, theirs in zip(own, gradients(exact), strict=True):
        assert difference(ours, theirs) <= 0.03


def test_float32_is_float32():
    """Not TF32, nor bfloat16, in which products would be off by a part in a thousand."""
    config = dataclasses.replace(WIDE, dtype="float32")
    model = make_dit(config, 0)
    latents = np.random.default_rng(0).standard_normal((1, 3, *LATENTS), np.float32)
    text = np.random.default_rng(1).standard_normal((1, config.text_length, config.text_dim), np.float32)

    def flow(model, latents, text):
        return model(latents, jnp.full((1, 3), 500.0), model.text_keys_values(text), np.arange(3))[0]

    here = jax.jit(flow)(model, latents, text)
    host = jax.devices("cpu")[0]
    there = jax.jit(flow)(jax.device_put(model, host), jax.device_put(latents, host), jax.device_put(text, host))
    assert difference(here, there) <= 2e-5


@pytest.fixture(scope="module")
def streaming():
    """A network, its text's keys and values, and a stream's settings."""
    model = make_dit(WIDE, 0)
    text = jax.random.normal(jax.random.key(1), (1, WIDE.text_length, WIDE.text_dim))
    return model, jax.jit(type(model).text_keys_values)(model, text), StreamConfig()


def test_scan_and_generator_give_the_same_video(streaming):
    model, text, config = streaming

    def start():
        return initial_carry(WIDE, config, seed_keys(0, 1), *LATENTS[:2])

    whole = jax.jit(rollout, static_argnums=(3, 4, 5))(model, start(), text, config, LATENTS, 5)[1]
    parts = [chunk.content for _, chunk in stream(model, start(), text, config, LATENTS, 5)]
    assert difference(np.concatenate(parts, axis=1), whole) <= 0.05  # two programs round their bfloat16 at other places


def test_a_long_stream_takes_no_more_memory(streaming):
    model, text, config = streaming
    carry = initial_carry(WIDE, config, seed_keys(0, 1), *LATENTS[:2])
    device, used = jax.devices()[0], []
    if device.memory_stats() is None:
        pytest.skip("the device does not tell")
    for number, (_, chunk) in enumerate(stream(model, carry, text, config, LATENTS, 60)):
        jax.block_until_ready(chunk.content)
        if number >= 10:
            used.append(device.memory_stats()["bytes_in_use"])
    assert max(used) == min(used)
