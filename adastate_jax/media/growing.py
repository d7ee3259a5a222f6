"""Videos that can be played while they are written: a fragmented mp4, complete up to its last frame at any moment."""

import contextlib
from pathlib import Path

import av
import numpy as np

from adastate_jax.errors import writing
from adastate_jax.media.writers import FPS, Mp4

_KEY_FRAMES = 2  # seconds between them: a player can jump to one


class GrowingVideo:
    """An H.264 mp4 in fragments of a frame each, under its own name from the first one on.

    Whenever the process ends, and however, the file shows all that was written. Sides are made even by repeating the
    last row and column.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: int = FPS):
        self.path = Path(path)
        self._encoder = _Fragmented(path, fps, {})

    def write(self, frames: np.ndarray) -> None:
        """Appends frames [F, H, W, 3] uint8; they are in the file when this returns."""
        even = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
        with writing(self.path):
            for frame in np.pad(frames, even, mode="edge"):
                self._encoder.write(frame)

    def close(self) -> None:
        """Ends the file."""
        with writing(self.path), contextlib.suppress(av.FFmpegError):
            self._encoder.close()


class _Fragmented(Mp4):
    """Each frame leaves the encoder as it comes, and the file's buffer with it."""

    def open(self):
        movflags = "+frag_every_frame+empty_moov+default_base_moof"
        return av.open(f"file:{self.path}", "w", format="mp4", options={"movflags": movflags, "flush_packets": "1"})

    def options(self):
        return super().options() | {"tune": "zerolatency", "g": str(_KEY_FRAMES * int(self.fps)), "threads": "1"}

    def close(self):
        if self._container is not None:
            self.finish()
