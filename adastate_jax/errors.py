"""Errors that a user caused and can fix."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_QUOTED = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class UserError(Exception):
    """Bad input: the message is one line that names the culprit (a file, a field) and the fix."""


def missing_requirement(error: BaseException) -> str:
    """What is not installed, and the fix, if that is why an import failed; else nothing."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name in ("", __package__):
        return ""
    return f"{name} is not installed; run pip install -r requirements.txt in the environment of this Python"


def shortlist(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def shown(value: object, limit: int = 80) -> str:
    """A value of somebody else's as an error shows it: its `repr`, cut short, whatever it is.

    Lists that hold themselves, nesting of any depth and integers of any length are shown as what they are.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or nested too deeply
        text = f"{type(value).__name__} of more than can be shown"
    return text if len(text) <= limit else f"{text[:limit]}…"


def one_line(message: str, limit: int = 2000) -> str:
    """A message as one line of a terminal: white space becomes single spaces, what is not to be seen is escaped.

    Names and values in it may be those of a hostile file, with control characters that move the cursor, colour what
    follows or set the window's title, or that reverse the direction of writing; or a megabyte long: of more than
    `limit` characters the middle is left out.
    """
    text = " ".join(message.split())
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@contextlib.contextmanager
def writing(where: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Makes what the system refuses within one `UserError`: `where` cannot be written, and why.

    Args:
        where: the file or folder.
        kinds: what a library may raise instead of an OSError; those count that quote the system.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, *kinds) as error:
        code = _code(error)
        if code is None and not isinstance(error, OSError):
            raise
        fix = "free some space and run again" if code in _FULL else "name another place"
        if code is not None and code not in _FULL:  # else a reason of this package's own, such as what lies there
            fix += " or make it writable"
        raise UserError(f"{where}: cannot be written ({reason(error)}); {fix}") from error


@contextlib.contextmanager
def reading(where: str | Path, fix: str, *kinds: type[Exception]) -> Iterator[None]:
    """Makes what goes wrong within one `UserError`: `where` cannot be read, why, and the fix.

    Args:
        where: the file or folder.
        kinds: what a library raises for a damaged file.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, *kinds) as error:
        raise UserError(f"{where}: cannot be read ({reason(error)}); {fix}") from error


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, in the system's words where they are known."""
    code = _code(error)
    if code:
        return os.strerror(code)
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _code(error: BaseException) -> int | None:
    """The system's number for an error; libraries in C++ that lose it still quote its text, or their own mark of it."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore
        return int(found[1])
    return next((code for code in _QUOTED if os.strerror(code) in str(error)), None)
