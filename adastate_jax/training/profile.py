"""A `jax.profiler` trace of some steps, for XProf or Perfetto."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import jax

from adastate_jax import distributed, lockstep
from adastate_jax.config.run import Config
from adastate_jax.errors import UserError, writing
from adastate_jax.files import whole_folder
from adastate_jax.training.spans import Spans

MOST = 100  # steps of one trace, which grows by megabytes with each
_AHEAD = 4  # steps, more than a process can be ahead of the one that writes


class Profile:
    """Which steps of each stage are traced: FIRST to LAST, both included, counted from 0 as in `metrics.jsonl`.

    The first process writes `folder/STAGE` once the last of them is done, of what its own devices and threads did. A
    trace that was there goes. A context manager: a trace that is begun and cut short leaves nothing.

    Raises:
        UserError: the range is none, or no stage has these steps; from the methods, the trace cannot be written.
    """

    def __init__(self, text: str, config: Config, folder: Path):
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
        if not found:
            raise UserError(f"--profile={text}: must be FIRST:LAST, two steps, such as 20:24")
        self._first, self._last = map(int, found.groups())
        if not 0 <= self._last - self._first < MOST:
            raise UserError(f"--profile={text}: must be 1 to {MOST} steps, the first of them first")
        steps = {stage: getattr(getattr(config, stage), "steps", 0) for stage in config.stages}
        if self._last >= max(steps.values(), default=0):
            most = ", ".join(f"{stage} {count}" for stage, count in steps.items() if count)
            raise UserError(f"--profile={text}: no stage has a step {self._last}: they have {most or 'none'}, from 0")
        self._text, self._folder = text, folder
        self._open = contextlib.ExitStack()
        self._tracing: str | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._tracing is not None:
            self._tracing = None
            jax.profiler.stop_trace()
            with contextlib.suppress(_CutShort):
                self._open.__exit__(_CutShort, _CutShort(), None)

    def begin(self, stage: str, first: int) -> None:
        """Says so where a stage goes on behind the first step to trace."""
        if first > self._first and distributed.is_first():
            print(f"note: --profile={self._text}: {stage} goes on from {first}, so it is not traced", file=sys.stderr)

    def before(self, stage: str, step: int, outputs: Any, spans: Spans) -> None:
        """Starts the trace before a step if that is the first one; `outputs` are those of the step before.

        spans: the clock, so that no step's time is taken for longer by what the trace costs.
        """
        if step != self._first or not distributed.is_first():
            return
        jax.block_until_ready(outputs)
        spans.lap("step")
        path = self._folder / stage
        with writing(path):
            self._folder.mkdir(exist_ok=True)
            temporary = self._open.enter_context(whole_folder(path, replaces=None))
        jax.profiler.start_trace(str(temporary))
        self._tracing = stage
        spans.lap("profile")

    def after(self, stage: str, step: int, outputs: Any, spans: Spans) -> None:
        """Ends the trace behind the last step, once the devices have done it."""
        if step == self._last:
            lockstep.untimed(_AHEAD)  # of all processes: those that write nothing wait in one of the next steps
        if step != self._last or self._tracing != stage:
            return
        jax.block_until_ready(outputs)
        spans.lap("step")
        self._tracing = None
        jax.profiler.stop_trace()
        with writing(self._folder / stage):
            self._open.close()
        spans.lap("profile")
        print(f"profile: {self._folder / stage}", file=sys.stderr)


class _CutShort(Exception):
    """Makes the context of a folder remove it."""
