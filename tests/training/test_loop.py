"""The loop around the steps: how far it runs ahead of the devices, and when it stops."""

import itertools

import pytest

from adastate_jax import lockstep
from adastate_jax.training import loop
from adastate_jax.training.metrics import Metrics, read_metrics
from adastate_jax.training.spans import Spans


class Scalar:
    """A number that a device has when somebody has waited for it."""

    def __init__(self, value: float):
        self.value, self.waited_for = value, False

    def is_ready(self) -> bool:
        return self.waited_for

    def __float__(self) -> float:
        self.waited_for = True
        return self.value


class Checkpoints:
    """Checkpoints that are numbers of steps."""

    folder, latest = "nowhere", None

    def __init__(self):
        self.saved = []

    def save(self, step: int, state: int) -> None:
        assert state == step
        self.saved.append(step)

    def wait(self) -> None:
        pass


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a stage of so many steps; returns what was saved, and how many steps were under way at each."""
    handed, under_way = [], []

    def wait(scalars):
        for scalar in scalars.values() if isinstance(scalars, dict) else ():
            scalar.waited_for = True

    def step_function(state: int, batch: int, step: int):
        assert state == batch == step
        handed.append(Scalar(float(step)))
        under_way.append(sum(not scalar.is_ready() for scalar in handed))
        return state + 1, {"loss": handed[-1]}

    monkeypatch.setattr(loop.jax, "block_until_ready", wait)

    def run(steps: int, **settings):
        checkpoints = Checkpoints()
        metrics, batches = Metrics(tmp_path, Spans()), lambda first: ((step, step) for step in itertools.count(first))
        compiling = iter([True, *[False] * steps])
        settings = {"log_every": steps, "save_every": steps} | settings
        loop.run_stage(
            "pretrain",
            None,
            lambda: 0,
            step_function,
            batches,
            steps,
            checkpoints,
            metrics,
            compiling=lambda step: next(compiling),
            **settings,
        )
        return checkpoints.saved, under_way, read_metrics(tmp_path / "metrics.jsonl")

    return run


def test_one_step_is_under_way_when_the_next_is_handed_over(run):
    """However rarely the numbers are asked for: a signal waits for no more, and each step's time is its own."""
    saved, under_way, records = run(20)
    assert under_way == [1, 1, *[2] * 18]  # the first is waited for: it compiles
    assert saved == [20]
    assert [record["loss"] for record in records] == [float(step) for step in range(20)]


def test_all_processes_stop_where_they_agreed(run, monkeypatch):
    passed = itertools.count(1)
    monkeypatch.setattr(lockstep, "pass_step", lambda requested: next(passed) == 7)
    saved, _, records = run(20)
    assert saved == [7]
    assert len(records) == 7
