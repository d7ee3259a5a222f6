"""`.safetensors` files: read tensor by tensor, written piece by piece."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from adastate_jax.errors import UserError
from adastate_jax.files import is_file
from adastate_jax.weights.tensors import BFLOAT16, StoredTensor

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of one `.safetensors` file, each read from disk when asked for.

    Raises:
        UserError: the file is missing, truncated or not of this format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not is_file(self.path):
            raise UserError(f"{path}: no such file")
        try:
            self._file = safetensors.safe_open(str(path), framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable .safetensors file ({error}); copy or download it again") from error
        self._names = tuple(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def stored(self) -> dict[str, StoredTensor]:
        """The tensors by name, unread; raises UserError for a dtype that this package does not know."""
        # The library has checked the header, but does not say where the tensors lie.
        with self.path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        tensors = {}
        for name in self._names:
            kind, shape = header[name]["dtype"], tuple(header[name]["shape"])
            if kind not in _SAFETENSORS_DTYPES:
                raise UserError(f"{self.path}: {name} has dtype {kind}, which cannot be read; save it as float32")
            offset = 8 + length + header[name]["data_offsets"][0]
            tensors[name] = StoredTensor.dense(self.path, offset, _SAFETENSORS_DTYPES[kind], shape)
        return tensors

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading the tensor, as a mapping would by itself

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    blocks: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a `.safetensors` file piece by piece; the library's writer wants all tensors in memory at once.

    Args:
        path: the file.
        layout: dtype and shape of every tensor by name, in the order of their elements.
        blocks: all elements, the last axis fastest, in pieces of any size.
        metadata: of the header.
    """
    kinds = {dtype: kind for kind, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    with path.open("wb") as stream:
        stream.write(head)
        for block in blocks:
            stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
        if stream.tell() != len(head) + end:
            raise ValueError(f"{path}: {stream.tell() - len(head)} bytes of elements, the layout has {end}")
