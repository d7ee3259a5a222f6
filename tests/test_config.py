"""Configurations: what is written is what is built, and what is wrong is named."""

import dataclasses
from pathlib import Path

import pytest

from adastate_jax.config import Config, default_config, from_config_dict, load_config, parse_config, save_config
from adastate_jax.errors import UserError
from adastate_jax.streaming.anchors import StaticAnchor

CONFIGS = Path(__file__).parents[1] / "configs"


def test_defaults_are_the_papers():
    config = from_config_dict(default_config())
    assert config == Config()
    assert (config.stream.chunk_frames, config.stream.past_frames, config.stream.anchor.state_frames) == (3, 3, 1)
    assert config.stream.denoising_steps == (1000, 750, 500, 250)
    distill = config.distill
    assert (distill.steps, distill.batch_size, distill.rollout_frames, distill.horizon_alpha) == (1000, 4, 21, 2.0)
    assert (distill.guidance_scale, distill.critic_ratio, distill.ema_decay, distill.ema_start) == (3.0, 5, 0.99, 200)
    assert (distill.student.learning_rate, distill.critic.learning_rate) == (2e-6, 4e-7)
    assert (distill.student.betas, distill.student.weight_decay) == ((0.0, 0.999), 0.01)
    assert (distill.student.max_gradient_norm, distill.cache_gradient) == (10.0, "stop")
    assert (distill.min_timestep, distill.max_timestep, distill.shift) == (20, 980, 5.0)


def test_json_round_trip(tmp_path):
    stream = dataclasses.replace(Config().stream, anchor=StaticAnchor(2), denoising_steps=(1000.0, 500.0))
    config = dataclasses.replace(Config(), stream=stream, stages=("pretrain",))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_every_config_file_builds_and_says_how_to_run_it(path):
    folder = ["--config.data.folder=clips"] if path.name == "clips.py" else []
    parse_config([f"--config={path}", *folder])
    docstring = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in docstring


def test_overrides():
    config = parse_config(
        [
            f"--config={CONFIGS / 'tiny.py'}",
            "--config.distill.horizon_alpha=4",
            "--config.stream.anchor.name=static",
            "--config.stages=('pretrain',)",
        ]
    )
    assert config.distill.horizon_alpha == 4.0
    assert config.stream.anchor == StaticAnchor(1)
    assert config.stages == ("pretrain",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nothing.py"], "nothing.py"),
        ([], "--config is not set"),
        (["TINY", "--config.distil.steps=3"], "distil"),
        (["TINY", "--config.distill.stepz=3"], "stepz"),
        (["TINY", "--config.distill.steps=many"], "many"),
        (["TINY", "--config.stream.chunk_frames=0"], "config.stream: chunk_frames"),
        (["TINY", "--config.stream.anchor.name=sticky"], "config.stream.anchor: anchor must be one of"),
        (["TINY", "--config.distill.rollout_frames=16"], "rollout_frames 16 is no whole number of chunks of 3"),
        (["TINY", "--config.model.num_heads=5"], "config.model: dim 128 must be an even multiple of num_heads 5"),
        (["TINY", "--config.stages=('dream',)"], "stages must be some of"),
        (["TINY", "--config.data.worlds.motions=('fly',)"], "fly"),
        (["TINY", "--unknown=3"], "unknown"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    arguments = [a.replace("TINY", f"--config={CONFIGS / 'tiny.py'}") for a in arguments]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_config(arguments)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"broken\.py"):
        parse_config([f"--config={tmp_path / 'broken.py'}"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a configuration"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"sed": 3}')
    with pytest.raises(UserError, match="sed: unknown field; did you mean seed"):
        load_config(tmp_path / "config.json")
