"""Animated WebP files, which FFmpeg writes but does not read: through Pillow, as video frames."""

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image

_FIRST_FRAMES = 8  # whose durations tell the rate


def is_webp(path: str | os.PathLike) -> bool:
    """Whether a file begins as a WebP does; raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        start = file.read(12)
    return start.startswith(b"RIFF") and start.endswith(b"WEBP")


def webp_header(path: str | os.PathLike) -> tuple[Fraction, int, int, int]:
    """Frames per second by the first of them, number of frames, height and width; `ValueError` for a damaged file."""
    with _opened(path) as picture:
        count, height, width = picture.n_frames, picture.height, picture.width
    seconds = [time for time, _ in itertools.islice(decode_webp(path), _FIRST_FRAMES + 1)]
    last = seconds[-1] if len(seconds) > 1 else 0.04
    rate = Fraction(max(len(seconds) - 1, 1) / last).limit_denominator(100)
    return rate, count, height, width


def decode_webp(path: str | os.PathLike) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes a WebP frame by frame: (seconds since the first frame, frame in RGBA).

    Raises `ValueError` where it is damaged.
    """
    seconds = 0.0
    with _opened(path) as picture:
        for number in range(picture.n_frames):
            with _damage(f"after {seconds:.2f} s"):
                picture.seek(number)
                pixels = np.asarray(picture.convert("RGBA"))
            yield seconds, av.VideoFrame.from_ndarray(pixels, format="rgba")
            seconds += max(picture.info.get("duration", 0), 1) / 1000


def _opened(path):
    with _damage("at its beginning"):
        return Image.open(path, formats=("WEBP",))


@contextlib.contextmanager
def _damage(where):
    """Makes a ValueError of whatever a decoder does on a damaged file, and keeps what it warns of to itself."""
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except Exception as error:
            raise ValueError(f"it is a WebP that is cut off or damaged {where}") from error
