"""Tensors that lie in files: nothing is read before it is asked for, and then only as many rows as are asked for."""

import dataclasses
import math
from pathlib import Path

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Weights come in these; the two that a network can be stored in are first.
FLOATING = (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16), np.dtype(np.float64))

_MAPPED_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided array of bytes of a file. Reading maps the file into memory, and lets go of it with the result.

    Attributes:
        path: the file.
        offset: byte of the first element.
        dtype: of the elements, little-endian.
        shape, strides: sizes of the axes, and steps along them in elements.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def dense(cls, path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> "StoredTensor":
        """One whose elements follow one another, the last axis fastest."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(path, offset, dtype, shape, strides)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All of it, read-only, in the file's dtype."""
        size = self.dtype.itemsize
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        extent = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        mapped = np.memmap(self.path, np.uint8, "r", self.offset, (extent * size,))
        # A hand-written file may place elements where no processor would; those are copied into order.
        flat = (mapped if self.offset % size == 0 else np.array(mapped)).view(self.dtype)
        strides = [stride * size for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Part [stop − start, ...] of the leading axis, read-only; raises IndexError outside of it."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of shape {self.shape}")
        part = dataclasses.replace(
            self,
            offset=self.offset + start * self.strides[0] * self.dtype.itemsize,
            shape=(stop - start, *self.shape[1:]),
        )
        return part.read()

    def last_rows(self, count: int) -> "StoredTensor":
        """The last `count` entries of the leading axis, unread."""
        skipped = (self.shape[0] - count) * self.strides[0] * self.dtype.itemsize
        return dataclasses.replace(self, offset=self.offset + skipped, shape=(count, *self.shape[1:]))


def row_blocks(shape: tuple[int, ...], itemsize: int, nbytes: int = _MAPPED_BYTES) -> list[tuple[int, int]]:
    """Ranges of rows that tile the leading axis, of at most `nbytes` each where single rows allow it."""
    row = max(math.prod(shape[1:]) * itemsize, 1)
    step = max(nbytes // row, 1)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
