"""Stage `initialize`: the causal student learns from the teacher's ODE trajectories, or from clips."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.models.dit import DiT
from adastate_jax.training.clips import clip_step, consistency_step
from adastate_jax.training.frozen import Frozen, batch_latents, batch_text
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.stages.inputs import read_clips, read_texts
from adastate_jax.training.stages.run import Run, abstract_states, compile_step, first_call
from adastate_jax.training.stages.trajectories import make_trajectories
from adastate_jax.training.state import TrainState


def initialize(run: Run) -> None:
    """Trains the causal student on what `config.initialize.targets` says."""
    config, stream, key = run.config.initialize, run.config.stream, run.key("initialize")
    abstract = abstract_states(run.config)["initialize"]
    read = _reader(run)
    teacher = run.network("teacher") if config.targets == "consistency" else None
    base = run.base("student", "initialize")
    null_text = run.empty_text if config.targets == "clips" else run.negative_text

    def create() -> TrainState:
        return run.new_state("student", config.optimizer, True, "initialize")

    def step_function(state: TrainState, base: DiT | None, teacher: DiT | None, frozen: Frozen, null_text, batch, step):
        text, step_key = batch_text(frozen, batch), jax.random.fold_in(key, step)
        if config.targets == "trajectories":
            return initialize_step(state, batch["trajectory"], text, step_key, config, stream, base)
        clips = batch_latents(frozen, batch)
        if config.targets == "clips":
            return clip_step(state, clips, text, null_text, step_key, config, stream, base)
        return consistency_step(state, teacher, clips, text, null_text, step_key, config, stream, base)

    compiled = compile_step(run, step_function, abstract)
    run.run_stage(
        "initialize",
        create,
        lambda state, batch, step: compiled(state, base, teacher, run.frozen, null_text, batch, jnp.int32(step)),
        read,
        config.steps,
        first_call(),
    )


def _reader(run: Run) -> Callable[[int], dict[str, np.ndarray]]:
    """How to read a step's batch; the trajectories are drawn before the first."""
    config = run.config.initialize
    if config.targets != "trajectories":
        return functools.partial(read_clips, run, "initialize", config.batch_size)
    trajectories = make_trajectories(run)

    def read(step: int) -> dict[str, np.ndarray]:
        chosen = run.indices("initialize", step, config.batch_size, config.trajectories)
        return {"trajectory": trajectories(chosen), **read_texts(run, run.captions, chosen)}

    return read
