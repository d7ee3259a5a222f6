"""Laws of gradient accumulation: micro-batches give what their batch gives, each where its samples lie."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit

from adastate_jax.config.stages import DistillConfig, InitializeConfig, OptimizerConfig, PretrainConfig
from adastate_jax.sharding import make_mesh, shard_batch
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.accumulation import accumulate, micro_batches
from adastate_jax.training.dmd import critic_step, draw_update, student_step
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.state import create_state

OPTIMIZER = OptimizerConfig(betas=(0.9, 0.999), max_gradient_norm=1e9)
STREAM = StreamConfig(2, 2, denoising_steps=(1000.0, 500.0))
BATCH, FRAMES = 4, 6
KEY = jax.random.key(1)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


TEXT = normal(1, BATCH, SMALL.text_length, SMALL.text_dim)
NULL_TEXT = normal(2, 1, SMALL.text_length, SMALL.text_dim)


@functools.cache
def network(seed):
    return make_dit(dataclasses.replace(SMALL, num_layers=1), seed)


def pretrained(state, parts):
    config = PretrainConfig(batch_size=BATCH, accumulate=parts, optimizer=OPTIMIZER, weighting="bell")
    return pretrain_step(state, normal(3, BATCH, FRAMES, *LATENT_SHAPE), TEXT, NULL_TEXT, KEY, config)


def initialized(context, state, parts):
    config = InitializeConfig(batch_size=BATCH, accumulate=parts, optimizer=OPTIMIZER, context=context)
    trajectory = normal(4, BATCH, len(STREAM.sigmas) + 1, FRAMES, *LATENT_SHAPE)
    return initialize_step(state, trajectory, TEXT, KEY, config, STREAM)


def distilled(kind, state, parts):
    config = DistillConfig(
        batch_size=BATCH, accumulate=parts, rollout_frames=FRAMES, student=OPTIMIZER, critic=OPTIMIZER
    )
    draws = draw_update(KEY, BATCH, config, STREAM, LATENT_SHAPE)
    if kind == "critic":
        return critic_step(state, network(1), TEXT, draws, config, STREAM)
    return student_step(state, network(1), network(2), TEXT, NULL_TEXT, jnp.int32(0), draws, config, STREAM)


STEPS = {
    "pretrain": pretrained,
    "initialize": functools.partial(initialized, "noisy"),
    "initialize with a state": functools.partial(initialized, "state"),
    "critic": functools.partial(distilled, "critic"),
    "student": functools.partial(distilled, "student"),
}


@pytest.mark.parametrize("name", STEPS)
def test_micro_batches_are_one_batch(name):
    """Loss and gradients, of which Adam's momentum is a tenth after one update."""
    networks = [network(seed) for seed in range(3)]  # made here, outside of `jit`
    state = create_state(networks[0], OPTIMIZER, False)
    (one, scalars), (parts, of_parts) = (jax.jit(STEPS[name], static_argnums=1)(state, count) for count in (1, 2))
    for key, value in scalars.items():
        np.testing.assert_allclose(of_parts[key], value, rtol=3e-6)
    gradients, of_parts = (next(part.mu for part in x.optimizer if hasattr(part, "mu")) for x in (one, parts))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients))
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(of_parts), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6 * largest)


def test_devices_take_their_samples_from_their_own():
    mesh = make_mesh(data=2, fsdp=2)
    with jax.set_mesh(mesh):
        x = shard_batch(normal(0, 8, 3), mesh)
        compiled = jax.jit(lambda x: micro_batches(x, 2)).lower(x).compile()
        parts = compiled(x)
    assert not re.search("all-|collective-permute", compiled.as_text())
    assert parts.sharding.spec[1] == ("data", "fsdp")
    np.testing.assert_array_equal(np.sort(np.concatenate(parts), axis=0), np.sort(x, axis=0))


def test_sums_of_16_bit_gradients_are_in_float32():
    """Of 512 parts of a 512th each: in bfloat16 the sum would stall."""
    parts = jnp.full((512, 1), 1.0, jnp.bfloat16)
    assert accumulate(lambda x: x.mean(), parts, 512) == 1.0
    with pytest.raises(ValueError, match="accumulate must divide batch_size 4, got 3"):
        DistillConfig(accumulate=3)
