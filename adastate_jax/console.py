"""How a command behaves in a terminal: its arguments, its progress, its exit code."""

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import tqdm

from adastate_jax.errors import UserError, one_line


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s, one line each; options are not to be abbreviated."""

    def __init__(self, **arguments):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help says more")


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
        print(f"error: {one_line(str(error))}", file=sys.stderr)
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
