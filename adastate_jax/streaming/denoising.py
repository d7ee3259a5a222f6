"""One chunk, or any live frames, denoised against a frozen cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, flow_to_clean
from adastate_jax.models.attention import Attend, KeyValues
from adastate_jax.models.context_parallel import constrain_kept
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import Chunk, ChunkNoise
from adastate_jax.streaming.layout import Layout
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, sigmas_of, timesteps_of


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
    timestep=None,
) -> tuple[jax.Array, Any]:
    """One pass at one noise level.

    Args:
        live: noisy live frames [B, F_s + F, H, W, C].
        sigma: their noise level, a float, a scalar array, or of each frame its own, [1 or B, F_s + F].
        attend: see `DiT.__call__`.
        timestep: what the network is told of the noise level, shaped as `sigma`; None is 1000 σ.

    Returns:
        The clean estimate x̂_0, and what `attend` kept: the live frames' own keys (un-rotated) and values.
    """
    timesteps = jnp.broadcast_to(jnp.float32(MAX_TIMESTEP * sigma if timestep is None else timestep), live.shape[:2])
    flow, kept = model(live, timesteps, text, layout.live, attend, context)
    return flow_to_clean(flow, live, sigma), kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratedChunk:
    """The live frames of one chunk, state first."""

    # The last denoising pass.
    noisy: jax.Array  # its input [B, F_s + F, H, W, C]
    clean: jax.Array  # its output x̂_0
    # The clean pass.
    fresh: KeyValues  # keys (un-rotated) and values of `clean` at σ = 0, [layers, B, tokens, heads, head_dim]


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
    timesteps = jnp.asarray([*timesteps_of(phase, config), 0.0], jnp.float32)
    tokens = len(layout.live) * model.config.frame_tokens(*noises.shape[3:5])
    shape = (model.config.num_layers, noises.shape[1], tokens, model.config.num_heads, model.config.head_dim)
    zeros = jnp.zeros(shape, model.config.dtype)
    unwritten = constrain_kept(KeyValues(zeros, zeros))

    def turn(step, carry):
        live, noisy, _ = carry
        level = jnp.where(step <= last_step, step, len(steps))
        clean, fresh = denoise(model, live, sigmas[level], text, layout, context, timestep=timesteps[level])
        # After the last step the next level is zero: nothing is added, and `live` is the clean estimate itself.
        next_sigma = jnp.where(step < last_step, sigmas[step + 1], 0.0)
        next_noise = noises[jnp.minimum(step + 1, len(steps) - 1)]
        return add_noise(clean, next_noise, next_sigma), jnp.where(step <= last_step, live, noisy), fresh

    start = (noises[0], noises[0], unwritten)
    clean, noisy, fresh = jax.lax.fori_loop(0, last_step + 2, turn, start)
    return GeneratedChunk(noisy, clean, fresh)
