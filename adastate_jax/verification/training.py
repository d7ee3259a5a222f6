"""The fixture of whole training updates: Self-Forcing's own trainer, through what our steps are made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import DistillConfig, OptimizerConfig
from adastate_jax.diffusion import MAX_TIMESTEP
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.carry import ChunkNoise
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.dmd import (
    Draws,
    apply_student_gradients,
    critic_gradients,
    score_sigma,
    student_gradients,
)
from adastate_jax.training.state import apply_gradients, create_state
from adastate_jax.verification.record import (
    Check,
    Fixture,
    NotChecked,
    Records,
    channels_first,
    channels_last,
    compiled,
    dit_config,
    faultless,
    load_dit,
)
from adastate_jax.weights.dit import dit_table
from adastate_jax.weights.slots import leaves, official_slots

LATENT_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-5  # of the number expected; also of gradient norms
GRADIENT_TOLERANCE = 1e-4  # of the largest magnitude expected in a tensor
GRADIENT_L2_TOLERANCE = 3e-5  # of the L2 norm of all tensors
WEIGHT_TOLERANCE = 2e-5
WEIGHT_L2_TOLERANCE = 1e-6
RELEASED_TOLERANCE = 5e-3  # of the loss with the reference's own grids, which ours has not

_NETWORKS = ("student", "critic", "teacher")
_PARAMETERS = "blocks.0.self_attn.k.weight"  # a tensor that every network has

_student_gradients = compiled(student_gradients, static_argnames=("config", "stream"))
_critic_gradients = compiled(critic_gradients, static_argnames="stream")
_apply_student_gradients = compiled(apply_student_gradients, static_argnames="config")
_apply_gradients = compiled(apply_gradients, static_argnames="optimizer")


def train_step(fixture: Fixture) -> Records:
    """Iterations of Self-Forcing's trainer: rollouts, losses, gradients, clipping, AdamW, EMA and their order."""
    if fixture.settings.dtype != "float32":
        yield NotChecked("everything", f"updates are stated for float32, not {fixture.settings.dtype}", ("out.",))
        return
    if fixture.settings.weights:
        yield NotChecked("everything", "weights in eight bits are not trained", ("out.",))
        return
    settings = fixture.header("config")
    config, stream = _configs(settings)
    yield _order_of_updates(settings, config)

    networks = {}
    for name in _NETWORKS:
        network = dataclasses.replace(dit_config(settings[name], fixture.settings), remat="none")
        networks[name] = load_dit(network, fixture.weights(f"w.{name}."), str(fixture.path))
    teacher, null_text = networks["teacher"], fixture["in.null_text"]
    states = {
        "student": create_state(networks["student"], config.student, ema=True),
        "critic": create_state(networks["critic"], config.critic, ema=False),
    }
    for number, update in enumerate(settings["updates"]):
        kind, text = update["kind"], fixture[f"in.{number}.text"]
        draws, timestep = _given_draws(fixture, number, update["exit"], config, stream)
        yield fixture.arithmetic(f"{number}.timestep", timestep)
        student, critic = states["student"].params, states["critic"].params
        if kind == "student":
            of_student = (student, critic, teacher, text, null_text, draws)
            gradients, latents, scalars = _student_gradients(*of_student, config=config, stream=stream)
            states[kind], metrics = _apply_student_gradients(
                states[kind], gradients, np.int32(update["iteration"]), config=config
            )
        else:
            gradients, latents, scalars = _critic_gradients(critic, student, text, draws, stream=stream)
            states[kind], metrics = _apply_gradients(states[kind], gradients, optimizer=config.critic)
        if f"out.{number}.latents" in fixture:
            yield fixture.group(
                f"{number}.latents", {f"{number}.latents": channels_first(latents, 2)}, LATENT_TOLERANCE
            )
            yield from _gradients(fixture, f"{number}.gradient", gradients)
        if f"out.{number}.gradient_stop_norm" in fixture:
            stopping = dataclasses.replace(config, cache_gradient="stop")
            stopped, _, _ = _student_gradients(*of_student, config=stopping, stream=stream)
            yield from _stopped_gradients(fixture, number, stopped)
        for name, value in {**scalars, **metrics}.items():
            quantity = f"{number}.{name}"
            yield fixture.group(quantity, {quantity: value}, LOSS_TOLERANCE, relative=True)
        released = f"{number}.as_released.loss"
        yield fixture.group(released, {released: scalars["loss"]}, RELEASED_TOLERANCE, relative=True)
        if kind == "critic":  # an iteration ends with it
            for name, state in states.items():
                stored = f"after{update['iteration'] + 1}.{name}"
                if f"out.{stored}.{_PARAMETERS}" in fixture:
                    yield from _weights(fixture, stored, state.params)
    yield from _weights(fixture, "ema", states["student"].ema)


def _configs(settings: Mapping[str, Any]) -> tuple[DistillConfig, StreamConfig]:
    """The stage's settings and the stream's: chunks that see all that is in a window, without an anchor."""

    def optimizer(rate: str) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=settings[rate],
            betas=tuple(settings["betas"]),
            weight_decay=settings["weight_decay"],
            max_gradient_norm=settings["max_gradient_norm"],
        )

    config = DistillConfig(
        batch_size=settings["prompts_per_update"],
        rollout_frames=settings["rollout_frames"],
        horizon_alpha=0.0,
        guidance_scale=settings["guidance_scale"],
        critic_ratio=settings["critic_ratio"],
        student=optimizer("learning_rate"),
        critic=optimizer("learning_rate_critic"),
        ema_decay=settings["ema_decay"],
        ema_start=settings["ema_start"],
        shift=settings["timestep_shift"],
        min_timestep=settings["min_step"],
        max_timestep=settings["max_step"],
        cache_gradient=settings["cache_gradient"],
    )
    stream = StreamConfig(
        chunk_frames=settings["chunk_frames"],
        past_frames=settings["window_frames"] - settings["chunk_frames"],
        anchor=NoAnchor(),
        denoising_steps=tuple(settings["denoising_step_list"]),
        shift=settings["timestep_shift"],
    )
    return config, stream


def _order_of_updates(settings: Mapping[str, Any], config: DistillConfig) -> Check:
    """Which network is updated when."""
    ours = [(i, name) for i in range(settings["iterations"]) for name in config.update_numbers(i)]
    theirs = [(update["iteration"], update["kind"]) for update in settings["updates"]]
    faults = [] if ours == theirs else [f"updates (iteration, network) are {theirs}, ours {ours}"]
    return faultless("order_of_updates", faults)


def _given_draws(
    fixture: Fixture, number: int, exit_step: int, config: DistillConfig, stream: StreamConfig
) -> tuple[Draws, jax.Array]:
    """What the reference drew for an update, and our timestep of its whole-number draw."""

    def chunked(name: str) -> np.ndarray:
        """[..., B, N, C, H, W] → [K, ..., B, F, H, W, C]."""
        noise = channels_last(fixture[name].astype(np.float32), -3)
        chunks, frames = noise.shape[-4] // stream.chunk_frames, stream.chunk_frames
        return np.moveaxis(noise.reshape(*noise.shape[:-4], chunks, frames, *noise.shape[-3:]), -5, 0)

    start, again = chunked(f"in.{number}.noise")[:, None], chunked(f"in.{number}.renoise")
    unused = np.zeros((len(start), len(stream.sigmas) - 1 - exit_step, *start.shape[2:]), np.float32)
    content = np.concatenate([start, again, unused], axis=1)
    raw = fixture[f"in.{number}.raw_timestep"].astype(np.float32)
    sigma = score_sigma(jnp.asarray(raw / np.float32(MAX_TIMESTEP)), config)
    score_noise = channels_last(fixture[f"in.{number}.score_noise"].astype(np.float32), 2)
    draws = Draws(ChunkNoise(content, content[:, :, :, :0]), jnp.int32(exit_step), score_noise, sigma)
    return draws, MAX_TIMESTEP * sigma


def _official(network: DiT) -> dict[str, np.ndarray]:
    """A network's leaves, or their gradients, as official tensors."""
    of_ours = {path: np.asarray(leaf) for path, leaf in leaves(network).items()}
    slots = official_slots(network, dit_table(network.config))
    return {
        name: slot.entry.to_official(of_ours[slot.entry.path][... if slot.layer is None else slot.layer])
        for name, slot in slots.items()
    }


def _relative_l2(case: str, check: Check, tolerance: float) -> Check:
    """The L2 norm of all differences of a check, as a share of that of all numbers expected."""
    pairs = [(np.asarray(expected, np.float64), np.asarray(ours)) for _, expected, ours in check.pairs]
    difference, size = (np.sqrt(sum(np.square(x).sum() for x in part)) for part in (
        [ours - expected for expected, ours in pairs], [expected for expected, _ in pairs]
    ))  # fmt: skip
    return Check(case, (("L2 norm of the error", np.zeros(()), difference / size),), tolerance)


def _gradients(fixture: Fixture, case: str, gradients: DiT) -> Records:
    check = fixture.group(
        case, {f"{case}.{name}": x for name, x in _official(gradients).items()}, GRADIENT_TOLERANCE, relative=True
    )
    yield check
    yield _relative_l2(f"{case}.relative_l2", check, GRADIENT_L2_TOLERANCE)


def _stopped_gradients(fixture: Fixture, number: int, gradients: DiT) -> Records:
    """Of the update with a detached cache, of which the file has what goes through keys and values, and the norm."""
    case = f"{number}.gradient_stop"
    ours = {f"{case}.{name}": x for name, x in _official(gradients).items()}
    stored = {name: x for name, x in ours.items() if f"out.{name}" in fixture}
    yield fixture.group(case, stored, GRADIENT_TOLERANCE, relative=True)
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in ours.values()))
    yield fixture.group(f"{case}_norm", {f"{case}_norm": norm}, LOSS_TOLERANCE, relative=True)


def _weights(fixture: Fixture, case: str, network: DiT) -> Records:
    check = fixture.group(case, {f"{case}.{name}": x for name, x in _official(network).items()}, WEIGHT_TOLERANCE)
    yield check
    yield _relative_l2(f"{case}.relative_l2", check, WEIGHT_L2_TOLERANCE)
