"""Joint denoising (Rolling-Forcing): several chunks on a staircase of noise levels; every step finishes the oldest.

Source: arXiv 2509.25161.
"""

import dataclasses

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import add_noise
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.carry import Chunk, ChunkNoise, RolloutCarry
from adastate_jax.streaming.denoising import denoise, read_context
from adastate_jax.streaming.schedule import Phase, StreamConfig, clean_layout_of, layout_of


def joint_step(
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
