"""The loop around the training steps: progress, metrics, checkpoints, signals, and what stops a run.

Nothing here decides what is computed: batches and keys are functions of the step, so a run that resumes at a step goes
on exactly as the run that was not interrupted.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX

from adastate_jax import interrupts
from adastate_jax.checkpoint import Checkpoints
from adastate_jax.console import progress
from adastate_jax.errors import UserError


class Metrics:
    """Scalars of a run: `metrics.jsonl`, a line per step, and TensorBoard events; written by the first process only."""

    def __init__(self, workdir: Path):
        self._active = jax.process_index() == 0
        self._path = workdir / "metrics.jsonl"
        self._board_folder = workdir / "tensorboard"
        self._boards: dict[str, tensorboardX.SummaryWriter] = {}

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what was logged of a stage from `step` on: those steps are about to be repeated."""
        if not self._active:
            return
        kept = []
        if self._path.is_file():
            for line in self._path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line that a kill cut short belongs to a repeated step
                    record = json.loads(line)
                    if record["stage"] != stage or record["step"] < step:
                        kept.append(line)
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)
        self._boards[stage] = tensorboardX.SummaryWriter(str(self._board_folder / stage), purge_step=step)

    def write(self, stage: str, records: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Appends the records (step, scalars) of a stage."""
        if not self._active:
            return
        with self._path.open("a") as file:
            for step, scalars in records:
                file.write(json.dumps({"stage": stage, "step": step, **scalars}) + "\n")
                for name, value in scalars.items():
                    self._boards[stage].add_scalar(name, value, step)
        self._boards[stage].flush()


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
) -> Any:
    """Runs a training stage from its newest checkpoint to its last step.

    Args:
        name: of the stage.
        like: shapes of the state, with shardings.
        create: makes the state before the first step; not called where there is a checkpoint.
        step_function: (state, batch, step) → (state, scalars on the device); may donate the state.
        batches: first step → iterator of (step, batch).
        steps: of the stage in all.
        compiling: whether the call at a step compiles, for the display; asked once per step, in order.

    Returns:
        The state after the last step, which is also the newest checkpoint.

    Raises:
        Stopped: after a signal; the state is saved. Before the first step is done there is nothing to save, and a
            signal raises at once.
        UserError: a loss or gradient norm is not finite; the last good checkpoint stays.
    """
    first = checkpoints.latest or 0
    state = checkpoints.load(like) if first else create()
    metrics.rewind(name, first)
    pending: list[tuple[int, Mapping[str, jax.Array]]] = []

    def flush() -> dict[str, float]:
        records = [(step, {key: float(value) for key, value in scalars.items()}) for step, scalars in pending]
        pending.clear()
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
        stop = None
        for step, batch in stream:
            if compiles := compiling(step):
                bar.set_description(f"{name} (compiling)")
            state, scalars = step_function(state, batch, step)
            pending.append((step, scalars))
            if compiles:
                jax.block_until_ready(scalars)
                bar.set_description(name)
            bar.update(1)
            stop = stop or unsaved.enter_context(interrupts.deferred("stopping as soon as all is saved"))
            done = step + 1
            if done % log_every == 0 or done == steps:
                latest = flush()
                bar.set_postfix({key: f"{value:.3g}" for key, value in latest.items()}, refresh=False)
            if done % save_every == 0 or done == steps or stop.requested:
                if pending:
                    flush()  # a state is saved only after every loss before it was seen to be finite
                checkpoints.save(done, state)
            if done == steps or stop.requested:
                checkpoints.wait()
                break  # leaving `unsaved` raises `Stopped` if that was asked for
    checkpoints.wait()
    return state
