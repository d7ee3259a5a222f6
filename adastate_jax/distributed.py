"""One run of several processes: how they find each other, and how they agree on what is not an array.

JAX's coordination service, which the first process holds, keeps texts by their names. What is said here goes through
it, past the devices: a process that waits for another is in no collective, and whoever watches it can end it. Every
process calls these functions in the same order; threads beside the main one have a channel of their own.
"""

import collections
import contextlib
import ctypes
import importlib.util
import ipaddress
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from adastate_jax.errors import UserError, one_line

Value = TypeVar("Value")

START_TIMEOUT = 1800  # seconds; a pod of many hosts can take more than JAX's 300 to come up after a restart
_HEARTBEAT = 600  # seconds: our own watch ends a run much earlier, and says why; JAX's is for what escapes it
_MARGIN = 1.0  # seconds after which a start that JAX has given up is; below the time that its abort is put off
_LOOPBACK = "means each machine itself (loopback); give an address of the first that all others reach"
# Seconds that one which has failed waits for the others, who may wait elsewhere for what it has not done.
_PATIENCE = 20.0
_SLICE = 1000  # milliseconds of one call of the service, between which Python handles signals


class _State:
    """Of this process."""

    client: Any = None  # of the coordination service; None where there is one process
    index = 0
    count = 1
    address: str | None = None  # of the coordination service, HOST:PORT
    alone = False  # within `alone`
    calls: ClassVar[collections.Counter[str]] = collections.Counter()  # per channel


_state = _State()


def add_arguments(parser) -> None:
    """Adds the flags that say which process of how many this is, where no platform does."""
    group = parser.add_argument_group(
        "several processes", "Cloud TPU, GKE, Slurm and Open MPI say by themselves which process of how many this is."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, where all others reach it")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--start-timeout",
        type=int,
        default=START_TIMEOUT,
        metavar="SECONDS",
        help=f"how long they wait for each other at the start (default {START_TIMEOUT})",
    )


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = START_TIMEOUT,
) -> None:
    """Joins the other processes of this run, if there are any: before anything is computed, and once.

    Without arguments, the variables ADASTATE_COORDINATOR, ADASTATE_PROCESSES and ADASTATE_PROCESS say it, or the
    platform does; where none does, this process is the only one.

    Args:
        coordinator: HOST:PORT of the first process.
        processes, process: how many there are, and which one this is.
        timeout: seconds that they wait for each other.

    Raises:
        UserError: the arguments do not fit together, or the processes did not find each other.
    """
    given = _given(coordinator, processes, process, os.environ)
    platform = None if given else several_by_platform(os.environ)
    if given is None and platform is None:
        return
    if platform == "Slurm" and "SLURM_STEP_NODELIST" not in os.environ:  # in the job's own script, or its shell
        raise UserError(
            f"SLURM_NTASKS={os.environ['SLURM_NTASKS']}, but srun did not start this process: put srun before the "
            "command, or unset SLURM_NTASKS for a single process"
        )
    loopback = bool(given) and is_loopback(given[0].rpartition(":")[0])
    if loopback and several_machines(os.environ):
        raise UserError(f"coordinator {given[0]}: {_LOOPBACK}")
    import jax

    # SIGTERM belongs to `interrupts`; JAX's notifier of preemptions would take it away, in C++.
    jax.config.update("jax_enable_preemption_service", False)
    what = f"process {given[2]} of {given[1]} at {given[0]}" if given else f"the processes of {platform}"
    hint = f"; {given[0]}: {_LOOPBACK}" if loopback else ""
    fix = f"start all of them, with the same coordinator, or give them longer with --start-timeout{hint}"
    failure = f"{what}: did not find each other within {timeout} s"
    _put_off_aborts()
    late = threading.Timer(timeout + _MARGIN, _end, (f"error: {failure}; {fix}",))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **dict(zip(("coordinator_address", "num_processes", "process_id"), given or (), strict=False)),
            **({"cluster_detection_method": "deactivate"} if given else {}),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{failure} ({one_line(str(error))[:300]}); {fix}") from None
    finally:
        late.cancel()
    from jax._src import distributed

    service = distributed.global_state
    _state.client, _state.index, _state.count = service.client, service.process_id, service.num_processes
    _state.address = service.coordinator_address
    _refuse_loopback(service.coordinator_address)


def _put_off_aborts() -> None:
    """Makes SIGABRT wait for six seconds before it ends this process, in which other threads can do so with a line.

    JAX aborts within a call of C++ where the coordination service is gone, and where the processes do not find each
    other. Its callback for that cannot be given from Python (`std::bad_cast` in jaxlib 0.10). The handler is the C
    library's own `sleep`, which is told the signal's number, 6, as its seconds: it may run in any thread at any moment.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _end(line: str) -> None:
    """Ends this process, whose main thread is within a call, as bad input does."""
    os.write(2, f"{one_line(line)}\n".encode(errors="backslashreplace"))
    os._exit(2)


def _given(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and which one: of the arguments, or of our variables."""
    values = [coordinator, processes, process]
    names = ["--coordinator", "--processes", "--process"]
    if values == [None] * 3:
        names = ["ADASTATE_COORDINATOR", "ADASTATE_PROCESSES", "ADASTATE_PROCESS"]
        values = [environment.get(name) for name in names]
        if values == [None] * 3:
            return None
    for name, value in zip(names, values, strict=True):
        if value is None:
            raise UserError(f"{name} is missing: {', '.join(names)} go together")
    host, _, port = str(values[0]).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{names[0]}={values[0]}: is no HOST:PORT")
    try:
        count, index = int(values[1]), int(values[2])
    except ValueError:
        raise UserError(f"{names[1]}={values[1]} and {names[2]}={values[2]}: must be numbers") from None
    if not 0 <= index < count:
        raise UserError(f"{names[2]}={index}: must lie in 0 … {names[1]} - 1 = {count - 1}")
    return str(values[0]), count, index


def several_by_platform(environment: Mapping[str, str]) -> str | None:
    """The platform by whose own variables this process is one of several, or None.

    Source: what `jax.distributed.initialize` looks at (jax/_src/clusters). It is asked only where one of these is
    there, because it waits for minutes on a machine that is none of them.
    """
    if int(environment.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in environment:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "GKE"
    if "cpu" in environment.get("JAX_PLATFORMS", "") or "TPU_SKIP_MDS_QUERY" in environment:
        return None
    chips = Path("/dev/vfio/0").exists() or Path("/dev/accel0").exists()
    if chips and importlib.util.find_spec("libtpu") is not None:
        return "Cloud TPU"
    return None


def several_machines(environment: Mapping[str, str]) -> bool:
    """Whether a platform's variables say that the processes run on more than one machine."""
    everywhere, here = environment.get("OMPI_COMM_WORLD_SIZE"), environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return (
        int(environment.get("SLURM_JOB_NUM_NODES") or 1) > 1
        or (everywhere is not None and here is not None and int(here) < int(everywhere))
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def _refuse_loopback(coordinator: str) -> None:
    """Raises UserError where the first machine calls itself by a name that to it alone means loopback.

    The others find it by that name, but it tells collectives to listen where nobody else reaches them.
    """
    machines = set(gather(socket.gethostname(), "machines"))
    first = from_first(lambda: is_loopback(coordinator.rpartition(":")[0]), "machines")
    if len(machines) > 1 and first:
        raise UserError(f"coordinator {coordinator}: {_LOOPBACK}")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means the machine that asks."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return False
    return any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def count() -> int:
    """How many processes work together here: one within `alone`."""
    return 1 if _state.alone else _state.count


def index() -> int:
    """Which of them this is."""
    return 0 if _state.alone else _state.index


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return index() == 0


def client() -> Any:
    """The coordination service's client; None where there is one process."""
    return _state.client


def is_refused() -> bool:
    """Whether nobody listens any more where the coordination service was: the first process is gone.

    One that is stopped, or that cannot be reached, refuses nothing.
    """
    host, _, port = (_state.address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A context in which this process works by itself, while the others wait for it elsewhere."""
    before, _state.alone = _state.alone, True
    try:
        yield
    finally:
        _state.alone = before


def gather(value: Value, channel: str = "main", patience: float = math.inf) -> list[Value]:
    """What every process gives, in their order, once all have given it.

    Args:
        value: anything that JSON holds.
        channel: of the thread that calls.
        patience: seconds to wait for the others.

    Raises:
        TimeoutError: they did not come. This process has to end: the next calls would not fit together.
    """
    if count() == 1:
        return [value]
    call = _state.calls[channel]
    _state.calls[channel] += 1
    own = f"adastate/{channel}/{call}"
    _state.client.key_value_set(f"{own}/{_state.index}", json.dumps(value))
    deadline = time.monotonic() + patience
    values = [json.loads(_wait_for(f"{own}/{index}", deadline)) for index in range(_state.count)]
    if is_first() and call:
        # Who has come to this call has left the one before.
        _state.client.key_value_delete(f"adastate/{channel}/{call - 1}")
    return values


def _wait_for(name: str, deadline: float) -> str:
    while True:
        try:
            return _state.client.blocking_key_value_get(name, _SLICE)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(name) from None


def from_first(function: Callable[[], Value], channel: str = "main") -> Value:
    """What a function returns that the first process alone calls; all wait for it. It must be something JSON holds.

    Raises:
        UserError, OSError: the function did; on all processes.
    """
    if count() == 1:
        return function()
    value, failure, error = None, None, None
    if is_first():
        try:
            value = function()
        except Exception as caught:
            failure, error = _describe(caught), caught
    value, failure = gather((value, failure), channel)[0]
    if error is not None:
        raise error
    if failure is not None:
        raise _failure(*failure)
    return value


@contextlib.contextmanager
def together(channel: str = "main") -> Iterator[None]:
    """A context that all leave at once: if an exception came in one, all leave by it.

    The one in which it came does not wait long for the others, who may be within a library's own barrier. It ends, and
    they with it: see `lockstep`.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(TimeoutError):
            gather(_describe(error), channel, _PATIENCE)
        raise
    failures = [failure for failure in gather(None, channel) if failure is not None]
    if failures:
        raise _failure(*failures[0])


def _describe(error: Exception) -> tuple[str, int, str]:
    number = getattr(error, "errno", None) or 0
    return type(error).__name__, number, os.strerror(number) if number else str(error)


def _failure(kind: str, number: int, text: str) -> Exception:
    if kind == UserError.__name__:
        return UserError(text)
    return OSError(number, text) if number else OSError(f"{kind}: {text}")
