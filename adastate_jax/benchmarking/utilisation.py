"""What the training steps of a run are to take, by its configuration, and what the devices here can do at best."""

import dataclasses

import jax

from adastate_jax.benchmarking import flops
from adastate_jax.benchmarking.targets import CHIPS
from adastate_jax.config.networks import trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.models.dit import DiTConfig

# How JAX calls the chips; what a name goes on with is another product of its maker, with another peak.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def peak_flops(kind: str) -> float | None:
    """bfloat16 operations per second of a device by its data sheet; None for one that is not known by its kind."""
    chip = _KINDS.get(kind)
    return CHIPS[chip].flops if chip else None


def step_flops(config: Config, stage: str, step: int) -> int:
    """Operations of one training step, on all devices together: the networks', forward and backward, without `remat`'s.

    What is computed again to save memory is left out, as in any model FLOPs utilisation. Of a rollout whose number of
    denoising steps or whose part is drawn it is the mean. Encoding texts and videos is not counted.
    """

    def sizes(name: str) -> DiTConfig:
        network = config.network(name)
        return dataclasses.replace(network if name == "teacher" else trained_sizes(network), remat="none")

    settings = getattr(config, stage)
    adapters = {f"{name}_lora": getattr(config, name).lora for name in ("student", "critic")}
    tokens = sizes("student").frame_tokens(*config.latent_shape[:2])
    if stage == "pretrain":
        work = [flops.pretrain_flops(sizes("teacher"), config.clip_frames, tokens)]
    elif stage == "initialize":
        work = [initialize_work(config, sizes("student"), sizes("teacher"))]
    else:
        shape = config.stream, settings, tokens
        work = [flops.critic_flops(sizes("student"), sizes("critic"), *shape, **adapters)]
        if settings.updates_student(step):
            networks = sizes("student"), sizes("critic"), sizes("teacher")
            work.append(flops.student_flops(*networks, *shape, **adapters))
    return settings.batch_size * sum(part.total for part in work)


def initialize_work(config: Config, student: DiTConfig, teacher: DiTConfig) -> flops.Flops:
    """Operations of a step of `initialize` per sample, for networks of these sizes."""
    settings, lora = config.initialize, config.student.lora
    frames = config.trajectory_frames if settings.targets == "trajectories" else config.clip_frames
    shape = config.stream, frames, student.frame_tokens(*config.latent_shape[:2]), settings.context
    if settings.targets == "consistency":
        return flops.consistency_flops(student, teacher, *shape, bool(settings.guidance_scale), lora)
    return flops.initialize_flops(student, *shape, lora)


def device_peak() -> float | None:
    """`peak_flops` of the devices of this run; None where they are not all of one kind, too."""
    kinds = {device.device_kind for device in jax.devices()}
    return peak_flops(kinds.pop()) if len(kinds) == 1 else None
