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
from adastate_jax.models.adapters import join
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import constrain
from adastate_jax.streaming.carry import ChunkNoise
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.accumulation import accumulate_and_keep, micro_batches
from adastate_jax.training.guidance import guided_pass
from adastate_jax.training.long_rollout import (
    CarriedRollout,
    Part,
    Start,
    join_carried,
    roll_out_part,
    split_carried,
)
from adastate_jax.training.pretrain import flow_loss
from adastate_jax.training.self_rollout import draw_rollout_noise, gradient_pass, record_frames
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
        score_noise: of the scores, or of the critic's flow matching, of all frames that these see, [B, N, H, W, C].
        sigma: their noise level, one per sample [B].
        start: where in a longer rollout its scored part begins; None is a rollout that is scored whole.
    """

    # Of the rollout.
    noise: ChunkNoise
    exit_step: jax.Array

    # Of the loss on what it made.
    score_noise: jax.Array
    sigma: jax.Array

    # Of what lies before it.
    start: Start | None = None


def draw_update(
    key: jax.Array,
    batch: int,
    config: DistillConfig,
    stream: StreamConfig,
    latent_shape: tuple[int, int, int],
    part: Part | None = None,
    chunk: jax.Array | None = None,
    rollout_key: jax.Array | None = None,
) -> Draws:
    """What an update with this key draws for `batch` samples: one exit step for all, noise and level for each.

    Args:
        latent_shape: (H, W, C).
        part: of the rollout that is scored, static; None is all of it.
        chunk: number of the part's first chunk, int32 [].
        rollout_key: of the update that the rollout began with; None is this one.
    """
    own_key, noise_key, level_key = jax.random.split(key, 3)
    begun_key = own_key if rollout_key is None else jax.random.split(rollout_key, 3)[0]
    keys = jax.random.split(jax.random.split(begun_key)[1], batch)
    sigma = score_sigma(1.0 - jax.random.uniform(level_key, (batch,)), config)  # of u in (0, 1]
    shape = (batch, config.clip_frames, *latent_shape)
    if part is None:
        noise, start = draw_rollout_noise(keys, stream, latent_shape, num_chunks(config.rollout_frames, stream)), None
    else:
        noise = draw_rollout_noise(keys, stream, latent_shape, part.chunks, chunk)
        start = Start(chunk, None if part.goes_on else keys, part)
    return Draws(
        noise=noise,
        exit_step=jax.random.randint(jax.random.split(own_key)[0], (), 0, len(stream.sigmas)),
        score_noise=constrain(draw_normal(noise_key, shape), "batch"),
        # Computed apart from what it is used in: the network is told 1000 σ, and a program that joins the two products
        # tells it another last bit, in which a step would then differ with its mesh and its micro-batches.
        sigma=jax.lax.optimization_barrier(sigma),
        start=start,
    )


def critic_gradients(
    critic: Any, student: DiT, text: jax.Array, draws: Draws, stream: StreamConfig, base: DiT | None = None
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """The critic's gradients: flow matching on a fresh rollout of the student.

    Args:
        critic, base: what is trained of it, and what is not, see `adapters.join`.
        text: embeddings [B, T, text_dim].

    Returns:
        The gradients, the content latents that are scored [B, N, H, W, C], and `loss`.
    """
    return _critic_gradients(critic, student, text, draws, stream, None, base)[:3]


def _critic_gradients(
    critic: Any,
    student: DiT,
    text: jax.Array,
    draws: Draws,
    stream: StreamConfig,
    carried: CarriedRollout | None,
    base: DiT | None,
) -> tuple[Any, jax.Array, dict[str, jax.Array], CarriedRollout | None]:
    """`critic_gradients` of a rollout that may go on, and what the next update goes on from."""
    record, clip, after = roll_out_part(student, text, draws.noise, draws.exit_step, stream, draws.start, carried)
    seen = clip.shape[1] - record_frames(record, stream)

    def loss_function(trained):
        return flow_loss(join(trained, base), clip, draws.score_noise, draws.sigma, text, first_frame=seen)

    loss, gradients = jax.value_and_grad(loss_function)(critic)
    return gradients, clip, {"loss": loss}, after


def critic_step(
    state: TrainState,
    student: DiT,
    text: jax.Array,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
    base: DiT | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the critic.

    Args:
        state: the critic's.
        student: its weights are not changed.
        text: embeddings [B, T, text_dim].
        draws: of this update.
        base: the frozen weights that the state has adapters of, see `adapters.join`.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    (state, _), metrics = critic_segment_step((state, None), student, text, draws, config, stream, base)
    return state, metrics


def critic_segment_step(
    states: tuple[TrainState, CarriedRollout | None],
    student: DiT,
    text: jax.Array,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
    base: DiT | None = None,
) -> tuple[tuple[TrainState, CarriedRollout | None], dict[str, jax.Array]]:
    """`critic_step` on the next segment of a rollout.

    Args:
        states: the critic's, and the rollout as the update before left it, which is not looked at where another begins.

    Returns:
        Both as this update leaves them, and the scalars.
    """
    state, carried = states

    def of_part(part: tuple[jax.Array, Draws, CarriedRollout | None]):
        text, draws, carried = part
        gradients, _, scalars, after = _critic_gradients(state.params, student, text, draws, stream, carried, base)
        return (gradients, scalars), after

    given = text, draws, carried
    (gradients, scalars), after = accumulate_and_keep(of_part, given, config.accumulate, _micro_updates, join_carried)
    state, metrics = apply_gradients(state, gradients, config.critic)
    return (state, after), {**scalars, **metrics}


def _micro_updates(batch: tuple[jax.Array, Draws, CarriedRollout | None], count: int) -> Any:
    """Prompts, draws and carried rollouts of micro-batches, stacked: one exit step and one place for all."""
    text, draws, carried = batch
    of_each = micro_batches((draws.score_noise, draws.sigma), count)
    exit_steps, start = jnp.broadcast_to(draws.exit_step, (count,)), draws.start
    if start is not None:
        chunks = jnp.broadcast_to(start.chunk, (count,))
        start = Start(chunks, micro_batches(start.keys, count), start.part)
    noise = micro_batches(draws.noise, count, axis=2)
    return micro_batches(text, count), Draws(noise, exit_steps, *of_each, start), split_carried(carried, count)


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
        The gradients, the clip that was scored [B, N, H, W, C], and `loss` and `dmd_gradient_norm` (mean |g|; NaN
        if a score is not finite, whose gradient is zero where it is NaN).
    """
    null = teacher.text_keys_values(null_text)
    return _student_gradients(student, critic, teacher, text, null, draws, config, stream, None, None)[:3]


def _student_gradients(
    student: Any,
    critic: DiT,
    teacher: DiT,
    text: jax.Array,
    null_text: Any,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
    base: DiT | None,
    carried: CarriedRollout | None,
) -> tuple[Any, jax.Array, dict[str, jax.Array], CarriedRollout | None]:
    """`student_gradients` with the teacher's keys and values of the negative prompt, of a rollout that may go on.

    base: see `adapters.join`.
    """
    network = join(student, base)
    record, clip, after = roll_out_part(network, text, draws.noise, draws.exit_step, stream, draws.start, carried)
    sigma, frames = draws.sigma, record_frames(record, stream)
    noisy = add_noise(clip, draws.score_noise, jnp.broadcast_to(sigma[:, None], clip.shape[:2]))
    clean_fake = clean_estimate(critic, noisy, sigma, text)
    clean_real = guided_pass(
        lambda text: _estimate(teacher, noisy, sigma, text),
        teacher.text_keys_values(text),
        null_text,
        config.guidance_scale,
    )
    gradient = dmd_gradient(clip, clean_fake, clean_real)[:, clip.shape[1] - frames :]
    weights = horizon_weights(config.rollout_frames, config.horizon_alpha, config.horizon_normalize)
    if draws.start is not None:
        first_frame = draws.start.chunk * stream.chunk_frames
        weights = jax.lax.dynamic_slice_in_dim(jnp.asarray(weights), first_frame, frames)

    def loss_function(trained):
        network = join(trained, base)
        how = config.cache_gradient, config.cache_gradient_chunks
        x = gradient_pass(network, network.text_keys_values(text), record, stream, *how)
        return dmd_loss(x, gradient, weights)

    loss, gradients = jax.value_and_grad(loss_function)(student)
    # A score that is NaN moves nothing, and its loss is zero: without this, a run would go on and learn nothing of it.
    finite = jnp.isfinite(clean_fake).all() & jnp.isfinite(clean_real).all()
    norm = jnp.where(finite, jnp.abs(gradient).mean(), jnp.nan)
    return gradients, clip, {"loss": loss, "dmd_gradient_norm": norm}, after


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
    base: DiT | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student.

    Args:
        state: the student's, with EMA.
        critic, teacher: bidirectional networks, not changed.
        text, null_text: embeddings of the prompts [B, T, text_dim] and of the negative prompt [1, T, text_dim].
        iteration: of the stage, int32 [].
        draws: of this update.
        base: the frozen weights that the student's state has adapters of, see `adapters.join`.

    Returns:
        The new state, and `loss`, `dmd_gradient_norm` (see `student_gradients`) and `gradient_norm`.
    """
    networks = (state, None), critic, teacher
    (state, _), metrics = student_segment_step(*networks, text, null_text, iteration, draws, config, stream, base)
    return state, metrics


def student_segment_step(
    states: tuple[TrainState, CarriedRollout | None],
    critic: DiT,
    teacher: DiT,
    text: jax.Array,
    null_text: jax.Array,
    iteration: jax.Array,
    draws: Draws,
    config: DistillConfig,
    stream: StreamConfig,
    base: DiT | None = None,
) -> tuple[tuple[TrainState, CarriedRollout | None], dict[str, jax.Array]]:
    """`student_step` on the next segment of a rollout; `states` as in `critic_segment_step`."""
    state, carried = states
    null = teacher.text_keys_values(null_text)

    def of_part(part: tuple[jax.Array, Draws, CarriedRollout | None]):
        text, draws, carried = part
        networks = state.params, critic, teacher
        gradients, _, scalars, after = _student_gradients(*networks, text, null, draws, config, stream, base, carried)
        return (gradients, scalars), after

    given = text, draws, carried
    (gradients, scalars), after = accumulate_and_keep(of_part, given, config.accumulate, _micro_updates, join_carried)
    state, metrics = apply_student_gradients(state, gradients, iteration, config)
    return (state, after), {**scalars, **metrics}


def apply_student_gradients(
    state: TrainState, gradients: DiT, iteration: jax.Array, config: DistillConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The student's optimizer step, and its average: the student itself before iteration `ema_start`.

    Returns:
        The new state, and `gradient_norm` before clipping.
    """
    decay = jnp.where(iteration >= config.ema_start, config.ema_decay, 0.0)
    return apply_gradients(state, gradients, config.student, decay)
