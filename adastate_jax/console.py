"""How a command behaves in a terminal: its arguments, its progress, its exit code."""

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import tqdm

from adastate_jax import distributed, interrupts
from adastate_jax.errors import UserError, one_line, reason
from adastate_jax.files import claimed, give_back, numbered_name, refuse_in_use, refuse_nameless

# JAX's names of the durations that make up a compilation. Tracing is not among them: it counts inner functions twice.
_COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


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

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help says more")


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
        raise UserError(f"--config={file}: no such file")
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: unknown argument; --help lists what there is")


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
            refuse_nameless(path)
            if named:
                path = numbered_name(path, number)
                give_back(path)
                _refuse_existing(path, folder, options.overwrite)
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
        with _standard_streams() as output, _logging():
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


class _Output:
    """A standard stream whose failure stops nothing: what cannot be written is dropped, and the failure kept."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        """Points the descriptor to nowhere, or what is left in the stream's buffer fails again at the process' end."""
        if isinstance(error, ValueError) and not self._stream.closed:  # a library may have closed it
            raise error
        self.failure = self.failure or error
        if self._stream.closed:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _standard_streams() -> Iterator[_Output]:
    """Makes stdout, which is yielded, and stderr such that writing to them never fails; what was closed is nowhere."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test's
            stream.reconfigure(errors="backslashreplace")
    try:
        yield sys.stdout
    finally:
        sys.stdout, sys.stderr = before


class _Handler(logging.Handler):
    """Log messages on stderr, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.tqdm.write(self.format(record), file=sys.stderr)


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

    The time that JAX spends compiling does not count: neither as elapsed, nor in the estimate of what remains.
    """

    def __init__(self, desc: str, compiles: bool, **settings):
        self._lines = not sys.stderr.isatty()
        self._said = None
        self._later = desc if compiles else None
        desc = f"{desc} (compiling)" if compiles else desc
        quiet = not distributed.is_first()
        super().__init__(desc=desc, file=sys.stderr, dynamic_ncols=True, smoothing=0.0, disable=quiet, **settings)

    def update(self, n: float = 1) -> bool | None:
        if n and self._later is not None:
            self.set_description(self._later, refresh=False)
            self._later = None
        return super().update(n)

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
        super().close()


@contextlib.contextmanager
def progress(
    description: str, total: int, initial: int = 0, unit: str = "step", compiles: bool = False
) -> Iterator[Progress]:
    """A progress bar on stderr whose clock goes on while the program waits.

    Args:
        compiles: says so until the first `update`.
    """
    with Progress(desc=description, total=total, initial=initial, unit=unit, compiles=compiles) as bar:
        finished = threading.Event()

        def tick():
            while not finished.wait(1.0):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            with _compilations(bar.exclude):
                yield bar
        finally:
            finished.set()
            clock.join()


@contextlib.contextmanager
def _compilations(heard: Callable[[float], None]) -> Iterator[None]:
    """Hands on how many seconds each compilation took, if JAX is at work in this process."""
    monitoring = getattr(sys.modules.get("jax"), "monitoring", None)
    if monitoring is None:
        yield
        return

    def listen(event: str, seconds: float, **_) -> None:
        if event in _COMPILING:
            heard(seconds)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
