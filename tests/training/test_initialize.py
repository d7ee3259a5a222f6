"""Laws of initialisation: what each context shows the student is what its stream will show it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL
from small_rollouts import CHUNKS, KEYS, STREAMS, record_of

from adastate_jax.config.stages import InitializeConfig
from adastate_jax.diffusion import flow_to_clean
from adastate_jax.streaming.anchors.averages import EMAAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.static import RollingAnchor, StaticAnchor
from adastate_jax.streaming.carry import draw_noise, initial_carry
from adastate_jax.streaming.denoising import generate_chunk
from adastate_jax.streaming.rollout import rollout_step
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of
from adastate_jax.training.initialize import block_causal_pass, initialize_step, recurrent_pass, teacher_forced_pass
from adastate_jax.training.self_rollout import rollout_latents
from adastate_jax.training.state import create_state


def inputs_and_outputs(record, stream):
    """What went into the last denoising pass of every chunk, and what came out."""
    noisy = [chunk.noisy for chunk in record.fill]
    if record.steady is not None:
        noisy += list(record.steady.noisy)
    return jnp.concatenate(noisy, axis=1), rollout_latents(record, stream)


@pytest.mark.parametrize("past_frames", [None, 3])
def test_streaming_is_the_block_causal_pass(past_frames, student, text):
    """Chunk by chunk against the cache, or all chunks at once beside their clean copy: the same estimates."""
    stream = StreamConfig(3, past_frames or 3 * CHUNKS, NoAnchor(), denoising_steps=(1000.0, 600.0, 300.0))
    noisy, clean = inputs_and_outputs(record_of(student, text, jnp.int32(1), stream), stream)
    sigma = jnp.full(noisy.shape[:2], stream.sigmas[1])
    flow = jax.jit(block_causal_pass, static_argnums=(4, 5))(student, noisy, sigma, text, 3, past_frames, clean)
    np.testing.assert_allclose(flow_to_clean(flow, noisy, sigma), clean, atol=2e-5)


@pytest.mark.parametrize("name", ["none", "static", "ema"])
def test_teacher_forcing_sees_what_the_stream_sees(name, student, text):
    """On the stream's own chunks, against the cache that they leave, the stream's own estimates come out."""
    ema = StreamConfig(1, 2, EMAAnchor(1), denoising_steps=(1000.0, 600.0, 300.0))
    stream = ema if name == "ema" else STREAMS[name]
    noisy, clean = inputs_and_outputs(record_of(student, text, jnp.int32(1), stream), stream)
    sigma = jnp.full(noisy.shape[:2], stream.sigmas[1])
    found = jax.jit(teacher_forced_pass, static_argnums=4)(student, noisy, sigma, text, stream, clean)
    np.testing.assert_allclose(found, clean, atol=2e-5)


def test_teacher_forcing_without_an_anchor_is_the_block_causal_pass(student, text):
    """In values and in gradients."""
    stream = StreamConfig(3, 3, NoAnchor())
    clean = jax.random.normal(jax.random.key(1), (2, 12, *LATENT_SHAPE))
    noisy, sigma = clean + 0.5, jnp.full((2, 12), 0.7).at[:, 3:6].set(0.3)

    def by_mask(student):
        flow = block_causal_pass(student, noisy, sigma, text, 3, 3, clean)
        return jnp.square(flow_to_clean(flow, noisy, sigma)).mean()

    def by_stream(student):
        return jnp.square(teacher_forced_pass(student, noisy, sigma, text, stream, clean)).mean()

    (one, slope), (other, other_slope) = (jax.jit(jax.value_and_grad(f))(student) for f in (by_mask, by_stream))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (slope, other_slope)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-3)


def test_teacher_forcing_shows_a_static_anchor_for_a_hidden_state(student, text):
    clean = jax.random.normal(jax.random.key(1), (2, 12, *LATENT_SHAPE))
    noisy, sigma = clean + 0.5, jnp.full((2, 12), 0.7)
    run = jax.jit(teacher_forced_pass, static_argnums=4)
    hidden = run(student, noisy, sigma, text, StreamConfig(), clean)
    np.testing.assert_array_equal(hidden, run(student, noisy, sigma, text, StreamConfig(anchor=StaticAnchor(1)), clean))
    without = run(student, noisy, sigma, text, StreamConfig(anchor=NoAnchor()), clean)
    assert np.abs(hidden - without)[:, 6:].min(axis=(2, 3, 4)).max() > 1e-4
    with pytest.raises(ValueError, match=r"context stream needs a cache that is filled chunk after chunk, not Rolling"):
        run(student, noisy, sigma, text, StreamConfig(anchor=RollingAnchor(3)), clean)


def levels_of_a_stream(student, text, stream):
    """What a stream denoises: content at each level [B, T, N, …], clean content, estimates; and the state's noise."""
    text_kv = student.text_keys_values(text)

    @functools.partial(jax.jit, static_argnames="phase")
    def passes(carry, phase):
        noise = draw_noise(carry, stream, LATENT_SHAPE)
        steps = range(len(stream.sigmas))
        found = [generate_chunk(student, carry.cache, text_kv, noise, stream, phase, step) for step in steps]
        return found, noise.state, rollout_step(student, carry, text_kv, noise, stream, phase)

    carry = initial_carry(SMALL, stream, KEYS, *LATENT_SHAPE[:2])
    noisy, estimates, clean, state_noise = [], [], [], []
    for index in range(CHUNKS):
        phase = phase_of(index, stream)
        found, noise, (carry, chunk) = passes(carry, phase)
        state_frames = len(layout_of(phase, stream).state)
        noisy.append(jnp.stack([one.noisy[:, state_frames:] for one in found], axis=1))
        estimates.append(jnp.stack([one.clean[:, state_frames:] for one in found], axis=1))
        clean.append(chunk.content)
        state_noise.append(noise)
    return (jnp.concatenate(x, axis=a) for x, a in ((noisy, 2), (clean, 1), (estimates, 2))), jnp.stack(state_noise)


@pytest.mark.parametrize("name", ["adaptive", "adaptive_wide"])
def test_the_recurrent_pass_is_the_stream(name, student, text):
    """Given what the stream denoised, its own estimates come out, and their gradient is through every state before."""
    stream = STREAMS[name]
    (noisy, clean, estimates), state_noise = levels_of_a_stream(student, text, stream)
    found = jax.jit(recurrent_pass, static_argnums=3)(student, noisy, text, stream, clean, state_noise)
    np.testing.assert_allclose(found, estimates, atol=2e-5)

    def last_chunk(state_noise):
        estimates = recurrent_pass(student, noisy, text, stream, clean, state_noise)
        return jnp.square(estimates[:, :, -stream.chunk_frames :]).mean()

    loss, slope = jax.jit(last_chunk), jax.jit(jax.grad(last_chunk))(state_noise)
    fill = stream.num_fill_chunks
    largest = np.abs(slope).max(axis=(2, 3, 4, 5, 6))
    assert (largest[:fill] == 0).all()  # the state is not there yet
    assert (largest[fill:] > 0).all()
    # As large as the difference that the first state's noise makes through all states after it.
    way = jnp.zeros_like(slope).at[fill].set(slope[fill])
    way = way / jnp.linalg.norm(way)
    difference = loss(state_noise + 0.5 * way) - loss(state_noise - 0.5 * way)
    np.testing.assert_allclose(jnp.vdot(slope, way), difference, rtol=0.05, equal_nan=False)


def test_initialisation_with_the_state_regresses_every_level(student, text):
    """The loss of a step: at each of the stream's levels, against the end of the trajectory."""
    stream = STREAMS["adaptive"]
    trajectory = jax.random.normal(jax.random.key(1), (2, 4, 12, *LATENT_SHAPE))
    config = InitializeConfig(context="state")
    state = create_state(student, config.optimizer, True)
    key = jax.random.key(2)
    _, scalars = jax.jit(initialize_step, static_argnums=(4, 5))(state, trajectory, text, key, config, stream)
    noise = jax.random.normal(key, (4, 3, 2, 1, *LATENT_SHAPE))
    noisy, clean = trajectory[:, :3], trajectory[:, 3]
    estimates = jax.jit(recurrent_pass, static_argnums=3)(student, noisy, text, stream, clean, noise)
    losses = [jnp.square(estimates[:, level] - clean).mean() for level in range(3)]
    np.testing.assert_allclose(scalars["loss"], np.mean(losses), rtol=1e-5)


def test_a_recurrent_pass_needs_a_state(student, text):
    clean = jax.random.normal(jax.random.key(1), (2, 12, *LATENT_SHAPE))
    with pytest.raises(ValueError, match=r"context state needs a hidden state, which StaticAnchor.* has not"):
        recurrent_pass(student, clean[:, None], text, StreamConfig(anchor=StaticAnchor(1)), clean, clean)


def test_block_causal_pass_without_a_clean_copy_is_causal(student, text):
    """Changing a chunk changes it and later chunks within reach, and nothing before it."""
    latents = jax.random.normal(jax.random.key(1), (2, 12, *LATENT_SHAPE))
    sigma = jnp.full((2, 12), 0.7)
    run = jax.jit(block_causal_pass, static_argnums=(4, 5))
    flow = run(student, latents, sigma, text, 3, 3)
    changed = run(student, latents.at[:, 3:6].add(1.0), sigma, text, 3, 3)
    moved = np.abs(flow - changed).max(axis=(0, 2, 3, 4)).reshape(4, 3).max(axis=1)
    assert moved[0] == 0.0
    assert moved[1] > 1e-3
    assert moved[2] > 1e-3
