"""What passes from chunk to chunk, the noise that a chunk takes, and what comes of it: the types of a stream."""

import dataclasses

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import draw_normal
from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiTConfig
from adastate_jax.sharding import constrain
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.schedule import StreamConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutCarry:
    """All that passes from chunk to chunk."""

    # What every chunk replaces.
    cache: Cache  # keys and values of all layers, the adaptive state among them
    chunk: jax.Array  # number of the next chunk, int32 []
    # What never changes.
    keys: jax.Array  # one random key per sample, [B]; never advanced: chunk k draws from fold_in(key, k)
    # What every chunk replaces where chunks are denoised jointly; None elsewhere.
    estimates: jax.Array | None = None  # x̂_0 of the next chunks, as far as they are denoised, [B, (T − 1) F, H, W, C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkNoise:
    """Standard normal noise of one chunk: index 0 starts it, index i re-noises it after step i − 1."""

    content: jax.Array  # [T, B, F, H, W, C]; for joint denoising, of all live chunks, [T, B, T F, H, W, C]
    state: jax.Array  # [T, B, F_s, H, W, C]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The clean latents of one chunk."""

    # For the outside.
    content: jax.Array  # [B, F, H, W, C]
    # For whoever looks inside: the hidden state [B, F_s, H, W, C]; None in the fill, and without one.
    state: jax.Array | None
    # What the rollout that begins behind this chunk begins with, [B, F, H, W, C]; None unless the stream restarts here.
    overlap: jax.Array | None = None


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
