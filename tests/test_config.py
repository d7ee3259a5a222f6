"""Configurations: what is written is what is built, and what is wrong is named."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from adastate_jax.config.files import default_config, from_config_dict, load_config, parse_config, save_config
from adastate_jax.config.run import Config, require_whole_decay
from adastate_jax.errors import UserError
from adastate_jax.generation import loading as generate
from adastate_jax.streaming.anchors.static import StaticAnchor
from adastate_jax.weights.kinds import KINDS

CONFIGS = Path(__file__).parents[1] / "configs"
GOLDEN = CONFIGS.parents[1] / "shared" / "golden"


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
    of_a_folder = "clips.py", "own_videos.py", "causal_consistency.py"
    folder = ["--config.data.folder=clips"] if path.name in of_a_folder else []
    require_whole_decay(parse_config([f"--config={path}", *folder]))
    docstring = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in docstring


def test_every_way_has_a_smallest_configuration_which_says_how_to_run_it():
    file = CONFIGS / "smallest.py"
    ways = runpy.run_path(str(file))["WAYS"]
    built = {parse_config([f"--config={file}:{way}"]) for way in ways}
    assert len(built) == len(ways)
    assert all(f"--config=configs/smallest.py:{way} " in file.read_text() for way in ways)
    with pytest.raises(UserError, match="unknown way 'nothing'; it is one of tiny, own_videos"):
        parse_config([f"--config={file}:nothing"])


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")
@pytest.mark.parametrize(
    ("file", "field", "kind", "manifest"),
    [
        ("wan_1_3b", "model", "transformer", "wan_t2v_1.3B"),
        ("wan_14b", "model", "transformer", "wan_t2v_14B"),
        ("wan_1_3b", "text", "text_encoder", "umt5_xxl"),
        ("wan_1_3b", "vae", "vae", "wan_vae"),
    ],
)
def test_wan_configurations_have_the_published_sizes(file, field, kind, manifest):
    network = getattr(parse_config([f"--config={CONFIGS / file}.py"]), field)
    assert network.dtype == network.param_dtype == "bfloat16"
    shapes = {name: list(slot.shape) for name, slot in KINDS[kind].slots(network).items()}
    assert shapes == json.loads((GOLDEN / f"manifest_{manifest}.json").read_text())["official"]


def test_the_wan_configuration_is_self_forcings_video_with_adastates_window():
    config = parse_config([f"--config={CONFIGS / 'wan_1_3b.py'}"])
    assert config.latent_shape == (60, 104, 16)  # 21 of them are Self-Forcing's [21, 16, 60, 104]
    assert config.time_factor == 4
    assert config.model.frame_tokens(60, 104) == 1560
    assert config.stream == Config().stream
    assert config.negative_prompt.startswith("色调艳丽")
    # What networks are taken to be where no configuration is named.
    assert generate._wan_config(config.model, "wan") == config


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
        (["TINY", "--config.decoder=film"], "decoder must be one of patch, wan, tiny"),
        (["TINY", "--config.decoder=wan"], "in_channels 48 .* must be the 16 channels of the wan decoder's latents"),
        (["TINY", "--config.data.kind=none"], "stage pretrain needs clips, and data.kind is none"),
        (["WAN", "--config.data.clips.height=482"], "video of 482x832 is not tiled by latents of 8x8 pixels"),
        (["WAN", "--config.data.clips.height=488"], "latent frames of 61x104 are not tiled by patches"),
        (["TINY", "--unknown=3"], "--unknown=3: unknown argument"),
        (["TINY", "unknown"], "unknown: unknown argument"),
        (["STUDY:nowhere"], "small_world.py:nowhere: ValueError: unknown arm 'nowhere'"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    files = {"TINY": "tiny.py", "WAN": "wan_1_3b.py", "STUDY:nowhere": "small_world.py:nowhere"}
    arguments = [f"--config={CONFIGS / files[a]}" if a in files else a for a in arguments]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_config(arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["pretrain.steps=1201"], "config.pretrain.optimizer.decay_steps 1200 ends before the 1201 updates of stage"),
        (["initialize.steps=400"], "set initialize.optimizer.decay_steps to 400, or to 0 for no decay"),
        (["distill.critic.decay_steps=99"], "config.distill.critic.decay_steps 99 ends before the 100 updates"),
        (["distill.student.decay_steps=49"], "config.distill.student.decay_steps 49 ends before the 50 updates"),
        (["distill.student.decay_steps=50", "distill.critic.decay_steps=100"], ""),
        (["initialize.steps=400", "stages=('pretrain',)"], ""),
    ],
)
def test_a_rate_that_is_zero_before_the_stage_ends_is_refused(fields, message):
    """By the train command: what was made so can still be loaded. The student is updated every second iteration."""
    config = parse_config([f"--config={CONFIGS / 'tiny.py'}", *(f"--config.{field}" for field in fields)])
    if not message:
        require_whole_decay(config)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        require_whole_decay(config)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match=r"broken\.py: not a configuration file \(invalid syntax"):
        parse_config([f"--config={tmp_path / 'broken.py'}"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is not JSON"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"sed": 3}')
    with pytest.raises(UserError, match="sed: unknown field; did you mean seed"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.batch_size=0", "config.distill: batch_size must be positive, got 0"),
        ("pretrain.steps=-3", "config.pretrain: steps must be positive"),
        ("pretrain.optimizer.learning_rate=-1", "config.pretrain.optimizer: learning_rate must be positive"),
        ("distill.ema_decay=7", "config.distill: ema_decay must lie in"),
        ("distill.horizon_alpha=nan", "config.distill.horizon_alpha: must be a finite number"),
        ("initialize.trajectories=0", "config.initialize: trajectories must be positive"),
        ("initialize.ode_steps=7", "ode_steps 7 must be a multiple of the 4 denoising steps"),
        (
            "initialize.optimizer.warmup_steps=300",
            "config.initialize.optimizer: decay_steps 300 must be more than warmup_steps 300",
        ),
        ("stream.timesteps=(1000.0, 757.0, 522.0, 250.0)", "leave stream.timesteps empty"),
        ("text.vocab_size=10", "text.vocab_size 10 is too small"),
        ("mesh.data=0", "config.mesh: data must be positive"),
        (
            "mesh.model=3",
            "config: model.num_heads 4 must be a multiple of mesh.model = 3: choose 3 or 6, or mesh.model = 2 or 4",
        ),
        ("mesh.context=5", "config: model.dim 128 must be a multiple of mesh.fsdp * mesh.context = 5: choose 125 or"),
        ("stages=('distill','pretrain')", "in this order"),
        ("stream.anchor.name=rolling", "distillation rolls out chunk by chunk"),
        ("model.dimm=3", "--config.model.dimm: unknown field; did you mean dim?"),
        ("model.dim.size=3", "--config.model.dim.size: config.model.dim is no group of fields"),
        ("model.dim=wide", "--config.model.dim=wide: invalid literal"),
    ],
)
def test_nonsense_is_refused_by_name(override, message):
    with pytest.raises(UserError) as error:
        parse_config([f"--config={CONFIGS / 'tiny.py'}", f"--config.{override}"])
    assert message in str(error.value)
