"""Stage `initialize`: the causal student learns to land on the teacher's ODE trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.sharding import tree_shardings
from adastate_jax.training.frozen import Frozen, batch_text
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.networks import load_weights
from adastate_jax.training.stages.inputs import read_texts
from adastate_jax.training.stages.run import Run, abstract_states, compile_step, first_call
from adastate_jax.training.stages.trajectories import make_trajectories
from adastate_jax.training.state import TrainState, create_state


def initialize(run: Run) -> None:
    """Trains the causal student to land on the teacher's ODE trajectories."""
    config, stream, key = run.config.initialize, run.config.stream, run.key("initialize")
    abstract = abstract_states(run.config)["initialize"]
    trajectories = make_trajectories(run)

    def create() -> TrainState:
        student = load_weights(run.config, run.workdir, "student", run.mesh, trained=True, start=True)
        function = functools.partial(create_state, optimizer=config.optimizer, ema=True)
        return jax.jit(function, out_shardings=tree_shardings(abstract, run.mesh))(student)

    def step_function(state: TrainState, frozen: Frozen, batch, step):
        text = batch_text(frozen, batch)
        return initialize_step(state, batch["trajectory"], text, jax.random.fold_in(key, step), config, stream)

    def read(step: int) -> dict[str, np.ndarray]:
        chosen = run.indices("initialize", step, config.batch_size, config.trajectories)
        return {"trajectory": trajectories(chosen), **read_texts(run, run.captions, chosen)}

    compiled = compile_step(run, step_function, abstract)
    run.run_stage(
        "initialize",
        create,
        lambda state, batch, step: compiled(state, run.frozen, batch, jnp.int32(step)),
        read,
        config.steps,
        first_call(),
    )
