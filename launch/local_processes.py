#!/usr/bin/env python3
"""Runs a Python command as several processes of one run on this machine.

    python launch/local_processes.py --processes=2 -- -m adastate_jax.train --config=configs/tiny.py --workdir=runs/two

What follows `--` are the arguments of `python`. Each process computes on the CPU, with as many devices as --devices
says; what it prints is labelled with its number. SIGINT and SIGTERM are passed on to all; that the terminal is gone, as
SIGTERM. The exit code is 0 if all end with it, else that of the process which ended first with another one (128 + N for
one that signal N ended).

It needs nothing but Python. For what several machines can show, before there are several.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

GRACE = 150.0  # seconds; when one has failed, the others have so long to find that out and say what they know of it


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments(processes: int, devices: int, port: int) -> list[dict[str, str]]:
    """What each process finds in its environment beside what is there."""
    flags, threads = os.environ.get("XLA_FLAGS", ""), max((os.cpu_count() or 1) // processes, 1)
    return [
        {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
            "OPENBLAS_NUM_THREADS": str(threads),  # of all processes no more than there are cores: they spin
            "ADASTATE_COORDINATOR": f"127.0.0.1:{port}",
            "ADASTATE_PROCESSES": str(processes),
            "ADASTATE_PROCESS": str(index),
        }
        for index in range(processes)
    ]


def label(stream, name: str, output) -> None:
    """Copies the lines of a stream, each behind a name, also when nobody reads them: the process would wait."""
    for line in stream:
        with contextlib.suppress(OSError):
            output.write(f"[{name}] {line}")
            output.flush()


def run(command: Sequence[str], processes: int, devices: int) -> int:
    """Starts the processes, and returns the exit code of all."""
    started, threads = [], []
    for index, environment in enumerate(environments(processes, devices, free_port())):
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,  # a terminal's Ctrl-C reaches them once, through us
        )
        started.append(process)
        for stream, output in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            threads.append(threading.Thread(target=label, args=(stream, str(index), output), daemon=True))
            threads[-1].start()

    def pass_on(number: int, _) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # the terminal is gone; nohup has it ignored
        signal.signal(signal.SIGHUP, lambda *_: pass_on(signal.SIGTERM, None))
    code = wait(started)
    for thread in threads:
        thread.join(timeout=5.0)
    return code


def wait(started: Sequence[subprocess.Popen]) -> int:
    """Waits for all; some time after one has failed, the others are killed."""
    code, failed = 0, None
    while any(process.poll() is None for process in started):
        for index, process in enumerate(started):
            if process.poll() and not code:
                code, failed = process.returncode, time.monotonic()
                print(f"[{index}] ended with {_shell_code(code)}", file=sys.stderr, flush=True)
        if failed is not None and time.monotonic() - failed > GRACE:
            for process in started:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    code = code or next((process.returncode for process in started if process.returncode), 0)
    return _shell_code(code)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many to start")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="of each process (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands instead of running them")
    parser.add_argument("command", nargs="+", metavar="-- ARGUMENTS", help="of python")
    options = parser.parse_args()
    if min(options.processes, options.devices) < 1:
        parser.error("--processes and --devices must be at least 1")
    if options.dry_run:
        for environment in environments(options.processes, options.devices, port=0):
            variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
            print(" ".join([*variables, shlex.join([sys.executable, *options.command])]))
        return 0
    return run(options.command, options.processes, options.devices)


if __name__ == "__main__":
    sys.exit(main())
