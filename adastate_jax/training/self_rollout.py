"""The student's rollout on its own output, and the same again with gradient.

The rollout runs without gradient first and records what each chunk's last pass saw; the gradient pass then repeats just
those passes. Noise and exit step are given, so that training, which draws them, and `verify`, which reads them from a
file, run the same functions. Source: arXiv 2605.30349, after Self-Forcing (guandeh17/Self-Forcing).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import ChunkNoise, RolloutCarry, draw_noise
from adastate_jax.streaming.denoising import GeneratedChunk, denoise, generate_chunk, read_context, split_live
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of


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

    # Of every chunk its own: what was generated, and the memory that it read.
    fill: tuple[GeneratedChunk, ...]
    fill_anchors: tuple[Any, ...]
    steady: GeneratedChunk | None
    anchors: Any

    # The same for all chunks and samples.
    exit_step: jax.Array


def draw_rollout_noise(
    keys: jax.Array, stream: StreamConfig, latent_shape: tuple[int, int, int], chunks: int
) -> ChunkNoise:
    """The noise of a rollout's chunks, stacked: content [K, T, B, F, H, W, C], state [K, T, B, F_s, H, W, C].

    Args:
        keys: one per sample [B].
        latent_shape: (H, W, C).
    """
    # Noise depends on the keys and the chunk's number alone, not on what the cache holds.
    return jax.lax.map(
        lambda chunk: draw_noise(RolloutCarry(None, chunk, keys), stream, latent_shape), jnp.arange(chunks)
    )


def self_rollout(
    student: DiT, text: KeyValues, noise: ChunkNoise, exit_step: jax.Array, stream: StreamConfig
) -> Rollout:
    """Rolls the student out on its own output; every chunk stops denoising after step `exit_step`.

    Args:
        text: the student's text keys and values.
        noise: of all chunks, see `draw_rollout_noise`; what is behind the exit step is not looked at.
        exit_step: one for all chunks and samples, int32 [] in 0 … T − 1.
    """
    student = jax.lax.stop_gradient(student)
    chunks, _, batch, _, height, width, _ = noise.content.shape

    def step(cache: Cache, noise: ChunkNoise, phase: Phase):
        chunk = generate_chunk(student, cache, text, noise, stream, phase, exit_step)
        after = cache_lib.advance(cache, stream.anchor, layout_of(phase, stream), chunk.fresh, phase.first_frame)
        return after, (chunk, cache.anchor)

    cache = _empty_cache(student, stream, batch, height, width)
    fill, fill_anchors = [], []
    for index in range(min(chunks, stream.num_fill_chunks)):
        given = jax.tree.map(lambda x, index=index: x[index], noise)
        cache, (chunk, anchor) = step(cache, given, phase_of(index, stream))
        fill.append(chunk)
        fill_anchors.append(anchor)
    steady = anchors = None
    if chunks > len(fill):
        phase = phase_of(stream.num_fill_chunks, stream)
        given = jax.tree.map(lambda x: x[len(fill) :], noise)
        _, (steady, anchors) = jax.lax.scan(lambda cache, noise: step(cache, noise, phase), cache, given)
    return jax.lax.stop_gradient(Rollout(tuple(fill), tuple(fill_anchors), steady, anchors, exit_step))


def _empty_cache(student: DiT, stream: StreamConfig, batch: int, height: int, width: int) -> Cache:
    frame_tokens = student.config.frame_tokens(height, width)
    return cache_lib.empty(student.config, stream.anchor, stream.past_frames, batch, frame_tokens)


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
    if cache_gradient != "stop":
        return _straight_through_pass(student, text, record, stream, through_anchor=cache_gradient != "window")
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


def _straight_through_pass(
    student: DiT, text: KeyValues, record: Rollout, stream: StreamConfig, through_anchor: bool
) -> jax.Array:
    """`gradient_pass` whose cache has the clean values, and the gradient of each chunk's exit pass.

    through_anchor: whether that gradient also goes through the anchor's memory, or through the window alone.
    """
    sigma = jnp.asarray(stream.sigmas, jnp.float32)[record.exit_step]
    first = record.fill[0].clean
    cache = _empty_cache(student, stream, first.shape[0], *first.shape[2:4])

    def step(cache: Cache, chunk: GeneratedChunk, phase: Phase):
        layout = layout_of(phase, stream)
        context = read_context(student.config, cache, stream, layout, chunk.noisy)
        clean, exit_fresh = denoise(student, chunk.noisy, sigma, text, layout, context)
        fresh = jax.tree.map(lambda value, path: value + (path - jax.lax.stop_gradient(path)), chunk.fresh, exit_fresh)
        cache = cache_lib.advance(cache, stream.anchor, layout, fresh, phase.first_frame)
        if not through_anchor:
            cache = Cache(jax.lax.stop_gradient(cache.anchor), cache.window)
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
