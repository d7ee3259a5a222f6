"""Ways to train, as runs: on one's own clips, by consistency, and with adapters; resumed, streamed and exported."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import adastate_jax as ada
from adastate_jax import convert
from adastate_jax.config import parse_config
from adastate_jax.errors import UserError
from adastate_jax.sharding import make_mesh
from adastate_jax.train import train
from adastate_jax.training.metrics import read_metrics
from adastate_jax.training.networks import check_networks
from adastate_jax.weights.converted import load_converted
from adastate_jax.weights.slots import leaves

ROOT = Path(__file__).parents[1]
LORA = {"student.lora.rank": 2, "critic.lora.rank": 1, "critic.lora.targets": ("self_attention/.*",)}


def configured(**fields):
    arguments = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return parse_config([f"--config={ROOT / 'configs' / 'smallest.py'}", *arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A causal teacher on clips; a student by consistency with it, and then by distillation, both with adapters.

    Distillation goes on with one rollout of two segments.
    """
    folder = tmp_path_factory.mktemp("ways")
    own, consistent, distilled = (folder / name for name in ("own", "consistent", "distilled"))
    clips = {"initialize__targets": "clips", "initialize__weights": "random", "initialize__context": "clean"}
    train(configured(stages=("initialize",), **clips), own)
    settings = {
        "initialize__targets": "consistency",
        "initialize__context": "clean",
        "teacher__weights": own / "initialize",
    }
    train(configured(stages=("initialize",), **settings, **LORA), consistent)
    networks = {f"{name}__weights": own / "initialize" for name in ("teacher", "critic")}
    networks |= {"student__weights": consistent / "initialize", "student__param_dtype": "bfloat16"}
    segments = {"distill__rollout_frames": 6, "distill__scored_frames": 3, "distill__continue_rollout": True}
    config = configured(stages=("distill",), **networks, **segments, **LORA)
    train(config, distilled)
    return own, consistent, distilled, config


def saved(folder):
    """Leaves of a checkpoint by name."""
    from orbax.checkpoint.experimental import v1 as ocp

    return {name: np.asarray(leaf) for name, leaf in ocp.load(folder.absolute()).items()}


def test_each_way_trains(runs):
    for folder, stage in zip(runs[:3], ("initialize", "initialize", "distill"), strict=True):
        records = read_metrics(folder / "metrics.jsonl")
        assert [(record["stage"], record["step"]) for record in records] == [(stage, 0), (stage, 1)]
    assert not (runs[0] / "trajectories").exists()


def test_a_checkpoint_has_adapters_alone(runs):
    for folder, parts in ((runs[1] / "initialize", {""}), (runs[2] / "distill", {"student/", "critic/"})):
        names = saved(folder / "2").keys()
        counts = {f"{part}{count}" for part in parts for count in ("step", "optimizer/1/count", "optimizer/3/count")}
        others = {name for name in names if not name.endswith(("/down", "/up"))}
        assert {name for name in others if not name.startswith("rollout/")} <= counts
        assert any("/ema/" in f"/{name}" for name in names)
    critic = {name for name in saved(runs[2] / "distill" / "2") if name.startswith("critic/params")}
    assert all("self_attention" in name for name in critic)


def test_a_resumed_run_with_adapters_is_the_uninterrupted_one(runs, tmp_path):
    """Also in the rollout that it goes on with."""
    *_, distilled, config = runs
    resumed = tmp_path / "resumed"
    shutil.copytree(distilled, resumed)
    shutil.rmtree(resumed / "distill" / "2")
    train(config, resumed)
    one, other = saved(distilled / "distill" / "2"), saved(resumed / "distill" / "2")
    assert one.keys() == other.keys()
    assert any(name.startswith("rollout/") for name in one)
    for name, leaf in one.items():
        np.testing.assert_array_equal(other[name], leaf, err_msg=name)


def test_the_first_of_the_run_streams(runs):
    """Of its own videos alone."""
    frames = np.concatenate(list(ada.stream(ada.load(runs[0]), "a camera pans left", seconds=0.75)))
    assert frames.shape == (12, 32, 32, 3)
    assert frames.std() > 0


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_exported_adapters_on_the_first_base_are_the_student_that_streams(names, runs, tmp_path):
    """Of both runs, side by side: read back by the reader of published files."""
    own, _, distilled, _ = runs
    convert.main([f"--source={distilled}", "--to=lora", f"--names={names}", f"--output={tmp_path / 'lora'}"])
    adapter = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    convert.main([f"--source={own}", f"--lora={adapter}", f"--output={tmp_path / 'student'}"])
    found = leaves(load_converted(tmp_path / "student", "transformer", make_mesh(), "float32"))
    base = leaves(ada.load(own).student)
    # The distilled run's student is bfloat16: the first base is rounded, and so is each sum of a base and adapters.
    wanted = leaves(jax.tree.map(lambda x: x.astype("float32"), ada.load(distilled).student))
    assert {str(leaf.dtype) for leaf in leaves(ada.load(distilled).student).values()} == {"bfloat16"}
    changed = 0
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=3 * 2**-8, atol=1e-6, err_msg=name)
        changed += bool(np.abs(found[name] - base[name]).max() > 1e-5)
    assert changed == 10


def test_a_student_that_was_trained_whole_has_no_adapters_to_export(runs, tmp_path):
    with pytest.raises(UserError, match="trained whole, not as adapters; take it with --to=safetensors"):
        convert.main([f"--source={runs[0]}", "--to=lora", f"--output={tmp_path / 'lora'}"])
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher__lora__rank": 2}, "teacher.lora: the teacher is frozen, or pretrained whole"),
        ({"student__lora__rank": 17}, "student.lora.rank 17 is more than the 16 inputs or the 16 outputs of"),
        ({"student__lora__rank": -1}, "config.student.lora: rank must be at least 1"),
        ({"critic__lora__rank": 2, "critic__lora__alpha": 0.0}, "config.critic.lora: alpha must be positive"),
        (
            {"critic__lora__rank": 2, "critic__lora__targets": ("to_q",)},
            "critic.lora.targets: 'to_q' is the end of no layer's path; there are",
        ),
        ({"student__param_dtype": "bfloat16"}, "student.param_dtype: the student is trained, in float32; leave it"),
        (
            {"student__lora__rank": 2, "initialize__weights": "random"},
            "student.lora: adapters of random weights; set initialize.weights to others",
        ),
        (
            {"initialize__targets": "consistency", "initialize__context": "clean"},
            "teacher.weights: initialize.targets consistency needs a causal teacher",
        ),
        (
            {
                "initialize__targets": "consistency",
                "initialize__context": "clean",
                "teacher__weights": "runs/own/initialize",
                "stages": ("initialize", "distill"),
            },
            "stages: distill needs another teacher than initialize.targets consistency",
        ),
    ],
)
def test_ways_that_cannot_be_are_refused_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        configured(**fields)
    assert "\n" not in str(raised.value)


def test_a_base_that_is_missing_is_named(tmp_path):
    config = configured(stages=("initialize",), initialize__targets="clips", initialize__weights="nowhere", **LORA)
    with pytest.raises(UserError, match=r"config\.initialize\.weights=nowhere: no such network; make it with"):
        check_networks(config, tmp_path)


def test_adapters_are_not_put_on_other_weights(runs, tmp_path):
    """Neither to go on, nor to stream: the base has moved on since."""
    own, consistent, _, _ = runs
    for folder in (own, consistent):
        shutil.copytree(folder, tmp_path / folder.name)
    shutil.rmtree(tmp_path / "own" / "initialize" / "2")
    noted = tmp_path / "consistent" / "config.json"
    noted.write_text(noted.read_text().replace(str(own), str(tmp_path / "own")))
    with pytest.raises(
        UserError, match=r"its adapters are of other initialize.student.weights than .*own/initialize/1"
    ):
        ada.load(tmp_path / "consistent")
