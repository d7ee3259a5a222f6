"""A side's process: it makes ready, and then runs its step once for every message."""

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.peers.cases import CASES
from benchmarks.peers.settings import Setting


def _flatten(result: Any) -> list[np.ndarray]:
    if isinstance(result, tuple | list):
        return [array for part in result for array in _flatten(part)]
    if hasattr(result, "detach"):
        result = result.detach().float().cpu().numpy()
    return [np.asarray(result, np.float32)]


def _work(connection: Connection, side: str, case: str, setting: Setting, cores: int) -> None:
    """A side's process: makes ready, then runs once for every message."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if side == "ours":
        import jax

        build, wait = CASES[case].ours, jax.block_until_ready
    else:
        import torch

        torch.set_num_threads(cores)
        build = CASES[case].theirs

        def wait(result):
            if setting.device == "cuda":
                torch.cuda.synchronize()
            return result

    made = build(setting)
    step = next(made)
    if step is None:  # its weights are drawn
        connection.send(None)
        connection.recv()
        step = next(made)
    for _ in range(2):
        connection.send(_flatten(wait(step())))
    while connection.recv():
        before, start = time.process_time(), time.perf_counter()
        wait(step())
        connection.send((time.perf_counter() - start, time.process_time() - before))


class Side:
    """One process, as the command sees it."""

    def __init__(self, name: str, case: str, setting: Setting, cores: int):
        self.name, self.seconds, self.processor = name, [], []
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, name, case, setting, cores), daemon=True)
        self._process.start()
        other.close()

    def hear(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit(f"{self.name} failed; see above")

    def tell(self, go_on: bool) -> None:
        self._connection.send(go_on)

    def end(self) -> None:
        self.tell(False)
        self._process.join()
