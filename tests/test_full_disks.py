"""A full disk, at whichever write: one line, nothing half-written, what was there stays, and with room all goes on."""

import asyncio
import contextlib
import dataclasses
import os
import resource
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

import adastate_jax as ada
from adastate_jax.checkpoint import Checkpoints, latest_step, load_tree, save_tree
from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.worlds import WorldConfig, worlds
from adastate_jax.errors import UserError, one_line, reason, writing
from adastate_jax.files import write_text
from adastate_jax.generation import samples
from adastate_jax.train import _refuse_other_data
from adastate_jax.training.metrics import Metrics, read_metrics
from adastate_jax.training.stages.trajectories import read_trajectories, write_trajectories

# Of a file in bytes: each stands for a disk that is full a little later.
LIMITS = (0, 1, 60, 300, 1500, 5000, 20_000)
TREE = {f"layer{i}": jnp.asarray(np.random.default_rng(i).standard_normal(3000, np.float32)) for i in range(4)}
RECORDS = [(step, {"loss": 1.0 / (1 + step)}) for step in range(20)]


@contextlib.contextmanager
def full(limit: int):
    """No file grows beyond `limit` bytes; whoever writes on is told so, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(write, limit: int) -> bool:
    """Whether a full disk stopped a writer: by one line, or not at all."""
    try:
        with full(limit):
            write()
    except UserError as error:
        message = str(error)
    else:
        return False
    assert "File too large" in message
    assert one_line(message) == message
    return True


def files(folder) -> list[str]:
    """All but locks, and what threads of TensorStore still write into a temporary folder that is being removed."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if ".partial/" not in name and not name.endswith(".lock"))


def whole_or_nothing(folder, write, read, limits=LIMITS):
    """Calls a writer on ever larger disks, until one is large enough; returns how many were too small."""
    count = 0
    for limit in (*limits, resource.RLIM_INFINITY):
        before = files(folder)
        if not refused(write, limit):
            break
        count += 1
        assert files(folder) == before, limit
    read()
    assert not list(folder.rglob("*.partial*"))
    return count


def test_a_tree(tmp_path):
    count = whole_or_nothing(
        tmp_path, lambda: save_tree(tmp_path / "tree", TREE), lambda: load_tree(tmp_path / "tree", TREE)
    )
    assert count >= 5


def test_a_checkpoint_of_a_run(tmp_path, capfd):
    """The one before stays, and one error is raised by whatever leaves the context."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, TREE)

    def save():
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(4, TREE)

    assert whole_or_nothing(tmp_path, save, lambda: load_tree(tmp_path / "4", TREE)) >= 5
    assert latest_step(tmp_path) == 4
    assert capfd.readouterr().err == ""  # also of TensorStore's threads, which outlive a failed save


def test_a_write_that_outlives_its_save_is_not_heard(tmp_path):
    """Whichever of Python's two hooks it is handed to; and nothing else is kept from them."""
    loop = asyncio.new_event_loop()
    loop.close()

    def report(error, trace):
        sys.excepthook(type(error), error, trace)
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, exc_traceback=trace))

    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", lambda kind, error, trace: heard.append(error))
        patch.setattr(sys, "unraisablehook", lambda what: heard.append(what.exc_value))
        save_tree(tmp_path / "other", TREE)
        with pytest.raises(RuntimeError) as closed:
            loop.call_soon_threadsafe(print)
        report(closed.value, closed.tb.tb_next)  # as C++ calls it
        assert heard == []
        report(closed.value, closed.tb)  # a function in Python called it
        assert heard == [closed.value, closed.value]


def test_a_checkpoint_that_fails_while_the_run_ends_for_another_reason(tmp_path, capsys):
    with pytest.raises(UserError, match="the loss is nan"), full(300), Checkpoints(tmp_path, keep=1) as checkpoints:  # noqa: PT012
        checkpoints.save(2, TREE)
        raise UserError("the loss is nan")
    assert "cannot save a checkpoint (File too large); nothing was saved before" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_not_begun_to_be_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=47_999))
    with pytest.raises(UserError, match=r"tree: cannot be written \(No space left on device\); free some space"):
        save_tree(tmp_path / "tree", TREE)
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(UserError, match=r"cannot save a checkpoint \(No space left on device\); nothing was saved"),
    ):
        checkpoints.save(2, TREE)
    assert files(tmp_path) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=48_000))
    save_tree(tmp_path / "tree", TREE)


def test_records_of_a_run(tmp_path):
    """A line that was cut is forgotten with the steps that are repeated."""
    for limit in LIMITS:
        metrics = Metrics(tmp_path)
        if not refused(lambda metrics=metrics: metrics.rewind("a", 0), limit):
            if not refused(lambda metrics=metrics: metrics.write("a", RECORDS), limit):
                break
            assert len(read_metrics(tmp_path / "metrics.jsonl")) < len(RECORDS)
    assert limit > 300
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(20))


def test_names_of_the_data(tmp_path):
    write = lambda: _refuse_other_data(tmp_path, {"clips": "worlds/a"})  # noqa: E731
    assert whole_or_nothing(tmp_path, write, write) >= 2


def test_trajectories(tmp_path):
    drawn, sealed = np.arange(4096.0).reshape(2, 2048), {}
    write = lambda: write_trajectories(tmp_path / "000000.npy", drawn, sealed)  # noqa: E731
    read = lambda: read_trajectories(tmp_path, 2, (2048,))(np.arange(2))  # noqa: E731
    assert whole_or_nothing(tmp_path, write, read) >= 4


def test_a_data_set(tmp_path):
    dataset = worlds(WorldConfig(height=8, width=8, num_frames=2), 6, 2, 0)
    write = lambda: open_source(dataset, tmp_path, "train")  # noqa: E731
    read = lambda: read_batch(write(), range(6))  # noqa: E731
    assert whole_or_nothing(tmp_path, write, read) >= 6


def test_a_saved_stream(tmp_path):
    model = ada.load(config=small_config(), random_weights=True)
    video = ada.stream(model, "a", seconds=1)
    count = whole_or_nothing(
        tmp_path, lambda: ada.save_stream(video, tmp_path / "saved"), lambda: ada.load_stream(model, tmp_path / "saved")
    )
    assert count >= 3


def test_the_stage_of_samples(tmp_path, monkeypatch, capsys):
    """On ever larger disks more and more of its files are there, each whole; on one that is large enough, all."""
    config = small_config()
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, count=2, frames=9))
    model = ada.load(config=config, random_weights=True)
    monkeypatch.setattr(samples, "load", lambda *_, **__: model)

    def run_in(workdir):
        workdir.mkdir(exist_ok=True)
        write_text(workdir / "metrics.jsonl", '{"stage": "distill", "step": 0, "loss": 1.0}\n')
        texts = ["a red ball", "a white ball"]
        return types.SimpleNamespace(
            config=config, workdir=workdir, mesh=model.mesh, prompts=texts, refuse_removed=lambda: None
        )

    def content(workdir):
        return {name: (workdir / name).read_bytes() for name in files(workdir)}

    run = run_in(tmp_path / "whole")
    samples.sample(run)
    whole, counts = content(run.workdir), []
    assert len(whole) == 2 + 2 * len(config.sample.anchors) + 4  # contact sheet, prompts, curves, metrics
    run = run_in(tmp_path / "full")
    sizes = sorted(map(len, whole.values()))
    for limit in (*LIMITS, *(size - 1 for size in sizes[1:]), resource.RLIM_INFINITY):
        full_disk = refused(lambda: samples.sample(run), limit)
        found = content(run.workdir)
        assert found.items() <= whole.items(), limit
        counts.append(len(found))
        if not full_disk:
            break
    assert found == whole
    assert len(set(counts)) >= 3
    assert not list(run.workdir.rglob("*.partial*"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "x"), "No space left on device"),
        (RuntimeError("write() failed: No space left on device; writing /a"), "No space left on device"),
        (ValueError("Failed writing \"/a\" [os_error_code='30']"), "Read-only file system"),
        (ValueError("many\nlines"), "many"),
        (ValueError(), "ValueError"),
    ],
)
def test_why_is_said_in_the_systems_words(error, said):
    assert reason(error) == said


def test_what_is_no_matter_of_the_system_is_not_called_one():
    with pytest.raises(RuntimeError, match="a mistake"), writing("a", RuntimeError):
        raise RuntimeError("a mistake")
    with pytest.raises(UserError, match="kept"), writing("a", Exception):
        raise UserError("kept")


def test_a_read_only_folder(tmp_path, monkeypatch):
    """For root nothing is read-only: the system is made to say so."""

    def refuse(*arguments, **named):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(Read-only file system\); name another"):
        Metrics(tmp_path).rewind("a", 0)
