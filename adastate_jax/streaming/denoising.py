"""One chunk, or any live frames, denoised against a frozen cache."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, flow_to_clean
from adastate_jax.models.attention import Attend, Context, KeyValues
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
    context: Context | None,
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

    The denoising passes are turns of one loop. The clean pass, the only one whose keys and values are kept, stands
    behind it: as a turn it would have every pass write them, and every turn copy them.

    Args:
        last_step: an int, or a traced scalar, in 0 … T − 1.

    Raises:
        ValueError: chunks are denoised jointly, there is no single one to generate.
    """
    if config.anchor.joint:
        raise ValueError(f"{type(config.anchor).__name__} denoises chunks jointly; it generates none by itself")
    layout = layout_of(phase, config)
    noises = live_noise(noise, layout)
    context = model.lay_out(read_context(model.config, cache, config, layout, noises[0]), noises[0])
    sigmas = jnp.asarray(sigmas_of(phase, config), jnp.float32)
    timesteps = jnp.asarray(timesteps_of(phase, config), jnp.float32)
    last = len(sigmas) - 1

    def turn(step, carry):
        live, _ = carry
        clean, _ = denoise(model, live, sigmas[step], text, layout, context, timestep=timesteps[step])
        # After the last step the next level is zero: nothing is added, `live` is the clean estimate itself.
        next_sigma = jnp.where(step < last_step, sigmas[jnp.minimum(step + 1, last)], 0.0)
        return add_noise(clean, noises[jnp.minimum(step + 1, last)], next_sigma), live

    clean, noisy = jax.lax.fori_loop(0, last_step + 1, turn, (noises[0], noises[0]))
    _, fresh = denoise(model, clean, 0.0, text, layout, context)
    return GeneratedChunk(noisy, clean, fresh)
