"""The stream: one chunk step, and its two drivers, `rollout` (a `lax.scan`) and `stream` (a generator).

A chunk starts from noise, is denoised through a few noise levels against the frozen cache, and a last clean pass gives
the keys and values that the cache keeps. A hidden state, if the anchor has one, is denoised with it. While the window
fills, each chunk has its own shapes; from then on one step function serves every chunk, whatever its number.

There are two ways to denoise: chunk after chunk (`denoising.py`), or jointly (`joint.py`), several chunks on a
staircase of noise levels, of which every step finishes the oldest.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import Chunk, ChunkNoise, RolloutCarry, draw_noise
from adastate_jax.streaming.denoising import denoise, generate_chunk, split_live
from adastate_jax.streaming.joint import joint_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of, restarts_after, sigmas_of

# Makes a rollout's last chunk [B, F, H, W, C] into the first of the next, for strategies that restart.
Reencode = Callable[[jax.Array], jax.Array]


def rollout_step(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    noise: ChunkNoise,
    config: StreamConfig,
    phase: Phase,
    reencode: Reencode | None = None,
) -> tuple[RolloutCarry, Chunk]:
    """Generates one chunk from given noise.

    Args:
        model: the causal student.
        carry: the stream so far.
        text: `model.text_keys_values` of the prompts, [layers, B, T, heads, head_dim].
        noise: the chunk's noise.
        config, phase: static; `phase_of(chunk, config)`.
        reencode: what a restart does to its overlap (CausVid: the first latent becomes the image latent of its last
            video frame, the first that both rollouts show); a `jax.tree_util.Partial` where it holds arrays. None takes
            the overlap as it is.

    Returns:
        The carry after the chunk, and its clean latents.
    """
    if config.anchor.joint:
        return joint_step(model, carry, text, noise, config, phase)
    layout = layout_of(phase, config)
    generated = generate_chunk(model, carry.cache, text, noise, config, phase, len(sigmas_of(phase, config)) - 1)
    chunk = split_live(generated.clean, layout)
    if restarts_after(phase, config):
        overlap = chunk.content if reencode is None else reencode(chunk.content)
        chunk = Chunk(chunk.content, chunk.state, overlap)
        cache = _restarted(model, text, overlap, config)
    else:
        cache = cache_lib.advance(carry.cache, config.anchor, layout, generated.fresh, phase.first_frame)
    return RolloutCarry(cache, carry.chunk + 1, carry.keys), chunk


def _restarted(model: DiT, text: KeyValues, overlap: jax.Array, config: StreamConfig) -> Cache:
    """The cache of a new rollout whose first chunk is given, clean [B, F, H, W, C]."""
    layout = layout_of(Phase(0), config)
    _, fresh = denoise(model, overlap, 0.0, text, layout, None)
    frame_tokens = fresh.num_tokens // config.chunk_frames
    empty = cache_lib.empty(model.config, config.anchor, config.past_frames, overlap.shape[0], frame_tokens)
    return cache_lib.advance(empty, config.anchor, layout, fresh, 0)


def rollout(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    num_chunks: int,
    first_chunk: int = 0,
    reencode: Reencode | None = None,
) -> tuple[RolloutCarry, jax.Array]:
    """Generates `num_chunks` chunks in one traced program: the fill chunk by chunk, the steady state as a `lax.scan`.

    Args:
        latent_shape: (H, W, C) of a latent frame.
        num_chunks: where chunks are denoised jointly, the video ends with them, and cannot go on.
        first_chunk: number of the carry's next chunk, static.
        reencode: see `rollout_step`.

    Returns:
        The carry, and the content latents [B, num_chunks · F, H, W, C].
    """
    last_chunk = first_chunk + num_chunks
    cycle, fill = config.cycle, config.num_fill_chunks

    def step(carry: RolloutCarry, phase: Phase):
        noise = draw_noise(carry, config, latent_shape)
        carry, chunk = rollout_step(model, carry, text, noise, config, phase, reencode)
        return carry, chunk.content

    def whole_cycle(carry: RolloutCarry, _):
        contents = []
        for phase in cycle:
            carry, content = step(carry, phase)
            contents.append(content)
        return carry, jnp.concatenate(contents, axis=1)

    contents = []
    chunk = first_chunk
    while chunk < last_chunk:
        starts_cycle = chunk >= fill and (chunk - fill) % len(cycle) == 0
        cycles = (last_chunk - (config.live_chunks - 1) - chunk) // len(cycle) if starts_cycle else 0
        if cycles > 0:
            carry, scanned = jax.lax.scan(whole_cycle, carry, length=cycles)
            contents.append(jnp.moveaxis(scanned, 0, 1).reshape(scanned.shape[1], -1, *latent_shape))
            chunk += cycles * len(cycle)
        else:
            carry, content = step(carry, phase_of(chunk, config, remaining=last_chunk - chunk))
            contents.append(content)
            chunk += 1
    return carry, jnp.concatenate(contents, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "latent_shape", "phase"), donate_argnames="carry")
def stream_step(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    phase: Phase,
    reencode: Reencode | None = None,
) -> tuple[RolloutCarry, Chunk]:
    """`rollout_step` with the carry's own noise, compiled once per phase; the carry is donated."""
    return rollout_step(model, carry, text, draw_noise(carry, config, latent_shape), config, phase, reencode)


def stream(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    num_chunks: int | None = None,
    reencode: Reencode | None = None,
) -> Iterator[tuple[RolloutCarry, Chunk]]:
    """Generates chunk after chunk, `num_chunks` of them or without end.

    Where chunks are denoised jointly, `num_chunks` ends the video: the last chunks see fewer and fewer after them.

    Yields:
        The carry after the chunk, and the chunk. A yielded carry is donated when the next chunk is asked for: copy it
        before if it is to be kept.
    """
    chunk = int(carry.chunk)
    last_chunk = None if num_chunks is None else chunk + num_chunks
    while last_chunk is None or chunk < last_chunk:
        phase = phase_of(chunk, config, remaining=None if last_chunk is None else last_chunk - chunk)
        carry, generated = stream_step(model, carry, text, config, latent_shape, phase, reencode)
        chunk += 1
        yield carry, generated
