"""The end of a video, for a stream to go on from."""

from pathlib import Path

import numpy as np

from adastate_jax.data.decoding import Unusable, decode_frames, reasons
from adastate_jax.data.footage import read_clips
from adastate_jax.errors import UserError
from adastate_jax.files import existing_name
from adastate_jax.media.writers import FPS


def read_last_frames(path: str | Path, count: int, height: int, width: int) -> np.ndarray:
    """The end of a video at 16 frames per second, whatever its own rate: uint8 [n, height, width, 3].

    Frames are scaled to cover height × width and cropped at their centre; n is `count`, or less of a shorter video.

    Raises:
        UserError: the file is missing, no video, or damaged.
    """
    path = existing_name(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with reasons(path):
            return _last_frames(path, count, height, width)
    except Unusable as reason:
        raise UserError(f"{path}: not a readable video ({reason})") from None


def _last_frames(path, count, height, width):
    times = np.array([seconds for seconds, _ in decode_frames(path)])
    if not len(times):
        raise ValueError("it has no frames")
    ages = np.arange(min(count, int(times[-1] * FPS + 1e-3) + 1))[::-1] / FPS
    numbers = np.abs(times - (times[-1] - ages[:, None])).argmin(axis=1)
    return next(read_clips(path, numbers[None], height, width))
