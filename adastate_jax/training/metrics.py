"""Scalars of a run: `metrics.jsonl`, a line per step and one per report on its time, and TensorBoard events."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from adastate_jax import distributed
from adastate_jax.errors import UserError, reading, writing
from adastate_jax.files import write_text
from adastate_jax.training.spans import Spans, Work, device_memory, summary

_TIMES = "seconds_"  # what the names in a report on time begin with, but for rates and memory; no step's do


class Metrics:
    """The scalars of a run in the making, written by the first process only.

    TensorBoard's events are written by the caller's thread: tensorboardX's own would die of a full disk, and whoever
    hands it the next scalar would wait for ever.

    Args:
        spans: the clock that says where the time went.
        work: what steps take; without it, there are no rates.
    """

    def __init__(self, workdir: Path, spans: Spans | None = None, work: Work | None = None):
        self.spans = spans or Spans()
        self._work = work
        self._now: dict[str, float] = {}  # seconds per span of this call
        self._active = distributed.is_first()
        self._path = workdir / "metrics.jsonl"
        self._board_folder = workdir / "tensorboard"
        self._boards: dict[str, EventsWriter] = {}

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what was logged of a stage from `step` on: those steps are about to be repeated.

        Their time is not forgotten, but it is called so.

        Raises:
            UserError: the file is damaged, or cannot be written.
        """
        if not self._active:
            return
        records = _read(self._path) if self._path.exists() else []
        kept = []
        for record in records:
            if record["stage"] != stage or record["step"] < step:
                kept.append(record)
            elif _is_times(record):
                kept.append({f"{_TIMES}repeated" if name == f"{_TIMES}step" else name: x for name, x in record.items()})
        with writing(self._path):
            write_text(self._path, "".join(f"{json.dumps(record)}\n" for record in kept))
        folder = self._board_folder / stage
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._boards[stage] = EventsWriter(str(folder / "events"))
            self._boards[stage].write_event(_event(step, session_log=SessionLog(status=SessionLog.START)))
            self._boards[stage].flush()

    def write(self, stage: str, records: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Appends the records (step, scalars) of a stage, and where the time went since the last call.

        Raises:
            UserError: they cannot be written.
        """
        records = list(records)
        times = self._times(stage, [step for step, _ in records])
        if not self._active:
            return
        self._append([{"stage": stage, "step": step, **scalars} for step, scalars in records])
        board = self._boards[stage]
        with writing(self._board_folder / stage):
            for step, scalars in records:
                for name, value in scalars.items():
                    board.write_event(_event(step, summary=scalar(name, value)))
            board.flush()
        if records and times:
            self._report(stage, records[-1][0], times)

    def close(self, stage: str, step: int) -> None:
        """Reports on the time since the last call, at the end of a stage whose last step this was.

        Raises:
            UserError: it cannot be written.
        """
        times = self._times(stage, [])
        if self._active and times:
            self._report(stage, step, times)

    def summary(self, memory: Mapping[str, float]) -> list[str]:
        """What the first process says at the end of time, rates and memory; nothing if no time was reported.

        memory: peak of each device, in GiB.
        """
        if not self._active or not self._now:
            return []
        return summary(self._now, read_times(self._path), memory)

    def _times(self, stage: str, steps: list[int]) -> dict[str, float]:
        """The clock's seconds, by their names in the file, with rates and memory where steps were done."""
        taken = self.spans.take()
        for name, seconds in taken.items():
            self._now[name] = self._now.get(name, 0.0) + seconds
        times = {f"{_TIMES}{name}": seconds for name, seconds in taken.items()}
        if steps and self._work is not None:
            times |= self._work.rates(stage, steps, taken.get("step", 0.0))
        if steps and (memory := device_memory()):
            times["memory_gib"] = max(memory.values())
        return {name: float(f"{value:.6g}") for name, value in times.items()}

    def _report(self, stage: str, step: int, times: Mapping[str, float]) -> None:
        self._append([{"stage": stage, "step": step, **times}])
        if board := self._boards.get(stage):
            with writing(self._board_folder / stage):
                for name, value in times.items():
                    board.write_event(_event(step, summary=scalar(f"time/{name}", value)))
                board.flush()

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        with writing(self._path), self._path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The steps in a `metrics.jsonl`: stage, step, and a number per name.

    Lines at its end that a kill or a power cut left unreadable are left out: their steps are repeated.

    Raises:
        UserError: the file cannot be read, or a line before its end is damaged.
    """
    return [record for record in _read(path) if not _is_times(record)]


def read_times(path: str | Path) -> list[dict[str, Any]]:
    """The reports on time in a `metrics.jsonl`, each for what passed since the one before.

    Stage, last step, `seconds_NAME` for the spans; where steps were done, perhaps `tflops_per_second` of a device,
    `utilisation` of its peak (0 … 1), `memory_gib` at most on one of the first process's devices so far.

    Raises:
        UserError: as `read_metrics`.
    """
    return [record for record in _read(path) if _is_times(record)]


def _is_times(record: Mapping[str, Any]) -> bool:
    return any(name.startswith(_TIMES) for name in record)


def _read(path: str | Path) -> list[dict[str, Any]]:
    fix = "remove the file: training does not need it, only its curves do"
    with reading(path, fix):
        lines = Path(path).read_bytes().splitlines()
    records = [_record(line) for line in lines]
    while records and records[-1] is None:
        records.pop()
    if None in records:
        raise UserError(f"{path}: line {records.index(None) + 1} is damaged; {fix}")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("stage")) is not str or type(record.get("step")) is not int:
        return None
    scalars = [value for name, value in record.items() if name not in ("stage", "step")]
    return record if all(type(value) is float and math.isfinite(value) for value in scalars) else None


def _event(step: int, **content: Any) -> Event:
    return Event(wall_time=time.time(), step=step, **content)
