"""Initialisation of the causal student: regression on the teacher's ODE trajectories, all chunks in one pass under the
block-causal mask, or chunk after chunk against a stream's cache."""

import functools
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import InitializeConfig, stream_of_clips
from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, draw_normal, flow_to_clean
from adastate_jax.models.adapters import join
from adastate_jax.models.attention import KeyValues, attend_block_causal
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import constrain
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.denoising import denoise, read_context
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of
from adastate_jax.training.accumulation import accumulate, micro_batches
from adastate_jax.training.guidance import guided_pass
from adastate_jax.training.state import TrainState, apply_gradients


def sample_trajectory(
    teacher: DiT,
    noise: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    sigmas: np.ndarray,
    guidance_scale: float,
    keep_every: int,
) -> jax.Array:
    """Euler solution of the teacher's guided probability-flow ODE.

    Args:
        noise: [B, N, H, W, C].
        text, null_text: embeddings [B, T, text_dim] and [1, T, text_dim].
        sigmas: levels [steps + 1] from 1 to 0.
        keep_every: keeps the states at indices 0, keep_every, 2 keep_every, …, and the end.

    Returns:
        Kept states, noise first, clean latents last, [B, kept, N, H, W, C].
    """
    batch, frames = noise.shape[:2]
    said, unsaid = teacher.text_keys_values(text), teacher.text_keys_values(null_text)
    levels = jnp.asarray(sigmas, jnp.float32).reshape(-1)

    def euler(latents, index):
        timesteps = jnp.full((batch, frames), MAX_TIMESTEP) * levels[index]

        def flow(text):
            return teacher(latents, timesteps, text, np.arange(frames))[0]

        return latents + (levels[index + 1] - levels[index]) * guided_pass(flow, said, unsaid, guidance_scale), None

    def interval(latents, start):
        after, _ = jax.lax.scan(euler, latents, start + jnp.arange(keep_every))
        return after, latents

    clean, kept = jax.lax.scan(interval, noise, jnp.arange(0, len(sigmas) - 1, keep_every))
    return jnp.concatenate([jnp.moveaxis(kept, 0, 1), clean[:, None]], axis=1)


def block_causal_pass(
    model: DiT,
    latents: jax.Array,
    sigma: jax.Array,
    text: jax.Array,
    chunk_frames: int,
    past_frames: int | None,
    clean: jax.Array | None = None,
) -> jax.Array:
    """All chunks in one pass, each seeing what a stream without an anchor would show it.

    Args:
        latents: noisy clip [B, N, H, W, C].
        sigma: noise level per frame [B, N].
        text: embeddings [B, T, text_dim].
        past_frames: frames a chunk sees before its own; None is all.
        clean: clean copy of the clip to see earlier chunks in (teacher forcing); None shows the noisy ones.

    Returns:
        Flow of the noisy clip [B, N, H, W, C].
    """
    frames = latents.shape[1]
    frame_tokens = model.config.frame_tokens(*latents.shape[2:4])
    attend = attend_block_causal(
        model.config.attention,
        chunk_frames * frame_tokens,
        None if past_frames is None else past_frames * frame_tokens,
        clean_copy=clean is not None,
    )
    positions = np.arange(frames)
    if clean is not None:
        latents = jnp.concatenate([clean, latents], axis=1)
        sigma = jnp.concatenate([jnp.zeros_like(sigma), sigma], axis=1)
        positions = np.tile(positions, 2)
    flow, _ = model(latents, MAX_TIMESTEP * sigma, model.text_keys_values(text), positions, attend)
    return flow[:, -frames:]


def _twice(keys_values: KeyValues | None) -> KeyValues | None:
    """Keys and values [layers, B, …] of every sample for it and for its copy beside it."""
    return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), keys_values)


def teacher_forced_pass(
    model: DiT, latents: jax.Array, sigma: jax.Array, text: jax.Array, stream: StreamConfig, clean: jax.Array
) -> jax.Array:
    """`teacher_forced_flow` as clean estimates x̂_0 of the noisy clip [B, N, H, W, C]."""
    return flow_to_clean(teacher_forced_flow(model, latents, sigma, text, stream, clean), latents, sigma)


def teacher_forced_flow(
    model: DiT, latents: jax.Array, sigma: jax.Array, text: jax.Array, stream: StreamConfig, clean: jax.Array
) -> jax.Array:
    """All chunks one after another, each against the cache that the stream would hold after the clean ones before it.

    A static anchor stands for a hidden state. Gradients reach the clean frames' keys and values. Without an anchor it
    is `block_causal_pass` with a clean copy.

    Args:
        latents: noisy clip [B, N, H, W, C].
        sigma: noise level per frame [B, N].
        text: embeddings [B, T, text_dim].
        stream: whose chunks, window, anchor and positions to show.
        clean: clean copy of the clip.

    Returns:
        Flow of the noisy clip [B, N, H, W, C].

    Raises:
        ValueError: see `stream_of_clips`.
    """
    stream = stream_of_clips(stream, "stream")
    batch, anchor = len(latents), stream.anchor
    # A chunk and its clean copy pass side by side: both see the same.
    both = jnp.stack([latents, clean], axis=1).reshape(2 * batch, -1, stream.chunk_frames, *latents.shape[2:])
    levels = jnp.stack([sigma, jnp.zeros_like(sigma)], axis=1).reshape(2 * batch, -1, stream.chunk_frames)
    text_keys_values = _twice(model.text_keys_values(text))
    frame_tokens = model.config.frame_tokens(*latents.shape[2:4])
    cache = cache_lib.empty(model.config, anchor, stream.past_frames, batch, frame_tokens)

    def step(cache: cache_lib.Cache, chunk: tuple[jax.Array, jax.Array], phase: Phase):
        layout = layout_of(phase, stream)
        live, level = chunk
        context = _twice(read_context(model.config, cache, stream, layout, live))
        flow, fresh = model(live, MAX_TIMESTEP * level, text_keys_values, layout.live, None, context)
        fresh = jax.tree.map(lambda x: x[:, 1::2], fresh)
        return cache_lib.advance(cache, anchor, layout, fresh, phase.first_frame), flow[::2]

    flows = _chunk_after_chunk(step, cache, (jnp.moveaxis(both, 1, 0), jnp.moveaxis(levels, 1, 0)), stream)
    return jnp.moveaxis(flows, 0, 1).reshape(latents.shape)


def causal_flow(
    model: DiT,
    latents: jax.Array,
    sigma: jax.Array,
    text: jax.Array,
    clean: jax.Array,
    context: str,
    stream: StreamConfig,
) -> jax.Array:
    """Flow of all chunks of a noisy clip [B, N, H, W, C], each seeing of the earlier ones what `context` says.

    Args:
        latents, clean: the clip with noise and without, [B, N, H, W, C].
        sigma: noise level per frame [B, N].
        text: embeddings [B, T, text_dim].
        context: of `InitializeConfig`, but for `state`.
    """
    if context == "stream":
        return teacher_forced_flow(model, latents, sigma, text, stream, clean)
    shown = clean if context == "clean" else None
    return block_causal_pass(model, latents, sigma, text, stream.chunk_frames, stream.past_frames, shown)


def _chunk_after_chunk(
    step: Callable, cache: cache_lib.Cache, chunks: tuple[jax.Array, ...], stream: StreamConfig
) -> jax.Array:
    """What `step(cache, chunk, phase)` gives beside the next cache, for chunks of arrays [K, …]: [K, …]."""
    fill = min(stream.num_fill_chunks, len(chunks[0]))
    found = []
    for number in range(fill):
        cache, one = step(cache, tuple(x[number] for x in chunks), phase_of(number, stream))
        found.append(one)
    later = tuple(x[fill:] for x in chunks)
    _, later = jax.lax.scan(functools.partial(step, phase=phase_of(stream.num_fill_chunks, stream)), cache, later)
    return jnp.concatenate([jnp.stack(found), later])


def recurrent_pass(
    model: DiT, noisy: jax.Array, text: jax.Array, stream: StreamConfig, clean: jax.Array, state_noise: jax.Array
) -> jax.Array:
    """All chunks one after another as the stream denoises them, with content that is given and a state that is not.

    At each noise level the hidden state is denoised beside the given content, and it is committed beside the clean one.
    So gradients of an estimate reach the state of every chunk before.

    Args:
        noisy: the clip at each of the stream's T levels [B, T, N, H, W, C].
        text: embeddings [B, T, text_dim].
        stream: its steps, chunks, window, anchor and positions.
        clean: the clip [B, N, H, W, C].
        state_noise: of each chunk and level [K, T, B, F_s, H, W, C].

    Returns:
        Clean estimates x̂_0 of the clip at each level [B, T, N, H, W, C].

    Raises:
        ValueError: see `stream_of_clips`.
    """
    stream = stream_of_clips(stream, "state")
    levels, text_keys_values = jnp.asarray(stream.sigmas, jnp.float32), model.text_keys_values(text)
    frame_tokens = model.config.frame_tokens(*clean.shape[2:4])
    cache = cache_lib.empty(model.config, stream.anchor, stream.past_frames, len(clean), frame_tokens)

    def step(cache: cache_lib.Cache, chunk: tuple[jax.Array, jax.Array, jax.Array], phase: Phase):
        layout = layout_of(phase, stream)
        state_frames = len(layout.state)
        noisy_content, clean_content, noise = chunk
        noise = noise[:, :, :state_frames]
        context = read_context(model.config, cache, stream, layout, clean_content)

        def turn(state, inputs):
            content, level, next_noise, next_level = inputs
            live = jnp.concatenate([state, content], axis=1)
            estimate, _ = denoise(model, live, level, text_keys_values, layout, context)
            # After the last level the next one is zero: nothing is added.
            return add_noise(estimate[:, :state_frames], next_noise, next_level), estimate[:, state_frames:]

        after = jnp.append(levels[1:], 0.0)
        state, estimates = jax.lax.scan(turn, noise[0], (noisy_content, levels, jnp.roll(noise, -1, axis=0), after))
        live = jnp.concatenate([state, clean_content], axis=1)
        _, fresh = denoise(model, live, 0.0, text_keys_values, layout, context)
        return cache_lib.advance(cache, stream.anchor, layout, fresh, phase.first_frame), estimates

    split = "b t (k f) h w c -> k t b f h w c"
    chunks = einops.rearrange(noisy, split, f=stream.chunk_frames)
    of_clean = einops.rearrange(clean, "b (k f) h w c -> k b f h w c", f=stream.chunk_frames)
    estimates = _chunk_after_chunk(step, cache, (chunks, of_clean, state_noise), stream)
    return einops.rearrange(estimates, "k t b f h w c -> b t (k f) h w c")


def initialize_step(
    state: TrainState,
    trajectory: jax.Array,
    text: jax.Array,
    key: jax.Array,
    config: InitializeConfig,
    stream: StreamConfig,
    base: DiT | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student: every chunk, at a step of its own, predicts the trajectory's end; `state`: at each.

    Args:
        trajectory: kept states [B, T + 1, N, H, W, C], at the student's T levels, then clean.
        text: embeddings [B, T, text_dim].
        key: of this step.
        base: the frozen weights that the state has adapters of, see `adapters.join`.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    draw, predict, axis = (
        (_draw_noise_of_trajectory, _predict_at_each_level, 2)
        if config.context == "state"
        else (_draw_levels, _predict_at_one_level, 0)
    )

    def gradients_of(part: tuple[jax.Array, jax.Array, jax.Array]):
        def loss_function(params):
            estimate, clean = predict(join(params, base), *part, config, stream)
            return jnp.square(estimate - clean).mean()

        return jax.value_and_grad(loss_function)(state.params)

    def split(batch: tuple[jax.Array, jax.Array, jax.Array], count: int):
        *of_each, drawn = batch
        return *micro_batches(tuple(of_each), count), micro_batches(drawn, count, axis)

    loss, gradients = accumulate(
        gradients_of, (trajectory, text, draw(key, trajectory, stream)), config.accumulate, split
    )
    return apply_update(state, loss, gradients, config)


def apply_update(
    state: TrainState, loss: jax.Array, gradients: Any, config: InitializeConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The optimizer's step, and the average: the student itself before step `ema_start`.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    decay = jnp.where(state.step >= config.ema_start, config.ema_decay, 0.0) if config.ema_start else config.ema_decay
    state, metrics = apply_gradients(state, gradients, config.optimizer, decay)
    return state, {"loss": loss, **metrics}


def _draw_levels(key: jax.Array, trajectory: jax.Array, stream: StreamConfig) -> jax.Array:
    """The step of each chunk, for each of its frames, int32 [B, N]."""
    batch, _, frames = trajectory.shape[:3]
    step = jax.random.randint(key, (batch, frames // stream.chunk_frames), 0, len(stream.sigmas))
    return constrain(jnp.repeat(step, stream.chunk_frames, axis=1), "batch")


def _draw_noise_of_trajectory(key: jax.Array, trajectory: jax.Array, stream: StreamConfig) -> jax.Array:
    return draw_state_noise(key, trajectory[:, -1], stream)


def draw_state_noise(key: jax.Array, clips: jax.Array, stream: StreamConfig) -> jax.Array:
    """Noise of the hidden state beside clips [B, N, H, W, C], of each chunk and level [K, T, B, F_s, H, W, C]."""
    batch, frames, *latent_shape = clips.shape
    shape = (frames // stream.chunk_frames, len(stream.sigmas), batch, stream.anchor.state_frames, *latent_shape)
    return constrain(draw_normal(key, shape), None, None, "batch")


def _predict_at_one_level(
    model: DiT, trajectory: jax.Array, text: jax.Array, step: jax.Array, config: InitializeConfig, stream: StreamConfig
) -> tuple[jax.Array, jax.Array]:
    """Estimates of each chunk at a level of its own, and the clip that they should be, both [B, N, H, W, C]."""
    clean = trajectory[:, -1]
    noisy = jnp.take_along_axis(trajectory, step[:, None, :, None, None, None], axis=1)[:, 0]
    sigma = jnp.asarray(stream.sigmas, jnp.float32)[step]
    flow = causal_flow(model, noisy, sigma, text, clean, config.context, stream)
    return flow_to_clean(flow, noisy, sigma), clean


def _predict_at_each_level(
    model: DiT, trajectory: jax.Array, text: jax.Array, noise: jax.Array, config: InitializeConfig, stream: StreamConfig
) -> tuple[jax.Array, jax.Array]:
    """Estimates of each chunk at every level [B, T, N, H, W, C], and what they should be [B, 1, N, H, W, C]."""
    estimates = recurrent_pass(model, trajectory[:, :-1], text, stream, trajectory[:, -1], noise)
    return estimates, trajectory[:, -1:]
