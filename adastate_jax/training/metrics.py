"""Scalars of a run: `metrics.jsonl`, a line per step, and TensorBoard events."""

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


class Metrics:
    """The scalars of a run in the making, written by the first process only.

    TensorBoard's events are written by the caller's thread: tensorboardX's own would die of a full disk, and whoever
    hands it the next scalar would wait for ever.
    """

    def __init__(self, workdir: Path):
        self._active = distributed.is_first()
        self._path = workdir / "metrics.jsonl"
        self._board_folder = workdir / "tensorboard"
        self._boards: dict[str, EventsWriter] = {}

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what was logged of a stage from `step` on: those steps are about to be repeated.

        Raises:
            UserError: the file is damaged, or cannot be written.
        """
        if not self._active:
            return
        records = read_metrics(self._path) if self._path.exists() else []
        kept = [record for record in records if record["stage"] != stage or record["step"] < step]
        with writing(self._path):
            write_text(self._path, "".join(f"{json.dumps(record)}\n" for record in kept))
        folder = self._board_folder / stage
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._boards[stage] = EventsWriter(str(folder / "events"))
            self._boards[stage].write_event(_event(step, session_log=SessionLog(status=SessionLog.START)))
            self._boards[stage].flush()

    def write(self, stage: str, records: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Appends the records (step, scalars) of a stage; raises UserError if they cannot be written."""
        if not self._active:
            return
        records = list(records)
        with writing(self._path), self._path.open("a") as file:
            for step, scalars in records:
                file.write(json.dumps({"stage": stage, "step": step, **scalars}) + "\n")
        board = self._boards[stage]
        with writing(self._board_folder / stage):
            for step, scalars in records:
                for name, value in scalars.items():
                    board.write_event(_event(step, summary=scalar(name, value)))
            board.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`: stage, step, and a number per name.

    Lines at its end that a kill or a power cut left unreadable are left out: their steps are repeated.

    Raises:
        UserError: the file cannot be read, or a line before its end is damaged.
    """
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
