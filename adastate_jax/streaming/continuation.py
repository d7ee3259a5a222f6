"""Starts a stream from frames that are given: a picture, or the end of a clip.

Given latents take the place of generated ones in the first chunks. They are never denoised: a chunk that is given
whole goes through the network once, clean, for the keys and values that the cache keeps; in a chunk that is given in
part, the given frames stand at noise level zero beside the frames that are denoised.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from adastate_jax.diffusion import add_noise
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.context_parallel import constrain_kept
from adastate_jax.models.dit import DiT
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.carry import Chunk, ChunkNoise, RolloutCarry, draw_noise
from adastate_jax.streaming.denoising import denoise, read_context
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, sigmas_of, timesteps_of


@functools.partial(jax.jit, static_argnames=("config", "phase"), donate_argnames="carry")
def given_step(
    model: DiT, carry: RolloutCarry, text: KeyValues, given: jax.Array, config: StreamConfig, phase: Phase
) -> tuple[RolloutCarry, Chunk]:
    """`stream_step` of a fill chunk whose first frames are given: [B, n, H, W, C] of its F, clean."""
    return given_chunk(model, carry, text, given, draw_noise(carry, config, given.shape[2:]), config, phase)


def given_chunk(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    given: jax.Array,
    noise: ChunkNoise,
    config: StreamConfig,
    phase: Phase,
) -> tuple[RolloutCarry, Chunk]:
    """`rollout_step` of a fill chunk whose first frames are given: [B, n, H, W, C] of its F, clean."""
    layout = layout_of(phase, config)
    noise = noise.content  # [T, B, F, H, W, C]
    num_given = given.shape[1]
    is_given = jnp.arange(config.chunk_frames) < num_given
    context = read_context(model.config, carry.cache, config, layout, noise[0])
    # All levels, then the clean pass for the cache; there is nothing to denoise in a chunk that is given whole.
    whole = num_given == config.chunk_frames
    steps = 1 if whole else len(sigmas_of(phase, config)) + 1

    def of_frames(levels: tuple[float, ...]) -> jax.Array:
        """[level, B, F]; the given frames are clean at all."""
        levels = jnp.asarray((0.0,) if whole else (*levels, 0.0), jnp.float32)
        return jnp.broadcast_to(jnp.where(is_given, 0.0, levels[:, None])[:, None], (steps, *noise.shape[1:3]))

    sigmas, timesteps = of_frames(sigmas_of(phase, config)), of_frames(timesteps_of(phase, config))

    def turn(step, state):
        live, _ = state
        clean, fresh = denoise(model, live, sigmas[step], text, layout, context, timestep=timesteps[step])
        clean = clean.at[:, :num_given].set(given)
        following = jnp.minimum(step + 1, steps - 1)
        return add_noise(clean, noise[jnp.minimum(step + 1, len(noise) - 1)], sigmas[following]), fresh

    live = noise[0].at[:, :num_given].set(given)
    tokens = config.chunk_frames * model.config.frame_tokens(*given.shape[2:4])
    shape = (model.config.num_layers, given.shape[0], tokens, model.config.num_heads, model.config.head_dim)
    zeros = jnp.zeros(shape, model.config.dtype)
    unwritten = constrain_kept(KeyValues(zeros, zeros))
    clean, fresh = jax.lax.fori_loop(0, steps, turn, (live, unwritten))
    cache = cache_lib.advance(carry.cache, config.anchor, layout, fresh, phase.first_frame)
    return dataclasses.replace(carry, cache=cache, chunk=carry.chunk + 1), Chunk(clean, None)


def max_given_frames(config: StreamConfig) -> int:
    """Latent frames that can be given: those of the chunks before the steady state, in which a hidden state is live.

    None can be where chunks are denoised jointly. Where the stream restarts, it is before the first restart.
    """
    if config.anchor.joint:
        return 0
    return (config.num_fill_chunks - config.anchor.restarts) * config.chunk_frames
