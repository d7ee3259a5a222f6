"""How a command behaves in a terminal: its arguments, its progress, its exit code."""

import argparse
import contextlib
import difflib
import errno
import io
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import tqdm

from adastate_jax import distributed, interrupts
from adastate_jax.errors import UserError, missing_requirement, one_line, reason
from adastate_jax.files import (
    claimed,
    give_back,
    numbered_name,
    refuse_in_use,
    refuse_nameless,
    refuse_to_replace,
    what_lies_near,
)
from adastate_jax.standard_streams import unfailing

# JAX's names of the durations that make up a compilation. That of a function that is traced holds its inner ones'.
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_ALIKE = 0.8  # of a name that is meant, to difflib; less, and --steps would be taken for --seed


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s, one line each; options are not to be abbreviated.

    epilog: a text, or what makes it when --help is asked for.
    """

    def __init__(self, epilog: str | Callable[[], str] = "", **arguments):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments)
        self._epilog = epilog

    def format_help(self) -> str:
        self.epilog = self._epilog() if callable(self._epilog) else self._epilog
        return super().format_help()

    def parse_known_args(self, args=None, namespace=None):
        for argument in args or ():
            if argument == "--":
                break
            name = argument.partition("=")[0]
            unknown = name.startswith("--") and name not in self._option_string_actions
            # Before anything else is missed: that may be what was meant.
            if unknown and (meant := did_you_mean(name, self._option_string_actions)):
                raise UserError(f"{name}: unknown argument{meant}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            meant = did_you_mean(str(value), choices) or f" (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{meant}")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UserError(message if message.endswith("?") else f"{message}; {self.prog} --help says more")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for a name that is much like one of those known, else nothing."""
    near = difflib.get_close_matches(name, list(known), 1, _ALIKE)
    return f"; did you mean {near[0]}?" if near else ""


def output_argument(parser: argparse.ArgumentParser, help: str, default: str | None = None, metavar: str = "FILE"):
    """Adds `--output` and `--overwrite`, of which `claimed_output` makes a path; without a default, it is required."""
    if default:
        help += f" (default {default}, or {numbered_name(Path(default), 2)} where that exists, and so on)"
    parser.add_argument("--output", type=Path, required=default is None, metavar=metavar, help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace what --output names, if it exists")
    parser.set_defaults(default_output=default and Path(default))


def refuse_configuration(file: str, overrides: Sequence[str]) -> None:
    """Refuses what can be refused of `--config=FILE` and the arguments that a parser left over, without JAX.

    Raises:
        UserError: there is no such file, or an argument overrides no field.
    """
    if not os.path.isfile(file.partition(":")[0]):
        raise UserError(f"--config={file}: no such file{what_lies_near(file.partition(':')[0])}")
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: unknown argument; --help lists what there is")


@contextlib.contextmanager
def claimed_output(
    options: argparse.Namespace,
    *,
    folder: bool = False,
    number: int = 1,
    replaces: Callable[[str], bool] | None = None,
) -> Iterator[Path]:
    """Where a command's `output_argument` says that its result goes, kept for this process while the context lasts.

    A default name that is taken is numbered, so that nothing is lost; one that the user gave is refused instead. All
    that can be known is found out here, before any work. Writing is the caller's.

    Args:
        folder: the result is a folder, which may exist if it is empty.
        number: of the file, where a call writes several: OUTPUT, OUTPUT-2, …
        replaces: says of the name of a file in a folder that is there whether --overwrite lets it go, as in
            `whole_folder`; None lets all go.

    Raises:
        UserError: the path exists, is of the other kind, cannot be written, or another process is about to write it.
    """
    named = options.output is not None
    path = options.output if named else options.default_output
    with contextlib.ExitStack() as stack:
        try:
            refuse_nameless(path)
            if named:
                path = numbered_name(path, number)
                give_back(path)
                _refuse_existing(path, folder, options.overwrite)
            if folder and options.overwrite:
                refuse_to_replace(path, replaces)
            path = stack.enter_context(claimed(path, numbered=not named and not options.overwrite))
        except BlockingIOError:
            raise UserError(f"--output={path}: another process is writing it; name another") from None
        except OSError as error:
            raise UserError(f"--output={path}: cannot be written ({error.strerror or error}); name another") from None
        yield path


def _refuse_existing(path: Path, folder: bool, overwrite: bool) -> None:
    if folder:
        refuse_in_use(Path(os.path.realpath(path)))
    if not path.exists():
        return
    if path.is_dir() != folder:
        kinds = ("a file", "a folder")
        raise UserError(f"--output={path}: is {kinds[not folder]}; name {kinds[folder]}")
    if not overwrite and not (folder and not any(path.iterdir())):
        raise UserError(f"--output={path}: exists; name another, or add --overwrite to replace it")
    if folder and not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command's `main(argv)` and ends the process with its exit code.

    | code | |
    |---|---|
    | 0 | done; also where stderr could not be written |
    | 1 | done, and the answer is no (`verify`, `evaluate export --check`); or stdout could not be written |
    | 2 | bad input: one line on stderr, a `UserError` |
    | 75 | of several processes, another one is gone: see `lockstep`; the same command goes on |
    | 130, 143 | stopped by Ctrl-C, by SIGTERM: see `interrupts` |
    | 141 | done, but who read stdout has gone |

    What the package logs (which attention backend serves, for one) goes to stderr, through a progress bar if one is
    there.
    """
    installed = interrupts.install()
    try:
        with unfailing() as output, _logging():
            with interrupts.raised():
                code = _run(main, sys.argv[1:] if argv is None else list(argv))
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            if output.failure and not code:
                code = 141 if isinstance(output.failure, BrokenPipeError) else 1
                print(f"note: stdout: cannot be written ({reason(output.failure)})", file=sys.stderr)
    finally:
        if installed:
            interrupts.uninstall()
    sys.exit(code)


def _run(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    try:
        return main(arguments) or 0
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not missing_requirement(error):
            raise
        print(f"error: {missing_requirement(error)}", file=sys.stderr)
        return 2
    except BaseException:  # also what an import makes of an interrupt
        if interrupts.received() is None:
            raise
    # The exception is gone, and with it all that its frames held: semaphores of other processes, for one.
    interrupts.end(interrupts.received())
    raise AssertionError("the process has ended")


def starting(what: str = "JAX") -> None:
    """Says that the command is at work, before seconds of imports: the arguments are found good."""
    print(f"starting {what}", file=sys.stderr, flush=True)


# --- what is said -----------------------------------------------------------------------------------------------------


class _Handler(logging.Handler):
    """Log messages on stderr, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)
        for bar in Progress.shown:
            bar.interrupted()


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """The package's own messages at INFO. Not by the root logger: libraries configure that when they are imported."""
    logger, handler = logging.getLogger(__package__), _Handler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class Progress(tqdm.tqdm):
    """A progress bar in a terminal; elsewhere a line for every tenth of the work and where the description changes.

    Of several processes, the first alone shows it.

    The time that JAX spends compiling does not count: neither as elapsed, nor in the estimate of what remains. That
    begins with the second `update`: until the first, all is got ready.
    """

    shown: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, desc: str, compiles: bool, **settings):
        self._lines = not sys.stderr.isatty()
        self._said = None
        self._later = desc if compiles else None
        self._first: tuple[float, float] | None = None  # units and elapsed seconds when the first were done
        desc = f"{desc} (compiling)" if compiles else desc
        quiet = not distributed.is_first()
        super().__init__(desc=desc, file=sys.stderr, dynamic_ncols=True, smoothing=0.0, disable=quiet, **settings)
        self.shown.add(self)

    @property
    def format_dict(self) -> dict[str, Any]:
        found = super().format_dict
        prefix = (found.get("prefix") or "").removesuffix(": ")  # a bar without a total would have the colon twice
        return found | {"rate": self._rate(found["elapsed"]), "prefix": prefix}

    def _rate(self, elapsed: float) -> float | None:
        """Units per second, 0 while it is not known; None has tqdm take the mean, where all came at once."""
        if self._first is None or self.n == self._first[0]:
            return None if self.n and self.n == self.total else 0.0
        return (self.n - self._first[0]) / max(elapsed - self._first[1], 1e-6)

    def update(self, n: float = 1) -> bool | None:
        if n and self._later is not None:
            self.set_description(self._later, refresh=False)
            self._later = None
        found = super().update(n)
        if n and self._first is None and not self.disable:
            self._first = self.n, self.format_dict["elapsed"]
        return found

    def interrupted(self) -> None:
        """Says again that it compiles, elsewhere than in a terminal: another line has come below that."""
        if self._lines and self._later is not None and not self.disable:
            self._said = None
            self.refresh()

    def exclude(self, seconds: float) -> None:
        """Takes seconds out of the elapsed time."""
        if not self.disable:
            self.start_t = min(self.start_t + seconds, time.time())

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._lines:
            return super().display(msg, pos)
        state = self.desc, 10 * self.n // self.total if self.total else None
        if msg is None and state != self._said:
            self._said = state
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        if not self._lines:
            super().clear(nolock)

    def close(self) -> None:
        if self._lines and not self.disable:
            self.display()
            self.fp = io.StringIO()  # for the end of the line, which is there
        self.shown.discard(self)
        super().close()


@contextlib.contextmanager
def progress(
    description: str,
    total: int,
    initial: int = 0,
    unit: str = "step",
    compiles: bool = False,
    counts_compiling: bool = False,
) -> Iterator[Progress]:
    """A progress bar on stderr whose clock goes on while the program waits.

    Args:
        compiles: says so until the first `update`.
        counts_compiling: where compiling is the work, its time counts as elapsed.
    """
    with Progress(desc=description, total=total, initial=initial, unit=unit, compiles=compiles) as bar:
        finished = threading.Event()

        def tick():
            while not finished.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            with contextlib.nullcontext() if counts_compiling else _compilations(bar.exclude):
                yield bar
        finally:
            finished.set()
            clock.join()


@contextlib.contextmanager
def _compilations(heard: Callable[[float], None]) -> Iterator[None]:
    """Hands on how many seconds went into compilations, each once, if JAX is at work in this process."""
    monitoring = getattr(sys.modules.get("jax"), "monitoring", None)
    if monitoring is None:
        yield
        return

    intervals: list[tuple[float, float]] = []  # that were handed on, one after the other

    def listen(event: str, seconds: float, **_) -> None:
        if event not in _COMPILING:
            return
        end = time.monotonic()
        begin = end - seconds
        while intervals and intervals[-1][1] > begin:  # what ends last holds what ended within it
            inner = intervals.pop()
            seconds -= inner[1] - max(inner[0], begin)
            begin = min(begin, inner[0])
        intervals.append((begin, end))
        heard(max(seconds, 0.0))

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
