"""Horizon-weighted distribution matching distillation on the student's own rollouts.

The rollout runs without gradient first and records what each chunk's last pass saw; the gradient pass then repeats just
those passes against the recorded cache, so nothing is differentiated through a loop that carries the cache.
Source: arXiv 2605.30349; the losses are Self-Forcing's (guandeh17/Self-Forcing model/dmd.py), without its σ grid.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import DistillConfig, num_chunks
from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, draw_normal, flow_to_clean, warp
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import constrain
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import RolloutCarry, draw_noise, initial_carry
from adastate_jax.streaming.denoising import GeneratedChunk, denoise, generate_chunk, read_context, split_live
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of
from adastate_jax.training.pretrain import flow_loss
from adastate_jax.training.state import TrainState, apply_gradients

# --- losses ---------------------------------------------------------------------------------------------------------


def horizon_weights(frames: int, alpha: float, normalize: bool = False) -> np.ndarray:
    """w_i = 1 + α i / (N − 1) of the N frames of a rollout, [N] float32; divided by their mean if `normalize`."""
    weights = 1.0 + alpha * np.arange(frames) / max(frames - 1, 1)
    return (weights / weights.mean() if normalize else weights).astype(np.float32)


def guided(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """cond + w (cond − uncond); w is the conventional guidance scale minus one."""
    return conditional + scale * (conditional - unconditional)


def dmd_gradient(latents: jax.Array, clean_fake: jax.Array, clean_real: jax.Array) -> jax.Array:
    """g = (x̂_fake − x̂_real) / mean|x̂ − x̂_real|, the mean over each whole sample; NaN becomes 0.

    latents, clean_fake, clean_real [B, N, H, W, C].
    """
    scale = jnp.abs(latents - clean_real).mean(axis=(1, 2, 3, 4), keepdims=True)
    gradient = (clean_fake - clean_real) / scale
    return jnp.where(jnp.isnan(gradient), 0.0, gradient)


def dmd_loss(latents: jax.Array, gradient: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over everything of w_i ½ ‖x̂_i − sg(x̂_i − g_i)‖²: its gradient is w_i g_i / size.

    latents, gradient [B, N, H, W, C]; weights [N].
    """
    target = jax.lax.stop_gradient(latents - gradient)
    return (weights[:, None, None, None] * 0.5 * jnp.square(latents - target)).mean()


def score_sigma(uniform: jax.Array, config: DistillConfig) -> jax.Array:
    """Noise level of the scores from u in [0, 1]: the warped timestep, clipped."""
    timestep = jnp.clip(MAX_TIMESTEP * warp(uniform, config.shift), config.min_timestep, config.max_timestep)
    return timestep / MAX_TIMESTEP


def _draw_sigma(key: jax.Array, batch: int, config: DistillConfig) -> jax.Array:
    return score_sigma(1.0 - jax.random.uniform(key, (batch,)), config)  # u in (0, 1]


def clean_estimate(model: DiT, noisy: jax.Array, sigma: jax.Array, text: jax.Array) -> jax.Array:
    """x̂_0 of a bidirectional network.  noisy [B, N, H, W, C]; sigma [B]; text embeddings [B, T, text_dim]."""
    sigma = jnp.broadcast_to(sigma[:, None], noisy.shape[:2])
    flow, _ = model(noisy, MAX_TIMESTEP * sigma, model.text_keys_values(text), np.arange(noisy.shape[1]))
    return flow_to_clean(flow, noisy, sigma)


# --- the student's rollout ------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What a rollout without gradient leaves behind for the gradient pass.

    The fill chunks are a tuple, each with shapes of its own; the K steady chunks are stacked along a leading axis (None
    if there are none).

    Attributes:
        fill, steady: the chunks.
        fill_anchors: the anchor memory that each fill chunk read.
        anchors: the anchor memory that each steady chunk read, stacked; None without steady chunks.
        exit_step: the step whose output is each chunk's, int32 [].
    """

    fill: tuple[GeneratedChunk, ...]
    fill_anchors: tuple[Any, ...]
    steady: GeneratedChunk | None
    anchors: Any
    exit_step: jax.Array


def self_rollout(
    student: DiT,
    text: KeyValues,
    keys: jax.Array,
    exit_step: jax.Array,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
    chunks: int,
) -> Rollout:
    """Rolls the student out on its own output; every chunk stops denoising after step `exit_step`.

    Args:
        text: the student's text keys and values.
        keys: one per sample [B].
        exit_step: one for all chunks and samples, int32 [] in 0 … T − 1.
        latent_shape: (H, W, C).
    """
    student = jax.lax.stop_gradient(student)
    carry = initial_carry(student.config, stream, keys, *latent_shape[:2])

    def step(carry: RolloutCarry, phase: Phase):
        noise = draw_noise(carry, stream, latent_shape)
        chunk = generate_chunk(student, carry.cache, text, noise, stream, phase, exit_step)
        cache = cache_lib.advance(carry.cache, stream.anchor, layout_of(phase, stream), chunk.fresh, phase.first_frame)
        return RolloutCarry(cache, carry.chunk + 1, carry.keys), (chunk, carry.cache.anchor)

    fill, fill_anchors = [], []
    for index in range(min(chunks, stream.num_fill_chunks)):
        carry, (chunk, anchor) = step(carry, phase_of(index, stream))
        fill.append(chunk)
        fill_anchors.append(anchor)
    steady = anchors = None
    if chunks > len(fill):
        phase = phase_of(stream.num_fill_chunks, stream)
        _, (steady, anchors) = jax.lax.scan(lambda carry, _: step(carry, phase), carry, length=chunks - len(fill))
    return jax.lax.stop_gradient(Rollout(tuple(fill), tuple(fill_anchors), steady, anchors, exit_step))


def rollout_latents(record: Rollout, stream: StreamConfig) -> jax.Array:
    """The content latents of a recorded rollout [B, N, H, W, C]."""
    contents = [
        split_live(chunk.clean, layout_of(phase_of(i, stream), stream)).content for i, chunk in enumerate(record.fill)
    ]
    if record.steady is not None:
        state_frames = stream.anchor.state_frames
        contents.append(_join_chunks(record.steady.clean[:, :, state_frames:]))
    return jnp.concatenate(contents, axis=1)


def _join_chunks(chunks: jax.Array) -> jax.Array:
    """[K, B, F, …] → [B, K · F, …]."""
    chunks = jnp.moveaxis(chunks, 0, 1)
    return chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])


def gradient_pass(
    student: DiT, text: KeyValues, record: Rollout, stream: StreamConfig, cache_gradient: str = "stop"
) -> jax.Array:
    """The rollout's content latents again, now with gradient through each chunk's exit step.

    Args:
        student: the network to differentiate.
        text: its text keys and values, with gradient.
        record: the recorded rollout of the same weights.
        cache_gradient: see `DistillConfig`.

    Returns:
        Content latents [B, N, H, W, C], equal to `rollout_latents`.
    """
    if cache_gradient == "straight_through":
        return _straight_through_pass(student, text, record, stream)
    sigma = jnp.asarray(stream.sigmas, jnp.float32)[record.exit_step]
    frame_tokens = student.config.frame_tokens(*record.fill[0].clean.shape[2:4])

    def exit_pass(noisy: jax.Array, cache: Cache, phase: Phase) -> jax.Array:
        layout = layout_of(phase, stream)
        context = read_context(student.config, cache, stream, layout, noisy)
        clean, _ = denoise(student, noisy, sigma, text, layout, context)
        return split_live(clean, layout).content

    contents = []
    content_cache = None  # all content committed so far, the window of a chunk is a slice of it
    for index, (chunk, anchor) in enumerate(zip(record.fill, record.fill_anchors, strict=True)):
        contents.append(exit_pass(chunk.noisy, Cache(anchor, content_cache), phase_of(index, stream)))
        content_cache = chunk.fresh if content_cache is None else concatenate(content_cache, chunk.fresh)
    if record.steady is not None:
        phase = phase_of(stream.num_fill_chunks, stream)
        state_tokens = stream.anchor.state_frames * frame_tokens
        chunk_tokens = stream.chunk_frames * frame_tokens
        steady = jax.tree.map(_join_steady_tokens(state_tokens), record.steady.fresh)
        content_cache = concatenate(content_cache, steady)
        first = len(record.fill) * stream.chunk_frames - stream.past_frames

        def steady_pass(_, inputs):
            index, noisy, anchor = inputs
            start = first * frame_tokens + index * chunk_tokens
            window = content_cache.tokens(start, stream.past_frames * frame_tokens)
            return None, exit_pass(noisy, Cache(anchor, window), phase)

        indices = jnp.arange(record.steady.noisy.shape[0])
        inputs = (indices, record.steady.noisy, record.anchors)
        _, scanned = jax.lax.scan(steady_pass, None, inputs)
        contents.append(_join_chunks(scanned))
    return jnp.concatenate(contents, axis=1)


def _join_steady_tokens(state_tokens: int):
    def join(x: jax.Array) -> jax.Array:  # [K, L, B, tokens, heads, head_dim] -> [L, B, K · content tokens, …]
        x = jnp.moveaxis(x[..., state_tokens:, :, :], 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    return join


def _straight_through_pass(student: DiT, text: KeyValues, record: Rollout, stream: StreamConfig) -> jax.Array:
    """`gradient_pass` whose cache has the clean values, and the gradient of each chunk's exit pass."""
    sigma = jnp.asarray(stream.sigmas, jnp.float32)[record.exit_step]
    first = record.fill[0].clean
    keys = jax.vmap(jax.random.key)(jnp.zeros(first.shape[0], jnp.uint32))  # nothing is drawn
    cache = initial_carry(student.config, stream, keys, *first.shape[2:4]).cache

    def step(cache: Cache, chunk: GeneratedChunk, phase: Phase):
        layout = layout_of(phase, stream)
        context = read_context(student.config, cache, stream, layout, chunk.noisy)
        clean, exit_fresh = denoise(student, chunk.noisy, sigma, text, layout, context)
        fresh = jax.tree.map(lambda value, path: value + (path - jax.lax.stop_gradient(path)), chunk.fresh, exit_fresh)
        cache = cache_lib.advance(cache, stream.anchor, layout, fresh, phase.first_frame)
        return cache, split_live(clean, layout).content

    contents = []
    for index, chunk in enumerate(record.fill):
        cache, content = step(cache, chunk, phase_of(index, stream))
        contents.append(content)
    if record.steady is not None:
        phase = phase_of(stream.num_fill_chunks, stream)
        _, scanned = jax.lax.scan(lambda cache, chunk: step(cache, chunk, phase), cache, record.steady)
        contents.append(_join_chunks(scanned))
    return jnp.concatenate(contents, axis=1)


# --- the two updates ------------------------------------------------------------------------------------------------


def _rollout_for(student: DiT, text: jax.Array, key: jax.Array, config: DistillConfig, stream: StreamConfig, shape):
    """A recorded rollout: one exit step for everybody, one noise key per sample."""
    exit_key, noise_key = jax.random.split(key)
    exit_step = jax.random.randint(exit_key, (), 0, len(stream.sigmas))
    keys = jax.random.split(noise_key, text.shape[0])
    student_text = jax.lax.stop_gradient(student.text_keys_values(text))
    chunks = num_chunks(config.rollout_frames, stream)
    return self_rollout(student, student_text, keys, exit_step, stream, shape, chunks)


def critic_step(
    state: TrainState,
    student: DiT,
    text: jax.Array,
    key: jax.Array,
    config: DistillConfig,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the critic: flow matching on a fresh rollout of the student.

    Args:
        state: the critic's.
        student: its weights are not changed.
        text: embeddings [B, T, text_dim].
        key: of this update.
        latent_shape: (H, W, C).

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    rollout_key, noise_key, level_key = jax.random.split(key, 3)
    latents = rollout_latents(_rollout_for(student, text, rollout_key, config, stream, latent_shape), stream)
    noise = constrain(draw_normal(noise_key, latents.shape), "batch")
    sigma = _draw_sigma(level_key, latents.shape[0], config)
    loss, gradients = jax.value_and_grad(flow_loss)(state.params, latents, noise, sigma, text)
    state, metrics = apply_gradients(state, gradients, config.critic)
    return state, {"loss": loss, **metrics}


def student_step(
    state: TrainState,
    critic: DiT,
    teacher: DiT,
    text: jax.Array,
    null_text: jax.Array,
    iteration: jax.Array,
    key: jax.Array,
    config: DistillConfig,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student by horizon-weighted DMD on its own rollout.

    Args:
        state: the student's, with EMA.
        critic, teacher: bidirectional networks, not changed.
        text, null_text: embeddings of the prompts [B, T, text_dim] and of the negative prompt [1, T, text_dim].
        iteration: of the stage, int32 [].
        key: of this update.
        latent_shape: (H, W, C).

    Returns:
        The new state, and `loss`, `dmd_gradient_norm` (mean |g|) and `gradient_norm`.
    """
    rollout_key, noise_key, level_key = jax.random.split(key, 3)
    record = _rollout_for(state.params, text, rollout_key, config, stream, latent_shape)
    latents = rollout_latents(record, stream)

    noise = constrain(draw_normal(noise_key, latents.shape), "batch")
    sigma = _draw_sigma(level_key, latents.shape[0], config)
    noisy = add_noise(latents, noise, jnp.broadcast_to(sigma[:, None], latents.shape[:2]))
    clean_fake = clean_estimate(critic, noisy, sigma, text)
    both_texts = jnp.concatenate([text, jnp.broadcast_to(null_text, text.shape)])
    both = clean_estimate(teacher, jnp.concatenate([noisy, noisy]), jnp.concatenate([sigma, sigma]), both_texts)
    clean_real = guided(*jnp.split(both, 2), config.guidance_scale)
    gradient = dmd_gradient(latents, clean_fake, clean_real)
    weights = horizon_weights(config.rollout_frames, config.horizon_alpha, config.horizon_normalize)

    def loss_function(params):
        x = gradient_pass(params, params.text_keys_values(text), record, stream, config.cache_gradient)
        return dmd_loss(x, gradient, weights)

    loss, gradients = jax.value_and_grad(loss_function)(state.params)
    decay = jnp.where(iteration >= config.ema_start, config.ema_decay, 0.0)
    state, metrics = apply_gradients(state, gradients, config.student, decay)
    return state, {"loss": loss, "dmd_gradient_norm": jnp.abs(gradient).mean(), **metrics}
