"""Fixtures of arithmetic: the noise schedule, and distribution matching with scores that are linear maps.

The reference looks noise levels up in a grid of 1000. Ours are exact, so where a number depends on that grid, its own
noise level is fed to our functions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import DistillConfig
from adastate_jax.diffusion import (
    MAX_TIMESTEP,
    add_noise,
    clean_to_flow,
    denoising_sigmas,
    flow_to_clean,
    training_weight,
    warp,
)
from adastate_jax.training.dmd import clean_estimate, dmd_gradient, dmd_loss, horizon_weights, score_sigma
from adastate_jax.training.guidance import guided
from adastate_jax.training.initialize import sample_trajectory
from adastate_jax.training.pretrain import flow_loss
from adastate_jax.verification.record import Fixture, NotChecked, Records, channels_first, channels_last

_GRID = 1000


def _grid_sigma(timestep: np.ndarray, shift: float) -> np.ndarray:
    """The reference's noise level for a timestep: that of the nearest entry of its grid."""
    grid = warp(np.arange(_GRID, 0, -1) / _GRID, shift)
    nearest = np.abs(MAX_TIMESTEP * grid - timestep[..., None]).argmin(axis=-1)
    return grid[nearest].astype(np.float32)


# --- the schedule -----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GivenFlow:
    """Answers with a given flow [1, F, H, W, C], behind the transformer's calling convention."""

    flow: jax.Array

    def text_keys_values(self, embeddings: jax.Array) -> None:
        return None

    def __call__(self, latents, timesteps, text, positions) -> tuple[jax.Array, None]:
        return jnp.broadcast_to(self.flow, latents.shape), None


def scheduler(fixture: Fixture) -> Records:
    """Self-Forcing's FlowMatchScheduler."""
    settings = fixture.header("config")
    shift = settings["shift"]
    uniform = np.arange(_GRID, 0, -1) / _GRID
    for suffix, grid_shift in (("", shift), ("_shift8", 8.0)):
        yield fixture.arithmetic(f"sigmas{suffix}", warp(uniform, grid_shift))
        yield fixture.arithmetic(f"timesteps{suffix}", MAX_TIMESTEP * warp(uniform, grid_shift))
    steps = MAX_TIMESTEP * np.array(denoising_sigmas(settings["denoising_step_list"], shift))
    yield fixture.arithmetic("warped_denoising_step_list", steps)
    yield fixture.arithmetic("training_weights", training_weight(MAX_TIMESTEP * warp(uniform, shift), shift))

    sigma = fixture["out.sigma_at_timestep"]
    yield NotChecked("sigma_at_timestep", "the grid's lookup, fed to the checks below")
    yield fixture.arithmetic("training_weight_at_timestep", training_weight(MAX_TIMESTEP * sigma, shift))

    def frames(name: str) -> np.ndarray:  # the examples as frames of one clip
        return channels_last(fixture[name], 1)[None]

    def examples(clip: Any) -> np.ndarray:
        return channels_first(clip[0], 1)

    clean, noise, flow = frames("in.x0"), frames("in.noise"), frames("in.flow")
    noisy = frames("out.add_noise")
    yield fixture.arithmetic("add_noise", examples(add_noise(clean, noise, sigma[None])))
    yield fixture.arithmetic("flow_to_x0", examples(flow_to_clean(flow, noisy, sigma[None])))
    yield fixture.arithmetic("x0_to_flow", examples(clean_to_flow(frames("in.x0_pred"), noisy, sigma[None])))
    yield fixture.arithmetic("training_target", examples(_training_target(clean, noise)))
    yield fixture.arithmetic("step", examples(_euler_steps(flow, noisy, sigma, fixture["out.sigmas"])))


def _training_target(clean: np.ndarray, noise: np.ndarray) -> jax.Array:
    """What the flow loss pulls a flow of zero towards."""
    gradient = jax.grad(lambda model: flow_loss(model, clean, noise, jnp.ones(1), jnp.zeros(())))
    return -0.5 * clean.size * gradient(GivenFlow(jnp.zeros(clean.shape))).flow


def _euler_steps(flow: np.ndarray, noisy: np.ndarray, sigma: np.ndarray, grid: np.ndarray) -> jax.Array:
    """One step of the sampler per frame, from its noise level to the next of the grid; behind the last is zero."""
    index = np.abs(grid - sigma[:, None]).argmin(axis=-1)
    levels = np.stack([sigma, np.append(grid, np.float32(0.0))[index + 1]], axis=1)
    text = jnp.zeros((1, 1, 1))

    def step(flow, noisy, levels):
        return sample_trajectory(GivenFlow(flow[None, None]), noisy[None, None], text, text, levels, 0.0, 1)[0, -1, 0]

    return jax.vmap(step)(flow[0], noisy[0], levels)[None]


# --- distribution matching --------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearScore:
    """The fixture's score network, flow = A x + P mean(context) + u t / 1000, behind the transformer's convention.

    Attributes:
        A, P, u: [C, C], [C, text_dim], [C]; exact whatever the precision of networks.
        stretch, gain: what the reference's grids do to the timestep that the network sees, and to its flow; [B].
    """

    A: jax.Array
    P: jax.Array
    u: jax.Array
    stretch: jax.Array
    gain: jax.Array

    def text_keys_values(self, embeddings: jax.Array) -> jax.Array:
        return jnp.dot(embeddings.mean(axis=1), self.P.T, precision="highest")

    def __call__(self, latents, timesteps, text, positions) -> tuple[jax.Array, None]:
        time = self.stretch[:, None] * timesteps / MAX_TIMESTEP
        flow = jnp.dot(latents, self.A.T, precision="highest") + text[:, None, None, None]
        flow = flow + self.u * time[..., None, None, None]
        return self.gain[:, None, None, None, None] * flow, None


def dmd(fixture: Fixture) -> Records:
    """Self-Forcing's losses around linear score networks."""
    settings = fixture.header("config")
    shift, score_shift = settings["timestep_shift"], settings["score_scheduler_shift"]
    config = DistillConfig(
        guidance_scale=settings["guidance_scale"],
        shift=shift,
        min_timestep=settings["min_step"],
        max_timestep=settings["max_step"],
    )

    def latents(name: str) -> np.ndarray:
        return channels_last(fixture[name], 2)

    def theirs(ours: Any) -> np.ndarray:
        return channels_first(ours, 2)

    timestep = fixture["out.timestep"]
    yield fixture.arithmetic("timestep", _timesteps(fixture["in.raw_timestep"], config, timestep.shape))
    # A clipped timestep is off the grid; the network sees it, while noise is added at the grid's nearest level.
    clean, sigmas = latents("in.latent"), _grid_sigma(timestep, shift)
    yield fixture.arithmetic("noisy_latent", theirs(add_noise(clean, latents("in.noise"), sigmas)))

    noisy = latents("out.noisy_latent")
    sigma, score_sigmas = sigmas[:, 0], _grid_sigma(timestep, score_shift)
    # With a gain of 1 / σ the estimate is the noisy latents less the flow, and nothing is divided by a small σ.
    stretch, gain = jnp.asarray(timestep[:, 0] / (MAX_TIMESTEP * sigma)), jnp.asarray(1 / sigma)
    for case, network, text in (
        ("fake", "fake", "context"),
        ("real_cond", "real", "context"),
        ("real_uncond", "real", "null_context"),
    ):
        model = LinearScore(*(fixture[f"w.{network}.{name}"] for name in "APu"), stretch, gain)
        estimate = clean_estimate(model, noisy, sigma, fixture[f"in.{text}"])
        yield fixture.arithmetic(f"flow_{case}", theirs(noisy - estimate))
        estimate = flow_to_clean(latents(f"out.flow_{case}"), noisy, score_sigmas)
        yield fixture.arithmetic(f"x0_{case}", theirs(estimate))

    fake, real = latents("out.x0_fake"), latents("out.x0_real_cfg")
    guidance = guided(latents("out.x0_real_cond"), latents("out.x0_real_uncond"), config.guidance_scale)
    yield fixture.arithmetic("x0_real_cfg", theirs(guidance))
    gradient = dmd_gradient(clean, fake, real)
    yield fixture.arithmetic("grad", theirs(gradient))
    yield fixture.arithmetic("gradient_norm_log", jnp.abs(gradient).mean())
    # Latents at a distance of one from the teacher's make the normaliser one; a difference of −x̂_real shows it.
    yield fixture.arithmetic("grad_unnormalised", theirs(dmd_gradient(real + 1.0, fake, real)))
    shown = dmd_gradient(clean, jnp.zeros_like(real), real)
    normalizer = -real.astype(np.float64) / np.asarray(shown, np.float64)
    yield fixture.arithmetic("normalizer", normalizer.mean(axis=(1, 2, 3, 4), keepdims=True))

    frames = clean.shape[1]
    for prefix, alpha in (("", 0.0), ("horizon.", settings["alpha"])):
        loss, slope = jax.value_and_grad(dmd_loss)(
            clean, latents("out.grad"), jnp.asarray(horizon_weights(frames, alpha))
        )
        yield fixture.arithmetic(f"{prefix}loss", loss)
        yield fixture.arithmetic(f"{prefix}dloss_dlatent", theirs(slope))
    yield fixture.arithmetic("horizon.weight", horizon_weights(frames, settings["alpha"]))
    yield NotChecked("masked", "our loss has no mask", ("out.masked.",))
    yield from _critic(fixture, config, clean, score_shift)


def _timesteps(raw: np.ndarray, config: DistillConfig, shape: tuple[int, ...]) -> jax.Array:
    """Our timesteps for the reference's whole-number draws, on all frames."""
    sigma = score_sigma(raw.astype(np.float32) / np.float32(MAX_TIMESTEP), config)
    return jnp.broadcast_to(MAX_TIMESTEP * sigma[:, None], shape)


def _critic(fixture: Fixture, config: DistillConfig, clean: np.ndarray, score_shift: float) -> Records:
    timestep = fixture["out.critic.timestep"]
    yield fixture.arithmetic("critic.timestep", _timesteps(fixture["in.critic_raw_timestep"], config, timestep.shape))
    timestep = timestep[:, 0]
    sigma, score_sigmas = _grid_sigma(timestep, config.shift), _grid_sigma(timestep, score_shift)
    model = LinearScore(
        *(jnp.asarray(fixture[f"w.fake.{name}"]) for name in "APu"),
        stretch=jnp.asarray(timestep / (MAX_TIMESTEP * sigma)),
        gain=jnp.asarray(score_sigmas / sigma),
    )
    noise = channels_last(fixture["in.critic_noise"], 2)
    loss, slope = jax.value_and_grad(flow_loss)(model, clean, noise, jnp.asarray(sigma), fixture["in.context"])
    yield fixture.arithmetic("critic.loss", loss)
    for name in "APu":
        yield fixture.arithmetic(f"critic.dloss_d{name}", getattr(slope, name))


def dmd_checks(fixture: Fixture, latents: Callable[[str], np.ndarray]) -> Records:
    """AdaState's horizon-weighted loss, `dmd.*` of `adastate_rollout`; `latents` gives an input as [1, N, H, W, C]."""
    clean = latents("clean")
    real = guided(latents("real_cond"), latents("real_uncond"), DistillConfig().guidance_scale)
    gradient = dmd_gradient(clean, latents("fake"), real)
    yield fixture.arithmetic("dmd.gradient", channels_first(gradient[0], 1))
    for alpha in (0, 2, 4):
        weights = jnp.asarray(horizon_weights(clean.shape[1], alpha))
        loss, slope = jax.value_and_grad(dmd_loss)(clean, gradient, weights)
        yield fixture.arithmetic(f"dmd.loss.alpha{alpha}", loss[None])
        yield fixture.arithmetic(f"dmd.grad_clean.alpha{alpha}", channels_first(slope[0], 1))
