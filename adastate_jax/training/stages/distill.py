"""Stage `distill`: the teacher into the student, on the student's own rollouts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.models.adapters import join
from adastate_jax.sharding import replicated
from adastate_jax.training.dmd import (
    Draws,
    critic_segment_step,
    critic_step,
    draw_update,
    student_segment_step,
    student_step,
)
from adastate_jax.training.frozen import batch_text, with_shardings
from adastate_jax.training.long_rollout import Part, Place, empty_carried, place_of, with_carried_shardings
from adastate_jax.training.stages.inputs import read_prompts, update_prompts
from adastate_jax.training.stages.run import Run, abstract_states

# What a program reads of its place: numbers of the part's first chunk, and of the iteration and update that began it.
Numbers = dict[str, jax.Array]


def distill(run: Run) -> None:
    """Distils the teacher into the student on the student's own rollouts.

    The state has a rollout beside the two networks where `distill.continue_rollout` is set.
    """
    config, stream, key = run.config.distill, run.config.stream, run.key("distill")
    teacher, bases = run.network("teacher"), {name: run.base(name, "distill") for name in ("student", "critic")}
    like = with_shardings(abstract_states(run.config)["distill"], run.mesh)
    if config.continue_rollout:
        sizes = run.config.network("student")
        empty = functools.partial(empty_carried, sizes, config, stream, run.latent_shape)
        like["rollout"] = with_carried_shardings(jax.eval_shape(empty), run.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def create() -> dict[str, Any]:
        states: dict[str, Any] = {
            "student": run.new_state("student", config.student, True, "distill"),
            "critic": run.new_state("critic", config.critic, False, "distill"),
        }
        if config.continue_rollout:
            states["rollout"] = jax.jit(empty, out_shardings=shardings["rollout"])()
        return states

    def update_key(step: jax.Array, update: jax.Array | int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, step), update)

    def draws_of(step: jax.Array, update: int, part: Part | None, numbers: Numbers) -> Draws:
        settings = config.batch_size, config, stream, run.latent_shape
        if part is None:
            return draw_update(update_key(step, update), *settings)
        begun = update_key(numbers["iteration"], numbers["update"])
        return draw_update(update_key(step, update), *settings, part, numbers["chunk"], begun)

    student_update = student_segment_step if config.continue_rollout else student_step
    critic_update = critic_segment_step if config.continue_rollout else critic_step

    def update_student(part, student, critic, bases, teacher, frozen, null_text, batch, step, numbers):
        text, critic = batch_text(frozen, batch), join(critic, bases["critic"])
        draws = draws_of(step, 0, part, numbers)
        return student_update(student, critic, teacher, text, null_text, step, draws, config, stream, bases["student"])

    def update_critic(part, critic, student, bases, frozen, batch, step, numbers):
        text, student = batch_text(frozen, batch), join(student, bases["student"])
        draws = draws_of(step, 1, part, numbers)
        return critic_update(critic, student, text, draws, config, stream, bases["critic"])

    @functools.cache
    def compiled(update, name: str, part: Part | None):
        """The program for a kind of parts; it takes the place of the network's state, and of the rollout."""
        own = (shardings[name], shardings["rollout"]) if config.continue_rollout else shardings[name]
        function = functools.partial(update, part)
        return jax.jit(function, donate_argnums=0, out_shardings=(own, replicated(run.mesh)))

    def places(step: int) -> dict[str, Place | None]:
        """By network, what an iteration's updates score."""
        numbers = config.update_numbers(step)
        return {name: place_of(number, config, stream, run.config.seed) for name, number in numbers.items()}

    def numbers_of(place: Place | None) -> Numbers:
        if place is None:
            return {}
        iteration, update = config.update_of(place.begun)
        numbers = {"chunk": place.chunk, "iteration": iteration, "update": update}
        return {name: jnp.int32(value) for name, value in numbers.items()}

    compiled_kinds = set()

    def compiling(step: int) -> bool:
        kinds = {(name, place and place.part) for name, place in places(step).items()}
        new = kinds - compiled_kinds
        compiled_kinds.update(kinds)
        return bool(new)

    def step_function(states, batch, step):
        states, number, where = dict(states), jnp.int32(step), places(step)

        def update(name: str, function, *given):
            place = where[name]
            program = compiled(function, name, place and place.part)
            own = (states[name], states["rollout"]) if config.continue_rollout else states[name]
            own, scalars = program(own, *given, batch[name], number, numbers_of(place))
            if config.continue_rollout:
                states[name], states["rollout"] = own
            else:
                states[name] = own
            return scalars

        scalars = {}
        if config.updates_student(step):
            critic = states["critic"].params
            scalars = update("student", update_student, critic, bases, teacher, run.frozen, run.negative_text)
        critic_scalars = update("critic", update_critic, states["student"].params, bases, run.frozen)
        return states, {**scalars, **{f"critic_{name}": value for name, value in critic_scalars.items()}}

    def read(step: int) -> dict[str, dict[str, np.ndarray]]:
        return {
            name: read_prompts(run, texts, config.batch_size, number)
            for name, (texts, number) in update_prompts(run, step).items()
        }

    run.run_stage("distill", create, step_function, read, config.steps, compiling, like)
