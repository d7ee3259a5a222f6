"""Files that are whole or not there, and that take nobody's place: written beside it under a name of their own.

A temporary file is created exclusively, so that two processes never share one and a planted link is never followed. Its
owner holds a lock on it while it lives; a temporary file without one is the leftover of a process that died, and the
next writer of the same file removes it. A name can be claimed before there is anything to write; nobody else's claim
then gets it.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from adastate_jax.interrupts import at_forced_end

_NAME_BYTES = 255  # of a file name, on every common file system
_SUFFIX = ".partial"
_CLAIM = ".claim"

_own: set[Path] = set()  # the hidden files that this process will remove


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; afterwards it takes the place of `path`, or goes if an exception came.

    A symbolic link is written through: its target is replaced, the link stays.

    Args:
        path: the file to make; its folder is made if need be.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, lock = _create(path)
    _own.add(temporary)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        _own.discard(temporary)
        os.close(lock)


def is_file(path: str | Path) -> bool:
    """Whether a file is there; a name that none can have, too long or with a NUL in it, is not (`Path` raises)."""
    return os.path.isfile(path)


@contextlib.contextmanager
def whole_folder(path: str | Path, replaces: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields a temporary folder to fill; afterwards it takes the place of `path`, or goes if an exception came.

    Args:
        path: the folder to make; it may be there if it is empty, or holds nothing but files of which `replaces` says by
            their names that they are of the same kind, and may go.

    Raises:
        OSError: the folder cannot be made, or what lies there may not go.
    """
    path = Path(os.path.realpath(path))
    _refuse_to_replace(path, replaces)
    with temporary_folder(path) as temporary:
        yield temporary
        _refuse_to_replace(path, replaces)
        _exchange(temporary, path)


@contextlib.contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new hidden folder beside `path`, and removes it afterwards; raises OSError where it cannot be made."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, lock = _create(path, folder=True)
    _own.add(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _own.discard(temporary)
        os.close(lock)


def _exchange(folder: Path, path: Path) -> None:
    """Gives a folder the name `path`; what had it before goes."""
    if not path.exists():
        folder.rename(path)
        return
    old = temporary_name(path)
    path.rename(old)  # a folder that is not empty has to go before another one can have its name
    try:
        folder.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_to_replace(path: Path, replaces: Callable[[str], bool]) -> None:
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    foreign = sorted(entry.name for entry in entries if entry.is_dir() or not replaces(entry.name))
    if foreign:
        raise OSError(f"it holds {foreign[0]!r}, which is of another kind")


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all; raises OSError as `whole_file` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file, whole or not at all; raises OSError as `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def existing_name(path: str | Path) -> Path:
    """The path itself, or where nothing lies there, what its folder calls the same in another Unicode normal form.

    macOS decomposes letters with accents in names and other systems do not, so that what somebody types need not be
    what a copied folder holds.
    """
    path = Path(path)
    if os.path.lexists(path) or not path.name:
        return path
    folder = existing_name(path.parent)
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", path.name):
                return folder / name
    return path


def free_name(path: str | Path) -> Path:
    """The path itself if nothing lies there, else the first of NAME-2, NAME-3, … (before its ending) that is free."""
    names = (numbered_name(Path(path), number) for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def numbered_name(path: Path, number: int) -> Path:
    """NAME-NUMBER before the ending, cut to what a file name can hold; the path itself for number 1."""
    if number == 1:
        return path
    end = f"-{number}{path.suffix}"
    stem = path.name.removesuffix(path.suffix).encode()[: _NAME_BYTES - len(end.encode())]
    return path.with_name(stem.decode(errors="ignore") + end)


@contextlib.contextmanager
def claimed(path: str | Path, numbered: bool = False) -> Iterator[Path]:
    """Keeps a name for this process while the context lasts, and finds out whether its folder can be written.

    Nothing is written under the name. A folder that was made for it goes again if it stays empty.

    Args:
        numbered: takes the first of NAME, NAME-2, … at which nothing lies and which nobody else has claimed.

    Raises:
        BlockingIOError: somebody else has claimed it.
        OSError: the name is too long, or its folder cannot be made or written.
    """
    path = Path(path)
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            yield _claim_free(path, stack) if numbered else _claim(path, stack)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _claim_free(path: Path, stack: contextlib.ExitStack) -> Path:
    for number in itertools.count(1):
        name = numbered_name(path, number)
        if not os.path.lexists(name):
            with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as attempt:
                _claim(name, attempt)
                if not os.path.lexists(name):  # else its writer was done in between
                    stack.push(attempt.pop_all())
                    return name


def _claim(path: Path, stack: contextlib.ExitStack) -> Path:
    """Locks a hidden file beside what `path` stands for, until the stack is left."""
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # raises for a name that is too long, as the hidden file's is not
    file = target.with_name(_stem(target, len(f"{_CLAIM}{target.suffix}".encode())) + _CLAIM + target.suffix)
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise
        except OSError:  # a file system without locks: two processes may claim one name
            pass
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)  # its owner was about to remove it
    _own.add(file)
    stack.callback(os.close, lock)
    stack.callback(_own.discard, file)
    stack.callback(file.unlink, missing_ok=True)
    return path


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody has: hidden, with its ending before the last dot, and not too long."""
    mark = f".{secrets.token_hex(4)}{_SUFFIX}"
    return path.with_name(_stem(path, len(mark) + len(path.suffix.encode())) + mark + path.suffix)


def remove_leftovers(path: Path) -> None:
    """Removes temporary files of `path` whose owners are dead."""
    with contextlib.suppress(OSError):
        for other in _temporaries(path):
            with contextlib.suppress(OSError):
                is_folder = stat.S_ISDIR(other.lstat().st_mode)
                lock = os.open(other, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_folder:
                        shutil.rmtree(other)
                    else:
                        other.unlink()
                finally:
                    os.close(lock)


def remove_own() -> None:
    """Removes this process' temporary files and folders: before it ends without leaving its contexts."""
    for path in list(_own):
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


at_forced_end(remove_own)


def _create(path: Path, folder: bool = False) -> tuple[Path, int]:
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


def _stem(path: Path, room: int) -> str:
    """`.NAME` without its ending, cut so that `room` more bytes fit into a file name."""
    stem = path.name.removesuffix(path.suffix).encode()[: _NAME_BYTES - 1 - room]
    return "." + stem.decode(errors="ignore")


def _temporaries(path: Path) -> list[Path]:
    """The temporary files of `path` that are there, anybody's."""
    mark = len(f".{secrets.token_hex(4)}{_SUFFIX}")
    start, end = _stem(path, mark + len(path.suffix.encode())), f"{_SUFFIX}{path.suffix}"
    length = len(start) + mark + len(path.suffix)
    names = os.listdir(path.parent)
    return [
        path.parent / name for name in names if name.startswith(start) and name.endswith(end) and len(name) == length
    ]
