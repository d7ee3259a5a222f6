"""A wide, deep teacher for a small critic and a small student, all from official files: from data sets to videos."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import small_wan
from small_inputs import Inputs

import adastate_jax as ada
from adastate_jax.config import parse_config
from adastate_jax.data.decoding import decode_frames
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.train import train
from adastate_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = dataclasses.replace(small_wan.CONFIG.model, num_layers=1)
WIDE = dataclasses.replace(SMALL, dim=72, ffn_dim=80, num_heads=3, num_layers=2)
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Five networks converted from files of official names, and the data sets that two of them make."""
    inputs, rng = Inputs(tmp_path_factory.mktemp("mixed")), np.random.default_rng(1)
    for name, network in (("teacher", WIDE), ("critic", SMALL), ("student", SMALL)):
        write = f"--set=num_heads={network.num_heads}"
        small_wan.write_network(inputs.folder / "weights" / name, "transformer", network, rng, write)
    inputs.encode(inputs.folder / "clips")
    inputs.embed(inputs.folder / "captions", prompts=inputs.folder / "clips" / "captions.jsonl")
    inputs.embed(inputs.folder / "prompts")
    return inputs


def configured(inputs, *others, stages=("initialize", "distill", "sample")):
    weights = inputs.folder / "weights"
    fields = {f"text.{name}": value for name, value in to_dict(small_wan.CONFIG.text).items()}
    fields |= {f"vae.{name}": value for name, value in to_dict(small_wan.CONFIG.vae).items() if "latents" not in name}
    fields |= {f"model.{name}": getattr(SMALL, name) for name in (*SIZES, "text_dim", "text_length", "freq_dim")}
    fields |= {f"teacher.{name}": getattr(WIDE, name) for name in SIZES}
    fields |= {"teacher.weights": weights / "teacher", "teacher.param_dtype": "bfloat16", "teacher.dtype": "bfloat16"}
    fields |= {"critic.weights": weights / "critic", "initialize.weights": weights / "student"}
    fields |= {"model.remat": "none", "model.dtype": "float32", "stages": stages}
    fields |= {"data.clips.height": 16, "data.clips.width": 24, "data.clips.num_frames": 9}
    names = {"latents": "clips", "captions": "captions", "embeddings": "prompts", "encoders": "weights"}
    fields |= {f"data.{field}": str(inputs.folder / name) for field, name in names.items()}
    for stage in ("initialize", "distill"):
        fields |= {f"{stage}.steps": 2, f"{stage}.batch_size": 2}
    fields |= {"initialize.trajectories": 4, "initialize.ode_steps": 4, "distill.rollout_frames": 6}
    fields |= {"stream.denoising_steps": (1000.0, 500.0)}
    fields |= {"sample.horizon": 1, "sample.count": 1, "logging.log_every": 1}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return parse_config([f"--config={ROOT / 'configs' / 'latents.py'}", *arguments, *others])


def test_a_teacher_of_other_sizes_trains_a_student_to_sample_videos(inputs, tmp_path):
    train(configured(inputs, "--config.teacher.quantization=int8"), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in records] == [(s, i) for s in ("initialize", "distill") for i in range(2)]
    assert records[2]["dmd_gradient_norm"] > 0
    assert len(list(decode_frames(tmp_path / "run" / "samples" / "00.mp4"))) == 1 + 4 * 5
    student = ada.load(tmp_path / "run").student
    assert (student.config.dim, student.config.num_layers) == (SMALL.dim, SMALL.num_layers)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(student)} == {"float32"}


def test_before_anything_is_compiled_a_wrong_network_is_one_line(inputs, tmp_path):
    for override, message in (
        ("critic.weights", "teacher: its dim is 72, config.critic.dim is 32; set config.critic.dim to it"),
        ("student.weights", "teacher: its dim is 72, config.student.dim is 32"),
    ):
        wrong = configured(inputs, f"--config.{override}={inputs.folder / 'weights' / 'teacher'}", stages=("distill",))
        with pytest.raises(UserError, match=message):
            train(wrong, tmp_path / "run")
        assert not [*(tmp_path / "run").iterdir()]
