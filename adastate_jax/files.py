"""Files that are whole or not there, and that take nobody's place: written beside it under a name of their own.

A temporary file is created exclusively, so that two processes never share one and a planted link is never followed. Its
owner holds a lock on it while it lives; a temporary file without one is the leftover of a process that died, and the
next writer of the same file removes it. A name can be claimed before there is anything to write; nobody else's claim
then gets it.

What gets its name is on the disk: files are synced before, and their folder after, so that not even a failure of power
leaves a name without its content. What a run appends to line by line (`metrics.jsonl`) is not: its last lines may be
lost, and are written again with the steps that are repeated.

A folder takes another's place in one step where the system can exchange two names (Linux, but not every file system).
Elsewhere it takes two, with the old one under a hidden name between them; of a process that died there, the next writer
gives it its name back.
"""

import contextlib
import ctypes
import difflib
import errno
import fcntl
import itertools
import os
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from adastate_jax.hidden_names import (
    NAME_BYTES,
    create_temporary,
    hidden,
    hidden_name,
    lock_of_the_dead,
    own,
    remove_leftovers,
    stem_of,
)

_CLAIM = ".claim"
_ALIKE = 0.7  # of two names, that one may be meant by the other
_REPLACED = ".replaced"
_RENAME_EXCHANGE = 2  # of Linux' renameat2
_AT_FDCWD = -100
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)  # what a file system lacks


@contextlib.contextmanager
def whole_file(
    path: str | Path, replace: bool = True, written: Callable[[Path], None] = lambda path: None
) -> Iterator[Path]:
    """Yields a temporary path to write to; afterwards it takes the place of `path`, or goes if an exception came.

    A symbolic link is written through: its target is replaced, the link stays. The new file has the permissions of the
    one that it replaces.

    Args:
        path: the file to make; its folder is made if need be.
        replace: whether it takes the place of what lies there. If not, and something came to lie there during the work,
            both are kept: the file gets the next number, as `numbered_name` gives them.
        written: told the name that the file got.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    named, path = Path(path), Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    refuse_nameless(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, lock = create_temporary(path)
    own.add(temporary)
    try:
        mode = _mode(path)
        if mode is not None:
            temporary.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)  # before there is anything that others may not read
        yield temporary
        _sync(temporary)
        if mode is not None:
            temporary.chmod(mode)
        number = 1
        if replace:
            temporary.replace(path)
        else:
            while not _give_free_name(temporary, numbered_name(path, number)):
                number += 1
        _sync(path.parent)
        written(named if number == 1 else numbered_name(path, number))
    finally:
        temporary.unlink(missing_ok=True)
        own.discard(temporary)
        os.close(lock)


def _mode(path: Path) -> int | None:
    """The permissions of a file, or None where there is none."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None


def _give_free_name(file: Path, path: Path) -> bool:
    """Gives a file a name at which nothing lies; returns whether it did."""
    try:
        os.link(file, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        if os.path.lexists(path):  # a file system without links: what comes between these two is lost
            return False
        file.rename(path)
    return True


def _sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:  # of a folder, some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    """`_sync` of a folder and all that is in it, links aside."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            _sync_all(path)
        elif path.is_file():
            _sync(path)
    _sync(folder)


def is_file(path: str | Path) -> bool:
    """Whether a file is there; a name that none can have, too long or with a NUL in it, is not (`Path` raises)."""
    return os.path.isfile(path)


@contextlib.contextmanager
def whole_folder(path: str | Path, replaces: Callable[[str], bool] | None = lambda name: False) -> Iterator[Path]:
    """Yields a temporary folder to fill; afterwards it takes the place of `path`, or goes if an exception came.

    Args:
        path: the folder to make; it may be there if it is empty, or holds nothing but files of which `replaces` says by
            their names that they are of the same kind, and may go; None for a folder of the caller's own making, which
            may go whatever it holds.

    Raises:
        OSError: the folder cannot be made, or what lies there may not go.
    """
    path = Path(os.path.realpath(path))
    refuse_nameless(path)
    refuse_in_use(path)
    give_back(path)
    refuse_to_replace(path, replaces)
    with temporary_folder(path) as temporary:
        yield temporary
        _sync_all(temporary)
        refuse_to_replace(path, replaces)
        if path.exists():
            _exchange(temporary, path)
            try:
                refuse_to_replace(temporary, replaces)  # it is the old one now: did anything come into it since?
            except OSError:
                _exchange(temporary, path)
                raise
        else:
            temporary.rename(path)
        _sync(path.parent)


@contextlib.contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new hidden folder beside `path`, and removes it afterwards; raises OSError where it cannot be made."""
    path = Path(os.path.realpath(path))
    refuse_nameless(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, lock = create_temporary(path, folder=True)
    own.add(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        own.discard(temporary)
        os.close(lock)


def _exchange(folder: Path, path: Path) -> None:
    """Exchanges the names of two folders side by side."""
    if _exchange_at_once(folder, path):
        return
    old = hidden_name(path, _REPLACED)
    lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # says that its owner lives
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            path.rename(old)
            folder.rename(path)
        except BaseException:
            if not os.path.lexists(path):
                old.rename(path)
            raise
        old.rename(folder)
    finally:
        os.close(lock)


def _exchange_at_once(folder: Path, path: Path) -> bool:
    """Whether the system could exchange two names in one step; raises OSError where it could, and did not."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not rename(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(path))


def give_back(path: str | Path) -> None:
    """Gives a folder its name back whose owner died while another was to take its place, or removes it if one did."""
    path = Path(os.path.realpath(path))
    for old in hidden(path, _REPLACED):
        with contextlib.suppress(OSError), lock_of_the_dead(old):
            if os.path.lexists(path):
                shutil.rmtree(old)
            else:
                old.rename(path)


def refuse_nameless(path: Path) -> None:
    """Raises OSError for a path that ends without a name that can be given: `/`, `.` and `..` do."""
    if path.name in ("", ".."):
        raise OSError(errno.EINVAL, "it names no file or folder", str(path))


def refuse_in_use(path: Path) -> None:
    """Raises OSError for a folder, without links in its path, whose place no other can take."""
    with contextlib.suppress(FileNotFoundError):  # a working folder that was removed
        if Path.cwd().is_relative_to(path):
            raise OSError(errno.EBUSY, "the working folder is in it", str(path))
    if path.is_mount():
        raise OSError(errno.EBUSY, "it is a mount point", str(path))


def refuse_to_replace(path: Path, replaces: Callable[[str], bool] | None) -> None:
    """Raises OSError for a folder that holds what may not go, see `whole_folder`."""
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return
    if replaces is None:
        return
    foreign = sorted(entry.name for entry in entries if entry.is_dir() or not replaces(entry.name))
    if foreign:
        raise OSError(f"it holds {foreign[0]!r}, which is of another kind")


def write_text(path: str | Path, text: str, replace: bool = True) -> Path:
    """Writes a UTF-8 text file, whole or not at all: see `write_bytes`."""
    return write_bytes(path, text.encode(), replace)


def write_bytes(path: str | Path, content: bytes, replace: bool = True) -> Path:
    """Writes a file, whole or not at all; returns its name, another one where `whole_file` keeps what is there.

    Raises:
        OSError: as `whole_file` does.
    """
    names: list[Path] = []
    with whole_file(path, replace, names.append) as temporary:
        temporary.write_bytes(content)
    return names[0]


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


def what_lies_near(path: str | Path) -> str:
    """`; did you mean PATH?` for a path that is missing, where one lies that is much like it, else nothing."""
    path = Path(path)
    missing = next((part for part in (*reversed(path.parents), path) if not os.path.lexists(part)), path)
    with contextlib.suppress(OSError):
        for name in difflib.get_close_matches(missing.name, os.listdir(missing.parent), cutoff=_ALIKE):
            near = missing.parent / name / path.relative_to(missing)
            if os.path.exists(near):
                return f"; did you mean {near}?"
    return ""


def numbered_name(path: Path, number: int) -> Path:
    """NAME-NUMBER before the ending, cut to what a file name can hold; the path itself for number 1."""
    if number == 1:
        return path
    end = f"-{number}{path.suffix}"
    stem = path.name.removesuffix(path.suffix).encode()[: NAME_BYTES - len(end.encode())]
    return path.with_name(stem.decode(errors="ignore") + end)


@contextlib.contextmanager
def claimed(path: str | Path, numbered: bool = False) -> Iterator[Path]:
    """Keeps a name for this process while the context lasts, and finds out whether its folder can be written.

    Nothing is written under the name. A folder that was made for it goes again if it stays empty.

    Args:
        numbered: takes the first of NAME, NAME-2, … at which nothing lies and which nobody else has claimed.

    Raises:
        BlockingIOError: somebody else has claimed it.
        OSError: the name is too long or none, or its folder cannot be made or written.
    """
    path = Path(path)
    refuse_nameless(path)
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
    refuse_nameless(target)
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # raises for a name that is too long, as the hidden file's is not
    file = target.with_name(stem_of(target, len(f"{_CLAIM}{target.suffix}".encode())) + _CLAIM + target.suffix)
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
    own.add(file)
    stack.callback(os.close, lock)
    stack.callback(own.discard, file)
    stack.callback(file.unlink, missing_ok=True)
    return path
