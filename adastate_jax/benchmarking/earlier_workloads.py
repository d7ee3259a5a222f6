"""The programs of the stages before distillation, by their shapes alone.

Clips and captions were encoded beforehand: where a run has a codec and a text encoder in memory, what these hold and
compute is not in it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.benchmarking import flops
from adastate_jax.benchmarking.shapes import (
    Mesh,
    Workload,
    base_of,
    device_bytes,
    key_shape,
    require_divided,
    state_of,
    text_shape,
    transformer,
    whole,
)
from adastate_jax.benchmarking.utilisation import initialize_work
from adastate_jax.config.networks import trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.config.stages import ode_sigmas
from adastate_jax.models.dit import DiTConfig
from adastate_jax.sharding import batch_sharding, replicated
from adastate_jax.training.clips import clip_step, consistency_step
from adastate_jax.training.initialize import initialize_step, sample_trajectory
from adastate_jax.training.pretrain import pretrain_step

EARLIER = ("pretrain", "trajectories", "initialize")


def earlier_workload(name: str, config: Config, teacher: DiTConfig, mesh: Mesh) -> Workload:
    """A program of `EARLIER`, split over a mesh.

    Args:
        teacher: its sizes.

    Raises:
        UserError: the mesh does not divide the batch.
    """
    require_divided("pretrain" if name == "pretrain" else "initialize", config, mesh)
    return {"pretrain": _pretrain, "trajectories": _trajectories, "initialize": _initialize}[name](
        config, teacher, mesh
    )


def _latents(batch: int, frames: int, config: Config, mesh: Mesh, *axes: int) -> jax.ShapeDtypeStruct:
    shape = (batch, *axes, frames, *config.latent_shape)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))


def _step(
    name: str, function: Callable, state: Any, others: tuple[Any, ...], work: flops.Flops, mesh: Mesh
) -> Workload:
    """A program that takes the place of its state, which with its other arguments is all that lies there."""
    shardings = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    compiled = jax.jit(function, donate_argnums=0, out_shardings=shardings)
    return Workload(name, mesh, compiled, (state, *others), device_bytes(state), 0, work)


def _pretrain(config: Config, teacher: DiTConfig, mesh: Mesh) -> Workload:
    """A step of flow matching."""
    settings, frames = config.pretrain, config.clip_frames
    state = state_of("teacher", config, settings.optimizer, True, mesh)

    def update(state, key, text, clips, null_text):
        return pretrain_step(state, clips, text, null_text, key, settings)

    batch = text_shape(settings.batch_size, config, mesh), _latents(settings.batch_size, frames, config, mesh)
    sizes = trained_sizes(teacher)
    work = flops.pretrain_flops(sizes, frames, sizes.frame_tokens(*config.latent_shape[:2]))
    others = key_shape(mesh), *batch, _null_text(config, mesh)
    return _step("pretrain", update, state, others, work.times(settings.batch_size), mesh)


def _null_text(config: Config, mesh: Mesh) -> jax.ShapeDtypeStruct:
    text = text_shape(1, config, mesh)
    return whole(jax.ShapeDtypeStruct(text.shape, text.dtype), mesh)


def _trajectories(config: Config, teacher: DiTConfig, mesh: Mesh) -> Workload:
    """A file of the teacher's trajectories. Nothing else lies there yet."""
    settings, stream, frames = config.initialize, config.stream, config.trajectory_frames
    sigmas, keep_every = ode_sigmas(stream, settings.ode_steps), settings.ode_steps // len(stream.sigmas)

    def draw(teacher, noise, text, null_text):
        return sample_trajectory(teacher, noise, text, null_text, sigmas, settings.guidance_scale, keep_every)

    batch = settings.batch_size
    inputs = _latents(batch, frames, config, mesh), text_shape(batch, config, mesh), _null_text(config, mesh)
    work = flops.trajectory_flops(teacher, frames, teacher.frame_tokens(*config.latent_shape[:2]), settings.ode_steps)
    function = jax.jit(draw, out_shardings=batch_sharding(mesh))
    return Workload("trajectories", mesh, function, (transformer(teacher, mesh), *inputs), 0, 0, work.times(batch))


def _initialize(config: Config, teacher: DiTConfig, mesh: Mesh) -> Workload:
    """A step of the causal student, see `InitializeConfig.targets`."""
    settings, stream = config.initialize, config.stream
    batch, of_trajectories = settings.batch_size, settings.targets == "trajectories"
    state, base = state_of("student", config, settings.optimizer, True, mesh), base_of("student", config, mesh)
    frames = config.trajectory_frames if of_trajectories else config.clip_frames
    levels = (len(stream.sigmas) + 1,) if of_trajectories else ()

    def update(state, key, text, clips, null_text, base, teacher):
        if of_trajectories:
            return initialize_step(state, clips, text, key, settings, stream, base)
        if settings.targets == "clips":
            return clip_step(state, clips, text, null_text, key, settings, stream, base)
        return consistency_step(state, teacher, clips, text, null_text, key, settings, stream, base)

    others = (
        key_shape(mesh),
        text_shape(batch, config, mesh),
        _latents(batch, frames, config, mesh, *levels),
        _null_text(config, mesh),
        base,
        transformer(teacher, mesh) if settings.targets == "consistency" else None,
    )
    work = initialize_work(config, trained_sizes(config.network("student")), teacher)
    return _step("initialize", update, state, others, work.times(batch), mesh)
