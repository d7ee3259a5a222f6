"""The loop around the training steps: progress, checkpoints, signals, and what stops a run.

Nothing here decides what is computed: batches and keys are functions of the step, so a run that resumes at a step goes
on exactly as the run that was not interrupted.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from adastate_jax import distributed, interrupts, lockstep
from adastate_jax.checkpoint import Checkpoints
from adastate_jax.console import progress
from adastate_jax.errors import UserError
from adastate_jax.training.metrics import Metrics
from adastate_jax.training.profile import Profile
from adastate_jax.training.spans import is_busy


def run_stage(
    name: str,
    like: Any,
    create: Callable[[], Any],
    step_function: Callable[[Any, Any, int], tuple[Any, Mapping[str, jax.Array]]],
    batches: Callable[[int], Iterator[tuple[int, Any]]],
    steps: int,
    checkpoints: Checkpoints,
    metrics: Metrics,
    log_every: int,
    save_every: int,
    compiling: Callable[[int], bool],
    profile: Profile | None = None,
) -> Any:
    """Runs a training stage from its newest checkpoint to its last step.

    Args:
        name: of the stage.
        like: shapes of the state, with shardings.
        create: makes the state before the first step; not called where there is a checkpoint.
        step_function: (state, batch, step) → (state, scalars on the device); may donate the state.
        batches: first step → iterator of (step, batch).
        steps: of the stage in all.
        metrics: also told where the time goes.
        compiling: whether the call at a step compiles, for the display; asked once per step, in order.
        profile: which steps are traced.

    Returns:
        The state after the last step, which is also the newest checkpoint.

    Raises:
        Stopped: after a signal; the state is saved. Before the first step is done there is nothing to save, and a
            signal raises at once.
        UserError: a loss or gradient norm is not finite; the last good checkpoint stays.
    """
    first = distributed.from_first(lambda: checkpoints.latest) or 0
    state = checkpoints.load(like) if first else create()
    jax.block_until_ready(state)
    metrics.rewind(name, first)
    spans = metrics.spans
    spans.lap("start")
    if profile is not None:
        profile.begin(name, first)
    pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def flush() -> dict[str, float]:
        records = [(step, {key: float(value) for key, value in scalars.items()}) for step, scalars in pending]
        pending.clear()
        spans.lap("step")
        for step, scalars in records:
            for key, value in scalars.items():
                if not math.isfinite(value):
                    checkpoints.wait()
                    kept = checkpoints.latest
                    keeps = f"checkpoint {kept} is kept" if kept else "nothing was saved yet"
                    raise UserError(
                        f"{name}: {key} is {value} at step {step}; {keeps} in {checkpoints.folder}; lower the learning "
                        "rate or look at the data"
                    )
        metrics.write(name, records)
        return {key: value for _, scalars in records for key, value in scalars.items()}

    with (
        contextlib.closing(batches(first)) as stream,
        progress(name, steps, first) as bar,
        contextlib.ExitStack() as unsaved,
    ):
        stop, scalars = None, {}
        for step, batch in stream:
            spans.lap("step" if is_busy(scalars) else "data")
            if profile is not None:
                profile.before(name, step, scalars, spans)
            if compiles := compiling(step):
                bar.set_description(f"{name} (compiling)")
                lockstep.untimed()
            before = scalars
            state, scalars = step_function(state, batch, step)
            # One step is handed over while another runs, and no more. In a longer queue, a signal would wait for all of
            # it, and only the step whose numbers are asked for would seem to take its time, as if it were stuck.
            jax.block_until_ready(before)
            pending.append((step, scalars))
            if compiles:
                spans.lap("compile")
                jax.block_until_ready(scalars)
                bar.set_description(name)
            if profile is not None:
                profile.after(name, step, scalars, spans)
            spans.lap("step")
            bar.update(1)
            stop = stop or unsaved.enter_context(interrupts.deferred("stopping as soon as all is saved"))
            done = step + 1
            stops = lockstep.pass_step(stop.requested)
            if done % log_every == 0 or done == steps:
                latest = flush()
                bar.set_postfix({key: f"{value:.3g}" for key, value in latest.items()}, refresh=False)
            if done % save_every == 0 or done == steps or stops:
                lockstep.untimed()
                if pending:
                    flush()  # a state is saved only after every loss before it was seen to be finite
                checkpoints.save(done, state)
                spans.lap("save")
            if done == steps or stops:
                checkpoints.wait()
                spans.lap("save")
                metrics.close(name, step)
                break  # leaving `unsaved` raises `Stopped` if that was asked for
    checkpoints.wait()
    return state
