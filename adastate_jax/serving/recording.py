"""What a session leaves on disk: a folder with its video, its file, and what of its keys tells who may read them.

Both are complete up to the last chunk at any moment, however the process ends; a server that starts serves what it
finds.
"""

import dataclasses
import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from adastate_jax.errors import UserError, writing
from adastate_jax.files import write_text
from adastate_jax.generation.provenance import describe_takes
from adastate_jax.generation.takes import Step, Take, take_to_dict
from adastate_jax.media import enlarge, fitted
from adastate_jax.media.growing import GrowingVideo
from adastate_jax.serving.session import Session, digest
from adastate_jax.texts import read_json

_log = logging.getLogger(__name__)

VIDEO, SESSION, _ACCESS = "video.mp4", "session.json", "access.json"
_NAME = re.compile("[0-9a-f]{16}")
_SMALLEST = 192  # pixels of a recording's height; smaller frames are enlarged by a whole number


class Recording:
    """A running session's folder. One thread uses it.

    Raises:
        UserError: it cannot be written.
    """

    def __init__(self, folder: Path, session: Session, head: dict[str, Any], fps: int):
        self.folder = folder
        # Its own command would name folders, and the token.
        self._command = ["python", "-m", "adastate_jax.serve", f"--checkpoint={head['checkpoint']}"]
        self._video = GrowingVideo(folder / VIDEO, fps, describe_takes(head, self._command))
        self._size: tuple[int, int] | None = None
        self._scale = 1
        self._finished: list[dict[str, Any]] = []  # takes
        self._take: Take | None = None
        self._number: int | None = None
        self._timings: list[tuple[float, float]] = []
        self._head = head | {"session": session.name, "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with writing(folder):
            folder.mkdir(parents=True, mode=0o700)
            kept = {"key": digest(session.key), "watch_key": digest(session.watch_key)}
            write_text(folder / _ACCESS, json.dumps(kept))

    def add(self, take: Take, number: int, step: Step, controls: list[dict[str, Any]]) -> None:
        """Adds a chunk, of take `number`, as it is after it."""
        if self._take is not None and number != self._number:  # takes without a chunk are none
            self._finished.append(take_to_dict(self._take))
        self._take, self._number = take, number
        self._timings.append((round(1000 * step.network, 2), round(1000 * step.decoded, 2)))
        self._video.write(self._fit(step.frames))
        self._write(controls, None)

    def end(self, reason: str, controls: list[dict[str, Any]]) -> None:
        """Closes the video, has it say how it was made, and says why the session ended."""
        self._video.close()
        try:
            self._video.describe(describe_takes(self._head, self._command, self._takes(), scale=self._scale))
        except UserError as error:  # it takes room for a second one; the first stays
            _log.warning("%s", error)
        self._write(controls, reason)

    def _takes(self) -> list[dict[str, Any]]:
        return [*self._finished, *([take_to_dict(self._take)] if self._take else [])]

    def _write(self, controls: list[dict[str, Any]], reason: str | None) -> None:
        found = self._head | {
            "ended": reason,
            "takes": self._takes(),
            "controls": controls,
            "timings_ms": {"network": [one for one, _ in self._timings], "decoded": [one for _, one in self._timings]},
        }
        with writing(self.folder):
            write_text(self.folder / SESSION, json.dumps(found) + "\n")

    def _fit(self, frames: np.ndarray) -> np.ndarray:
        """Frames [F, h, w, 3] enlarged by a whole number; in a later take of another width, fitted into the first's."""
        self._scale = max(1, -(-_SMALLEST // frames.shape[1]))
        frames = enlarge(frames, self._scale)
        self._size = self._size or frames.shape[1:3]
        return fitted(frames, *self._size)


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder of all recordings, of which it keeps the newest.

    Attributes:
        folder: holds a folder for each session, and may hold other things, which are left alone.
        most: recordings that are kept.
    """

    folder: Path
    most: int

    def check(self) -> None:
        """Makes the folder; raises UserError where nothing can be written to it."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()

    def begin(self, session: Session, head: dict[str, Any], fps: int) -> Recording:
        """A new recording; the oldest goes where there are too many."""
        with writing(self.folder):
            kept = sorted(self._recordings(), key=lambda folder: folder.stat().st_mtime)
        for folder in kept[: max(0, len(kept) + 1 - self.most)]:
            shutil.rmtree(folder, ignore_errors=True)
        return Recording(self.folder / session.name, session, head, fps)

    def find(self, name: str, key: str, file: str) -> Path | None:
        """A recording's file, for who has one of its keys; None for anybody else, and where there is none."""
        if not _NAME.fullmatch(name) or file not in (VIDEO, SESSION):
            return None
        try:
            access = read_json(self.folder / name / _ACCESS, "")
        except UserError:
            return None
        path = self.folder / name / file
        allowed = isinstance(access, dict) and digest(key) in (access.get("key"), access.get("watch_key"))
        return path if allowed and path.is_file() else None

    def _recordings(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and (path / _ACCESS).is_file()]
