"""Pretraining of the bidirectional teacher: flow matching on clips, with caption dropout."""

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import PretrainConfig
from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, draw_normal, training_weight, warp
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import constrain
from adastate_jax.training.accumulation import accumulate
from adastate_jax.training.state import TrainState, apply_gradients


def flow_loss(
    model: DiT,
    latents: jax.Array,
    noise: jax.Array,
    sigma: jax.Array,
    text: jax.Array,
    weight: jax.Array | float = 1.0,
    first_frame: int = 0,
) -> jax.Array:
    """Flow-matching loss of a bidirectional pass: mean of weight · ‖v − (ε − x_0)‖² over everything.

    Args:
        latents, noise: [B, N, H, W, C].
        sigma: noise level of each sample [B].
        text: embeddings [B, T, text_dim].
        weight: per sample [B], or one number.
        first_frame: frames before it are seen, and are not in the loss.
    """
    sigma = jnp.broadcast_to(sigma[:, None], latents.shape[:2])
    flow, _ = model(
        add_noise(latents, noise, sigma),
        MAX_TIMESTEP * sigma,
        model.text_keys_values(text),
        np.arange(latents.shape[1]),
    )
    error = jnp.square(flow - (noise - latents.astype(jnp.float32)))[:, first_frame:].mean(axis=(1, 2, 3, 4))
    return (weight * error).mean()


def pretrain_step(
    state: TrainState, latents: jax.Array, text: jax.Array, null_text: jax.Array, key: jax.Array, config: PretrainConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the teacher.

    Args:
        latents: clips [B, N, H, W, C].
        text, null_text: embeddings of the captions [B, T, text_dim], and of the empty caption [1, T, text_dim].
        key: of this step.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    noise_key, level_key, drop_key = jax.random.split(key, 3)
    batch = latents.shape[0]
    noise = constrain(draw_normal(noise_key, latents.shape), "batch")
    sigma = warp(1.0 - jax.random.uniform(level_key, (batch,)), config.shift)  # of u in (0, 1]
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (batch,))
    text = jnp.where(dropped[:, None, None], null_text, text)

    def gradients_of(part: tuple[jax.Array, ...]):
        sigma = part[2]
        return jax.value_and_grad(flow_loss)(state.params, *part, level_weight(sigma, config.weighting, config.shift))

    loss, gradients = accumulate(gradients_of, (latents, noise, sigma, text), config.accumulate)
    state, metrics = apply_gradients(state, gradients, config.optimizer, config.ema_decay)
    return state, {"loss": loss, **metrics}


def level_weight(sigma: jax.Array, weighting: str, shift: float) -> jax.Array | float:
    """Loss weight of noise levels of any shape, see `PretrainConfig.weighting`."""
    if weighting == "bell":
        return training_weight(MAX_TIMESTEP * sigma, shift)
    if weighting == "clean":
        return jnp.minimum(1.0, jnp.square(sigma / 0.3))
    return 1.0
