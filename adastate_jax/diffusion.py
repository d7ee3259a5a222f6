"""Flow matching: noise levels, noising, and conversions between flow and clean latents.

x_σ = (1 − σ) x_0 + σ ε,  timestep t = 1000 σ,  the network predicts the flow v ≈ ε − x_0.
There is no grid: every σ in [0, 1] is exact.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_TIMESTEP = 1000.0


def warp(uniform, shift: float):
    """Shifts noise levels towards 1: σ = s u / (1 + (s − 1) u).  uniform in [0, 1], any shape, → σ in [0, 1]."""
    return shift * uniform / (1.0 + (shift - 1.0) * uniform)


def denoising_sigmas(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Noise levels of a few-step sampler from its raw step list on the scale 0..1000 (1000, 750, 500, 250).

    They are warped in float32, as those of the official schedulers are: the network is told 1000 σ, and sees its last
    bit.

    Raises:
        ValueError: the list is empty, leaves (0, 1000] or does not strictly decrease, or the shift is not positive, or
            so far from 1 that noise levels fall together.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive, got {shift}")
    if not steps or not all(0 < step <= MAX_TIMESTEP for step in steps) or any(np.diff(steps) >= 0):
        raise ValueError(f"denoising_steps must strictly decrease within (0, 1000], got {tuple(steps)}")
    with np.errstate(all="ignore"):  # reported below
        sigmas = tuple(float(warp(np.float32(step / MAX_TIMESTEP), np.float32(shift))) for step in steps)
    if not all(0 < sigma <= 1 for sigma in sigmas) or any(np.diff(sigmas) >= 0):
        raise ValueError(f"shift {shift} warps denoising_steps {tuple(steps)} into noise levels that do not decrease")
    return sigmas


def add_noise(clean: jax.Array, noise: jax.Array, sigma) -> jax.Array:
    """x_σ = (1 − σ) x_0 + σ ε in float32.  clean, noise [B, F, H, W, C]; sigma [B, F] or []."""
    sigma = _per_frame(sigma, clean)
    return (1.0 - sigma) * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def flow_to_clean(flow: jax.Array, noisy: jax.Array, sigma) -> jax.Array:
    """x̂_0 = x_σ − σ v in float32.  flow, noisy [B, F, H, W, C]; sigma [B, F] or []."""
    return noisy.astype(jnp.float32) - _per_frame(sigma, noisy) * flow.astype(jnp.float32)


def clean_to_flow(clean: jax.Array, noisy: jax.Array, sigma, min_sigma: float = 0.0) -> jax.Array:
    """v = (x_σ − x̂_0) / max(σ, min_sigma) in float32.  clean, noisy [B, F, H, W, C]; sigma [B, F] or []."""
    sigma = jnp.maximum(_per_frame(sigma, noisy), min_sigma)
    return (noisy.astype(jnp.float32) - clean.astype(jnp.float32)) / sigma


def draw_normal(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`jax.random.normal(key, shape)`, the same bits, drawn flat: XLA's CPU backend compiles that ten times faster."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def training_weight(timestep, shift: float):
    """Wan's bell-shaped training weight exp(−2 ((t − 500) / 1000)²), lowered to zero at its minimum, mean one.

    Minimum and mean are taken over the 1000 warped timesteps, as Self-Forcing's FlowMatchScheduler does.
    timestep on 0..1000, any shape → weight of the same shape.
    """
    lowest, mean = _bell_statistics(shift)
    return (jnp.exp(-2.0 * ((timestep - 500.0) / 1000.0) ** 2) - lowest) / mean


@functools.cache
def _bell_statistics(shift: float) -> tuple[float, float]:
    timesteps = MAX_TIMESTEP * warp(1.0 - np.arange(1000) / 1000, shift)
    bell = np.exp(-2.0 * ((timesteps - 500.0) / 1000.0) ** 2)
    return float(bell.min()), float((bell - bell.min()).mean())


def _per_frame(sigma, latents: jax.Array) -> jax.Array:
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim)) if sigma.ndim else sigma
