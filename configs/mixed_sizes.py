"""A teacher of other width, depth and heads than critic and student, from official files to sample videos.

python -m benchmarks.mixed_sizes --folder=runs/mixed_sizes

writes the files (random weights under official names, small videos and prompts) and runs what a lab would run with the
published ones: `convert` five times, `encode`, `embed` twice, and last

python -m adastate_jax.train --config=configs/mixed_sizes.py:runs/mixed_sizes --workdir=runs/mixed_sizes/run

Nothing is learned of random weights: the videos show noise. `configs/adastate_wan.py` is the same recipe at size.
"""

from adastate_jax.config import default_config


def get_config(folder: str = "runs/mixed_sizes"):
    config = default_config()

    config.data.kind = "latents"
    config.data.clips.height, config.data.clips.width, config.data.clips.num_frames = 32, 48, 21  # 6 latent frames
    config.data.latents = f"{folder}/clips"
    config.data.captions = f"{folder}/captions"
    config.data.embeddings = f"{folder}/prompts"
    config.data.encoders = f"{folder}/weights"

    config.text.vocab_size = 64
    config.text.dim = config.text.dim_attention = 32
    config.text.ffn_dim = 64
    config.text.num_heads = 2
    config.text.num_layers = 2
    config.text.text_length = 24

    config.decoder = "wan"
    config.vae.dim = 4
    config.vae.dim_multipliers = (1, 1, 1)
    config.vae.num_res_blocks = 1
    config.vae.temporal_downsample = (True, True)

    # Critic and student; heads of 16 where Wan2.1's are of 128
    config.model.dim = 64
    config.model.ffn_dim = 128
    config.model.num_heads = 4
    config.model.num_layers = 2
    config.model.text_dim = 32
    config.model.text_length = 24
    config.model.freq_dim = 32
    config.critic.weights = f"{folder}/weights/critic"
    config.initialize.weights = f"{folder}/weights/student"

    # The teacher, wider and deeper, frozen in bfloat16
    config.teacher.weights = f"{folder}/weights/teacher"
    config.teacher.dim = 96
    config.teacher.ffn_dim = 256
    config.teacher.num_heads = 6
    config.teacher.num_layers = 3
    config.teacher.param_dtype = config.teacher.dtype = "bfloat16"

    config.stages = ("initialize", "distill", "sample")
    config.initialize.steps = 10
    config.initialize.batch_size = 4
    config.initialize.trajectories = 8
    config.initialize.ode_steps = 8
    config.distill.steps = 10
    config.distill.batch_size = 2
    config.distill.rollout_frames = 6

    config.sample.anchors = ("adaptive", "none")
    config.sample.horizon = 3
    config.sample.count = 1
    config.logging.log_every = 5
    return config
