"""Tensors that are read when asked for, and then only as many rows as are asked for: the currency of `convert`."""

import dataclasses
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from adastate_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

# Weights come in these.
FLOATING = (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16), np.dtype(np.float64), *FLOAT8)

# Rows are handled so many bytes at a time: transposing such a block stays within the processor's caches.
_BLOCK_BYTES = 1 << 22


class Tensor(Protocol):
    """What a reader needs to know of a tensor.

    Attributes:
        path: file or folder that it comes from, to name in errors.
        shape, dtype: of the elements.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Part [stop − start, ...] of the leading axis, read-only, in any floating dtype."""


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """An array in memory."""

    path: Path
    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


class Checked:
    """Bytes of a file and their CRC-32, which is compared once, when the first of them is asked for.

    They are mapped and go through the processor then; what is copied from them next comes from memory, so that the
    disk is read once.
    """

    def __init__(self, path: Path, offset: int, size: int, checksum: int):
        self._path, self._offset, self._size, self._checksum = path, offset, size, checksum
        self._verified = False

    def verify(self) -> None:
        """Raises UserError if the bytes are not those that were written."""
        if self._verified or not self._size:
            return
        if zlib.crc32(np.memmap(self._path, np.uint8, "r", self._offset, (self._size,))) != self._checksum:
            raise UserError(
                f"{self._path}: damaged: {self._size} bytes from {self._offset} on do not match their checksum; "
                "download or copy it again"
            )
        self._verified = True


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided array of bytes of a file. Reading maps the file into memory, and lets go of it with the result.

    Attributes:
        path: the file.
        offset: byte of the first element.
        dtype: of the elements, little-endian.
        shape, strides: sizes of the axes, and steps along them in elements.
        checked: the bytes that the elements are among, where the file has a checksum of them.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    checked: Checked | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def dense(cls, path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> "StoredTensor":
        """One whose elements follow one another, the last axis fastest."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(path, offset, dtype, shape, strides)

    def __getitem__(self, rows: slice) -> "StoredTensor":
        """Rows of the leading axis, unread."""
        start, stop, _ = rows.indices(self.shape[0])
        offset = self.offset + start * self.strides[0] * self.dtype.itemsize
        return dataclasses.replace(self, offset=offset, shape=(max(stop - start, 0), *self.shape[1:]))

    def read(self) -> np.ndarray:
        """All of it, read-only, in the file's dtype; raises UserError if its bytes do not match their checksum."""
        size = self.dtype.itemsize
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        if self.checked is not None:
            self.checked.verify()
        extent = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        mapped = np.memmap(self.path, np.uint8, "r", self.offset, (extent * size,))
        # A hand-written file may place elements where no processor would; those are copied into order.
        held = mapped if self.offset % size == 0 else np.array(mapped)
        held.flags.writeable = False
        # Not as_strided, which does not know all of ml_dtypes.
        return np.ndarray(self.shape, self.dtype, held, 0, [stride * size for stride in self.strides])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Part [stop − start, ...] of the leading axis, read-only, in the file's dtype."""
        return self[start:stop].read()


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Ranges of rows that tile the leading axis, a few megabytes each where single rows allow it."""
    row = max(math.prod(tensor.shape[1:]) * tensor.dtype.itemsize, 1)
    step = max(_BLOCK_BYTES // row, 1)
    for start in range(0, tensor.shape[0], step):
        yield slice(start, min(start + step, tensor.shape[0]))


def finite_blocks(name: str, tensor: Tensor, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    """A tensor in another dtype, a few rows at a time.

    Args:
        name: of the tensor, for errors.
        tensor: of one axis or more.
        dtype: of the result.

    Yields:
        (range of rows, these rows [n, ...]).

    Raises:
        UserError: a number is NaN, infinite, or beyond the range of the new dtype.
    """
    for block in row_blocks(tensor):
        with np.errstate(over="ignore"):  # beyond the range is infinite, which is reported below
            rows = tensor.rows(block.start, block.stop).astype(dtype, copy=False)
        if not np.isfinite(rows).all():
            raise UserError(
                f"{tensor.path}: {name} holds NaN, infinity or numbers beyond {dtype.name}; download it again"
            )
        yield block, rows
