"""The study of what anchors do, in a small world that moves and that needs memory; see docs/reproduction.md.

python -m adastate_jax.train --config=configs/small_world.py:teacher --workdir=runs/small_world/teacher
python -m adastate_jax.train --config=configs/small_world.py:ARM --config.seed=0 --workdir=runs/small_world/ARM-0

The first trains the teacher and the student that the arms start from, which anchors on the first frame; the second
distils one arm. `unanchored` is a student that is initialised without an anchor, with a window of a whole training
video. `recurrent` is one that is initialised with the hidden state, through its recurrence. Some arms start from these.

A camera pans over clay and past balls of one colour, one every sixteen frames and out of sight for eleven, while the
landscape's hue turns. The caption says which way it pans and which way the hue turns, but not the colour of the balls.
"""

import ml_collections

from adastate_jax.config import default_config

# Each arm changes what it names in the arm `adaptive`: AdaState's stream and loss.
ARMS = {
    "adaptive": {},
    "none": {"stream.anchor.name": "none"},
    "static": {"stream.anchor.name": "static"},
    "ema": {"stream.anchor.name": "ema", "stream.anchor.frames": 3},
    "memory": {"stream.anchor.name": "memory", "stream.anchor.sink_frames": 1},
    "ping_pong": {"stream.anchor.name": "ping_pong", "stream.anchor.frames": 3},
    "state_3": {"stream.anchor.frames": 3},
    "window_9": {"stream.past_frames": 6},
    "alpha_0": {"distill.horizon_alpha": 0.0},
    "alpha_4": {"distill.horizon_alpha": 4.0},
    "normalized": {"distill.horizon_normalize": True},
    "straight_through": {"distill.cache_gradient": "straight_through"},
}
# Beside the study's one factor at a time: three times the training, a start that knows the state, and one that knows no
# anchor, distilled with its window of a whole training video (as Self-Forcing is), with a static anchor, or a state.
FURTHER = {
    "longer": {"distill.steps": 1350},
    "longer_straight_through": {"distill.steps": 1350, "distill.cache_gradient": "straight_through"},
    "recurrent_start": {"start_from": "runs/small_world/recurrent"},
    "recurrent_straight_through": {
        "start_from": "runs/small_world/recurrent",
        "distill.cache_gradient": "straight_through",
    },
    "unanchored_none": {
        "start_from": "runs/small_world/unanchored",
        "stream.anchor.name": "none",
        "stream.past_frames": 18,
    },
    "unanchored_static": {"start_from": "runs/small_world/unanchored", "stream.anchor.name": "static"},
    "unanchored_adaptive": {"start_from": "runs/small_world/unanchored"},
}


def get_config(arm: str = "adaptive") -> ml_collections.ConfigDict:
    config = default_config()

    config.data.kind = "worlds"
    config.data.num_worlds = 8192
    config.data.worlds.height = config.data.worlds.width = 16
    config.data.worlds.num_frames = 21
    config.data.worlds.motions = ("pan left", "pan right")
    config.data.worlds.palettes = ("clay",)
    config.data.worlds.shapes = ("ball",)
    config.data.worlds.colours = ("yellow", "cyan", "magenta")  # alike in brightness, and their mean is none of them
    config.data.worlds.name_colour = False
    config.data.worlds.speed = (3.0, 3.0)  # 3 pixels a frame
    config.data.worlds.subject_spacing = 3.1
    config.data.worlds.subject_scatter = 0.0
    config.data.worlds.subject_radius = (0.2, 0.2)
    config.data.worlds.hue_turn = (1.0, 1.0)  # more than once around in a training video: no hue is new later on
    config.data.worlds.hue_start = 0.2  # from any hue on, noise hides either sense alike: no teacher learned it

    # A frame is one latent, hence one token.
    config.codec.patch = 16
    config.codec.channels = 48

    config.text.vocab_size = 259  # bytes
    config.text.dim = config.text.dim_attention = 64
    config.text.ffn_dim = 128
    config.text.num_heads = 4
    config.text.num_layers = 2
    config.text.text_length = 80

    config.model.dim = 128
    config.model.ffn_dim = 384
    config.model.num_heads = 4
    config.model.num_layers = 4
    config.model.in_channels = config.model.out_channels = 48
    config.model.patch_size = (1, 1, 1)
    config.model.text_dim = 64
    config.model.text_length = 80
    config.model.freq_dim = 64
    config.model.prediction = "clean"
    config.model.remat = "none"

    config.pretrain.steps = 4000
    config.pretrain.batch_size = 32
    config.pretrain.optimizer.learning_rate = 2e-3
    config.pretrain.optimizer.warmup_steps = 200
    config.pretrain.optimizer.decay_steps = 5000
    config.pretrain.ema_decay = 0.998
    config.pretrain.shift = 5.0
    config.pretrain.weighting = "clean"

    config.initialize.steps = 1500
    config.initialize.batch_size = 32
    config.initialize.optimizer.learning_rate = 1e-3
    config.initialize.optimizer.warmup_steps = 100
    config.initialize.optimizer.decay_steps = 1500
    config.initialize.trajectories = 4096
    config.initialize.ode_steps = 24
    config.initialize.guidance_scale = 0.0
    config.initialize.context = "stream"

    config.distill.steps = 450
    config.distill.batch_size = 16
    config.distill.rollout_frames = 21
    config.distill.guidance_scale = 0.0
    config.distill.critic_ratio = 3
    config.distill.student.learning_rate = 2e-4
    config.distill.critic.learning_rate = 1e-3  # a critic that lags lets the student drop colours
    config.distill.ema_decay = 0.98
    config.distill.ema_start = 50

    config.sample.anchors = ("none", "static")
    config.sample.count = 8
    config.logging.log_every = 50
    config.logging.save_every = 1000
    config.logging.keep = 1

    if arm == "teacher":
        config.stream.anchor = {"name": "static"}  # the paper starts from a student that anchors on the first frame too
        config.stages = ("pretrain", "initialize", "sample")
    elif arm == "unanchored":
        config.stream.anchor = {"name": "none"}
        config.stream.past_frames = 18  # all of a training video
        config.initialize.context = "clean"
        config.stages = ("initialize",)
        config.start_from = "runs/small_world/teacher"
    elif arm == "recurrent":
        config.initialize.context = "state"
        config.initialize.batch_size = 8  # each chunk at four levels: as many losses as of 32 clips at one
        config.stages = ("initialize",)
        config.start_from = "runs/small_world/teacher"
    elif arm in ARMS or arm in FURTHER:
        config.stages = ("distill",)
        config.start_from = "runs/small_world/teacher"
        _set_fields(config, (ARMS | FURTHER)[arm])
    else:
        known = ", ".join(["teacher", "unanchored", "recurrent", *ARMS, *FURTHER])
        raise ValueError(f"unknown arm {arm!r}; choose one of {known}")
    return config


def _set_fields(config, fields):
    if "stream.anchor.name" in fields:
        config.stream.anchor = {}  # another strategy has other settings
    for path, value in fields.items():
        group = config
        *names, last = path.split(".")
        for name in names:
            group = group[name]
        group[last] = value
