"""The student's rollout on its own output, and the same again with gradient.

The rollout runs without gradient first and records each chunk: what its last pass was given, what that made of it, and
the clean keys and values. The gradient pass repeats just the last passes, chunk after chunk, against the cache that it
fills from the record again. Noise and exit step are given, so that training, which draws them, and `verify`, which
reads them from a file, run the same functions. Source: arXiv 2605.30349, after Self-Forcing (guandeh17/Self-Forcing).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.models.adapters import join, split
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.context_parallel import constrain_kept
from adastate_jax.models.dit import DiT
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import ChunkNoise, RolloutCarry, draw_noise
from adastate_jax.streaming.denoising import GeneratedChunk, denoise, generate_chunk, read_context, split_live
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of
from adastate_jax.training.accumulation import add_in_float32, zeros_in_float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """What a rollout without gradient leaves behind for the gradient pass: every frame's keys and values once.

    The fill chunks are a tuple, each with shapes of its own; the K steady chunks are stacked along a leading axis (None
    if there are none).

    Attributes:
        fill, steady: the chunks.
        exit_step: the step whose output is each chunk's, int32 [].
        before: the cache before the first of them; None is an empty one.
        first_chunk: the first one's number in the stream; the number of fill chunks stands for any steady one.
    """

    # Of every chunk its own. What it read of the cache follows from the chunks before.
    fill: tuple[GeneratedChunk, ...]
    steady: GeneratedChunk | None

    # The same for all chunks and samples.
    exit_step: jax.Array

    # Where in the stream they are.
    before: Cache | None = None
    first_chunk: int = dataclasses.field(default=0, metadata={"static": True})


def draw_rollout_noise(
    keys: jax.Array,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
    chunks: int,
    first_chunk: jax.Array | int = 0,
) -> ChunkNoise:
    """The noise of a rollout's chunks, stacked: content [K, T, B, F, H, W, C], state [K, T, B, F_s, H, W, C].

    Args:
        keys: one per sample [B].
        latent_shape: (H, W, C).
        first_chunk: number of the first of them.
    """
    # Noise depends on the keys and the chunk's number alone, not on what the cache holds.
    return jax.lax.map(
        lambda chunk: draw_noise(RolloutCarry(None, chunk, keys), stream, latent_shape),
        first_chunk + jnp.arange(chunks),
    )


def self_rollout(
    student: DiT,
    text: KeyValues,
    noise: ChunkNoise,
    exit_step: jax.Array,
    stream: StreamConfig,
    before: Cache | None = None,
    first_chunk: int = 0,
) -> tuple[Rollout, Cache]:
    """Rolls the student out on its own output; every chunk stops denoising after step `exit_step`.

    Args:
        text: the student's text keys and values.
        noise: of all chunks, see `draw_rollout_noise`; what is behind the exit step is not looked at.
        exit_step: one for all chunks and samples, int32 [] in 0 … T − 1.
        before, first_chunk: where the rollout goes on from, see `Rollout`.

    Returns:
        The record, and the cache after the last chunk.
    """
    student = jax.lax.stop_gradient(student)
    chunks, _, batch, _, height, width, _ = noise.content.shape
    cache = _empty_cache(student, stream, batch, height, width) if before is None else before
    phases = _fill_phases(first_chunk, chunks, stream)

    def step(cache: Cache, noise: ChunkNoise, phase: Phase):
        chunk = generate_chunk(student, cache, text, noise, stream, phase, exit_step)
        return _advance(cache, chunk, stream, phase), chunk

    fill = []
    for index, phase in enumerate(phases):
        given = jax.tree.map(lambda x, index=index: x[index], noise)
        cache, chunk = step(cache, given, phase)
        fill.append(chunk)
    steady = None
    if chunks > len(fill):
        phase = phase_of(stream.num_fill_chunks, stream)
        given = jax.tree.map(lambda x: x[len(fill) :], noise)
        cache, steady = jax.lax.scan(lambda cache, noise: step(cache, noise, phase), cache, given)
    return jax.lax.stop_gradient((Rollout(tuple(fill), steady, exit_step, before, first_chunk), cache))


def cache_before(
    student: DiT,
    text: KeyValues,
    keys: jax.Array,
    exit_step: jax.Array,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
    chunk: jax.Array,
    first_chunk: int,
) -> Cache:
    """The cache before a chunk of the rollout with these keys; of the chunks up to there nothing else is kept.

    Args:
        keys: one per sample [B].
        latent_shape: (H, W, C).
        chunk: its number, int32 [].
        first_chunk: the same, as `Rollout` has it, static.
    """
    student = jax.lax.stop_gradient(student)

    def step(number: jax.Array | int, cache: Cache, phase: Phase) -> Cache:
        noise = draw_noise(RolloutCarry(None, jnp.int32(number), keys), stream, latent_shape)
        chunk = generate_chunk(student, cache, text, noise, stream, phase, exit_step)
        return _advance(cache, chunk, stream, phase)

    cache = _empty_cache(student, stream, keys.shape[0], *latent_shape[:2])
    fill = stream.num_fill_chunks
    for number in range(first_chunk):
        cache = step(number, cache, phase_of(number, stream))
    if first_chunk == fill:
        steady = phase_of(fill, stream)
        cache = jax.lax.fori_loop(fill, chunk, lambda number, cache: step(number, cache, steady), cache)
    return jax.lax.stop_gradient(cache)


def _fill_phases(first_chunk: int, chunks: int, stream: StreamConfig) -> list[Phase]:
    """Phases of those of so many chunks that are in the fill."""
    return [phase_of(index, stream) for index in range(first_chunk, min(first_chunk + chunks, stream.num_fill_chunks))]


def _recorded_phases(record: Rollout, stream: StreamConfig) -> list[Phase]:
    """Phases of the record's fill chunks."""
    return _fill_phases(record.first_chunk, len(record.fill), stream)


def _cache_of(student: DiT, record: Rollout, stream: StreamConfig) -> Cache:
    """The cache before the record's first chunk."""
    if record.before is not None:
        return record.before
    noisy = record.fill[0].noisy
    return _empty_cache(student, stream, noisy.shape[0], *noisy.shape[2:4])


def _empty_cache(student: DiT, stream: StreamConfig, batch: int, height: int, width: int) -> Cache:
    frame_tokens = student.config.frame_tokens(height, width)
    return cache_lib.empty(student.config, stream.anchor, stream.past_frames, batch, frame_tokens)


def _advance(cache: Cache, chunk: GeneratedChunk, stream: StreamConfig, phase: Phase) -> Cache:
    return cache_lib.advance(cache, stream.anchor, layout_of(phase, stream), chunk.fresh, phase.first_frame)


def _exit_sigma(record: Rollout, stream: StreamConfig) -> jax.Array:
    return jnp.asarray(stream.sigmas, jnp.float32)[record.exit_step]


def record_frames(record: Rollout, stream: StreamConfig) -> int:
    """Content frames of a record."""
    steady = 0 if record.steady is None else record.steady.clean.shape[0]
    return (len(record.fill) + steady) * stream.chunk_frames


def rollout_latents(record: Rollout, stream: StreamConfig) -> jax.Array:
    """The content latents of a recorded rollout [B, N, H, W, C]."""
    phases = _recorded_phases(record, stream)
    contents = [
        split_live(chunk.clean, layout_of(phase, stream)).content
        for phase, chunk in zip(phases, record.fill, strict=True)
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
    student: DiT,
    text: KeyValues,
    record: Rollout,
    stream: StreamConfig,
    cache_gradient: str = "stop",
    through_chunks: int = 1,
) -> jax.Array:
    """The rollout's content latents again, now with gradient through each chunk's exit step.

    Args:
        student: the network to differentiate.
        text: its text keys and values, with gradient.
        record: the recorded rollout of the same weights.
        cache_gradient: see `DistillConfig`.
        through_chunks: how many chunks back the gradient goes through the state, where it does.

    Returns:
        Content latents [B, N, H, W, C], equal to `rollout_latents`.
    """
    if cache_gradient in ("stop", "state"):
        return _exit_passes(*split(student), text, record, stream, through_chunks if cache_gradient == "state" else 0)
    return _straight_through_pass(student, text, record, stream, through_anchor=cache_gradient != "window")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Before:
    """An earlier chunk, as the gradient goes back through its state.

    Attributes:
        noisy: what its last pass was given.
        cache: before it.
        live: whether a state was denoised with it, bool [].
    """

    noisy: jax.Array
    cache: Cache
    live: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _exit_passes(
    trained: Any, base: DiT | None, text: KeyValues, record: Rollout, stream: StreamConfig, through_chunks: int
) -> jax.Array:
    """`gradient_pass` with a constant cache: what the exit passes made is in the record, the gradient is theirs.

    It is taken of one chunk's pass at a time, and summed in float32, so that no more than one chunk's context and
    intermediate results are there at once. Through the state it is taken of a chunk's pass and of those of the
    `through_chunks` before it, which made the states that led to it: truncated back-propagation through time.

    trained, base: of the student, see `adapters.split`; the base gets no gradient.
    """
    return rollout_latents(record, stream)


def _exit_passes_forward(trained, base, text, record, stream, through_chunks):
    return _exit_passes(trained, base, text, record, stream, through_chunks), (trained, base, text, record)


def _state_of(
    student: DiT, text: KeyValues, before: tuple[_Before, ...], cache: Cache, sigma: jax.Array, stream: StreamConfig
) -> KeyValues:
    """The adaptive state in `cache`, as the chunks before made it of the state before them: with its gradient.

    What they saw of the window is constant.
    """
    layout = layout_of(phase_of(stream.num_fill_chunks, stream), stream)
    state = before[0].cache.anchor
    for chunk, after in zip(before, (*before[1:], None), strict=True):
        context = read_context(student.config, Cache(state, chunk.cache.window), stream, layout, chunk.noisy)
        clean, _ = denoise(student, chunk.noisy, sigma, text, layout, context)
        _, fresh = denoise(student, clean, 0.0, text, layout, context)
        found = cache.anchor if after is None else after.cache.anchor
        made = fresh.tokens(0, found.num_tokens)

        def with_gradient(value: jax.Array, path: jax.Array, live: jax.Array = chunk.live) -> jax.Array:
            return value + jnp.where(live, path - jax.lax.stop_gradient(path), 0).astype(value.dtype)

        state = jax.tree.map(with_gradient, found, made)
    return state


def _exit_passes_backward(stream: StreamConfig, through_chunks: int, saved, gradient: jax.Array):
    trained, base, text, record = saved
    student = join(trained, base)
    sigma = _exit_sigma(record, stream)
    chunks = jnp.stack(jnp.split(gradient, gradient.shape[1] // stream.chunk_frames, axis=1))  # [K, B, F, H, W, C]

    def step(carry, inputs: tuple[GeneratedChunk, jax.Array], phase: Phase):
        cache, to_student, to_text, before = carry
        (chunk, to_content), layout = inputs, layout_of(phase, stream)
        goes_back = through_chunks and phase.steady

        def exit_pass(trained, text, noisy):
            network, seen = join(trained, base), cache
            if goes_back:
                seen = Cache(_state_of(network, text, before, cache, sigma, stream), cache.window)
            context = read_context(network.config, seen, stream, layout, noisy)
            clean, _ = denoise(network, noisy, sigma, text, layout, context)
            return split_live(clean, layout).content

        _, pull_back = jax.vjp(exit_pass, trained, text, chunk.noisy)
        of_student, of_text, to_noisy = pull_back(to_content)
        sums = add_in_float32(to_student, of_student), jax.tree.map(jnp.add, to_text, of_text)
        if goes_back:
            before = (*before[1:], _Before(chunk.noisy, cache, jnp.bool_(True)))
        return (_advance(cache, chunk, stream, phase), *sums, before), to_noisy

    exact_zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), text)
    carry = _cache_of(student, record, stream), zeros_in_float32(trained), constrain_kept(exact_zeros), ()
    to_fill = []
    for index, (chunk, phase) in enumerate(zip(record.fill, _recorded_phases(record, stream), strict=True)):
        carry, to_noisy = step(carry, (chunk, chunks[index]), phase)
        to_fill.append(dataclasses.replace(_zeros(chunk), noisy=to_noisy))
    to_steady = None
    if record.steady is not None:
        phase = phase_of(stream.num_fill_chunks, stream)
        steady = (record.steady, chunks[len(to_fill) :])
        none_yet = _Before(jnp.zeros_like(record.steady.noisy[0]), carry[0], jnp.bool_(False))
        carry = (*carry[:3], (none_yet,) * through_chunks)
        carry, to_noisy = jax.lax.scan(functools.partial(step, phase=phase), carry, steady)
        to_steady = dataclasses.replace(_zeros(record.steady), noisy=to_noisy)
    to_trained, to_text = jax.tree.map(lambda x, like: x.astype(like.dtype), carry[1:3], (trained, text))
    none = jax.tree.map(_no_gradient, (record.exit_step, record.before))
    return to_trained, None, to_text, Rollout(tuple(to_fill), to_steady, *none, record.first_chunk)


_exit_passes.defvjp(_exit_passes_forward, _exit_passes_backward)


def _no_gradient(x: jax.Array) -> jax.Array | np.ndarray:
    """The gradient of what is constant: zeros, of the type that JAX wants for integers where these are some."""
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.zeros_like(x) if inexact else np.zeros(x.shape, jax.dtypes.float0)


def _zeros(chunk: GeneratedChunk) -> GeneratedChunk:
    return jax.tree.map(jnp.zeros_like, chunk)


def _straight_through_pass(
    student: DiT, text: KeyValues, record: Rollout, stream: StreamConfig, through_anchor: bool
) -> jax.Array:
    """`gradient_pass` whose cache has the clean values, and the gradient of each chunk's exit pass.

    through_anchor: whether that gradient also goes through the anchor's memory, or through the window alone.
    """
    sigma = _exit_sigma(record, stream)
    cache = jax.lax.stop_gradient(_cache_of(student, record, stream))

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
    for chunk, phase in zip(record.fill, _recorded_phases(record, stream), strict=True):
        cache, content = step(cache, chunk, phase)
        contents.append(content)
    if record.steady is not None:
        phase = phase_of(stream.num_fill_chunks, stream)
        _, scanned = jax.lax.scan(lambda cache, chunk: step(cache, chunk, phase), cache, record.steady)
        contents.append(_join_chunks(scanned))
    return jnp.concatenate(contents, axis=1)
