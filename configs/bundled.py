"""The model that ships with the package as `tiny`: 48×48 pixels, an hour and a half on two processor cores.

python -m adastate_jax.train --config=configs/bundled.py --workdir=runs/bundled
python -m adastate_jax.bundle --run=runs/bundled --output=adastate_jax/bundled/tiny.safetensors

Its student is initialised through the recurrence of its hidden state, which taught a state to hold what it should in
the study of docs/reproduction.md.
"""

from adastate_jax.config import default_config


def get_config():
    config = default_config()

    config.data.kind = "worlds"
    config.data.num_worlds = 4096
    config.data.worlds.height = config.data.worlds.width = 48
    config.data.worlds.num_frames = 21
    config.data.worlds.motions = ("pan left", "pan right")
    config.data.worlds.speed = (1.5, 1.5)  # 4.5 pixels a frame
    config.data.worlds.palettes = ("meadow", "desert", "dusk")
    config.data.worlds.finest = 9.0  # a landscape as smooth as one of 16 pixels
    config.data.worlds.shapes = ("ball",)
    config.data.worlds.colours = ("red", "white")
    config.data.worlds.subject_spacing = 2.0
    config.data.worlds.subject_scatter = 0.0
    config.data.worlds.subject_radius = (0.2, 0.2)

    # A frame is one latent, hence one token: what takes four does not learn in hours that they belong together.
    config.codec.patch = 48
    config.codec.channels = 96

    config.text.vocab_size = 259  # bytes
    config.text.dim = config.text.dim_attention = 64
    config.text.ffn_dim = 128
    config.text.num_heads = 4
    config.text.num_layers = 2
    config.text.text_length = 64

    config.model.dim = 192
    config.model.ffn_dim = 576
    config.model.num_heads = 6
    config.model.num_layers = 4
    config.model.in_channels = config.model.out_channels = 96
    config.model.patch_size = (1, 1, 1)
    config.model.text_dim = 64
    config.model.text_length = 64
    config.model.freq_dim = 64
    config.model.prediction = "clean"
    config.model.remat = "none"

    config.pretrain.steps = 10000
    config.pretrain.batch_size = 32
    config.pretrain.optimizer.learning_rate = 1.5e-3
    config.pretrain.optimizer.warmup_steps = 200
    config.pretrain.optimizer.decay_steps = 10000
    config.pretrain.ema_decay = 0.998
    config.pretrain.shift = 5.0
    config.pretrain.weighting = "clean"

    config.initialize.steps = 1500
    config.initialize.batch_size = 8
    config.initialize.optimizer.learning_rate = 5e-4
    config.initialize.optimizer.decay_steps = 1500
    config.initialize.trajectories = 1024
    config.initialize.ode_steps = 16
    config.initialize.guidance_scale = 1.0
    config.initialize.context = "state"

    config.distill.steps = 600
    config.distill.batch_size = 8
    config.distill.rollout_frames = 21
    config.distill.guidance_scale = 1.0
    config.distill.critic_ratio = 2
    config.distill.student.learning_rate = 5e-5
    config.distill.critic.learning_rate = 1e-4
    config.distill.ema_decay = 0.98
    config.distill.ema_start = 60

    config.sample.anchors = ("static", "adaptive")
    config.sample.horizon = 8
    config.sample.prompts = (
        "a camera pans left over green hills with a red ball",
        "a camera pans right over green hills with a white ball",
        "a camera pans left over sand dunes with a white ball",
        "a camera pans right over purple mountains with a red ball",
    )

    config.logging.log_every = 50
    config.logging.save_every = 100
    return config
