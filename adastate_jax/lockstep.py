"""How several processes end: at the same step after a signal, and with a line that says why when one of them is gone.

Two threads beside the main one. One speaks with the coordination service, about once a second: it says that this
process lives and how many steps it has passed, hears the same of the others, and passes a signal on. The other watches
the first, because a call to a service whose process hangs does not return.

A signal to one process becomes a signal to all, which `interrupts` treats as ever: where nothing is to be saved, it
ends the process. In the training loop each process then says how many steps it has passed, and passes no more until
all have said so; the first step that none has passed is where all stop. The main thread says nothing itself: it may
wait in a collective for a process that waits here.
"""

import _thread
import atexit
import collections
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from adastate_jax import distributed, interrupts
from adastate_jax.errors import UserError, one_line

GONE = 75  # exit code where another process ended the run; EX_TEMPFAIL of sysexits.h: the same command may work again
SILENCE = 40.0  # seconds without a sign of life, after which a process counts as dead or stopped
_DEAD = f"for {SILENCE:.0f} s: it is dead or stopped"
_STUCK = 60.0  # seconds that a step may take beyond three times the longest of late
_FAREWELL = 8.0  # seconds in which all hear that one has left, before the one goes that holds the service
_LOOK = 0.5  # seconds between two looks of the second thread; JAX's own abort is put off for six, see `distributed`
_PERIOD = 1.0  # seconds between two rounds; longer with many processes, of which each hears all
_BEATS, _PASSED, _LEFT, _SIGNAL = (f"adastate/{name}/" for name in ("beats", "passed", "left", "signal"))


class Watch:
    """The agreement of this process with the others, and its watch over them.

    Args:
        client: of the coordination service.
        end: ends this process, told an exit code and a line; by default with the stacks of all threads.
        refused: whether nobody listens where the service was.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        end: Callable[[int, str], None] | None = None,
        refused: Callable[[], bool] = distributed.is_refused,
    ):
        self._client, self._index, self._count = client, index, count
        self._end = end or self._end_process
        self._refused = refused
        self._period = _PERIOD + count / 100
        self._agreed = threading.Condition()
        self._steps = 0  # passed by this process, over all stages
        self._posted = False  # whether it was said how many; none is passed until all have said it
        self._stop_at: int | None = None
        self._rounds = 0
        self._begun = 0.0  # when the first round was
        self._seen: dict[int, tuple[str, float]] = {}  # per process: the newest sign of life, and since when
        self._heard = self._since = time.monotonic()  # when the service answered, and when the last step was passed
        self._untimed = 1  # steps from here on whose time says nothing
        self._times: collections.deque[float] = collections.deque(maxlen=50)
        self._leaving = False
        self._ending = threading.Lock()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- the main thread ----------------------------------------------------------------------------------------------

    def pass_step(self) -> bool:
        """Counts a step as done; whether all processes stop here. Waits while they agree on where."""
        with self._agreed:
            while self._posted and self._stop_at is None and not self._closed.is_set():
                self._agreed.wait(0.1)
            now = time.monotonic()
            if not self._untimed:
                self._times.append(now - self._since)
            self._since, self._untimed = now, max(self._untimed - 1, 0)
            self._steps += 1
            return self._stop_at is not None and self._steps >= self._stop_at

    def untimed(self, steps: int = 1) -> None:
        """Says that what comes until so many steps are passed takes its time: a compilation, a save."""
        self._untimed = max(self._untimed, steps)

    def leave(self, why: str) -> None:
        """Says that this process ends; the one that holds the service waits until the others have left, too."""
        if self._leaving:
            return
        self._leaving, said = True, threading.Event()
        # In a thread of its own: a call to a service whose process hangs does not return. Not by `threading`, within
        # whose locks the signal that ends this process may have come.
        _thread.start_new_thread(self._say_goodbye, (why, said))
        said.wait(2 * _FAREWELL)

    def _say_goodbye(self, why: str, said: threading.Event) -> None:
        with contextlib.suppress(Exception):
            if number := interrupts.received():  # it may end the process before the next round
                self._client.key_value_set(f"{_SIGNAL}0", str(int(number)), allow_overwrite=True)
            self._client.key_value_set(f"{_LEFT}{self._index}", why, allow_overwrite=True)
            deadline = time.monotonic() + _FAREWELL
            while self._index == 0 and time.monotonic() < deadline and len(self._read(_LEFT)) < self._count:
                time.sleep(0.2)
        said.set()

    def start(self) -> None:
        """Starts the threads."""
        for function in (self._speak, self._guard):
            thread = threading.Thread(target=function, name=f"lockstep {function.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Ends the threads; one that is within a call of a service which hangs is left to itself."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._period)

    def await_verdict(self) -> None:
        """Waits as long as it can take to find out that another process is gone, which ends this one."""
        self._closed.wait(SILENCE + _FAREWELL + 5 * self._period)

    # --- the threads --------------------------------------------------------------------------------------------------

    def _speak(self) -> None:
        while not self._closed.wait(self._period):
            try:
                self.round()
            except Exception as error:
                if self._closed.is_set() or self._leaving:
                    return
                if time.monotonic() - self._heard > SILENCE / 2:  # it answers, that it cannot
                    self._finish(
                        f"process 0, which holds the coordination service, is gone ({one_line(str(error))[:200]})"
                    )

    def _guard(self) -> None:
        while not self._closed.wait(_LOOK):
            silent = time.monotonic() - self._heard
            if silent > self._period + _LOOK and self._index and not self._leaving and self._refused():
                host = json.loads(self._seen[0][0])[2] if 0 in self._seen else "the coordinator's host"
                self._finish(f"process 0 on {host} is dead: nobody listens where it held the coordination service")
            if silent > SILENCE and not self._leaving:
                self._finish(f"process 0, which holds the coordination service, has not answered {_DEAD}")

    def round(self) -> None:
        """One round of speaking and hearing."""
        self._rounds += 1
        beat = json.dumps([self._rounds, self._steps, socket.gethostname()])
        self._client.key_value_set(f"{_BEATS}{self._index}", beat, allow_overwrite=True)
        beats, left = self._read(_BEATS), self._read(_LEFT)
        self._heard = now = time.monotonic()
        self._begun = self._begun or now
        self._pass_signal_on()
        if left and not self._leaving:
            self._follow(*next(iter(left.items())))
        for index, beat in beats.items():
            if self._seen.get(index, ("", now))[0] != beat:
                self._seen[index] = beat, now
        for index, (beat, since) in self._seen.items():
            if now - since > SILENCE and index not in left:
                self._finish(f"process {index} on {json.loads(beat)[2]} has given no sign of life {_DEAD}")
        silent = [index for index in range(self._count) if index not in self._seen and index not in left]
        if silent and now - self._begun > 2 * SILENCE:
            self._finish(f"process {silent[0]} was there at the start and has given no sign of life since: it is dead")
        limit = _STUCK + 3 * max(self._times, default=0.0)
        if not self._untimed and len(self._times) > 2 and now - self._since > limit:
            steps = {index: json.loads(beat)[1] for index, (beat, _) in self._seen.items()}
            slowest = min(steps, key=steps.get)
            self._finish(
                f"no step was passed for {limit:.0f} s; process {slowest} has passed the fewest, {steps[slowest]}: "
                "it, or what it waits for, is stuck"
            )

    def _pass_signal_on(self) -> None:
        number = interrupts.received()
        known = self._read(_SIGNAL)
        if number and not known:
            self._client.key_value_set(f"{_SIGNAL}0", str(int(number)), allow_overwrite=True)
        elif known and not number:
            number = int(known[0])
            os.kill(os.getpid(), number)
        if not number:
            return
        with self._agreed:
            if not self._posted:
                self._posted = True
                self._client.key_value_set(f"{_PASSED}{self._index}", str(self._steps), allow_overwrite=True)
        passed = self._read(_PASSED)
        if self._stop_at is None and len(passed) == self._count:
            with self._agreed:
                self._stop_at = 1 + max(map(int, passed.values()))
                self._agreed.notify_all()

    def _follow(self, index: int, why: str) -> None:
        """Ends this process because another one has left, once it had time to do so by itself."""
        if self._closed.wait(_FAREWELL / 2) or self._leaving:
            return
        number = interrupts.received()
        if number:
            interrupts.end(number)
        self._finish(f"process {index} has ended: {why}")

    def _read(self, folder: str) -> dict[int, str]:
        """What every process says under a name, by its number."""
        found = self._client.key_value_dir_get(folder)
        return {int(name.rpartition("/")[2]): value for name, value in found}

    def _finish(self, line: str) -> None:
        self._end(GONE, f"error: {line}; the same command goes on from the last checkpoint")

    def _end_process(self, code: int, line: str) -> None:
        """Prints the stacks of all threads and the line, and ends the process without waiting for anything."""
        if not self._ending.acquire(blocking=False):
            return  # the other thread is at it
        self._leaving = True
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        os.write(2, f"{one_line(line)}\n".encode(errors="backslashreplace"))
        if self._index == 0:
            time.sleep(3 * self._period)  # with this process the service goes, and others end without a line
        os._exit(code)


_watch: Watch | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A context in which the processes of a run watch each other, and which they leave together."""
    global _watch
    if distributed.count() == 1:
        yield
        return
    watch = _watch = Watch(distributed.client(), distributed.index(), distributed.count())
    interrupts.at_forced_end(lambda: watch.leave("it was stopped"))
    watch.start()
    try:
        yield
        distributed.gather("finished")
    except UserError as error:
        watch.leave(one_line(str(error)))
        _leave_jax(2)
        raise
    except Exception as error:  # what a collective raises when another process dies, for one
        print(f"process {distributed.index()}: {one_line(str(error))[:300]}", file=sys.stderr, flush=True)
        watch.await_verdict()
        watch.leave(one_line(str(error))[:300])
        _leave_jax(1)
        raise
    finally:
        watch.close()
        _watch = None


def _leave_jax(code: int) -> None:
    """Makes the interpreter end with this code before JAX waits for the other processes, and aborts: they end, too."""
    atexit.register(os._exit, code)


def pass_step(requested: bool) -> bool:
    """Counts a step of training as done; whether the run stops here, which of several processes all do.

    requested: whether this process was asked to stop.
    """
    return requested if _watch is None else _watch.pass_step()


def untimed(steps: int = 1) -> None:
    """Says that what comes until so many steps are passed takes its time: a compilation, a save."""
    if _watch is not None:
        _watch.untimed(steps)
