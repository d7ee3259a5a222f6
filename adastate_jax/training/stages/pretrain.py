"""Stage `pretrain`: the bidirectional teacher, on clips."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.config.networks import trained_sizes
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import init_sharded
from adastate_jax.training.frozen import Frozen, batch_latents, batch_text
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.stages.inputs import read_clips
from adastate_jax.training.stages.run import Run, abstract_states, compile_step, first_call
from adastate_jax.training.state import TrainState, create_state


def pretrain(run: Run) -> None:
    """Trains the bidirectional teacher on clips."""
    config, key = run.config.pretrain, run.key("pretrain")
    network = trained_sizes(run.config.network("teacher"))

    def create() -> TrainState:
        return init_sharded(
            lambda key: create_state(DiT(network, rngs=nnx.Rngs(key)), config.optimizer, True),
            run.mesh,
            run.key("weights"),
        )

    def step_function(state: TrainState, frozen: Frozen, empty_text, batch, step):
        latents = batch_latents(frozen, batch)
        return pretrain_step(
            state, latents, batch_text(frozen, batch), empty_text, jax.random.fold_in(key, step), config
        )

    compiled = compile_step(run, step_function, abstract_states(run.config)["pretrain"])
    read = functools.partial(read_clips, run, "pretrain", config.batch_size)
    run.run_stage(
        "pretrain",
        create,
        lambda state, batch, step: compiled(state, run.frozen, run.empty_text, batch, jnp.int32(step)),
        read,
        config.steps,
        first_call(),
    )
