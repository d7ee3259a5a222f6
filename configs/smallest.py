"""Each way to train at sizes at which it runs in a minute on a processor: all of its code, and nothing that is learned.

python -m adastate_jax.train --config=configs/smallest.py:tiny --workdir=runs/smallest/tiny
python -m adastate_jax.train --config=configs/smallest.py:own_videos --workdir=runs/smallest/own_videos
python -m adastate_jax.train --config=configs/smallest.py:causal_consistency --workdir=runs/smallest/consistency
python -m adastate_jax.train --config=configs/smallest.py:lora --workdir=runs/smallest/lora
python -m adastate_jax.train --config=configs/smallest.py:windows --workdir=runs/smallest/windows
python -m adastate_jax.train --config=configs/smallest.py:segments --workdir=runs/smallest/segments
python -m adastate_jax.train --config=configs/smallest.py:state_gradient --workdir=runs/smallest/state_gradient

`causal_consistency` goes on from `own_videos`, the last four go on from `tiny`. For what learns something take the
configurations that these are made of.
"""

import pathlib
import runpy

# Of which file, with which argument.
WAYS = {
    "tiny": ("tiny",),
    "own_videos": ("own_videos", "worlds"),
    "causal_consistency": ("causal_consistency", "worlds"),
    "lora": ("lora",),
    "windows": ("long_rollouts", "windows"),
    "segments": ("long_rollouts", "segments"),
    "state_gradient": ("tiny",),
}


def get_config(way: str = "tiny"):
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}; it is one of {', '.join(WAYS)}")
    name, *argument = WAYS[way]
    config = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))["get_config"](*argument)
    config.data.num_worlds = 8
    config.data.worlds.num_frames = config.data.clips.num_frames = 6
    config.codec.channels = config.model.in_channels = config.model.out_channels = 8
    config.model.dim = 16
    config.model.ffn_dim = 24
    config.model.num_heads = 1
    config.model.num_layers = 1
    config.stream.denoising_steps = (1000.0, 500.0)
    config.pretrain.steps = config.initialize.steps = config.distill.steps = 2
    for optimizer in (config.pretrain.optimizer, config.initialize.optimizer):
        optimizer.warmup_steps = optimizer.decay_steps = 0
    config.pretrain.batch_size = config.initialize.batch_size = 4
    config.initialize.trajectories = 4
    config.initialize.ode_steps = 4
    config.distill.batch_size = 2
    config.distill.rollout_frames = 3
    config.distill.critic_ratio = 1
    config.sample.horizon = config.sample.count = 1
    config.logging.log_every = config.logging.save_every = 1

    if way == "causal_consistency":
        config.start_from = "runs/smallest/own_videos"
        config.teacher.weights = "runs/smallest/own_videos/initialize"
    if way in ("lora", "windows", "segments", "state_gradient"):
        config.start_from = "runs/smallest/tiny"
        config.stages = ("distill", "sample")
    if way == "lora":
        config.student.lora.rank = config.critic.lora.rank = 2
    if way in ("windows", "segments"):
        config.student.weights = "runs/smallest/tiny/distill"
        config.distill.rollout_frames = 9
        config.distill.scored_frames = 6
    if way == "state_gradient":
        config.distill.rollout_frames = 6
        config.distill.cache_gradient = "state"
        config.distill.cache_gradient_chunks = 2
    return config
