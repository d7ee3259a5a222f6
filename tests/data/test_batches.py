"""Laws of batches: a function of the step, every example once an epoch, ordered prefetch, all-or-nothing builds."""

import itertools
import pathlib
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from adastate_jax import distributed
from adastate_jax.data import worlds as worlds_module
from adastate_jax.data.batches import example_indices, open_source, prefetch, read_batch
from adastate_jax.data.worlds import WorldConfig, Worlds, worlds
from adastate_jax.errors import UserError

TINY = WorldConfig(height=8, width=8, num_frames=2)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "process_count"), [(12, 4, 1), (10, 4, 2), (7, 6, 3), (3, 8, 4)]
)
def test_every_epoch_covers_each_example_once(num_examples, batch_size, process_count):
    epochs = 4 * batch_size  # then a whole number of batches makes a whole number of epochs
    sequence = [
        example_indices(step, batch_size, num_examples, 5, rows)
        for step in range(epochs * num_examples // batch_size)
        for rows in np.split(np.arange(batch_size), process_count)
    ]
    assert all(part.shape == (batch_size // process_count,) and part.dtype == np.int64 for part in sequence)
    by_epoch = np.concatenate(sequence).reshape(epochs, num_examples)
    np.testing.assert_array_equal(np.sort(by_epoch), np.broadcast_to(np.arange(num_examples), by_epoch.shape))
    assert len({tuple(order) for order in by_epoch.tolist()}) > 1  # epochs are shuffled differently


def test_the_global_batch_does_not_depend_on_the_number_of_processes():
    for step in (0, 3, 1000):
        whole = example_indices(step, 12, 17, 0)
        parts = [example_indices(step, 12, 17, 0, rows) for rows in np.split(np.arange(12), 4)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(example_indices(step, 12, 17, 0), whole)
    assert not np.array_equal(example_indices(0, 12, 17, 1), example_indices(0, 12, 17, 0))


def test_a_batch_that_cannot_be_is_named():
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        example_indices(0, 0, 10, 0)
    with pytest.raises(ValueError, match="out of range"):
        example_indices(0, 6, 10, 0, np.array([6]))
    with pytest.raises(UserError, match="no examples"):
        example_indices(0, 6, 0, 0)


def test_reading_stacks_by_feature():
    source = [{"a": np.full((2, 3), i, np.uint8), "b": {"c": i / 2, "d": f"é{i}".encode()}} for i in range(4)]
    batch = read_batch(source, np.array([3, 1]))
    np.testing.assert_array_equal(batch["a"], np.stack([np.full((2, 3), 3), np.full((2, 3), 1)]))
    assert batch["a"].dtype == np.uint8
    np.testing.assert_array_equal(batch["b"]["c"], [1.5, 0.5])
    assert batch["b"]["d"] == ["é3", "é1"]


def test_prefetch_keeps_the_order_and_its_depth():
    started = []

    def function(step):
        started.append(step)
        return step * step

    results = prefetch(function, first_step=5, depth=3)
    assert list(itertools.islice(results, 20)) == [(step, step * step) for step in range(5, 25)]
    time.sleep(0.05)
    assert len(started) <= 20 + 2  # the one handed out last left room for two behind it
    results.close()


def test_prefetch_works_ahead_in_another_thread():
    ahead = threading.Event()

    def function(step):
        if step == 1:
            ahead.set()
        return threading.current_thread()

    results = prefetch(function, depth=2)
    _, thread = next(results)
    assert ahead.wait(5.0)  # nobody asked for step 1 yet
    assert thread is not threading.current_thread()
    results.close()


def test_prefetch_raises_where_the_result_would_have_been():
    def function(step):
        if step == 2:
            raise KeyError("step two")
        return step

    results = prefetch(function, depth=4)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(KeyError, match="step two"):
        next(results)
    assert list(results) == []


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_the_prefetch_thread_ends_with_its_consumer(how):
    def alive():
        return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    def function(step):
        if how == "exception" and step == 1:
            raise ValueError("done")
        return step

    results = prefetch(function)
    next(results)
    assert len(alive()) == 1
    if how == "close":
        results.close()
    elif how == "exception":
        with pytest.raises(ValueError, match="done"):
            next(results)
    del results
    assert alive() == []


def test_a_source_is_built_once_and_pickles(tmp_path, monkeypatch, capsys):
    dataset = worlds(TINY, 6, 2, 0)
    source = open_source(dataset, tmp_path, "train")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "building worlds: 100%" in printed.err

    def fail(*arguments):
        raise AssertionError("built again")

    monkeypatch.setattr(worlds_module, "render_world", fail)
    again = open_source(dataset, tmp_path, "train")
    copy = pickle.loads(pickle.dumps(again))
    for other in (again, copy):
        np.testing.assert_array_equal(other[3]["video"], source[3]["video"])
    assert len(open_source(dataset, tmp_path, "train[:50%]")) == 3
    assert capsys.readouterr() == ("", "")


def test_other_processes_look_for_it_only_when_it_is_built(tmp_path, monkeypatch):
    """A network file system may go on for a while to say that it is not there."""
    looked, by_the_first = [], distributed.from_first

    def dataset(**arguments):
        looked.append(arguments)
        return worlds(TINY, 6, 2, 0)(**arguments)

    def built_elsewhere(build):
        assert looked == []
        monkeypatch.setattr(distributed, "from_first", by_the_first)
        open_source(worlds(TINY, 6, 2, 0), tmp_path, "train")

    monkeypatch.setattr(distributed, "from_first", built_elsewhere)
    assert len(open_source(dataset, tmp_path, "train")) == 6
    assert len(looked) == 1


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    whole = worlds_module.render_world

    def fail_late(config, seed, index):
        if index == 4:
            raise RuntimeError("the disk caught fire")
        return whole(config, seed, index)

    dataset = worlds(TINY, 6, 2, 0)
    monkeypatch.setattr(worlds_module, "render_world", fail_late)
    with pytest.raises(RuntimeError, match="caught fire"):
        open_source(dataset, tmp_path, "train")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    monkeypatch.setattr(worlds_module, "render_world", whole)
    assert len(open_source(dataset, tmp_path, "train")) == 6


def test_a_killed_build_never_reads_as_complete(tmp_path):
    program = """
import sys, time
from adastate_jax.data import worlds
from adastate_jax.data.batches import open_source
render = worlds.render_world
def stall(config, seed, index):
    if index == 7:
        print("stalled", flush=True)
        time.sleep(60)
    return render(config, seed, index)
worlds.render_world = stall
config = worlds.WorldConfig(height=8, width=8, num_frames=2)
open_source(worlds.worlds(config, 6, 2, 0), sys.argv[1], "train")
"""
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"stalled\n"  # the train split is written by now
        process.kill()
    dataset = worlds(TINY, 6, 2, 0)
    folder = pathlib.Path(dataset(data_dir=tmp_path).data_dir)
    assert not folder.exists()
    assert len(list(folder.parent.glob("incomplete.*"))) == 1
    assert len(open_source(dataset, tmp_path, "validation")) == 2
    assert list(folder.parent.glob("incomplete.*")) == []


def test_of_two_that_want_the_same_dataset_one_builds(tmp_path, monkeypatch):
    builds = []
    whole = Worlds.download_and_prepare
    monkeypatch.setattr(Worlds, "download_and_prepare", lambda self: (builds.append(1), whole(self)))
    dataset = worlds(TINY, 6, 2, 0)
    with ThreadPoolExecutor(2) as threads:
        sources = list(threads.map(lambda split: open_source(dataset, tmp_path, split), ["train", "train"]))
    assert len(builds) == 1
    assert [len(source) for source in sources] == [6, 6]


def test_a_data_dir_that_cannot_be_and_an_unknown_split_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    dataset = worlds(TINY, 2, 1, 0)
    with pytest.raises(UserError, match="file: cannot be written"):
        open_source(dataset, tmp_path / "file", "train")
    with pytest.raises(UserError, match="no split 'test': use one of train, validation"):
        open_source(dataset, tmp_path, "test")
