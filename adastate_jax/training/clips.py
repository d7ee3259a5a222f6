"""The causal student on clips, behind clean ones: by flow matching, or by consistency with a causal teacher.

Neither needs trajectories. Flow matching needs no teacher at all: it makes a streaming model of one's own videos, and
it makes the teacher of the other. Sources: arXiv 2602.02214 (Causal-Forcing, its first stage) and arXiv 2605.15141
(Causal-Forcing++, causal consistency distillation).

Published is, of flow matching: clean earlier chunks as context, a noise level of each chunk's own, Wan's bell of a
weight. Of consistency: a grid of 48 levels at shift 5; one Euler step of the guided causal teacher from a level to the
next; the mean squared error between the student at the one and its average at the other, an average from step 200 on.
Our reading is: each chunk draws a pair of neighbouring levels of its own (the material says a random pair); the last
level is 0, where an estimate is the latents themselves, so that the teacher's step is the target there; and the grid
goes through the student's own levels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adastate_jax.config.stages import InitializeConfig, ode_sigmas
from adastate_jax.diffusion import add_noise, draw_normal, flow_to_clean, warp
from adastate_jax.models.adapters import join
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import constrain
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.accumulation import accumulate, micro_batches
from adastate_jax.training.guidance import guided_pass
from adastate_jax.training.initialize import apply_update, causal_flow, draw_state_noise, recurrent_pass
from adastate_jax.training.pretrain import level_weight
from adastate_jax.training.state import TrainState


def clip_step(
    state: TrainState,
    clips: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    key: jax.Array,
    config: InitializeConfig,
    stream: StreamConfig,
    base: DiT | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student by flow matching: of a clip of one chunk without an anchor, that of pretraining.

    With a hidden state, every chunk is denoised at each of the stream's levels instead of one that is drawn, and there
    is no loss on the state.

    Args:
        clips: latents [B, N, H, W, C].
        text, null_text: embeddings of the captions [B, T, text_dim], and of the empty caption [1, T, text_dim].
        key: of this step.
        base: the frozen weights that the state has adapters of, see `adapters.join`.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    noise_key, level_key, drop_key = jax.random.split(key, 3)
    batch, frames = clips.shape[:2]
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (batch,))
    text = jnp.where(dropped[:, None, None], null_text, text)
    if config.context == "state":
        loss_of, axis = _loss_at_each_level, 2
        noise = draw_normal(noise_key, (batch, len(stream.sigmas), *clips.shape[1:]))
        drawn = draw_state_noise(level_key, clips, stream)
    else:
        loss_of, axis = _loss_at_one_level, 0
        noise = draw_normal(noise_key, clips.shape)
        uniform = 1.0 - jax.random.uniform(level_key, (batch, frames // stream.chunk_frames))  # in (0, 1]
        drawn = _of_frames(warp(uniform, config.shift), stream)

    def gradients_of(part):
        return jax.value_and_grad(lambda trained: loss_of(join(trained, base), *part, config, stream))(state.params)

    def split(batch, count: int):
        *of_each, drawn = batch
        return *micro_batches(tuple(of_each), count), micro_batches(drawn, count, axis)

    drawn = clips, constrain(noise, "batch"), text, drawn
    loss, gradients = accumulate(gradients_of, drawn, config.accumulate, split)
    return apply_update(state, loss, gradients, config)


def _of_frames(chunks: jax.Array, stream: StreamConfig) -> jax.Array:
    """What each chunk has [B, K], for each of its frames [B, N]."""
    return constrain(jnp.repeat(chunks, stream.chunk_frames, axis=1), "batch")


def _loss_at_one_level(
    model: DiT,
    clips: jax.Array,
    noise: jax.Array,
    text: jax.Array,
    sigma: jax.Array,
    config: InitializeConfig,
    stream: StreamConfig,
) -> jax.Array:
    """Mean of weight · ‖v − (ε − x_0)‖², with noise levels [B, N]."""
    flow = causal_flow(model, add_noise(clips, noise, sigma), sigma, text, clips, config.context, stream)
    error = jnp.square(flow - (noise - clips.astype(jnp.float32))).mean(axis=(2, 3, 4))
    return (level_weight(sigma, config.weighting, config.shift) * error).mean()


def _loss_at_each_level(
    model: DiT,
    clips: jax.Array,
    noise: jax.Array,
    text: jax.Array,
    state_noise: jax.Array,
    config: InitializeConfig,
    stream: StreamConfig,
) -> jax.Array:
    """`_loss_at_one_level` beside a hidden state, at each of the stream's levels, with noise [B, T, N, H, W, C]."""
    sigma = jnp.asarray(stream.sigmas, jnp.float32)
    noisy = jnp.stack([add_noise(clips, noise[:, i], sigma[i]) for i in range(len(stream.sigmas))], axis=1)
    estimates = recurrent_pass(model, noisy, text, stream, clips, state_noise)
    # The flow is (x_σ − x̂_0) / σ, and its error that of the estimate over σ.
    error = jnp.square((estimates - clips[:, None]) / sigma[:, None, None, None, None]).mean(axis=(0, 2, 3, 4, 5))
    return (level_weight(sigma, config.weighting, config.shift) * error).mean()


Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def consistency_loss(
    student: Denoiser, target: Denoiser, teacher: Denoiser, noisy: jax.Array, sigma: jax.Array, next_sigma: jax.Array
) -> jax.Array:
    """Mean of ‖f(x_σ, σ) − f⁻(x_σ', σ')‖², where x_σ' = x_σ + (σ' − σ) v(x_σ, σ) is one Euler step of the teacher's.

    Args:
        student, target: f and its average f⁻, (latents, levels) → clean estimates; the second gets no gradient.
        teacher: (latents, levels) → flow v; it gets no gradient.
        noisy: x_σ [B, N, H, W, C].
        sigma, next_sigma: σ and the level σ' below it, per frame [B, N].
    """
    step = (next_sigma - sigma)[..., None, None, None]
    further = jax.lax.stop_gradient(noisy + step * teacher(noisy, sigma))
    wanted = jax.lax.stop_gradient(target(further, next_sigma))
    return jnp.square(student(noisy, sigma) - wanted).mean()


def consistency_step(
    state: TrainState,
    teacher: DiT,
    clips: jax.Array,
    text: jax.Array,
    null_text: jax.Array,
    key: jax.Array,
    config: InitializeConfig,
    stream: StreamConfig,
    base: DiT | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the student by consistency with a causal teacher, which sees what the student sees.

    Args:
        state: the student's; its average is the target.
        clips: latents [B, N, H, W, C].
        text, null_text: embeddings of the captions [B, T, text_dim], and of the negative prompt [1, T, text_dim].
        key: of this step.
        base: the frozen weights that the state has adapters of, see `adapters.join`.

    Returns:
        The new state, and `loss` and `gradient_norm`.
    """
    noise_key, level_key = jax.random.split(key)
    batch, frames = clips.shape[:2]
    noise = constrain(draw_normal(noise_key, clips.shape), "batch")
    level = jax.random.randint(level_key, (batch, frames // stream.chunk_frames), 0, config.ode_steps)
    grid = jnp.asarray(ode_sigmas(stream, config.ode_steps), jnp.float32)

    def gradients_of(part: tuple[jax.Array, ...]):
        clips, noise, text, level = part
        sigma, next_sigma = grid[level], grid[level + 1]

        def flow(model: DiT, latents: jax.Array, sigma: jax.Array, text: jax.Array) -> jax.Array:
            return causal_flow(model, latents, sigma, text, clips, config.context, stream)

        def denoiser(trained) -> Denoiser:
            model = join(trained, base)
            return lambda latents, sigma: flow_to_clean(flow(model, latents, sigma, text), latents, sigma)

        def teacher_flow(latents: jax.Array, sigma: jax.Array) -> jax.Array:
            said = functools.partial(flow, teacher, latents, sigma)
            return guided_pass(said, text, null_text, config.guidance_scale) if config.guidance_scale else said(text)

        def loss_function(trained):
            noisy = add_noise(clips, noise, sigma)
            return consistency_loss(denoiser(trained), denoiser(state.ema), teacher_flow, noisy, sigma, next_sigma)

        return jax.value_and_grad(loss_function)(state.params)

    loss, gradients = accumulate(gradients_of, (clips, noise, text, _of_frames(level, stream)), config.accumulate)
    return apply_update(state, loss, gradients, config)
