"""Laws of distillation: the two-phase gradient, what it reaches, and the losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL
from small_rollouts import CHUNKS, KEYS, STREAMS, differ, naive_latents, record_of, weighted

from adastate_jax.config.stages import CACHE_GRADIENTS, DistillConfig, OptimizerConfig, num_chunks
from adastate_jax.diffusion import MAX_TIMESTEP
from adastate_jax.models.attention import KeyValues, attention, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.models.rope import rotate
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.carry import draw_noise, initial_carry
from adastate_jax.streaming.denoising import denoise, read_context, split_live
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of
from adastate_jax.training.dmd import (
    dmd_gradient,
    dmd_loss,
    draw_update,
    horizon_weights,
    score_sigma,
    student_step,
)
from adastate_jax.training.self_rollout import draw_rollout_noise, gradient_pass, rollout_latents, self_rollout
from adastate_jax.training.state import create_state

DRAW = jax.jit(draw_update, static_argnums=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("name", "exit_step", "cache_gradient"),
    [
        *((name, step, "stop") for name, step in (("adaptive", 1), ("adaptive_wide", 2), ("static", 0), ("none", 2))),
        *((name, step, "window") for name, step in (("adaptive", 1), ("static", 0))),
        *((name, step, "straight_through") for name, step in (("adaptive", 1), ("adaptive_wide", 2), ("static", 0))),
        ("none", 2, "straight_through"),
    ],
)
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
    for mode in CACHE_GRADIENTS:
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
    window, _, _ = _gradient_of_last_chunk(student, text, "window")
    whole, _, _ = _gradient_of_last_chunk(student, text, "straight_through")
    assert differ(window, gradient) > 1e-2
    assert differ(whole, window) > 1e-2  # the state carries some of it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateHidden:
    """A student whose content frames do not see the live state's keys."""

    model: DiT
    state_tokens: int = dataclasses.field(metadata={"static": True})

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
    text_kv = student.text_keys_values(text)
    state_frames = stream.anchor.state_frames

    @functools.partial(jax.jit, static_argnames="hidden")
    def gradient_to_state(noisy, hidden):
        model = StateHidden(student, state_frames * SMALL.frame_tokens(*LATENT_SHAPE[:2])) if hidden else student

        def loss(noisy):
            steady = dataclasses.replace(record.steady, noisy=noisy)
            latents = gradient_pass(model, text_kv, dataclasses.replace(record, steady=steady), stream)
            return jnp.square(latents[:, -stream.chunk_frames :]).mean()

        return jax.grad(loss)(noisy)[-1, :, :state_frames]

    assert float(jnp.abs(gradient_to_state(record.steady.noisy, False)).max()) > 1e-6
    assert float(jnp.abs(gradient_to_state(record.steady.noisy, True)).max()) == 0.0


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


def test_a_gradient_that_is_not_finite():
    """NaN is no gradient; an infinity stays one, so that the loss, which the loop looks at, is infinite too."""
    zeros, ones = np.zeros((1, 1, 1, 1, 3), np.float32), np.ones((1, 1, 1, 1, 3), np.float32)
    fake = np.array([np.nan, np.inf, -np.inf], np.float32).reshape(zeros.shape)
    gradient = dmd_gradient(ones, fake, zeros)
    np.testing.assert_array_equal(gradient.ravel(), [0, np.inf, -np.inf])
    assert dmd_loss(ones, gradient, horizon_weights(1, 0.0)) == np.inf
    # Latents that equal the teacher's clean latents have a scale of zero; where the critic agrees, it is 0 / 0.
    np.testing.assert_array_equal(dmd_gradient(zeros, zeros, zeros).ravel(), [0, 0, 0])
    assert dmd_loss(zeros, dmd_gradient(zeros, zeros, zeros), horizon_weights(1, 0.0)) == 0


def test_an_update_draws_what_a_stream_would():
    """The rollout's noise is that of streams with the same keys; exit steps and levels cover their range."""
    stream, config = STREAMS["adaptive"], DistillConfig(rollout_frames=9)
    keys = jax.random.split(jax.random.key(8), 2)
    noise = draw_rollout_noise(keys, stream, LATENT_SHAPE, 3)
    carry = initial_carry(SMALL, stream, keys, *LATENT_SHAPE[:2])
    for chunk in range(3):
        alone = draw_noise(dataclasses.replace(carry, chunk=jnp.int32(chunk)), stream, LATENT_SHAPE)
        np.testing.assert_array_equal(noise.content[chunk], alone.content)
        np.testing.assert_array_equal(noise.state[chunk], alone.state)
    draws = [DRAW(jax.random.key(i), 2, config, stream, LATENT_SHAPE) for i in range(20)]
    assert {int(draw.exit_step) for draw in draws} == set(range(len(stream.sigmas)))
    sigma = np.array([draw.sigma for draw in draws])
    assert sigma.min() >= 0.02
    assert sigma.max() <= 0.98
    assert len(np.unique(sigma)) > 30
    assert draws[0].score_noise.shape == (2, 9, *LATENT_SHAPE)


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
    draws = DRAW(jax.random.key(4), 2, DistillConfig(rollout_frames=frames), stream, LATENT_SHAPE)
    optimizer = OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.999), max_gradient_norm=1e9)
    config = DistillConfig(rollout_frames=frames, student=optimizer, ema_decay=decay, ema_start=3, horizon_alpha=1.5)
    critic, teacher = (Opinion(jax.random.normal(jax.random.key(i), (frames, *LATENT_SHAPE))) for i in (1, 2))
    null_text = jnp.full((1, *text.shape[1:]), 0.3)
    state = create_state(student, optimizer, True)
    state = dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 1.0, student))

    @jax.jit
    def step(state, iteration):
        return student_step(state, critic, teacher, text, null_text, iteration, draws, config, stream)

    (before, scalars), (after, _) = step(state, jnp.int32(2)), step(state, jnp.int32(3))

    @jax.jit
    def expected(student):
        record = self_rollout(student, student.text_keys_values(text), draws.noise, draws.exit_step, stream)[0]
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_teacher_that_says_nothing_shows(student, text, accumulate):
    """The teacher's score of the last frame is NaN: it moves nothing, and a scalar is NaN, which ends a run."""
    stream, frames = STREAMS["adaptive"], 3
    config = DistillConfig(batch_size=2, rollout_frames=frames, accumulate=accumulate)
    draws = DRAW(jax.random.key(4), 2, config, stream, LATENT_SHAPE)
    opinion = Opinion(jax.random.normal(jax.random.key(1), (frames, *LATENT_SHAPE)))
    teacher = dataclasses.replace(opinion, clean=2 * opinion.clean)
    state = create_state(student, config.student, False)

    @jax.jit
    def step(state, teacher):
        return student_step(state, opinion, teacher, text, text[:1], jnp.int32(0), draws, config, stream)

    _, scalars = step(state, teacher)
    assert all(np.isfinite(value) for value in scalars.values())
    _, scalars = step(state, dataclasses.replace(teacher, clean=teacher.clean.at[-1].set(jnp.nan)))
    assert np.isnan(scalars["dmd_gradient_norm"])
    assert np.isfinite(scalars["gradient_norm"])


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


@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_every_update_draws_prompts_of_its_own(ratio):
    """Batches are numbered through, none is left out, and the student's come first in an iteration."""
    config = DistillConfig(critic_ratio=ratio)
    updates = [(config.update_numbers(i)) for i in range(11)]
    assert [number for numbers in updates for number in numbers.values()] == list(range(sum(map(len, updates))))
    assert all(list(numbers) == ["critic"] or list(numbers) == ["student", "critic"] for numbers in updates)
    assert [i for i, numbers in enumerate(updates) if "student" in numbers] == list(range(0, 11, ratio))
