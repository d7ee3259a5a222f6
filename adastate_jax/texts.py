"""Text files that people write, and JSON that this package wrote: read, or refused by name."""

import codecs
import json
from pathlib import Path
from typing import Any

from adastate_jax.errors import UserError, reading, reason

# Marks that editors put first, Windows' above all, and what they say of the bytes behind them.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

# The index of a large model's files takes a few hundred kilobytes, a list of prompts some megabytes.
_MAX_BYTES = 1 << 28


def read_text(path: str | Path) -> str:
    r"""The text of a file, its lines ended by `\n` alone.

    UTF-8 with a byte-order mark or without, or UTF-16 with one.

    Raises:
        UserError: the file cannot be read, or is no such text; the message names the line.
    """
    content = _read(path, "name a text file")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: holds zero bytes, and is no text; save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; raises UserError for what is none, names a field twice, or is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({reason(error)})") from None


def read_json(path: str | Path, fix: str) -> Any:
    """What a JSON file of ours holds; raises UserError, with the fix, if it cannot be read or is damaged."""
    content = _read(path, fix)
    try:
        return parse_json(content.decode("utf-8-sig"), str(path))
    except (UserError, UnicodeDecodeError):
        raise UserError(f"{path}: is damaged; {fix}") from None


def _read(path: str | Path, fix: str) -> bytes:
    """A file's bytes; raises UserError if it cannot be read, or is endless as a device is."""
    with reading(path, fix, ValueError), open(path, "rb") as stream:
        content = stream.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: is larger than {_MAX_BYTES >> 20} MB, and is no text; {fix}")
    return content


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written: JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r:.80} twice in one object")
    return found
