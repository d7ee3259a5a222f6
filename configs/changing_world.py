"""The second study: a world whose reference goes stale; see docs/reproduction.md.

python -m studies.changing_world train --folder=runs/changing_world    # or, one run of it:
python -m adastate_jax.train --config=configs/changing_world.py:teacher --workdir=runs/changing_world/teacher
python -m adastate_jax.train --config=configs/changing_world.py:anchored --workdir=runs/changing_world/anchored
python -m adastate_jax.train --config=configs/changing_world.py:anchored/static --workdir=runs/changing_world/X

A camera pans to the left or right over clay, or darker loam, peat or basalt, past balls, one every sixteen frames and
out of sight for eleven, while the landscape's hue turns. In half of the videos the balls' colour is replaced while one
is in view, at the first one and then at every one with even odds; what comes back has the colour that was seen last. No
caption tells the colour or that it changes. Of the sixteen captions four are in no training video.

`teacher` is pretrained; a start (`STARTS`) is a student that is initialised on the teacher's trajectories; all else is
an arm, distilled: `START/ANCHOR` and what else differs (`FACTORS`), as in `recurrent/adaptive/state_2/rollout_4`.
"""

import ml_collections

from adastate_jax.config import default_config

# One of each landscape, each way twice, each sense twice: every word of theirs is known from other captions.
WITHHELD = (
    "a camera pans left over clay with a ball while the colours turn forwards",
    "a camera pans right over loam with a ball while the colours turn backwards",
    "a camera pans right over peat with a ball while the colours turn forwards",
    "a camera pans left over basalt with a ball while the colours turn backwards",
)

# How students are initialised: against a static anchor's stream; without an anchor, with a window of all of a training
# video; and with the hidden state, through its recurrence. `tenth`: in a tenth of the steps, from the teacher, or (the
# last) from the student that is anchored.
STARTS = {
    "anchored": {"stream.anchor.name": "static"},
    "unanchored": {"stream.anchor.name": "none", "stream.past_frames": 18, "initialize.context": "clean"},
    "recurrent": {"initialize.context": "state", "initialize.batch_size": 8},  # four levels: as many losses as of 32
    "recurrent_tenth": {
        "initialize.context": "state",
        "initialize.batch_size": 8,
        "initialize.steps": 150,
        "initialize.trajectories": 1024,
        "initialize.optimizer.warmup_steps": 10,
        "initialize.optimizer.decay_steps": 150,
    },
}
STARTS["anchored_tenth"] = {
    **STARTS["recurrent_tenth"],
    "initialize.weights": "runs/changing_world/anchored/initialize",
    "initialize.optimizer.learning_rate": 3e-4,
}

ANCHORS = {
    "none": {"stream.anchor.name": "none"},
    "none_long": {"stream.anchor.name": "none", "stream.past_frames": 18},
    "static": {"stream.anchor.name": "static"},
    "ema": {"stream.anchor.name": "ema", "stream.anchor.frames": 3},
    "memory": {"stream.anchor.name": "memory", "stream.anchor.sink_frames": 1},
    "ping_pong": {"stream.anchor.name": "ping_pong", "stream.anchor.frames": 3},
    "adaptive": {},
}

CRITIC_RATIO = 3  # critic updates, so iterations, for each of the student
FACTORS = {
    "window": {"distill.cache_gradient": "window"},
    "straight_through": {"distill.cache_gradient": "straight_through"},
    **{
        f"state_{chunks}": {"distill.cache_gradient": "state", "distill.cache_gradient_chunks": chunks}
        for chunks in (1, 2, 4)
    },
    **{f"rollout_{n}": {"distill.rollout_frames": 21 * n, "distill.scored_frames": 21} for n in (2, 4)},
    # Windows that begin two periods from ball to ball apart, where the scene is as when a training video begins.
    "aligned_4": {"distill.rollout_frames": 87, "distill.scored_frames": 21, "distill.scored_every": 33},
    **{f"updates_{n}": {"distill.steps": CRITIC_RATIO * n} for n in (1000, 3000)},
}


def get_config(arm: str = "teacher") -> ml_collections.ConfigDict:
    config = default_config()

    config.data.kind = "worlds"
    config.data.num_worlds = 8192
    config.data.worlds.height = config.data.worlds.width = 16
    config.data.worlds.num_frames = 21
    config.data.worlds.motions = ("pan left", "pan right")
    config.data.worlds.palettes = ("clay", "loam", "peat", "basalt")
    config.data.worlds.shapes = ("ball",)
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

    config.distill.steps = 200 * CRITIC_RATIO
    config.distill.batch_size = 16
    config.distill.rollout_frames = 21
    config.distill.guidance_scale = 0.0
    config.distill.critic_ratio = CRITIC_RATIO
    config.distill.student.learning_rate = 2e-4
    config.distill.critic.learning_rate = 1e-3  # a critic that lags lets the student drop colours
    config.distill.ema_decay = 0.98
    config.distill.ema_start = 50

    config.logging.log_every = 50
    config.logging.save_every = 500
    config.logging.keep = 1

    start, *rest = arm.split("/")
    if arm == "teacher":
        config.stages = ("pretrain",)
    elif start in STARTS and not rest:
        config.stages = ("initialize",)
        config.start_from = "runs/changing_world/teacher"
        _set_fields(config, STARTS[start])
    elif start in STARTS and rest[0] in ANCHORS and set(rest[1:]) <= set(FACTORS):
        config.stages = ("distill",)
        config.start_from = f"runs/changing_world/{start}"
        for fields in (ANCHORS[rest[0]], *(FACTORS[name] for name in rest[1:])):
            _set_fields(config, fields)
    else:
        raise ValueError(
            f"unknown arm {arm!r}; teacher, or one of {', '.join(STARTS)}; distilled, /ANCHOR behind it, one of "
            f"{', '.join(ANCHORS)}; and any of {', '.join(f'/{name}' for name in FACTORS)}"
        )
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
