"""How a command behaves in a terminal: its arguments, its progress, its exit code."""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import tqdm

from adastate_jax.errors import UserError
from adastate_jax.files import claimed, numbered_name


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s, one line each; options are not to be abbreviated."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help says more")


def output_argument(parser: argparse.ArgumentParser, help: str, default: str | None = None, metavar: str = "FILE"):
    """Adds `--output` and `--overwrite`, of which `claimed_output` makes a path; without a default, it is required."""
    if default:
        help += f" (default {default}, or {numbered_name(Path(default), 2)} where that exists, and so on)"
    parser.add_argument("--output", type=Path, required=default is None, metavar=metavar, help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace what --output names, if it exists")
    parser.set_defaults(default_output=default and Path(default))


@contextlib.contextmanager
def claimed_output(options: argparse.Namespace, *, folder: bool = False, number: int = 1) -> Iterator[Path]:
    """Where a command's `output_argument` says that its result goes, kept for this process while the context lasts.

    A default name that is taken is numbered, so that nothing is lost; one that the user gave is refused instead. All
    that can be known is found out here, before any work. Writing is the caller's.

    Args:
        folder: the result is a folder, which may exist if it is empty.
        number: of the file, where a call writes several: OUTPUT, OUTPUT-2, …

    Raises:
        UserError: the path exists, is of the other kind, cannot be written, or another process is about to write it.
    """
    named = options.output is not None
    path = options.output if named else options.default_output
    with contextlib.ExitStack() as stack:
        try:
            if named:
                path = numbered_name(path, number)
                _refuse_existing(path, folder, options.overwrite)
            path = stack.enter_context(claimed(path, numbered=not named and not options.overwrite))
        except BlockingIOError:
            raise UserError(f"--output={path}: another process is writing it; name another") from None
        except OSError as error:
            raise UserError(f"--output={path}: cannot be written ({error.strerror or error})") from None
        yield path


def _refuse_existing(path: Path, folder: bool, overwrite: bool) -> None:
    if not path.exists():
        return
    if path.is_dir() != folder:
        kinds = ("a file", "a folder")
        raise UserError(f"--output={path}: is {kinds[not folder]}; name {kinds[folder]}")
    if not overwrite and not (folder and not any(path.iterdir())):
        raise UserError(f"--output={path}: exists; name another, or add --overwrite to replace it")
    if folder and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main(argv)` and exits: its return code (None is 0), or 2 with one line for a `UserError`.

    SIGTERM interrupts as Ctrl-C does, so that what is half-written gets removed; the exit code is then 130. What the
    package logs (which attention backend serves, for one) goes to stderr.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    sys.exit(code or 0)


@contextlib.contextmanager
def progress(description: str, total: int, initial: int = 0, unit: str = "step") -> Iterator[tqdm.tqdm]:
    """A progress bar on stderr whose clock goes on while the program waits, for a compilation say."""
    with tqdm.tqdm(total=total, initial=initial, unit=unit, file=sys.stderr, dynamic_ncols=True) as bar:
        bar.set_description(description)
        finished = threading.Event()

        def tick():
            while not finished.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield bar
        finally:
            finished.set()
            clock.join()
