"""The whole system in minutes on a laptop: a small procedural world, all stages, videos at the end.

python -m adastate_jax.train --config=configs/tiny.py --workdir=runs/tiny
"""

from adastate_jax.config import default_config


def get_config():
    config = default_config()

    config.data.kind = "worlds"
    config.data.num_worlds = 256  # few enough to be learned by heart: with 1024 the direction is not learned in minutes
    config.data.worlds.height = config.data.worlds.width = 32
    config.data.worlds.num_frames = 15
    # Two directions, one speed, one shape and a few colours: what can be learned in minutes.
    config.data.worlds.motions = ("pan left", "pan right")
    config.data.worlds.speed = (1.0, 1.0)
    config.data.worlds.palettes = ("meadow", "desert")
    config.data.worlds.shapes = ("ball",)
    config.data.worlds.colours = ("red", "white")

    # A frame is one latent, hence one token: a blurred world, but one whose motion is learned in minutes.
    config.codec.patch = 32
    config.codec.channels = 48

    config.text.vocab_size = 259  # bytes
    config.text.dim = config.text.dim_attention = 64
    config.text.ffn_dim = 128
    config.text.num_heads = 4
    config.text.num_layers = 2
    config.text.text_length = 56

    config.model.dim = 128
    config.model.ffn_dim = 384
    config.model.num_heads = 4
    config.model.num_layers = 3
    config.model.in_channels = config.model.out_channels = 48
    config.model.patch_size = (1, 1, 1)
    config.model.text_dim = 64
    config.model.text_length = 56
    config.model.freq_dim = 64
    config.model.prediction = "clean"
    config.model.remat = "none"

    config.pretrain.steps = 1200
    config.pretrain.batch_size = 32
    config.pretrain.optimizer.learning_rate = 3e-3
    config.pretrain.optimizer.warmup_steps = 50
    config.pretrain.optimizer.decay_steps = 1200
    config.pretrain.ema_decay = 0.99
    config.pretrain.shift = 3.0
    config.pretrain.weighting = "clean"

    config.initialize.steps = 300
    config.initialize.batch_size = 16
    config.initialize.optimizer.learning_rate = 1e-3
    config.initialize.optimizer.decay_steps = 300
    config.initialize.trajectories = 512
    config.initialize.ode_steps = 16
    config.initialize.guidance_scale = 1.0
    config.initialize.context = "clean"

    config.distill.steps = 100
    config.distill.batch_size = 8
    config.distill.rollout_frames = 15
    config.distill.guidance_scale = 1.0
    config.distill.critic_ratio = 2
    config.distill.student.learning_rate = 1e-4
    config.distill.critic.learning_rate = 2e-4
    config.distill.ema_decay = 0.95
    config.distill.ema_start = 20

    config.sample.count = 3

    config.logging.log_every = 20
    config.logging.save_every = 250
    return config
