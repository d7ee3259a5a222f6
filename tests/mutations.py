"""Damages files and values as disks, networks and hostile people do, from a fixed seed."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

# Values that no field of a file should have, and of which some reader somewhere thinks that it knows them.
HOSTILE_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, -(2**63), 2**64, 10**11, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), "", "x", "0", "float77", "bfloat16", "none", "\x1b[2J\x1b]0;x\x07", "\u202egnp",
    "\udcff", "a\0b", "a" * 5000, "../../etc/passwd", "/dev/stdin", [], {}, [[]], [None], {"": {}}, {"name": []},
    [1, 2, 3], [-1, 0], [10**11] * 3, ["x"] * 40, {"__class__": "os.system"},
)  # fmt: skip


def nested(depth: int, kind: type = list) -> Any:
    """A value of so many levels."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def damaged_bytes(content: bytes, rng: np.random.Generator, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes with a flipped bit, a cut, other bytes, a gap, a repetition or a swap, within a range."""
    data = bytearray(content)
    stop = len(data) if stop is None else stop
    place = int(rng.integers(start, stop))
    length = int(min(rng.integers(1, 40), stop - place))
    match rng.integers(8):
        case 0 | 1:
            data[place] ^= 1 << int(rng.integers(8))
        case 2:
            for other in rng.integers(start, stop, rng.integers(2, 9)):
                data[other] = int(rng.integers(256))
        case 3:
            del data[place:]
        case 4:
            del data[place : place + length]
        case 5:
            data[place : place + length] = bytes(length)
        case 6:
            data[place:place] = data[place : place + length]
        case 7:
            other = int(rng.integers(start, stop - length + 1))
            one, two = data[place : place + length], data[other : other + length]
            data[place : place + length], data[other : other + length] = two, one
    return bytes(data)


def damaged_value(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value in which one place holds something else, is missing, or is called differently."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    holder, key = places[rng.integers(len(places))]
    match rng.integers(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(HOSTILE_VALUES[rng.integers(len(HOSTILE_VALUES))])[:60] + key] = holder.pop(key)
        case 2 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * (-1, 0, 2, 10**6, 10**30, 0.5)[rng.integers(6)] + int(rng.integers(-2, 3))
        case 3:
            other, name = places[rng.integers(len(places))]
            holder[key] = copy.deepcopy(other[name])
        case _:
            holder[key] = copy.deepcopy(HOSTILE_VALUES[rng.integers(len(HOSTILE_VALUES))])
    return value


def _places(value: Any):
    """(container, key) of every value inside of a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def damaged_json(text: str, rng: np.random.Generator) -> bytes:
    """A JSON text with damaged values, damaged bytes, or something else altogether in its place."""
    choice = rng.integers(20)
    if choice < 13:
        value = json.loads(text)
        for _ in range(rng.integers(1, 3)):
            value = damaged_value(value, rng)
            if not value:
                break
        return json.dumps(value).encode("utf-8", "surrogatepass")
    if choice < 18:
        return damaged_bytes(text.encode(), rng)
    others = (
        b"", b"\0" * 50, b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'{"a": ' + b"9" * 10_000 + b"}", b"null",
        b"\xff\xfe{\0}\0", b'{"a": 1, "a": 2}', b"[1e999]", b"\xef\xbb\xbf{}", b'"\\ud800"', b"[]", b"7",
    )  # fmt: skip
    return others[rng.integers(len(others))]


def tried(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a function returns, or the one line with which it refuses; any other exception is a test's failure."""
    from adastate_jax.errors import UserError, one_line

    try:
        return function(), None
    except UserError as error:
        line = one_line(str(error))
        assert line.isprintable()
        assert len(line) < 4000
        return None, line
