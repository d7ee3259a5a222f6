"""Where a run's time went: what is written of it, what a resumed run makes of it, and what steps count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from adastate_jax.benchmarking.utilisation import peak_flops, step_flops
from adastate_jax.config.files import parse_config
from adastate_jax.errors import UserError
from adastate_jax.training import spans
from adastate_jax.training.metrics import Metrics, read_metrics, read_times
from adastate_jax.training.profile import Profile


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(spans.time, "monotonic", lambda: now[0])
    return now


def test_laps_leave_nothing_out(clock):
    watch = spans.Spans()
    for name, seconds in (("start", 3.0), ("step", 2.0), ("data", 0.5), ("step", 1.0)):
        clock[0] += seconds
        watch.lap(name)
    assert watch.take() == {"start": 3.0, "step": 3.0, "data": 0.5}
    assert watch.take() == {}
    with pytest.raises(ValueError, match="lunch: no span"):
        watch.lap("lunch")


def test_a_run_that_is_resumed_counts_the_steps_that_it_repeats(clock, tmp_path):
    """Ten seconds per step of 4e12 operations on each of two devices; the second call goes on from step 2."""
    work = spans.Work(lambda stage, step: 8 * 10**12, devices=2, peak=1e12)

    def steps(metrics, first, last):
        for step in range(first, last):
            clock[0] += 10.0
            metrics.spans.lap("step")
            metrics.write("pretrain", [(step, {"loss": 1.0})])

    first = Metrics(tmp_path, spans.Spans(), work)
    clock[0] += 5.0
    first.spans.lap("start")
    first.rewind("pretrain", 0)
    steps(first, 0, 4)
    second = Metrics(tmp_path, spans.Spans(), work)
    clock[0] += 5.0
    second.spans.lap("start")
    second.rewind("pretrain", 2)
    steps(second, 2, 5)
    clock[0] += 20.0
    second.spans.lap("save")
    second.close("pretrain", 4)
    path = tmp_path / "metrics.jsonl"
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    times = read_times(path)
    assert sum(record.get("seconds_repeated", 0.0) for record in times) == 20.0
    assert sum(record.get("seconds_step", 0.0) for record in times) == 50.0
    assert times[0] == {
        "stage": "pretrain",
        "step": 0,
        "seconds_start": 5.0,
        "seconds_step": 10.0,
        "tflops_per_second": 0.4,
        "utilisation": 0.4,
    }
    assert second.summary({"TPU_0": 2.5, "TPU_1": 2.25}) == [
        "time: 55.0 s: step 55%, save 36%, start 9%",
        "time of all calls with this work directory: 100.0 s: step 50%, repeated 20%, save 20%, start 10%",
        "pretrain: steps at 0.4 TFLOP/s of a device, 40.0% of its peak by the data sheet",
        "memory: at most 2.50 GiB (TPU_0), at least 2.25 (TPU_1)",
    ]
    assert Metrics(tmp_path).summary({}) == []  # a call that had nothing to do
    events = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard" / "pretrain").iterdir())
    assert all(f"time/{name}".encode() in events for name in ("seconds_step", "seconds_save", "utilisation"))


def test_memory_is_that_of_each_device_where_the_backend_tells(monkeypatch):
    class Device:
        def __init__(self, name, peak):
            self.name, self.peak = name, peak

        def __str__(self):
            return self.name

        def memory_stats(self):
            return self.peak and {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device("TPU_0", 3 << 30), Device("TPU_1", 1 << 29)])
    assert spans.device_memory() == {"TPU_0": 3.0, "TPU_1": 0.5}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device("CPU_0", None)])
    assert spans.device_memory() == {}


def test_what_steps_count_follows_from_the_work_and_not_from_how_it_is_done():
    """Twice the batch is twice the work, what is computed again to save memory is none, the critic alone is less."""
    config = parse_config(["--config=configs/tiny.py"])
    for stage in ("pretrain", "initialize", "distill"):
        settings = getattr(config, stage)
        twice = dataclasses.replace(
            config, **{stage: dataclasses.replace(settings, batch_size=2 * settings.batch_size)}
        )
        assert step_flops(twice, stage, 0) == 2 * step_flops(config, stage, 0) > 0
        again = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="block"))
        assert step_flops(again, stage, 0) == step_flops(config, stage, 0)
    assert config.distill.updates_student(0)
    assert not config.distill.updates_student(1)
    assert 0 < step_flops(config, "distill", 1) < step_flops(config, "distill", 0)


def test_adapters_take_less_work_than_all_weights():
    """Nothing is multiplied for a gradient of frozen weights; those who train none take the same."""
    config = parse_config(["--config=configs/tiny.py"])
    adapters = parse_config(["--config=configs/tiny.py", "--config.student.lora.rank=2"])
    assert 0.5 < step_flops(adapters, "initialize", 0) / step_flops(config, "initialize", 0) < 0.8
    assert step_flops(adapters, "distill", 0) < step_flops(config, "distill", 0)
    assert step_flops(adapters, "pretrain", 0) == step_flops(config, "pretrain", 0)
    consistency = parse_config(
        ["--config=configs/causal_consistency.py:worlds", "--config.initialize.guidance_scale=0.0"]
    )
    assert step_flops(consistency, "initialize", 0) > 0


def test_what_is_not_counted_has_no_rate(clock, tmp_path):
    metrics = Metrics(tmp_path, spans.Spans(), spans.Work(lambda stage, step: None, devices=1, peak=1e12))
    metrics.rewind("distill", 0)
    clock[0] += 1.0
    metrics.spans.lap("step")
    metrics.write("distill", [(0, {"loss": 1.0})])
    assert read_times(tmp_path / "metrics.jsonl") == [{"stage": "distill", "step": 0, "seconds_step": 1.0}]
    assert metrics.summary({}) == ["time: 1.0 s: step 100%"]


def test_peaks_are_of_the_very_product():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("NVIDIA H100 PCIe") is None  # slower, under the same name
    assert peak_flops("cpu") is None


@pytest.mark.parametrize("text", ["3", "a:b", "-1:2", "5:4", "0:100", "0:100000", "1:", "1:2:3"])
def test_ranges_that_are_none_are_refused(text, tmp_path):
    with pytest.raises(UserError, match=f"--profile={text}: "):
        Profile(text, parse_config(["--config=configs/tiny.py", "--config.pretrain.steps=1000"]), tmp_path)


def test_steps_that_no_stage_has_are_refused(tmp_path):
    sizes = [f"--config.{stage}.steps={steps}" for stage, steps in (("pretrain", 6), ("initialize", 4), ("distill", 6))]
    config = parse_config(["--config=configs/tiny.py", *sizes])
    Profile("4:5", config, tmp_path)
    with pytest.raises(UserError, match="no stage has a step 6: they have pretrain 6, initialize 4, distill 6, from 0"):
        Profile("4:6", config, tmp_path)


def test_a_profile_that_is_cut_short_leaves_nothing(tmp_path):
    config = parse_config(["--config=configs/tiny.py"])
    with Profile("1:2", config, tmp_path / "profile") as profile:
        for step in range(2):
            profile.before("pretrain", step, {}, spans.Spans())
            profile.after("pretrain", step, {"loss": jnp.zeros(()) + step}, spans.Spans())
    assert list((tmp_path / "profile").iterdir()) == []
