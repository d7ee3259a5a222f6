"""Stage `distill`: the teacher into the student, on the student's own rollouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.stages import OptimizerConfig
from adastate_jax.sharding import tree_shardings
from adastate_jax.training.dmd import critic_step, draw_update, student_step
from adastate_jax.training.frozen import batch_text
from adastate_jax.training.stages.inputs import read_prompts, update_prompts
from adastate_jax.training.stages.run import Run, abstract_states, compile_step
from adastate_jax.training.state import TrainState, create_state


def distill(run: Run) -> None:
    """Distils the teacher into the student on the student's own rollouts."""
    config, stream, key = run.config.distill, run.config.stream, run.key("distill")
    teacher = run.network("teacher")
    abstract = abstract_states(run.config)["distill"]

    def create() -> dict[str, TrainState]:
        def state(name: str, optimizer: OptimizerConfig, ema: bool) -> TrainState:
            function = functools.partial(create_state, optimizer=optimizer, ema=ema)
            return jax.jit(function, out_shardings=tree_shardings(abstract[name], run.mesh))(run.network(name))

        return {"student": state("student", config.student, True), "critic": state("critic", config.critic, False)}

    def update_key(step: jax.Array, update: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, step), update)

    def update_student(student, critic, teacher, frozen, null_text, batch, step):
        text = batch_text(frozen, batch)
        draws = draw_update(update_key(step, 0), config.batch_size, config, stream, run.latent_shape)
        return student_step(student, critic, teacher, text, null_text, step, draws, config, stream)

    def update_critic(critic, student, frozen, batch, step):
        text = batch_text(frozen, batch)
        draws = draw_update(update_key(step, 1), config.batch_size, config, stream, run.latent_shape)
        return critic_step(critic, student, text, draws, config, stream)

    compiled_student = compile_step(run, update_student, abstract["student"])
    compiled_critic = compile_step(run, update_critic, abstract["critic"])
    uncompiled = {False, True}  # a step of the critic alone, a step of both

    def compiling(step: int) -> bool:
        kind = config.updates_student(step)
        compiles = kind in uncompiled
        uncompiled.discard(kind)
        return compiles

    def step_function(state, batch, step):
        student, critic, number = state["student"], state["critic"], jnp.int32(step)
        scalars = {}
        if config.updates_student(step):
            student, scalars = compiled_student(
                student, critic.params, teacher, run.frozen, run.negative_text, batch["student"], number
            )
        critic, critic_scalars = compiled_critic(critic, student.params, run.frozen, batch["critic"], number)
        scalars = {**scalars, **{f"critic_{name}": value for name, value in critic_scalars.items()}}
        return {"student": student, "critic": critic}, scalars

    def read(step: int) -> dict[str, dict[str, np.ndarray]]:
        return {
            name: read_prompts(run, texts, config.batch_size, number)
            for name, (texts, number) in update_prompts(run, step).items()
        }

    run.run_stage("distill", create, step_function, read, config.steps, compiling)
