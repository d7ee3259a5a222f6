"""The stream: one chunk step, and its two drivers, `rollout` (a `lax.scan`) and `stream` (a generator).

A chunk starts from noise, is denoised through a few noise levels against the frozen cache, and a last clean pass gives
the keys and values that the cache keeps. A hidden state, if the anchor has one, is denoised with it. While the window
fills, each chunk has its own shapes; from then on one step function serves every chunk, whatever its number.

There are two ways to denoise: chunk after chunk, or jointly (Rolling-Forcing), several chunks on a staircase of noise
levels, of which every step finishes the oldest.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, draw_normal, flow_to_clean
from adastate_jax.errors import UserError
from adastate_jax.models.attention import Attend, KeyValues
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.sharding import constrain
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors import Layout
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.schedule import (
    Phase,
    StreamConfig,
    clean_layout_of,
    layout_of,
    phase_of,
    restarts_after,
    sigmas_of,
)

# Makes a rollout's last chunk [B, F, H, W, C] into the first of the next, for strategies that restart.
Reencode = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutCarry:
    """All that passes from chunk to chunk.

    Attributes:
        cache: keys and values of all layers, the adaptive state among them.
        chunk: number of the next chunk, int32 [].
        keys: one random key per sample, [B]; never advanced: chunk k draws from fold_in(key, k).
        estimates: x̂_0 of the next chunks, as far as they are denoised, [B, (T − 1) F, H, W, C]; None unless chunks are
            denoised jointly.
    """

    cache: Cache
    chunk: jax.Array
    keys: jax.Array
    estimates: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkNoise:
    """Standard normal noise of one chunk: index 0 starts it, index i re-noises it after step i − 1.

    content [T, B, F, H, W, C], for joint denoising of all live chunks [T, B, T F, H, W, C]; state [T, B, F_s, H, W, C].
    """

    content: jax.Array
    state: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The clean latents of one chunk.

    content [B, F, H, W, C]; the hidden state [B, F_s, H, W, C], None in the fill.
    """

    content: jax.Array
    state: jax.Array | None


def seed_keys(seed: int, batch: int) -> jax.Array:
    """Random keys [batch] of the samples with seeds seed, seed + 1, …

    Raises:
        UserError: a seed is not in 0 … 2³² − 1, which are those that differ.
    """
    if not 0 <= seed <= 2**32 - batch:
        samples = f" for {batch} samples" if batch > 1 else ""
        raise UserError(f"seed must lie in 0 … {2**32 - batch}{samples}, got {seed}")
    return jax.vmap(jax.random.key)(jnp.uint32(seed) + jnp.arange(batch, dtype=jnp.uint32))


def initial_carry(model: DiTConfig, config: StreamConfig, keys: jax.Array, height: int, width: int) -> RolloutCarry:
    """The carry before the first chunk, for latents of height × width and one key per sample, [B]."""
    frame_tokens = model.frame_tokens(height, width)
    cache = cache_lib.empty(model, config.anchor, config.past_frames, keys.shape[0], frame_tokens)
    estimates = None
    if config.anchor.joint:
        frames = (config.live_chunks - 1) * config.chunk_frames
        estimates = jnp.zeros((keys.shape[0], frames, height, width, model.in_channels))
    return RolloutCarry(cache, jnp.int32(0), keys, estimates)


def draw_noise(carry: RolloutCarry, config: StreamConfig, latent_shape: tuple[int, int, int]) -> ChunkNoise:
    """The noise of the carry's next chunk; latent_shape is (H, W, C).

    A chunk's content noise depends on the sample's key and its number alone, not on the batch, nor on the anchor.
    """
    steps = max(len(config.sigmas), len(config.first_sigmas))

    def draw(key: jax.Array, chunk, part: int, frames: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, chunk), part)
        return draw_normal(key, (steps, frames, *latent_shape))

    def draw_content(key: jax.Array) -> jax.Array:
        live = [draw(key, carry.chunk + i, 0, config.chunk_frames) for i in range(config.live_chunks)]
        content = jnp.concatenate(live, axis=1)
        if not config.repeat_noise:
            return content
        start = jnp.tile(draw(key, 0, 0, config.chunk_frames)[:1], (1, config.live_chunks, 1, 1, 1))
        return jnp.concatenate([start, content[1:]])

    content = jax.vmap(draw_content, out_axes=1)(carry.keys)
    state = jax.vmap(lambda key: draw(key, carry.chunk, 1, config.anchor.state_frames), out_axes=1)(carry.keys)
    return ChunkNoise(constrain(content, None, "batch"), constrain(state, None, "batch"))


def live_noise(noise: ChunkNoise, layout: Layout) -> jax.Array:
    """Noise of the live frames, state first: [T, B, F_s + F, H, W, C], or [T, B, F, H, W, C] without a live state."""
    return jnp.concatenate([noise.state, noise.content], axis=2) if layout.state else noise.content


def split_live(live: jax.Array, layout: Layout) -> Chunk:
    """Live latents [B, F_s + F, H, W, C] as state and content."""
    state_frames = len(layout.state)
    return Chunk(live[:, state_frames:], live[:, :state_frames] if state_frames else None)


def read_context(model: DiTConfig, cache: Cache, config: StreamConfig, layout: Layout, latents: jax.Array):
    """The cached keys (rotated) and values that live `latents` [B, F, H, W, C] attend to, or None."""
    _, patch_height, patch_width = model.patch_size
    height, width = latents.shape[2] // patch_height, latents.shape[3] // patch_width
    return cache_lib.read(cache, config.anchor, layout, height, width, model.head_dim)


def denoise(
    model: DiT,
    live: jax.Array,
    sigma,
    text: KeyValues,
    layout: Layout,
    context: KeyValues | None,
    attend: Attend | None = None,
) -> tuple[jax.Array, Any]:
    """One pass at one noise level.

    Args:
        live: noisy live frames [B, F_s + F, H, W, C].
        sigma: their noise level, a float, a scalar array, or of each frame its own, [1 or B, F_s + F].
        attend: see `DiT.__call__`.

    Returns:
        The clean estimate x̂_0, and what `attend` kept: the live frames' own keys (un-rotated) and values.
    """
    timesteps = jnp.broadcast_to(jnp.float32(MAX_TIMESTEP * sigma), live.shape[:2])
    flow, kept = model(live, timesteps, text, layout.live, attend, context)
    return flow_to_clean(flow, live, sigma), kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratedChunk:
    """The live frames of one chunk, state first.

    Attributes:
        noisy: input of the last denoising pass [B, F_s + F, H, W, C].
        clean: its output x̂_0.
        fresh: keys (un-rotated) and values of `clean` at noise level zero, [layers, B, tokens, heads, head_dim].
    """

    noisy: jax.Array
    clean: jax.Array
    fresh: KeyValues


def generate_chunk(
    model: DiT, cache: Cache, text: KeyValues, noise: ChunkNoise, config: StreamConfig, phase: Phase, last_step
) -> GeneratedChunk:
    """Denoises one chunk against the frozen cache up to and with step `last_step`, then passes over it clean.

    All passes, the clean one among them, are turns of one loop, so that the network is compiled once.

    Args:
        last_step: an int, or a traced scalar, in 0 … T − 1.

    Raises:
        ValueError: chunks are denoised jointly, there is no single one to generate.
    """
    if config.anchor.joint:
        raise ValueError(f"{type(config.anchor).__name__} denoises chunks jointly; it generates none by itself")
    layout = layout_of(phase, config)
    context = read_context(model.config, cache, config, layout, noise.content[0])
    noises = live_noise(noise, layout)
    steps = sigmas_of(phase, config)
    sigmas = jnp.asarray([*steps, 0.0], jnp.float32)
    tokens = len(layout.live) * model.config.frame_tokens(*noises.shape[3:5])
    shape = (model.config.num_layers, noises.shape[1], tokens, model.config.num_heads, model.config.head_dim)
    unwritten = constrain(jnp.zeros(shape, model.config.dtype), None, "batch", None, "heads")

    def turn(step, carry):
        live, noisy, _ = carry
        sigma = jnp.where(step <= last_step, sigmas[step], 0.0)
        clean, fresh = denoise(model, live, sigma, text, layout, context)
        # After the last step the next level is zero: nothing is added, and `live` is the clean estimate itself.
        next_sigma = jnp.where(step < last_step, sigmas[step + 1], 0.0)
        next_noise = noises[jnp.minimum(step + 1, len(steps) - 1)]
        return add_noise(clean, next_noise, next_sigma), jnp.where(step <= last_step, live, noisy), fresh

    start = (noises[0], noises[0], KeyValues(unwritten, unwritten))
    clean, noisy, fresh = jax.lax.fori_loop(0, last_step + 2, turn, start)
    return GeneratedChunk(noisy, clean, fresh)


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
        return _joint_step(model, carry, text, noise, config, phase)
    layout = layout_of(phase, config)
    generated = generate_chunk(model, carry.cache, text, noise, config, phase, len(sigmas_of(phase, config)) - 1)
    chunk = split_live(generated.clean, layout)
    if restarts_after(phase, config):
        overlap = chunk.content if reencode is None else reencode(chunk.content)
        cache = _restarted(model, carry.cache, text, overlap, config)
    else:
        cache = cache_lib.advance(carry.cache, config.anchor, layout, generated.fresh, phase.first_frame)
    return RolloutCarry(cache, carry.chunk + 1, carry.keys), chunk


def _restarted(model: DiT, cache: Cache, text: KeyValues, overlap: jax.Array, config: StreamConfig) -> Cache:
    """The cache of a new rollout whose first chunk is given, clean [B, F, H, W, C]."""
    layout = layout_of(Phase(0), config)
    _, fresh = denoise(model, overlap, 0.0, text, layout, None)
    return cache_lib.advance(jax.tree.map(jnp.zeros_like, cache), config.anchor, layout, fresh, 0)


def _joint_step(
    model: DiT, carry: RolloutCarry, text: KeyValues, noise: ChunkNoise, config: StreamConfig, phase: Phase
) -> tuple[RolloutCarry, Chunk]:
    """Finishes the oldest of the live chunks; each of the others comes a noise level lower, and a new one enters.

    The video's first chunk is preceded by the passes in which the staircase grows, one chunk longer each.
    """
    frames, last = config.chunk_frames, len(config.sigmas) - 1

    def one_pass(clean: jax.Array, oldest: int) -> jax.Array:
        """Clean estimates after a pass with the oldest chunk at level `oldest`, the next one a level above, …"""
        levels = range(oldest, max(oldest - phase.live_chunks, -1), -1)
        sigma = jnp.repeat(jnp.asarray([config.sigmas[level] for level in levels], jnp.float32), frames)[None]
        fresh = [noise.content[level][:, i * frames : (i + 1) * frames] for i, level in enumerate(levels)]
        # A chunk that enters has no estimate yet; it does not matter at σ = 1.
        clean = _with_frames(clean, len(levels) * frames)
        live = add_noise(clean, jnp.concatenate(fresh, axis=1), sigma)
        layout = layout_of(dataclasses.replace(phase, live_chunks=len(levels)), config)
        context = read_context(model.config, carry.cache, config, layout, live)
        return denoise(model, live, sigma, text, layout, context)[0]

    clean = carry.estimates
    if phase.first_frame == 0:
        clean = clean[:, :0]
        for oldest in range(last):
            clean = one_pass(clean, oldest)
    clean = one_pass(clean, last)
    content = clean[:, :frames]

    layout = clean_layout_of(phase, config)
    context = read_context(model.config, carry.cache, config, layout, content)
    _, fresh = denoise(model, content, 0.0, text, layout, context)
    cache = cache_lib.advance(carry.cache, config.anchor, layout, fresh, phase.first_frame)
    estimates = _with_frames(clean[:, frames:], last * frames)
    return RolloutCarry(cache, carry.chunk + 1, carry.keys, estimates), Chunk(content, None)


def _with_frames(latents: jax.Array, frames: int) -> jax.Array:
    """The first `frames` frames of latents [B, F, H, W, C], zeros behind them where there are fewer."""
    missing = max(frames - latents.shape[1], 0)
    return jnp.pad(latents[:, :frames], ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))


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
