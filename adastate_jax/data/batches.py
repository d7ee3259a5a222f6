"""Batches as a pure function of the step, read from random-access datasets.

There is no iterator state to save: a run that resumes at step s asks for batch s, and gets the batch it would have got.
"""

import collections
import contextlib
import fcntl
import functools
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds

from adastate_jax import distributed, seals
from adastate_jax.errors import UserError, reading, writing

Result = TypeVar("Result")


def example_indices(
    step: int, batch_size: int, num_examples: int, seed: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """The examples of a batch's rows at `step`, int64 `[rows]`; by default all rows, `[batch_size]`.

    Training walks through one endless sequence of shuffled epochs; the global batch `step` is positions
    `step * batch_size` and following, so a batch may straddle two epochs, and every process reads the rows that its
    devices hold (`sharding.local_rows`). Over an epoch each example comes exactly once, whatever the number of
    processes. Raises `UserError` when there are no rows or no examples.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if num_examples < 1:
        raise UserError("the dataset has no examples: build it with at least one")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if step < 0 or not ((rows >= 0) & (rows < batch_size)).all():
        raise ValueError(f"step {step} or a row of {rows} is out of range, a batch has {batch_size}")
    epochs, offsets = np.divmod(step * batch_size + rows.astype(np.int64), num_examples)
    indices = np.empty(len(rows), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch_order(seed, int(epoch), num_examples)[offsets[here]]
    return indices


@functools.lru_cache(maxsize=4)  # two epochs of a training and an evaluation set
def _epoch_order(seed, epoch, num_examples):
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.setflags(write=False)
    return order


def read_batch(source: Sequence[Mapping[str, Any]], indices: np.ndarray) -> dict[str, Any]:
    """Reads examples and stacks them feature by feature.

    Arrays `[...]` become arrays `[B, ...]`, numbers arrays `[B]` (real ones float32), texts a list of B strings;
    nested features nested dictionaries. `source` is what `open_source` returns, or any sequence of dictionaries.
    Raises `UserError` for damage: ArrayRecord checks a hash of all that it reads.
    """
    examples = read_examples(source, indices)
    return {name: _stack([example[name] for example in examples]) for name in examples[0]}


def read_examples(source: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> list[dict[str, Any]]:
    """Reads examples one by one, for those that do not stack; `source` and damage are as `read_batch` has them."""
    numbers = [int(index) for index in indices]
    if not hasattr(source, "dataset_info"):
        return [source[number] for number in numbers]
    folder = source.dataset_info.data_dir
    with reading(folder, _again(folder), RuntimeError):
        return source.__getitems__(numbers)  # a whole batch at once is read in parallel


def _stack(values):
    if isinstance(values[0], Mapping):
        return {name: _stack([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], bytes):
        return [value.decode("utf-8") for value in values]
    if isinstance(values[0], str):
        return list(values)
    if isinstance(values[0], float):
        return np.array(values, np.float32)  # TFDS hands a scalar feature over as a Python number
    return np.stack(values)


def prefetch(function: Callable[[int], Result], first_step: int = 0, depth: int = 2) -> Iterator[tuple[int, Result]]:
    """Yields (step, function(step)) for step = first_step, first_step + 1, ... without end.

    One background thread computes up to `depth` results ahead, in order. An exception in `function` is raised from the
    `next` that would have returned its result, and ends the iteration. Closing the generator (or dropping it) waits for
    the call in progress, if any, and ends the thread.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth is {depth}, must be at least 1")
    steps = itertools.count(first_step)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        pending = collections.deque()
        try:
            while True:
                while len(pending) < depth:
                    step = next(steps)
                    pending.append((step, thread.submit(function, step)))
                step, result = pending.popleft()
                yield step, result.result()
        finally:
            for _, result in pending:
                result.cancel()


def open_source(builder: Callable[..., tfds.core.DatasetBuilder], data_dir: str | os.PathLike, split: str):
    """Opens a dataset for random access, and builds it first where `data_dir` does not hold it yet.

    `builder` makes a TFDS builder from the keyword `data_dir`: what `worlds`, `videos` and `prompts` return. Returns a
    sequence of examples, with `len`, `[i]` and `__getitems__`; it pickles. A build shows one progress bar on stderr.

    TFDS builds into a directory named `incomplete.…` and renames it when everything is written, so an exception leaves
    nothing, and a killed build leaves only that directory, which never reads as a dataset and which the next build of
    the same dataset removes. Processes on one machine wait for each other: one builds, the others read. What describes
    a dataset is sealed, and checked when it is opened; datasets that earlier versions built have no seal. Raises
    `UserError` if `data_dir` cannot be written, if the dataset is damaged, or if it has no such split.
    """
    data_dir = pathlib.Path(data_dir)
    with writing(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)

    def described() -> tfds.core.DatasetBuilder:
        with reading(data_dir, _again(data_dir), Exception):  # TFDS reads its descriptions, and fails in many ways
            return builder(data_dir=data_dir)

    def build() -> None:
        folder = pathlib.Path(described().data_dir)
        if folder.exists():
            return
        with writing(data_dir, RuntimeError), _only_process(folder.parent):
            for stale in folder.parent.glob(f"incomplete.*_{folder.name}"):
                shutil.rmtree(stale)
            dataset = builder(data_dir=data_dir)  # another process may have built it while this one waited
            if not folder.exists():
                dataset.download_and_prepare()
                seals.write_seal(folder, {path.name: seals.fingerprint(path) for path in sorted(folder.glob("*.json"))})

    # The other processes look only now: network file systems keep for a while what they have once called missing.
    distributed.from_first(build)
    dataset = described()
    folder = pathlib.Path(dataset.data_dir)
    if seals.is_sealed(folder):
        for name, listed in seals.read_seal(folder, _again(folder)).items():
            seals.verify_file(folder / name, listed, _again(folder))
    if split.split("[")[0] not in dataset.info.splits:
        known = ", ".join(dataset.info.splits)
        raise UserError(f"dataset {dataset.info.full_name} has no split {split!r}: use one of {known}")
    with reading(folder, _again(folder), Exception):
        return dataset.as_data_source(split=split)


def _again(folder):
    return f"remove {folder} and run again, to build it anew"


@contextlib.contextmanager
def _only_process(folder):
    """Holds the lock of `folder`; the system releases it when a process dies, however it dies."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
