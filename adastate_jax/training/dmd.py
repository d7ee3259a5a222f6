"""Horizon-weighted distribution matching distillation on the student's own rollouts.

What an update draws comes first (`draw_update`), and is handed to the rest, which is a function of it.
Source: arXiv 2605.30349; the losses are Self-Forcing's (guandeh17/Self-Forcing model/dmd.py), without its σ grid.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import DistillConfig, num_chunks
from adastate_jax.diffusion import MAX_TIMESTEP, add_noise, draw_normal, flow_to_clean, warp
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import constrain
from adastate_jax.streaming.carry import ChunkNoise
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.accumulation import accumulate, micro_batches
from adastate_jax.training.guidance import guided_pass
from adastate_jax.training.pretrain import flow_loss
from adastate_jax.training.self_rollout import (
    Rollout,
    draw_rollout_noise,
    gradient_pass,
    rollout_latents,
    self_rollout,
)
from adastate_jax.training.state import TrainState, apply_gradients

# --- losses ---------------------------------------------------------------------------------------------------------


def horizon_weights(frames: int, alpha: float, normalize: bool = False) -> np.ndarray:
    """w_i = 1 + α i / (N − 1) of the N frames of a rollout, [N] float32; divided by their mean if `normalize`."""
    weights = 1.0 + alpha * np.arange(frames) / max(frames - 1, 1)
    return (weights / weights.mean() if normalize else weights).astype(np.float32)


def dmd_gradient(latents: jax.Array, clean_fake: jax.Array, clean_real: jax.Array) -> jax.Array:
    """g = (x̂_fake − x̂_real) / mean|x̂ − x̂_real|, the mean over each whole sample.

    NaN becomes 0: a sample that is the teacher's already has nowhere to go. ±∞ stay, and the loss with them, so that
    the run stops at its last checkpoint: critic or teacher have left the range of their numbers. The released trainer
    puts the largest finite numbers in their place (torch.nan_to_num), whose squares are infinite too: clipped to a
    norm, such a gradient would be that of a single latent, or none.
    latents, clean_fake, clean_real [B, N, H, W, C].
    """
    scale = jnp.abs(latents - clean_real).mean(axis=(1, 2, 3, 4), keepdims=True)
    gradient = (clean_fake - clean_real) / scale
    return jnp.where(jnp.isnan(gradient), 0.0, gradient)


def dmd_loss(latents: jax.Array, gradient: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean over everything of w_i ½ ‖x̂_i − sg(x̂_i − g_i)‖²: its gradient is w_i g_i / size.

    latents, gradient [B, N, H, W, C]; weights [N].
    """
    target = jax.lax.stop_gradient(latents - gradient)
    return (weights[:, None, None, None] * 0.5 * jnp.square(latents - target)).mean()


def score_sigma(uniform: jax.Array, config: DistillConfig) -> jax.Array:
    """Noise level of the scores from u in [0, 1]: the warped timestep, clipped."""
    timestep = jnp.clip(MAX_TIMESTEP * warp(uniform, config.shift), config.min_timestep, config.max_timestep)
    return timestep / MAX_TIMESTEP


def clean_estimate(model: DiT, noisy: jax.Array, sigma: jax.Array, text: jax.Array) -> jax.Array:
    """x̂_0 of a bidirectional network.  noisy [B, N, H, W, C]; sigma [B]; text embeddings [B, T, text_dim]."""
    return _estimate(model, noisy, sigma, model.text_keys_values(text))


def _estimate(model: DiT, noisy: jax.Array, sigma: jax.Array, text: Any) -> jax.Array:
    """`clean_estimate` with the prompts' keys and values."""
    sigma = jnp.broadcast_to(sigma[:, None], noisy.shape[:2])
    flow, _ = model(noisy, MAX_TIMESTEP * sigma, text, np.arange(noisy.shape[1]))
    return flow_to_clean(flow, noisy, sigma)


# --- the two updates ------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """All that is random in one update.

    Attributes:
        noise: of the student's rollout, see `draw_rollout_noise`.
        exit_step: where every chunk of it stops denoising, int32 [] in 0 … T − 1.
        score_noise: of the scores, or of the critic's flow matching, [B, N, H, W, C].
        sigma: their noise level, one per sample [B].
    """

    # Of the rollout.
    noise: ChunkNoise
    exit_step: jax.Array

    # Of the loss on what it made.
    score_noise: jax.Array
    sigma: jax.Array


def draw_update(
    key: jax.Array, batch: int, config: DistillConfig, stream: StreamConfig, latent_shape: tuple[int, int, int]
) -> Draws:
    """What an update with this key draws for `batch` samples: one exit step for all, noise and level for each.

    latent_shape: (H, W, C).
    """
    rollout_key, noise_key, level_key = jax.random.split(key, 3)
    exit_key, chunk_key = jax.random.split(rollout_key)
    keys = jax.random.split(chunk_key, batch)
    shape = (batch, config.rollout_frames, *latent_shape)
    return Draws(
        noise=draw_rollout_noise(keys, stream, latent_shape, num_chunks(config.rollout_frames, stream)),
        exit_step=jax.random.randint(exit_key, (), 0, len(stream.sigmas)),
        score_noise=constrain(draw_normal(noise_key, shape), "batch"),
        sigma=score_sigma(1.0 - jax.random.uniform(level_key, (batch,)), config),  # of u in (0, 1]
    )


def _rollout_for(student: DiT, text: jax.Array, draws: Draws, stream: StreamConfig) -> Rollout:
    student_text = jax.lax.stop_gradient(student.text_keys_values(text))
    return self_rollout(student, student_text, draws.noise, draws.exit_step, stream)


def critic_gradients(
    critic: DiT, student: DiT, text: jax.Array, draws: Draws, stream: StreamConfig
) -> tuple[DiT, jax.Array, dict[str, jax.Array]]:
    """The critic's gradients: flow matching on a fresh rollout of the student.

    Args:
        text: embeddings [B, T, text_dim].

    Returns:
        The gradients, the rollout's content latents [B, N, H, W, C], and `loss`.
    """
    latents = rollout_latents(_rollout_for(student, text, draws, stream), stream)
    loss, gradients = jax.value_and_grad(flow_loss)(critic, latents, draws.score_noise, draws.sigma, text)
    return gradients, latents, {"loss": loss}


def critic_step(
    state: TrainState, student: DiT, text: jax.Array, draws: Draws, config: DistillConfig, stream: StreamConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the critic.

    Args:
        state: the critic's.
        student: its weights are not changed.
        text: embeddings [B, T, text_dim].
        draws: of this update.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """

    def of_part(part: tuple[jax.Array, Draws]):
        gradients, _, scalars = critic_gradients(state.params, student, *part, stream)
        return gradients, scalars

    gradients, scalars = accumulate(of_part, (text, draws), config.accumulate, _micro_updates)
    state, metrics = apply_gradients(state, gradients, config.critic)
    return state, {**scalars, **metrics}


def _micro_updates(batch: tuple[jax.Array, Draws], count: int) -> tuple[jax.Array, Draws]:
    """Prompts and draws of micro-batches, stacked: one exit step for all."""
    text, draws = batch
    of_each = micro_batches((draws.score_noise, draws.sigma), count)
    exit_steps = jnp.broadcast_to(draws.exit_step, (count,))
    return micro_batches(text, count), Draws(micro_batches(draws.noise, count, axis=2), exit_steps, *of_each)


def student_gradients(
    student: DiT,
    critic: DiT,
    teacher: DiT,
    text: jax.Array,
    null_text: jax.Array,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
) -> tuple[DiT, jax.Array, dict[str, jax.Array]]:
    """The student's gradients: horizon-weighted DMD on its own rollout.

    Args:
        critic, teacher: bidirectional networks.
        text, null_text: embeddings of the prompts [B, T, text_dim] and of the negative prompt [1, T, text_dim].

    Returns:
        The gradients, the rollout's content latents [B, N, H, W, C], and `loss` and `dmd_gradient_norm` (mean |g|).
    """
    null = teacher.text_keys_values(null_text)
    return _student_gradients(student, critic, teacher, text, null, draws, config, stream)


def _student_gradients(
    student: DiT,
    critic: DiT,
    teacher: DiT,
    text: jax.Array,
    null_text: Any,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
) -> tuple[DiT, jax.Array, dict[str, jax.Array]]:
    """`student_gradients` with the teacher's keys and values of the negative prompt."""
    record = _rollout_for(student, text, draws, stream)
    latents, sigma = rollout_latents(record, stream), draws.sigma
    noisy = add_noise(latents, draws.score_noise, jnp.broadcast_to(sigma[:, None], latents.shape[:2]))
    clean_fake = clean_estimate(critic, noisy, sigma, text)
    clean_real = guided_pass(
        lambda text: _estimate(teacher, noisy, sigma, text),
        teacher.text_keys_values(text),
        null_text,
        config.guidance_scale,
    )
    gradient = dmd_gradient(latents, clean_fake, clean_real)
    weights = horizon_weights(config.rollout_frames, config.horizon_alpha, config.horizon_normalize)

    def loss_function(params):
        x = gradient_pass(params, params.text_keys_values(text), record, stream, config.cache_gradient)
        return dmd_loss(x, gradient, weights)

    loss, gradients = jax.value_and_grad(loss_function)(student)
    return gradients, latents, {"loss": loss, "dmd_gradient_norm": jnp.abs(gradient).mean()}


def student_step(
    state: TrainState,
    critic: DiT,
    teacher: DiT,
    text: jax.Array,
    null_text: jax.Array,
    iteration: jax.Array,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student.

    Args:
        state: the student's, with EMA.
        critic, teacher: bidirectional networks, not changed.
        text, null_text: embeddings of the prompts [B, T, text_dim] and of the negative prompt [1, T, text_dim].
        iteration: of the stage, int32 [].
        draws: of this update.

    Returns:
        The new state, and `loss`, `dmd_gradient_norm` (mean |g|) and `gradient_norm`.
    """
    null = teacher.text_keys_values(null_text)

    def of_part(part: tuple[jax.Array, Draws]):
        text, draws = part
        gradients, _, scalars = _student_gradients(state.params, critic, teacher, text, null, draws, config, stream)
        return gradients, scalars

    gradients, scalars = accumulate(of_part, (text, draws), config.accumulate, _micro_updates)
    state, metrics = apply_student_gradients(state, gradients, iteration, config)
    return state, {**scalars, **metrics}


def apply_student_gradients(
    state: TrainState, gradients: DiT, iteration: jax.Array, config: DistillConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The student's optimizer step, and its average: the student itself before iteration `ema_start`.

    Returns:
        The new state, and `gradient_norm` before clipping.
    """
    decay = jnp.where(iteration >= config.ema_start, config.ema_decay, 0.0)
    return apply_gradients(state, gradients, config.student, decay)
