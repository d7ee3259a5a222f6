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


def step_flops(config: Config, stage: str, step: int) -> int | None:
    """Operations of one training step, on all devices together: the networks', forward and backward, without `remat`'s.

    What is computed again to save memory is left out, as in any model FLOPs utilisation. Of a rollout whose number of
    denoising steps or whose part is drawn it is the mean. Encoding texts and videos is not counted. None where nothing
    counts the work: a stage that trains adapters, and `initialize.targets` `consistency`.
    """

    def sizes(name: str) -> DiTConfig:
        network = config.network(name)
        return dataclasses.replace(network if name == "teacher" else trained_sizes(network), remat="none")

    settings = getattr(config, stage)
    if stage != "pretrain" and any(getattr(config, name).lora.rank for name in ("student", "critic")):
        return None
    tokens = sizes("student").frame_tokens(*config.latent_shape[:2])
    if stage == "pretrain":
        work = [flops.pretrain_flops(sizes("teacher"), config.clip_frames, tokens)]
    elif stage == "initialize":
        if settings.targets == "consistency":
            return None
        frames = config.trajectory_frames if settings.targets == "trajectories" else config.clip_frames
        work = [flops.initialize_flops(sizes("student"), config.stream, frames, tokens, settings.context)]
    else:
        shape = config.stream, settings, tokens
        work = [flops.critic_flops(sizes("student"), sizes("critic"), *shape)]
        if settings.updates_student(step):
            work.append(flops.student_flops(sizes("student"), sizes("critic"), sizes("teacher"), *shape))
    return settings.batch_size * sum(part.total for part in work)


def device_peak() -> float | None:
    """`peak_flops` of the devices of this run; None where they are not all of one kind, too."""
    kinds = {device.device_kind for device in jax.devices()}
    return peak_flops(kinds.pop()) if len(kinds) == 1 else None
