"""The student's rollout on its own output, and the same again with gradient.

The rollout runs without gradient first and records each chunk: what its last pass was given, what that made of it, and
the clean keys and values. The gradient pass repeats just the last passes, chunk after chunk, against the cache that it
fills from the record again. Noise and exit step are given, so that training, which draws them, and `verify`, which
reads them from a file, run the same functions. Source: arXiv 2605.30349, after Self-Forcing (guandeh17/Self-Forcing).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

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
    """

    # Of every chunk its own. What it read of the cache follows from the chunks before.
    fill: tuple[GeneratedChunk, ...]
    steady: GeneratedChunk | None

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
        return _advance(cache, chunk, stream, phase), chunk

    cache = _empty_cache(student, stream, batch, height, width)
    fill = []
    for index in range(min(chunks, stream.num_fill_chunks)):
        given = jax.tree.map(lambda x, index=index: x[index], noise)
        cache, chunk = step(cache, given, phase_of(index, stream))
        fill.append(chunk)
    steady = None
    if chunks > len(fill):
        phase = phase_of(stream.num_fill_chunks, stream)
        given = jax.tree.map(lambda x: x[len(fill) :], noise)
        _, steady = jax.lax.scan(lambda cache, noise: step(cache, noise, phase), cache, given)
    return jax.lax.stop_gradient(Rollout(tuple(fill), steady, exit_step))


def _empty_cache(student: DiT, stream: StreamConfig, batch: int, height: int, width: int) -> Cache:
    frame_tokens = student.config.frame_tokens(height, width)
    return cache_lib.empty(student.config, stream.anchor, stream.past_frames, batch, frame_tokens)


def _advance(cache: Cache, chunk: GeneratedChunk, stream: StreamConfig, phase: Phase) -> Cache:
    return cache_lib.advance(cache, stream.anchor, layout_of(phase, stream), chunk.fresh, phase.first_frame)


def _exit_sigma(record: Rollout, stream: StreamConfig) -> jax.Array:
    return jnp.asarray(stream.sigmas, jnp.float32)[record.exit_step]


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
    return _exit_passes(student, text, record, stream)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exit_passes(student: DiT, text: KeyValues, record: Rollout, stream: StreamConfig) -> jax.Array:
    """`gradient_pass` with a constant cache: what the exit passes made is in the record, the gradient is theirs.

    It is taken of one chunk's pass at a time, and summed in float32, so that no more than one chunk's context and
    intermediate results are there at once.
    """
    return rollout_latents(record, stream)


def _exit_passes_forward(student, text, record, stream):
    return _exit_passes(student, text, record, stream), (student, text, record)


def _exit_passes_backward(stream: StreamConfig, saved, gradient: jax.Array):
    student, text, record = saved
    sigma = _exit_sigma(record, stream)
    noisy = record.fill[0].noisy
    chunks = jnp.stack(jnp.split(gradient, gradient.shape[1] // stream.chunk_frames, axis=1))  # [K, B, F, H, W, C]

    def step(carry, inputs: tuple[GeneratedChunk, jax.Array], phase: Phase):
        cache, to_student, to_text = carry
        (chunk, to_content), layout = inputs, layout_of(phase, stream)
        context = read_context(student.config, cache, stream, layout, chunk.noisy)

        def exit_pass(student, text, noisy):
            clean, _ = denoise(student, noisy, sigma, text, layout, context)
            return split_live(clean, layout).content

        _, pull_back = jax.vjp(exit_pass, student, text, chunk.noisy)
        of_student, of_text, to_noisy = pull_back(to_content)
        sums = add_in_float32(to_student, of_student), jax.tree.map(jnp.add, to_text, of_text)
        return (_advance(cache, chunk, stream, phase), *sums), to_noisy

    exact_zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), text)
    cache = _empty_cache(student, stream, noisy.shape[0], *noisy.shape[2:4])
    carry = cache, zeros_in_float32(student), constrain_kept(exact_zeros)
    to_fill = []
    for index, chunk in enumerate(record.fill):
        carry, to_noisy = step(carry, (chunk, chunks[index]), phase_of(index, stream))
        to_fill.append(dataclasses.replace(_zeros(chunk), noisy=to_noisy))
    to_steady = None
    if record.steady is not None:
        phase = phase_of(stream.num_fill_chunks, stream)
        steady = (record.steady, chunks[len(to_fill) :])
        carry, to_noisy = jax.lax.scan(functools.partial(step, phase=phase), carry, steady)
        to_steady = dataclasses.replace(_zeros(record.steady), noisy=to_noisy)
    to_weights = jax.tree.map(lambda x, like: x.astype(like.dtype), carry[1:], (student, text))
    no_gradient = np.zeros(record.exit_step.shape, jax.dtypes.float0)
    return (*to_weights, Rollout(tuple(to_fill), to_steady, no_gradient))


_exit_passes.defvjp(_exit_passes_forward, _exit_passes_backward)


def _zeros(chunk: GeneratedChunk) -> GeneratedChunk:
    return jax.tree.map(jnp.zeros_like, chunk)


def _straight_through_pass(
    student: DiT, text: KeyValues, record: Rollout, stream: StreamConfig, through_anchor: bool
) -> jax.Array:
    """`gradient_pass` whose cache has the clean values, and the gradient of each chunk's exit pass.

    through_anchor: whether that gradient also goes through the anchor's memory, or through the window alone.
    """
    sigma = _exit_sigma(record, stream)
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
