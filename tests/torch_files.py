"""Writes files in the layout of `torch.save` without PyTorch, honest ones and others."""

import dataclasses
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass(frozen=True)
class Raw:
    """Pickle instructions as they are."""

    code: bytes


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a stored array; what is None follows from the array."""

    array: np.ndarray
    shape: Any = None
    strides: Any = None
    offset: Any = 0
    key: str | None = None
    storage: str | None = None
    length: int | None = None
    rebuild: str = "torch._utils _rebuild_tensor_v2"


def name(module: str, attribute: str) -> bytes:
    """The instruction that looks up a class or function."""
    return f"c{module}\n{attribute}\n".encode()


class Writer:
    """Pickles values and collects the storages of their tensors."""

    def __init__(self):
        self.storages: dict[str, bytes] = {}

    def pickle(self, value: Any) -> bytes:
        """A whole pickle of a value."""
        return b"\x80\x02" + self._code(value) + b"."

    def _code(self, value: Any) -> bytes:
        match value:
            case Raw(code):
                return code
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                data = value.to_bytes(9, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                data = value.encode()
                return b"X" + struct.pack("<I", len(data)) + data
            case tuple():
                return b"(" + b"".join(map(self._code, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self._code, value)) + b"e"
            case dict():
                # An ordered dict and the attribute that a state dict carries.
                items = b"".join(self._code(key) + self._code(item) for key, item in value.items())
                return name("collections", "OrderedDict") + b")R(" + items + b"u}" + self._code("_metadata") + b"}sb"
            case Tensor():
                return self._tensor(value)
        raise TypeError(f"cannot pickle {value!r}")

    def _tensor(self, tensor: Tensor) -> bytes:
        array = tensor.array
        key = str(len(self.storages)) if tensor.key is None else tensor.key
        self.storages.setdefault(key, np.ascontiguousarray(array).tobytes())
        storage = tensor.storage or STORAGES[array.dtype.name]
        length = array.size if tensor.length is None else tensor.length
        identifier = ("storage", Raw(name("torch", storage)), key, "cpu", length)
        shape = array.shape if tensor.shape is None else tensor.shape
        strides = tensor.strides
        if strides is None:
            strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        arguments = (Raw(self._code(identifier) + b"Q"), tensor.offset, shape, strides, False, None)
        return name(*tensor.rebuild.split(" ")) + self._code(arguments) + b"R"


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays by name as tensors, each with a storage of its own."""
    return {key: Tensor(array) for key, array in arrays.items()}


def save(
    path: Path, value: Any, prefix: str = "archive", extra: dict[str, bytes] | None = None, **options: Any
) -> Path:
    """Writes a value as `torch.save` would; `options` go to each record's ZipInfo."""
    writer = Writer()
    records = {"data.pkl": writer.pickle(value), "byteorder": b"little"}
    records |= {f"data/{key}": data for key, data in writer.storages.items()}
    records |= {"version": b"3\n", **(extra or {})}
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            info = zipfile.ZipInfo(f"{prefix}/{record}")
            for option, setting in options.items():
                setattr(info, option, setting)
            archive.writestr(info, data)
    return path
