"""As configs/own_videos.py, on videos that were encoded with Wan2.1's autoencoder, and captions with its text encoder.

With `weights` as the README makes it, and a folder `videos` with captions:

python -m adastate_jax.encode --checkpoint=weights --videos=videos --output=data/clips
python -m adastate_jax.embed --checkpoint=weights --prompts=data/clips/captions.jsonl --output=data/captions
python -m adastate_jax.train --config=configs/own_latents.py --workdir=runs/own_latents

From published weights instead of none, and as adapters: --config.initialize.weights=weights/transformer, the sizes of
configs/wan_1_3b.py, and --config.student.lora.rank=64.
"""

import pathlib
import runpy

LATENTS = pathlib.Path(__file__).with_name("latents.py")


def get_config():
    config = runpy.run_path(str(LATENTS))["get_config"]()
    config.data.embeddings = ""  # the captions are all that is read
    config.stages = ("initialize", "sample")
    config.initialize.targets = "clips"
    config.initialize.weights = "random"
    config.initialize.context = "stream"
    config.initialize.steps = config.initialize.optimizer.decay_steps = 10000
    config.initialize.batch_size = 64
    config.initialize.optimizer.learning_rate = 1e-4
    config.initialize.optimizer.warmup_steps = 500
    config.initialize.ema_decay = 0.999
    config.initialize.weighting = "bell"

    config.stream.anchor = {"name": "static", "frames": 1}
    config.stream.denoising_steps = (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)
    config.sample.anchors = ("static",)
    return config
