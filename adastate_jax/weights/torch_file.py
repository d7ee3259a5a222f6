"""Reads what `torch.save` wrote, without PyTorch and without running anything that the file says.

Such a file is an uncompressed zip archive of a pickle, `data.pkl`, and one record per tensor storage, `data/N`. A
pickle is a program. The one here is not handed to Python's unpickler but interpreted by a small machine that knows the
instructions of a state dict and nothing else: it builds dicts, lists, numbers and strings, and it never calls, imports
or changes an object. Names of classes and functions are compared with a short list; all others are refused by name.
"""

import dataclasses
import math
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adastate_jax.errors import UserError
from adastate_jax.files import is_file
from adastate_jax.weights.tensors import BFLOAT16, Checked, StoredTensor
from adastate_jax.weights.torch_archive import Record, read_directory, read_record

# A state dict takes some hundred bytes per tensor; a pickle of this size can build objects of some gigabytes.
_MAX_PICKLE_BYTES = 1 << 24
# Weights have five at most. A list that a few bytes of pickle name over and over is copied each time.
_MAX_AXES = 32


@dataclasses.dataclass(frozen=True)
class _Global:
    """A class or function that a pickle names, as far as it means anything here."""

    role: str
    dtype: np.dtype | None = None


_DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_GLOBALS = {
    "collections.OrderedDict": _Global("dict"),
    "torch.Size": _Global("size"),
    "torch.device": _Global("device"),
    "torch._utils._rebuild_tensor_v2": _Global("tensor"),
    "torch._utils._rebuild_tensor_v3": _Global("tensor with dtype"),
    "torch._utils._rebuild_parameter": _Global("parameter"),
    "torch._utils._rebuild_parameter_with_state": _Global("parameter"),
    "torch.storage.UntypedStorage": _Global("storage"),
    **{f"torch.{name}": _Global("storage", _DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": _Global("dtype", dtype) for name, dtype in _DTYPES.items()},
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A record of elements; without a dtype, the tensors in it bring theirs."""

    key: str
    record: Record
    dtype: np.dtype | None
    checked: Checked | None


def load_torch_file(path: str | Path) -> Any:
    """The object in a file that `torch.save` wrote.

    Args:
        path: a file in the layout of PyTorch 1.6 and later.

    Returns:
        Dicts, lists, tuples, numbers, strings and None as they were, and a `StoredTensor`, unread, in the place of each
        tensor. Parameters are plain tensors, ordered dicts plain dicts; attributes of dicts are left out.

    Raises:
        UserError: the file is missing, cut short, damaged, of the older layout, or holds anything but tensors in plain
            containers. Whether the elements of a tensor are damaged shows when they are read.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    try:
        records, prefix = read_directory(path)
        byteorder = records.get(f"{prefix}byteorder")
        if byteorder is not None and (order := read_record(path, byteorder, 16)) != b"little":
            raise UserError(
                f"{path}: written on a big-endian machine ({order!r}); save it again on a little-endian one"
            )
        program = read_record(path, records[f"{prefix}data.pkl"], _MAX_PICKLE_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    machine = _Machine(path, records, prefix)
    content = machine.run(program)
    machine.check_storages()
    return content


class _Machine:
    """Interprets the pickle of a state dict."""

    def __init__(self, path: Path, records: dict[str, Record], prefix: str):
        self._path, self._records, self._prefix = path, records, prefix
        self._storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def _refuse(self, what: str) -> UserError:
        return UserError(
            f"{self._path}: {what}; nothing in the file was executed. If you trust its origin, save the weights alone "
            "with PyTorch: torch.save(model.state_dict(), FILE)"
        )

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._path}: damaged: {what}; download or copy it again")

    def run(self, program: bytes) -> Any:
        """What the pickle builds."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        # Instructions that do not fit together find an empty stack or a value of another type.
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
            raise self._damaged(f"its index is no valid pickle ({type(error).__name__}: {error})") from None
        raise self._damaged("its index has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "INT" | "LONG" | "BINFLOAT" | "FLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING" | "STRING" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise IndexError("stack is empty")
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST":
                stack.append(self._above_mark())
            case "DICT":
                pairs = self._above_mark()
                stack.append({})
                self._set_items(pairs)
            case "APPEND":
                value = stack.pop()
                self._top(list).append(value)
            case "APPENDS":
                values = self._above_mark()
                self._top(list).extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._above_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[int(argument)])
            case "POP":
                stack.pop()
            case "GLOBAL":
                stack.append(self._find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._find(module, attribute))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._reduce(function, arguments))
            case "BUILD":
                # A state dict carries the versions of its modules this way; they mean nothing here.
                stack.pop()
                self._top(dict)
            case _:
                raise self._refuse(f"holds the instruction {name}, which no state dict needs")

    def _above_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise self._refuse(f"changes an object that is no {kind.__name__}")
        return self._stack[-1]

    def _set_items(self, pairs: Sequence[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise self._refuse(f"has a dict with a key of type {type(key).__name__}")
            target[key] = value

    def _find(self, module: Any, attribute: Any) -> _Global:
        # Anything else than two strings may be too large to be shown.
        name = f"{module}.{attribute}" if type(module) is type(attribute) is str else "something without a name"
        if name not in _GLOBALS:
            raise self._refuse(f"asks for {name[:100]!r}, which no state dict needs")
        return _GLOBALS[name]

    def _reduce(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise self._refuse("calls something that is no known function")
        match function.role, arguments:
            case "dict", ():
                return {}
            case "size", (sizes,):
                return self._sizes(sizes)
            case "device", (str(device), *_):
                return device
            case "tensor", (storage, offset, shape, strides, _, _, *_):
                return self._tensor(storage, offset, shape, strides, None)
            case "tensor with dtype", (storage, offset, shape, strides, _, _, _Global("dtype", dtype), *_):
                return self._tensor(storage, offset, shape, strides, dtype)
            case "parameter", (StoredTensor() as tensor, *_):
                return tensor
        raise self._refuse(f"makes a {function.role} of unknown arguments")

    def _sizes(self, values: Any) -> tuple[int, ...]:
        if isinstance(values, (tuple, list)) and len(values) > _MAX_AXES:
            raise self._damaged(f"a tensor has {len(values)} axes, {_MAX_AXES} are allowed")
        if not isinstance(values, (tuple, list)) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in values):
            raise self._damaged("a tensor has a size, stride or offset that is no natural number")
        return tuple(values)

    def _storage(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", _Global("storage", dtype), str(key), str(), int(length)) if type(length) is int:
                pass
            case _:
                raise self._refuse("refers to something outside of it that is no tensor storage")
        name = f"{self._prefix}data/{key}"
        if not (key.isascii() and key.isdecimal()) or name not in self._records:
            raise self._damaged(f"the storage {key[:100]!r} is missing")
        record = self._records[name]
        if record.size != length * (dtype.itemsize if dtype else 1):
            unit = f"{dtype.name} elements" if dtype else "bytes"
            raise self._damaged(f"the storage {key} has {record.size} bytes, which are not {length} {unit}")
        if key not in self._storages:
            whole = record.checksum is not None and Checked(self._path, record.offset, record.size, record.checksum)
            self._storages[key] = _Storage(key, record, dtype, whole or None)
        storage = self._storages[key]
        if storage.dtype != dtype:
            raise self._damaged(f"the storage {key} is of two types, {storage.dtype} and {dtype}")
        return storage

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None) -> StoredTensor:
        if not isinstance(storage, _Storage) or (dtype is None) == (storage.dtype is None):
            raise self._refuse("makes a tensor of something that is no storage")
        dtype = dtype or storage.dtype
        (offset,), shape, strides = self._sizes((offset,)), self._sizes(shape), self._sizes(strides)
        if len(shape) != len(strides):
            raise self._damaged(f"a tensor of storage {storage.key} has {len(shape)} sizes and {len(strides)} strides")
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        length = storage.record.size // dtype.itemsize
        # More elements than the storage has would be the same ones many times over: nobody's weights.
        if count > length or (count and last >= length):
            raise self._damaged(
                f"a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} does not fit into "
                f"storage {storage.key} of {length} elements"
            )
        start = storage.record.offset + offset * dtype.itemsize
        return StoredTensor(self._path, start, dtype, shape, strides, storage.checked)

    def check_storages(self) -> None:
        """Refuses storages that share bytes of the file."""
        end = 0
        for storage in sorted(self._storages.values(), key=lambda storage: storage.record.offset):
            if storage.record.offset < end:
                raise self._damaged(f"the storage {storage.key} overlaps another one")
            end = storage.record.offset + storage.record.size
