"""The second study: a world whose reference goes stale; see docs/reproduction.md.

python -m adastate_jax.train --config=configs/changing_world.py:teacher --workdir=runs/changing_world/teacher
python -m adastate_jax.train --config=configs/changing_world.py:ARM --config.seed=0 --workdir=runs/changing_world/ARM-0

A camera pans over clay in one of four directions, past balls or boxes, one every sixteen frames and out of sight for
eleven, while the landscape's hue turns. In half of the videos the subjects' colour is replaced while one is in view, at
the first one and then at every one with even odds; what comes back has the colour that was seen last. No caption tells
the colour or that it changes. Of the sixteen captions four are in no training video.
"""

import ml_collections

from adastate_jax.config import default_config

# One of each way, each sense twice, each shape twice: every word of theirs is known from other captions.
WITHHELD = (
    "a camera pans left over clay with a ball while the colours turn forwards",
    "a camera pans right over clay with a box while the colours turn backwards",
    "a camera pans up over clay with a ball while the colours turn backwards",
    "a camera pans down over clay with a box while the colours turn forwards",
)


def get_config(arm: str = "adaptive") -> ml_collections.ConfigDict:
    config = default_config()

    config.data.kind = "worlds"
    config.data.num_worlds = 8192
    config.data.worlds.height = config.data.worlds.width = 16
    config.data.worlds.num_frames = 21
    config.data.worlds.motions = ("pan left", "pan right", "pan up", "pan down")
    config.data.worlds.palettes = ("clay",)
    config.data.worlds.shapes = ("ball", "box")
    config.data.worlds.colours = ("yellow", "cyan", "magenta")  # alike in brightness, and their mean is none of them
    config.data.worlds.name_colour = False
    config.data.worlds.speed = (3.0, 3.0)  # 3 pixels a frame
    config.data.worlds.subject_spacing = 3.1
    config.data.worlds.subject_scatter = 0.0
    config.data.worlds.subject_radius = (0.2, 0.2)
    config.data.worlds.hue_turn = (1.0, 1.0)  # more than once around in a training video: no hue is new later on
    config.data.worlds.hue_start = 0.2  # from any hue on, noise hides either sense alike: no teacher learned it

    config.data.worlds.colour_change = 0.5
    config.data.worlds.withheld = WITHHELD

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

    config.pretrain.steps = 6000
    config.pretrain.batch_size = 32
    config.pretrain.optimizer.learning_rate = 2e-3
    config.pretrain.optimizer.warmup_steps = 200
    config.pretrain.optimizer.decay_steps = 7000
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
    return config
