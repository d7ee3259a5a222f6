"""Stage `distill`: the teacher into the student, on the student's own rollouts."""

import functools

import jax
import jax.numpy as jnp

from adastate_jax.sharding import tree_shardings
from adastate_jax.training.dmd import critic_step, student_step
from adastate_jax.training.stages.inputs import read_prompts
from adastate_jax.training.stages.run import Run, abstract_states, compile_step, copy_tree, trained
from adastate_jax.training.state import TrainState, create_state


def distill(run: Run) -> None:
    """Distils the teacher into the student on the student's own rollouts."""
    config, stream, key = run.config.distill, run.config.stream, run.key("distill")
    teacher = trained(run, "pretrain", "ema")
    abstract = abstract_states(run.config)["distill"]

    def create() -> dict[str, TrainState]:
        def states(student, teacher):
            return {
                "student": create_state(copy_tree(student), config.student, True),
                "critic": create_state(copy_tree(teacher), config.critic, False),
            }

        shardings = tree_shardings(abstract, run.mesh)
        return jax.jit(states, out_shardings=shardings)(trained(run, "initialize", "ema"), teacher)

    def update_student(student, critic, teacher, frozen, null_text, batch, step):
        text = frozen.text_encoder.encode(batch["token_ids"], batch["mask"])
        update_key = jax.random.fold_in(jax.random.fold_in(key, step), 0)
        return student_step(
            student, critic, teacher, text, null_text, step, update_key, config, stream, run.latent_shape
        )

    def update_critic(critic, student, frozen, batch, step):
        text = frozen.text_encoder.encode(batch["token_ids"], batch["mask"])
        update_key = jax.random.fold_in(jax.random.fold_in(key, step), 1)
        return critic_step(critic, student, text, update_key, config, stream, run.latent_shape)

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
                student, critic.params, teacher, run.frozen, run.negative_text, batch, number
            )
        critic, critic_scalars = compiled_critic(critic, student.params, run.frozen, batch, number)
        scalars = {**scalars, **{f"critic_{name}": value for name, value in critic_scalars.items()}}
        return {"student": student, "critic": critic}, scalars

    read = functools.partial(read_prompts, run, "distill", config.batch_size)
    run.run_stage("distill", create, step_function, read, config.steps, compiling)
