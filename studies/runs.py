"""Trains and measures the runs of a study, several at a time; what is done is skipped, what was stopped goes on."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from adastate_jax.checkpoint import latest_step
from adastate_jax.config.files import load_config
from adastate_jax.errors import UserError
from studies import ROOT

_INTERRUPTED = (130, 143)  # the exit codes of a command that Ctrl-C or SIGTERM stopped


class RunFailed(UserError):
    """A run failed, where others may not."""


def share_cores(jobs: int) -> list[list[int] | None]:
    """The processor cores of each of several runs at a time; None is all."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[job::jobs] for job in range(jobs)] if 1 < jobs <= len(cores) else [None] * jobs


def train_all(runs: Iterable[Any], train_one: Callable[[Any], None], jobs: int) -> None:
    """Calls `train_one` of each run, `jobs` at a time on processor cores of their own.

    Raises:
        RunFailed: of the first run that failed, after all others are trained.
        UserError: a run was stopped.
    """
    waiting = iter(list(runs))
    failures: list[RunFailed] = []

    def work(cores: list[int] | None) -> None:
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
        for run in waiting:  # a list's iterator may be shared between threads
            try:
                train_one(run)
            except RunFailed as failure:
                print(failure, flush=True)
                failures.append(failure)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, share_cores(jobs)))
    if failures:
        raise failures[0]


def done_file(workdir: Path) -> Path:
    """The file that is there once a run is trained: its seconds, and those that processors worked for it."""
    return workdir.with_name(f"{workdir.name}.seconds")


def train_one(config: str, workdir: Path, overrides: Sequence[str] = ()) -> None:
    """Trains a run with the command `train`, unless it is done; its output is kept beside it.

    Args:
        config: FILE:ARM.
        overrides: of the command line.

    Raises:
        RunFailed: the run failed.
        UserError: it was stopped.
    """
    done = done_file(workdir)
    if done.exists():
        return
    command = [sys.executable, "-m", "adastate_jax.train", f"--config={config}", f"--workdir={workdir}", *overrides]
    environment = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # faster: the buffers of a step are new each time
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compilations"),
    }
    with workdir.with_name(f"{workdir.name}.log").open("ab") as log:
        code, *seconds = run_timed(command, log, environment)
    before = workdir.with_name(f"{workdir.name}.stopped")  # the same of a run that was stopped
    if before.exists():
        seconds = [sum(pair) for pair in zip(seconds, map(float, before.read_text().split()), strict=True)]
    told = " ".join(f"{x:.0f}" for x in seconds)
    if code not in (0, *_INTERRUPTED):
        raise RunFailed(f"{workdir}: training failed; the end of {log.name} says why")
    if code or not _is_finished(workdir):
        before.write_text(f"{told}\n")
        raise UserError(f"{workdir}: was stopped before its end; the same command goes on from there")
    done.write_text(f"{told}\n")
    before.unlink(missing_ok=True)
    print(f"{workdir.name}: {seconds[0]:.0f} s, {seconds[1]:.0f} s of a processor", flush=True)


def run_timed(command: Sequence[str], log: Any, environment: dict[str, str]) -> tuple[int, float, float]:
    """Runs a command; its exit code, its seconds, and the seconds that processors worked for it."""
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=log, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - start, usage.ru_utime + usage.ru_stime


def _is_finished(workdir: Path) -> bool:
    config = load_config(workdir / "config.json")
    stage = [stage for stage in config.stages if stage != "sample"][-1]
    return latest_step(workdir / stage) == getattr(config, stage).steps


def measure_all(
    runs: Iterable[tuple], measure_one: Callable[..., str], jobs: int, folder: Path, *settings: Any
) -> None:
    """Calls `measure_one(folder, *run, *settings)` in processes, `jobs` at a time on cores of their own.

    Raises:
        Exception: the first that a call raised.
    """
    spawn = multiprocessing.get_context("spawn")
    shares = spawn.Queue()
    for share in share_cores(jobs):
        shares.put(share)
    with ProcessPoolExecutor(jobs, spawn, _begin_worker, (shares, folder / "compilations")) as pool:
        for future in [pool.submit(measure_one, folder, *run, *settings) for run in runs]:
            print(f"{future.result()}: measured", flush=True)


def _begin_worker(shares: Any, compilations: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(compilations))  # training seeds share their programs
    share = shares.get()
    if share:
        os.sched_setaffinity(0, share)
