"""Laws of distillation: the two-phase gradient, what it reaches, and the losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, flow_to_clean
from adastate_jax.models.attention import KeyValues, attention, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.models.rope import rotate
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors import AdaptiveAnchor, EMAAnchor, NoAnchor, RollingAnchor, StaticAnchor
from adastate_jax.streaming.rollout import (
    StreamConfig,
    denoise,
    draw_noise,
    generate_chunk,
    initial_carry,
    layout_of,
    live_noise,
    phase_of,
    read_context,
    rollout_step,
    split_live,
)
from adastate_jax.training.dmd import (
    DistillConfig,
    dmd_gradient,
    dmd_loss,
    gradient_pass,
    horizon_weights,
    num_chunks,
    rollout_latents,
    score_sigma,
    self_rollout,
    student_step,
)
from adastate_jax.training.initialize import (
    InitializeConfig,
    block_causal_pass,
    initialize_step,
    recurrent_pass,
    teacher_forced_pass,
)
from adastate_jax.training.state import OptimizerConfig, create_state

STREAMS = {
    "adaptive": StreamConfig(denoising_steps=(1000.0, 600.0, 300.0)),
    "adaptive_wide": StreamConfig(2, 3, AdaptiveAnchor(2), denoising_steps=(1000.0, 600.0, 300.0)),
    "static": StreamConfig(2, 2, StaticAnchor(1), denoising_steps=(1000.0, 600.0, 300.0)),
    "none": StreamConfig(1, 2, NoAnchor(), denoising_steps=(1000.0, 600.0, 300.0)),
}
CHUNKS = 5
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))


@functools.partial(jax.jit, static_argnames="stream")
def record_of(student, text, exit_step, stream):
    return self_rollout(student, student.text_keys_values(text), KEYS, exit_step, stream, LATENT_SHAPE, CHUNKS)


def naive_latents(student, text, exit_step, stream, cache_gradient="stop"):
    """The rollout as the paper tells it: one loop, the exit pass with gradient, the cache carried along."""
    frozen = jax.lax.stop_gradient(student)
    text_kv = student.text_keys_values(text)
    frozen_text = jax.lax.stop_gradient(text_kv)
    carry = initial_carry(SMALL, stream, KEYS, *LATENT_SHAPE[:2])
    contents = []
    for index in range(CHUNKS):
        phase = phase_of(index, stream)
        layout = layout_of(phase, stream)
        noise = live_noise(draw_noise(carry, stream, LATENT_SHAPE), layout)
        context = read_context(SMALL, carry.cache, stream, layout, noise[0])
        live = noise[0]
        for step in range(exit_step):
            fixed = jax.lax.stop_gradient(context)
            clean, _ = denoise(frozen, live, stream.sigmas[step], frozen_text, layout, fixed)
            live = add_noise(clean, noise[step + 1], stream.sigmas[step + 1])
        live = jax.lax.stop_gradient(live)
        clean, exit_fresh = denoise(student, live, stream.sigmas[exit_step], text_kv, layout, context)
        contents.append(split_live(clean, layout).content)
        fixed = jax.lax.stop_gradient(context)
        _, fresh = denoise(frozen, jax.lax.stop_gradient(clean), 0.0, frozen_text, layout, fixed)
        if cache_gradient == "straight_through":
            fresh = jax.tree.map(lambda v, path: v + path - jax.lax.stop_gradient(path), fresh, exit_fresh)
        cache = cache_lib.advance(carry.cache, stream.anchor, layout, fresh, phase.first_frame)
        carry = dataclasses.replace(carry, cache=cache, chunk=carry.chunk + 1)
    return jnp.concatenate(contents, axis=1)


def weighted(latents):
    """A loss that treats every latent differently."""
    weights = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    return (weights * latents).mean() + jnp.square(latents).mean()


def differ(a, b) -> float:
    """Largest difference of two gradients, of each leaf relative to its largest entry."""
    # A bias that moves all keys by the same hardly changes a softmax: where b is but rounding noise, so may a be.
    noise = 1e-3 * max(float(jnp.abs(y).max()) for y in jax.tree.leaves(b))

    def leaf(x, y) -> float:
        return float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), noise))

    return max(jax.tree.leaves(jax.tree.map(leaf, a, b)))


@pytest.mark.parametrize("cache_gradient", ["stop", "straight_through"])
@pytest.mark.parametrize(("name", "exit_step"), [("adaptive", 1), ("adaptive_wide", 2), ("static", 0), ("none", 2)])
def test_two_phases_give_the_naive_gradient(name, exit_step, cache_gradient, student, text):
    stream = STREAMS[name]

    @jax.jit
    def two_phase(student):
        record = record_of(student, text, jnp.int32(exit_step), stream)

        def loss(params):
            return weighted(gradient_pass(params, params.text_keys_values(text), record, stream, cache_gradient))

        return jax.value_and_grad(loss)(student)

    naive = jax.jit(jax.value_and_grad(lambda m: weighted(naive_latents(m, text, exit_step, stream, cache_gradient))))
    (loss, gradient), (naive_loss, naive_gradient) = two_phase(student), naive(student)
    np.testing.assert_allclose(loss, naive_loss, rtol=1e-5)
    assert differ(gradient, naive_gradient) < 1e-4


def test_the_gradient_pass_repeats_the_rollout(student, text):
    stream = STREAMS["adaptive"]
    record = record_of(student, text, jnp.int32(2), stream)
    again = jax.jit(gradient_pass, static_argnames=("stream", "cache_gradient"))
    for mode in ("stop", "straight_through"):
        latents = again(student, student.text_keys_values(text), record, stream, mode)
        np.testing.assert_allclose(latents, rollout_latents(record, stream), atol=1e-5)


def _gradient_of_last_chunk(student, text, cache_gradient):
    """Gradient of a loss on the last chunk alone, and the record it was taken at."""
    stream = STREAMS["adaptive"]
    record = record_of(student, text, jnp.int32(1), stream)

    def loss(params, record):
        latents = gradient_pass(params, student.text_keys_values(text), record, stream, cache_gradient)
        return jnp.square(latents[:, -stream.chunk_frames :]).mean()

    return jax.jit(jax.grad(loss))(student, record), record, stream


def test_stopped_gradient_reaches_no_earlier_chunk(student, text):
    """With `stop`, the loss of one chunk has exactly the gradient of that chunk's pass against a constant cache."""
    gradient, record, stream = _gradient_of_last_chunk(student, text, "stop")
    text_kv = student.text_keys_values(text)
    phase = phase_of(CHUNKS, stream)
    layout = layout_of(phase, stream)
    carry = initial_carry(SMALL, stream, KEYS, *LATENT_SHAPE[:2])
    cache = carry.cache
    chunks = [*record.fill, *(jax.tree.map(lambda x, i=i: x[i], record.steady) for i in range(CHUNKS - 2))]
    for index, chunk in enumerate(chunks[:-1]):
        before = phase_of(index, stream)
        cache = cache_lib.advance(cache, stream.anchor, layout_of(before, stream), chunk.fresh, before.first_frame)

    def alone(params):
        context = read_context(SMALL, cache, stream, layout, chunks[-1].noisy)
        clean, _ = denoise(params, chunks[-1].noisy, stream.sigmas[1], text_kv, layout, context)
        return jnp.square(split_live(clean, layout).content).mean()

    assert differ(gradient, jax.jit(jax.grad(alone))(student)) < 1e-5
    leaking, _, _ = _gradient_of_last_chunk(student, text, "straight_through")
    assert differ(leaking, gradient) > 1e-2


@dataclasses.dataclass(frozen=True)
class StateHidden:
    """A student whose content frames do not see the live state's keys."""

    model: DiT
    state_tokens: int

    @property
    def config(self):
        return self.model.config

    def __call__(self, latents, timesteps, text, positions, attend=None, context=None):
        def attend_past_the_state(query, key, value, rotation, context):
            query, live = rotate(query, rotation), KeyValues(rotate(key, rotation), value)
            past = () if context is None else (context,)
            seen = concatenate(*past, live)
            state = attention(query[:, : self.state_tokens], seen.key, seen.value, "xla")
            seen = concatenate(*past, live.tokens(self.state_tokens, live.num_tokens - self.state_tokens))
            content = attention(query[:, self.state_tokens :], seen.key, seen.value, "xla")
            return jnp.concatenate([state, content], axis=1), KeyValues(key, value)

        return self.model(latents, timesteps, text, positions, attend_past_the_state, context)


def test_gradient_reaches_the_state_through_attention_alone(student, text):
    """A steady chunk's loss moves its live state; hide the state's keys from the content, and it does not."""
    stream = STREAMS["adaptive"]
    record = record_of(student, text, jnp.int32(1), stream)
    last = jax.tree.map(lambda x: x[-1:], (record.steady, record.anchors))
    record = dataclasses.replace(record, steady=last[0], anchors=last[1])
    text_kv = student.text_keys_values(text)
    state_frames = stream.anchor.state_frames

    @functools.partial(jax.jit, static_argnames="hidden")
    def gradient_to_state(noisy, hidden):
        model = StateHidden(student, state_frames * SMALL.frame_tokens(*LATENT_SHAPE[:2])) if hidden else student

        def loss(noisy):
            steady = dataclasses.replace(record.steady, noisy=noisy)
            latents = gradient_pass(model, text_kv, dataclasses.replace(record, steady=steady), stream)
            return jnp.square(latents[:, -stream.chunk_frames :]).mean()

        return jax.grad(loss)(noisy)[:, :, :state_frames]

    assert float(jnp.abs(gradient_to_state(record.steady.noisy, False)).max()) > 1e-6
    assert float(jnp.abs(gradient_to_state(record.steady.noisy, True)).max()) == 0.0


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


def test_exit_step_is_the_same_program(student, text):
    stream = STREAMS["static"]
    record_of(student, text, jnp.int32(0), stream)
    before = record_of._cache_size()
    records = [record_of(student, text, jnp.int32(step), stream) for step in range(3)]
    assert record_of._cache_size() == before
    noise = draw_noise(initial_carry(SMALL, stream, KEYS, *LATENT_SHAPE[:2]), stream, LATENT_SHAPE).content[0]
    np.testing.assert_allclose(records[0].fill[0].noisy, noise, atol=1e-6)
    assert not np.allclose(records[0].fill[0].clean, records[2].fill[0].clean, atol=1e-3)


def test_horizon_weights():
    np.testing.assert_allclose(horizon_weights(5, 2.0), [1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(horizon_weights(5, 2.0, normalize=True).mean(), 1.0)
    np.testing.assert_allclose(horizon_weights(4, 0.0), 1.0)
    np.testing.assert_allclose(horizon_weights(1, 2.0), 1.0)


def test_dmd_gradient_and_loss():
    rng = np.random.default_rng(0)
    latents, fake, real = (rng.standard_normal((2, 4, 2, 2, 3)).astype(np.float32) for _ in range(3))
    gradient = dmd_gradient(latents, fake, real)
    expected = (fake - real) / np.abs(latents - real).mean(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    weights = horizon_weights(4, 2.0)
    loss_gradient = jax.grad(dmd_loss)(jnp.asarray(latents), gradient, weights)
    np.testing.assert_allclose(loss_gradient, weights[:, None, None, None] * expected / latents.size, rtol=1e-4)
    assert np.all(dmd_gradient(latents, np.full_like(fake, np.nan), real) == 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opinion:
    """A score that takes any noisy clip for one clean clip [N, H, W, C], brightened by the mean of the text."""

    clean: jax.Array

    def text_keys_values(self, embeddings):
        return embeddings.mean(axis=(1, 2))

    def __call__(self, noisy, timesteps, text, positions):
        clean = self.clean + text[:, None, None, None, None]
        return (noisy - clean) / (timesteps[..., None, None, None] / MAX_TIMESTEP), None


def test_student_step_follows_the_weighted_difference_of_the_scores(student, text):
    """Loss, gradient and EMA of a student update, told apart from the scores' opinions and the rollout alone."""
    stream, frames, decay = STREAMS["adaptive"], 3, 0.75  # one chunk
    optimizer = OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.999), max_gradient_norm=1e9)
    config = DistillConfig(rollout_frames=frames, student=optimizer, ema_decay=decay, ema_start=3, horizon_alpha=1.5)
    critic, teacher = (Opinion(jax.random.normal(jax.random.key(i), (frames, *LATENT_SHAPE))) for i in (1, 2))
    null_text, key = jnp.full((1, *text.shape[1:]), 0.3), jax.random.key(4)
    state = create_state(student, optimizer, True)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 1.0, student))

    @jax.jit
    def step(state, iteration):
        return student_step(state, critic, teacher, text, null_text, iteration, key, config, stream, LATENT_SHAPE)

    (before, scalars), (after, _) = step(state, jnp.int32(2)), step(state, jnp.int32(3))

    @jax.jit
    def expected(student):
        exit_key, noise_key = jax.random.split(jax.random.split(key, 3)[0])
        exit_step = jax.random.randint(exit_key, (), 0, len(stream.sigmas))
        keys = jax.random.split(noise_key, text.shape[0])
        text_kv = student.text_keys_values(text)
        record = self_rollout(student, text_kv, keys, exit_step, stream, LATENT_SHAPE, frames // stream.chunk_frames)
        latents = rollout_latents(record, stream)
        said, unsaid = (x.mean(axis=(1, 2))[:, None, None, None, None] for x in (text, null_text))
        fake, real = critic.clean + said, teacher.clean + said + config.guidance_scale * (said - unsaid)
        gradient = (fake - real) / jnp.abs(latents - real).mean(axis=(1, 2, 3, 4), keepdims=True)
        weights = (1.0 + 1.5 * jnp.arange(frames) / (frames - 1))[:, None, None, None]

        def again(params):
            return gradient_pass(params, params.text_keys_values(text), record, stream)

        (to_student,) = jax.vjp(again, student)[1](weights * gradient / latents.size)
        return (weights * gradient**2 / 2).mean(), jnp.abs(gradient).mean(), to_student

    loss, size, gradient = expected(student)
    np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-3)
    np.testing.assert_allclose(scalars["dmd_gradient_norm"], size, rtol=1e-3)
    # After one update the optimizer's momentum is (1 − β1) of the gradient.
    momentum = next(part.mu for part in before.optimizer if hasattr(part, "mu"))
    assert differ(jax.tree.map(lambda x: 2 * x, momentum), gradient) < 1e-3
    for old, new, copied, averaged in zip(
        *map(jax.tree.leaves, (state.ema, before.params, before.ema, after.ema)), strict=True
    ):
        np.testing.assert_array_equal(copied, new)  # no average before ema_start
        np.testing.assert_allclose(averaged, decay * old + (1 - decay) * new, atol=1e-6)


def test_score_levels_are_clipped():
    config = DistillConfig()
    sigma = score_sigma(jnp.array([0.0, 0.5, 1.0]), config)
    np.testing.assert_allclose(sigma, [0.02, 2.5 / 3.0, 0.98], rtol=1e-6)


def test_concatenated_contexts_keep_their_order(student, text):
    kv = student.text_keys_values(text)
    joined = concatenate(kv.tokens(0, 2), kv.tokens(2, 3))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(kv), strict=True))


def test_impossible_distillations_are_refused():
    with pytest.raises(ValueError, match="cache_gradient"):
        DistillConfig(cache_gradient="leak")
    with pytest.raises(ValueError, match="critic_ratio"):
        DistillConfig(critic_ratio=0)
    with pytest.raises(ValueError, match="20 rollout frames are no whole number of chunks of 3"):
        num_chunks(20, StreamConfig())


def test_the_student_is_updated_once_per_ratio():
    config = DistillConfig(critic_ratio=5)
    assert [i for i in range(12) if config.updates_student(i)] == [0, 5, 10]
