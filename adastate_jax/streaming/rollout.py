"""The stream: one chunk step, and its two drivers, `rollout` (a `lax.scan`) and `stream` (a generator).

A chunk starts from noise, is denoised through a few noise levels against the frozen cache, and a last clean pass gives
the keys and values that the cache keeps. A hidden state, if the anchor has one, is denoised with it. While the window
fills, each chunk has its own shapes; from then on one step function serves every chunk, whatever its number.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, denoising_sigmas, draw_normal, flow_to_clean
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.sharding import constrain
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors import AdaptiveAnchor, Layout, NoAnchor
from adastate_jax.streaming.cache import Cache


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How a stream is generated; the defaults are AdaState's.

    Attributes:
        chunk_frames: content latent frames per chunk, F.
        past_frames: content frames kept in the window, W_p.
        anchor: the anchor strategy, with its frames F_s.
        denoising_steps: raw step list on 0..1000, strictly decreasing.
        shift: warp of the step list.
    """

    chunk_frames: int = 3
    past_frames: int = 3
    anchor: NoAnchor = dataclasses.field(default_factory=AdaptiveAnchor)
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0

    def __post_init__(self):
        if self.chunk_frames < 1 or self.past_frames < 0:
            raise ValueError(
                f"chunk_frames must be at least 1 and past_frames at least 0, got {self.chunk_frames} and "
                f"{self.past_frames}"
            )
        before_steady = self.num_fill_chunks * self.chunk_frames
        if self.anchor.frames > before_steady:
            raise ValueError(
                f"an anchor of {self.anchor.frames} frames cannot be taken from the {before_steady} frames before "
                "the first eviction; enlarge past_frames or chunk_frames, or shrink the anchor"
            )
        denoising_sigmas(self.denoising_steps, self.shift)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each denoising step."""
        return denoising_sigmas(self.denoising_steps, self.shift)

    @property
    def num_fill_chunks(self) -> int:
        """Chunks k with k F ≤ W_p: they evict nothing older than themselves and see neither anchor nor state."""
        return self.past_frames // self.chunk_frames + 1


@dataclasses.dataclass(frozen=True)
class Phase:
    """What distinguishes one compiled step from another: frames in the window, and whether the anchor takes part.

    `first_frame` is the stream index of the chunk's first frame during the fill, None in the steady state.
    """

    cached_frames: int
    first_frame: int | None

    @property
    def steady(self) -> bool:
        return self.first_frame is None


def phase_of(chunk: int, config: StreamConfig) -> Phase:
    """The phase of chunk number `chunk` (from 0)."""
    first_frame = chunk * config.chunk_frames
    steady = first_frame > config.past_frames
    return Phase(min(first_frame, config.past_frames), None if steady else first_frame)


def layout_of(phase: Phase, config: StreamConfig) -> Layout:
    """Positions of everything that a chunk in this phase sees."""
    return config.anchor.layout(phase.cached_frames, config.chunk_frames, phase.steady)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutCarry:
    """All that passes from chunk to chunk.

    Attributes:
        cache: keys and values of all layers, the adaptive state among them.
        chunk: number of the next chunk, int32 [].
        keys: one random key per sample, [B]; never advanced: chunk k draws from fold_in(key, k).
    """

    cache: Cache
    chunk: jax.Array
    keys: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkNoise:
    """Standard normal noise of one chunk: index 0 starts it, index i re-noises it after step i − 1.

    content [T, B, F, H, W, C]; state [T, B, F_s, H, W, C].
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
    """Random keys [batch] of the samples with seeds seed, seed + 1, …"""
    return jax.vmap(jax.random.key)(jnp.arange(seed, seed + batch))


def initial_carry(model: DiTConfig, config: StreamConfig, keys: jax.Array, height: int, width: int) -> RolloutCarry:
    """The carry before the first chunk, for latents of height × width and one key per sample, [B]."""
    frame_tokens = model.frame_tokens(height, width)
    cache = cache_lib.empty(model, config.anchor, config.past_frames, keys.shape[0], frame_tokens)
    return RolloutCarry(cache, jnp.int32(0), keys)


def draw_noise(carry: RolloutCarry, config: StreamConfig, latent_shape: tuple[int, int, int]) -> ChunkNoise:
    """The noise of the carry's next chunk; latent_shape is (H, W, C).

    A sample's content noise depends on its key and the chunk number alone, not on the batch, nor on the anchor.
    """

    def draw(key: jax.Array, part: int, frames: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, carry.chunk), part)
        return draw_normal(key, (len(config.sigmas), frames, *latent_shape))

    content = jax.vmap(lambda key: draw(key, 0, config.chunk_frames), out_axes=1)(carry.keys)
    state = jax.vmap(lambda key: draw(key, 1, config.anchor.state_frames), out_axes=1)(carry.keys)
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
    model: DiT, live: jax.Array, sigma, text: KeyValues, layout: Layout, context: KeyValues | None
) -> tuple[jax.Array, KeyValues]:
    """One pass at one noise level.

    Args:
        live: noisy live frames [B, F_s + F, H, W, C].
        sigma: their noise level, a float or a scalar array.

    Returns:
        The clean estimate x̂_0, and the live frames' own keys (un-rotated) and values.
    """
    timesteps = jnp.broadcast_to(jnp.float32(MAX_TIMESTEP * sigma), live.shape[:2])
    flow, fresh = model(live, timesteps, text, layout.live, context=context)
    return flow_to_clean(flow, live, sigma), fresh


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
    """
    layout = layout_of(phase, config)
    context = read_context(model.config, cache, config, layout, noise.content[0])
    noises = live_noise(noise, layout)
    sigmas = jnp.asarray([*config.sigmas, 0.0], jnp.float32)
    tokens = len(layout.live) * model.config.frame_tokens(*noises.shape[3:5])
    shape = (model.config.num_layers, noises.shape[1], tokens, model.config.num_heads, model.config.head_dim)
    unwritten = constrain(jnp.zeros(shape, model.config.dtype), None, "batch")

    def turn(step, carry):
        live, noisy, _ = carry
        sigma = jnp.where(step <= last_step, sigmas[step], 0.0)
        clean, fresh = denoise(model, live, sigma, text, layout, context)
        # After the last step the next level is zero: nothing is added, and `live` is the clean estimate itself.
        next_sigma = jnp.where(step < last_step, sigmas[step + 1], 0.0)
        next_noise = noises[jnp.minimum(step + 1, len(config.sigmas) - 1)]
        return add_noise(clean, next_noise, next_sigma), jnp.where(step <= last_step, live, noisy), fresh

    start = (noises[0], noises[0], KeyValues(unwritten, unwritten))
    clean, noisy, fresh = jax.lax.fori_loop(0, last_step + 2, turn, start)
    return GeneratedChunk(noisy, clean, fresh)


def rollout_step(
    model: DiT, carry: RolloutCarry, text: KeyValues, noise: ChunkNoise, config: StreamConfig, phase: Phase
) -> tuple[RolloutCarry, Chunk]:
    """Generates one chunk from given noise.

    Args:
        model: the causal student.
        carry: the stream so far.
        text: `model.text_keys_values` of the prompts, [layers, B, T, heads, head_dim].
        noise: the chunk's noise.
        config, phase: static; `phase_of(chunk, config)`.

    Returns:
        The carry after the chunk, and its clean latents.
    """
    generated = generate_chunk(model, carry.cache, text, noise, config, phase, len(config.sigmas) - 1)
    layout = layout_of(phase, config)
    cache = cache_lib.advance(carry.cache, config.anchor, layout, generated.fresh, phase.first_frame)
    return RolloutCarry(cache, carry.chunk + 1, carry.keys), split_live(generated.clean, layout)


def rollout(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    num_chunks: int,
    first_chunk: int = 0,
) -> tuple[RolloutCarry, jax.Array]:
    """Generates `num_chunks` chunks in one traced program: the fill chunk by chunk, the steady state as a `lax.scan`.

    Args:
        latent_shape: (H, W, C) of a latent frame.
        first_chunk: number of the carry's next chunk, static.

    Returns:
        The carry, and the content latents [B, num_chunks · F, H, W, C].
    """

    def step(carry: RolloutCarry, phase: Phase):
        carry, chunk = rollout_step(model, carry, text, draw_noise(carry, config, latent_shape), config, phase)
        return carry, chunk.content

    contents = []
    last_chunk = first_chunk + num_chunks
    num_filling = max(min(config.num_fill_chunks, last_chunk) - first_chunk, 0)
    for chunk in range(first_chunk, first_chunk + num_filling):
        carry, content = step(carry, phase_of(chunk, config))
        contents.append(content)
    if num_chunks > num_filling:
        steady = phase_of(config.num_fill_chunks, config)
        carry, scanned = jax.lax.scan(lambda carry, _: step(carry, steady), carry, length=num_chunks - num_filling)
        contents.append(jnp.moveaxis(scanned, 0, 1).reshape(scanned.shape[1], -1, *latent_shape))
    return carry, jnp.concatenate(contents, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "latent_shape", "phase"), donate_argnames="carry")
def stream_step(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    phase: Phase,
) -> tuple[RolloutCarry, Chunk]:
    """`rollout_step` with the carry's own noise, compiled once per phase; the carry is donated."""
    return rollout_step(model, carry, text, draw_noise(carry, config, latent_shape), config, phase)


def stream(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    num_chunks: int | None = None,
) -> Iterator[tuple[RolloutCarry, Chunk]]:
    """Generates chunk after chunk, `num_chunks` of them or without end.

    Yields:
        The carry after the chunk, and the chunk. A yielded carry is donated when the next chunk is asked for: copy it
        before if it is to be kept.
    """
    chunk = int(carry.chunk)
    last_chunk = None if num_chunks is None else chunk + num_chunks
    while last_chunk is None or chunk < last_chunk:
        carry, generated = stream_step(model, carry, text, config, latent_shape, phase_of(chunk, config))
        chunk += 1
        yield carry, generated
