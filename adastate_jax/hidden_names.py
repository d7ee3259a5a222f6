"""Hidden names beside a file: of temporary files and folders, each with a lock that its owner holds while it lives."""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from adastate_jax.interrupts import at_forced_end

NAME_BYTES = 255  # of a file name, on every common file system
_PARTIAL = ".partial"

own: set[Path] = set()  # the hidden files that this process will remove


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody has: hidden, with its ending before the last dot, and not too long."""
    return hidden_name(path, _PARTIAL)


def hidden_name(path: Path, kind: str) -> Path:
    """A name of another kind beside `path` that nobody has; the kind is a suffix such as `.partial`."""
    mark = f".{secrets.token_hex(4)}{kind}"
    return path.with_name(stem_of(path, len(mark) + len(path.suffix.encode())) + mark + path.suffix)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose owners are dead."""
    for other in hidden(path, _PARTIAL):
        with contextlib.suppress(OSError), lock_of_the_dead(other):
            if other.is_dir():
                shutil.rmtree(other)
            else:
                other.unlink()


@contextlib.contextmanager
def lock_of_the_dead(path: Path) -> Iterator[None]:
    """Holds the lock of a temporary file or folder; raises OSError if its owner lives, or it is a link."""
    is_folder = stat.S_ISDIR(path.lstat().st_mode)
    lock = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def remove_own() -> None:
    """Removes this process' temporary files and folders: before it ends without leaving its contexts."""
    for path in list(own):
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


at_forced_end(remove_own)


def create_temporary(path: Path, folder: bool = False) -> tuple[Path, int]:
    """A new temporary file of `path`, or a folder, and the descriptor that holds its lock."""
    while True:
        temporary = temporary_name(path)
        try:
            if folder:
                temporary.mkdir()
                lock = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            else:
                lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process takes it for a leftover: it came between the two calls
            os.close(lock)
            continue
        except OSError:  # a file system without locks: its leftovers stay
            return temporary, lock
        if os.fstat(lock).st_nlink:
            return temporary, lock
        os.close(lock)


def stem_of(path: Path, room: int) -> str:
    """`.NAME` without its ending, cut so that `room` more bytes fit into a file name."""
    stem = path.name.removesuffix(path.suffix).encode()[: NAME_BYTES - 1 - room]
    return "." + stem.decode(errors="ignore")


def hidden(path: Path, kind: str) -> list[Path]:
    """The files and folders with a hidden name of `path` that are there, anybody's."""
    mark = len(f".{secrets.token_hex(4)}{kind}")
    start, end = stem_of(path, mark + len(path.suffix.encode())), f"{kind}{path.suffix}"
    length = len(start) + mark + len(path.suffix)
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return [
        path.parent / name for name in names if name.startswith(start) and name.endswith(end) and len(name) == length
    ]
