"""Videos that can be played while they are written: a fragmented mp4, complete up to its last frame at any moment."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np

from adastate_jax.errors import writing
from adastate_jax.files import whole_file
from adastate_jax.media.writers import FPS, Mp4

_KEY_FRAMES = 2  # seconds between them: a player can jump to one


class GrowingVideo:
    """An H.264 mp4 in fragments of a frame each, under its own name from the first one on.

    Whenever the process ends, and however, the file shows all that was written. Sides are made even by repeating the
    last row and column.

    Args:
        metadata: as of `open_writer`: what is known at the beginning.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: int = FPS, metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        self._encoder = _Fragmented(path, fps, dict(metadata or {}))

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

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Has the file, once it is closed, say `metadata` instead: it becomes an ordinary mp4 of the same pictures."""
        if not self.path.exists():  # no frame came
            return
        options = {"movflags": "+faststart+use_metadata_tags"}
        with (
            writing(self.path, av.FFmpegError),
            whole_file(self.path) as temporary,
            av.open(f"file:{self.path}") as source,
            av.open(f"file:{temporary}", "w", format="mp4", options=options) as target,
        ):
            target.metadata.update(metadata)
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:  # the last one only says that it is the last
                    packet.stream = stream
                    target.mux(packet)


class _Fragmented(Mp4):
    """Each frame leaves the encoder as it comes, and the file's buffer with it."""

    def open(self):
        movflags = "+frag_every_frame+empty_moov+default_base_moof+use_metadata_tags"
        options = {"movflags": movflags, "flush_packets": "1"}
        container = av.open(f"file:{self.path}", "w", format="mp4", options=options)
        container.metadata.update(self.metadata)
        return container

    def options(self):
        return super().options() | {"tune": "zerolatency", "g": str(_KEY_FRAMES * int(self.fps)), "threads": "1"}

    def close(self):
        if self._container is not None:
            self.finish()
