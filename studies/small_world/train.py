"""Trains the runs of the study, several at a time; what is done is skipped, what was stopped goes on."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adastate_jax.checkpoint import latest_step
from adastate_jax.config.files import load_config, parse_config
from adastate_jax.errors import UserError
from studies.small_world import CONFIG, ROOT, STARTS, once, share_cores
from studies.small_world.measure import check_teacher

_INTERRUPTED = (130, 143)  # the exit codes of a command that Ctrl-C or SIGTERM stopped


def train(folder: Path, names: list[str], seeds: list[int], jobs: int) -> None:
    """Trains what arms start from, then all else, `jobs` at a time on processor cores of their own.

    Done runs are skipped.

    Raises:
        UserError: the teacher does not move as it should, or a run failed or was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in dict.fromkeys(["teacher", *map(_start_of, names)]):
        _train_one(folder, start, 0)
        check_teacher(folder)
    waiting = iter(dict.fromkeys([("unanchored", 0), *((name, seed) for seed in seeds for name in names)]))

    def work(cores):
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
        for name, seed in waiting:  # a list's iterator may be shared between threads
            _train_one(folder, name, seed)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, share_cores(jobs)))


def _start_of(arm: str) -> str:
    return Path(parse_config([f"--config={CONFIG}:{arm}"]).start_from).name


def _train_one(folder: Path, name: str, seed: int) -> None:
    workdir = folder / (STARTS.get(name, name) if once(name) else f"{name}-{seed}")
    done = folder / f"{workdir.name}.seconds"
    if done.exists():
        return
    command = [sys.executable, "-m", "adastate_jax.train", f"--config={CONFIG}:{name}", f"--workdir={workdir}"]
    if name != "teacher":
        command += [f"--config.seed={seed}", f"--config.start_from={folder / _start_of(name)}"]
    environment = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # faster: the buffers of a step are new each time
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compilations"),
    }
    start = time.monotonic()
    with (folder / f"{workdir.name}.log").open("ab") as log:
        code = subprocess.run(command, stderr=log, env=environment).returncode
    if code not in (0, *_INTERRUPTED):
        raise UserError(f"{workdir}: training failed; the end of {log.name} says why")
    seconds = time.monotonic() - start
    stage = "initialize" if once(name) else "distill"
    if code or latest_step(workdir / stage) != getattr(load_config(workdir / "config.json"), stage).steps:
        raise UserError(f"{workdir}: was stopped before its end; the same command goes on from there")
    done.write_text(f"{seconds:.0f}\n")
    print(f"{workdir.name}: {seconds:.0f} s", flush=True)
