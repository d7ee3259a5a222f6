"""Ctrl-C and SIGTERM: one of them ends a command within seconds, at whatever moment it comes, without a traceback.

Python's own way, a KeyboardInterrupt in the main thread, does not; each of its gaps is closed here:

- During a command's first imports it ends in a traceback: handlers are installed before them, and end the process. What
  they need themselves is imported with the system's own handler.
- In a callback from C (JAX has one in the garbage collector) Python can only report it and drop it, and some libraries
  print it: the hooks that it is reported to have the signal raised again.
- While the main thread is in C, which a compilation is for minutes, no handler runs. The signal's number is in the pipe
  of `signal.set_wakeup_fd` nevertheless; a thread reads it there, and ends the process itself if the main thread has
  not done so within seconds. What must not be left behind is registered with `at_forced_end`.

Whoever has something to save asks for `deferred` signals. A second Ctrl-C ends the process at once, always.
"""

import _signal  # of C, there already: `signal` takes a while to import
import sys

# Until a command's handlers are there, a Ctrl-C ends it in the system's way, which shows nothing.
if (
    getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "").startswith("adastate_jax.")
    and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
):
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + number, as shells count a process that a signal ended
_PATIENCE = 3.0  # seconds that the main thread gets for leaving its contexts
_ECHO = 0.2  # seconds within which a signal is the same one again: some launchers send it to a process and to its group


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by a signal; what there was to save is saved."""


class Deferral:
    """What a `deferred` context yields: `requested` is whether a signal has come."""

    requested = False

    def __init__(self, message: str):
        self.message = message
        self.inner: list[Deferral] = []

    def request(self) -> None:
        """Notes that a signal has come."""
        self.requested = True
        for deferral in self.inner:
            deferral.request()


class _State:
    """Of this process: what is installed, and what has come."""

    received: int | None = None  # the first signal's number
    raised = False  # whether the handler has raised for it
    dropped = False  # whether that was lost in a callback
    deferral: Deferral | None = None
    note: str | Callable[[], str] = ""
    previous: dict[int, object] | None = None  # handlers to restore; None is not installed
    hooks: tuple[Callable, Callable] = (sys.unraisablehook, sys.excepthook)  # to restore, and to call meanwhile
    ender: int | None = None  # the thread that ends the process
    raising = False  # whether somebody is there to catch what the handler raises


_ending = threading.Lock()
_at_forced_end: list[Callable[[], None]] = []

_state = _State()


def install() -> bool:
    """Installs handlers and the watching thread, if they are not; a signal that the process ignores stays ignored.

    Returns whether they were installed now.
    """
    if _state.previous is not None:
        return False
    _hold_standard_descriptors()
    _state.previous = _set_handlers()
    _state.received, _state.raised, _state.dropped, _state.note = None, False, False, ""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _state.hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = _report, _report_uncaught
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    return True


def uninstall() -> None:
    """Undoes `install`."""
    os.close(signal.set_wakeup_fd(-1))  # ends the thread
    sys.unraisablehook, sys.excepthook = _state.hooks
    _restore_handlers(_state.previous)
    _state.previous = None


def received() -> int | None:
    """The number of the signal that has come, or None."""
    return _state.received


def at_forced_end(function: Callable[[], None]) -> None:
    """Registers what is called before a process ends without leaving its contexts, in another thread than the main."""
    _at_forced_end.append(function)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """A context that a signal leaves by `Stopped`, so that what is open gets closed; outside, it ends the process."""
    _state.raising = True
    try:
        yield
    finally:
        _state.raising = False


@contextlib.contextmanager
def if_stopped(note: str | Callable[[], str]) -> Iterator[None]:
    """What is said after "stopped" of a signal that comes within this context; a function is asked at that moment."""
    before, _state.note = _state.note, note
    yield
    _state.note = before  # not after an exception: it is said when the contexts are left


def if_unwritten(path: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """`if_stopped` for a file or folder that gets its name when it is complete: says whether it got it.

    It did if another one lies there than when the context was entered, so that there is no moment, however short, at
    which a file that is there would be called missing.
    """

    def lies_there() -> tuple[int, int] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    before = lies_there()
    return if_stopped(lambda: f"{path} {'was not' if lies_there() in (None, before) else 'is'} written")


@contextlib.contextmanager
def deferred(message: str) -> Iterator[Deferral]:
    """A context in which a signal raises nothing: it is noted, and `message` is said. Leaving it then raises `Stopped`.

    Within another one it is part of that: both are told of a signal, the outer one says so, and leaving the outer one
    raises. In another thread than the main one, to which signals do not come, it defers nothing and is told of nothing.
    """
    deferral = Deferral(message)
    if threading.current_thread() is not threading.main_thread():
        yield deferral
        return
    if _state.deferral is not None:
        outer = _state.deferral
        deferral.requested = outer.requested
        outer.inner.append(deferral)
        try:
            yield deferral
        finally:
            outer.inner.remove(deferral)
        return
    own = _state.previous is None
    handlers = _set_handlers() if own else None
    _state.deferral = deferral
    try:
        yield deferral
    finally:
        _state.deferral = None
        if own:
            _restore_handlers(handlers)
            _state.received = None
    if deferral.requested:
        _state.raised = not own
        raise Stopped


def end(number: int) -> None:
    """Says "stopped" and ends the process, as one that this signal ended; does not return.

    Neither threads nor dispatched computations are waited for, as JAX would at the interpreter's end.
    """
    if not _ending.acquire(blocking=False):
        if _state.ender == threading.get_ident():
            return  # a second signal, handled within this very call, which goes on
        while True:  # another thread is at it
            time.sleep(1.0)
    _state.ender = threading.get_ident()
    for function in _at_forced_end:
        with contextlib.suppress(Exception):
            function()
    note = _state.note() if callable(_state.note) else _state.note
    _say(f"stopped; {note}" if note else "stopped")
    os._exit(EXIT_CODES[number])


def _say(text: str) -> None:
    """A line on stderr, past Python's stream: the main thread may be within a call of that, or hold its lock."""
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:
            before = "\n" if os.isatty(2) else ""  # a progress bar may be there
            os.write(2, f"{before}{text}\n".encode(errors="backslashreplace"))


def _hold_standard_descriptors() -> None:
    """Opens nowhere as stdin, stdout or stderr where they are closed.

    Otherwise the next file that is opened has their number, and what libraries say on stderr is written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _set_handlers() -> dict[int, object]:
    heeded = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _handle) for number in heeded}


def _restore_handlers(handlers: dict[int, object]) -> None:
    for number, handler in handlers.items():
        # None is a handler that was not installed from Python, which cannot install it again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _handle(number: int, _) -> None:
    """In the main thread, once it runs Python."""
    _state.received = _state.received or number
    if _state.deferral is not None:
        if not _state.deferral.requested:
            _state.deferral.request()
            _say(f"{signal.Signals(number).name}: {_state.deferral.message}")
        elif _state.previous is None and number == signal.SIGINT:
            raise Stopped  # the second; where nothing watches
    elif _state.previous is None:
        raise Stopped
    elif not _state.raising:
        end(number)
    elif not _state.raised:
        _state.raised = True
        raise Stopped


def _report(unraisable) -> None:
    """`sys.unraisablehook`: an exception that Python cannot raise."""
    if _state.received is None or _state.deferral is not None:
        _state.hooks[0](unraisable)
    elif issubclass(unraisable.exc_type, KeyboardInterrupt):
        _state.dropped = True


def _report_uncaught(kind, error, trace) -> None:
    """`sys.excepthook`, which C code calls, too, for an exception that it goes on after."""
    from adastate_jax.errors import missing_requirement  # not before the handlers are there: it takes a while

    if line := missing_requirement(error):  # of a command's first imports
        _say(f"error: {line}")
        raise SystemExit(2)  # which Python heeds here
    if _state.received is None or _state.deferral is not None:
        _state.hooks[1](kind, error, trace)
    else:
        _state.dropped = True


def _watch(reading: int) -> None:
    """The thread: sees every signal when it comes, and that one of them ends the process."""
    first = last = free = None  # when the first and the newest came, and since when nothing defers them
    while True:
        ready, _, _ = select.select([reading], [], [], None if first is None else 0.1)
        now = time.monotonic()
        if ready:
            content = os.read(reading, 64)
            if not content:  # closed by `uninstall`
                os.close(reading)
                return
            numbers = [number for number in content if number in EXIT_CODES]
            if not numbers:
                continue
            again = last is not None and now - last > _ECHO
            _state.received = _state.received or numbers[0]
            first, last = first or now, now
            if again and signal.SIGINT in numbers:
                end(_state.received)
        if first is None:
            continue
        free = None if _state.deferral is not None else free or now
        if free is not None and now - free > _PATIENCE:
            end(_state.received)
        if _state.dropped:
            _state.raised = _state.dropped = False
            last = now
            signal.pthread_kill(threading.main_thread().ident, _state.received)
