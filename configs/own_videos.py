"""A streaming model of your own videos, without a teacher: every chunk learns to follow the clean ones before it.

python -m adastate_jax.train --config=configs/own_videos.py --workdir=runs/own --config.data.folder=DIR
python -m adastate_jax.sample --checkpoint=runs/own --prompt="a caption of yours" --seconds=10 --output=own.mp4

Without videos at hand, `--config=configs/own_videos.py:worlds` takes procedural ones. Captions are read from NAME.txt
beside each file. Clips are of 15 frames at 16 fps, 32×32 pixels; `configs/own_latents.py` is the same on Wan latents.
"""

import pathlib
import runpy

TINY = pathlib.Path(__file__).with_name("tiny.py")


def get_config(kind: str = "videos"):
    config = runpy.run_path(str(TINY))["get_config"]()
    config.data.kind = kind
    config.data.clips.height = config.data.clips.width = 32
    config.data.clips.num_frames = 15
    config.data.clips.stride = 3

    config.stages = ("initialize", "sample")
    config.initialize.targets = "clips"
    config.initialize.weights = "random"
    config.initialize.context = "clean"  # for a stream with an anchor `stream`, with a hidden state `state`: slower
    config.initialize.steps = config.initialize.optimizer.decay_steps = 400
    config.initialize.batch_size = 16
    config.initialize.optimizer.learning_rate = 3e-3
    config.initialize.optimizer.warmup_steps = 50
    config.initialize.ema_decay = 0.99
    config.initialize.shift = 3.0
    config.initialize.weighting = "clean"

    config.stream.anchor = {"name": "none"}
    config.stream.past_frames = 6
    # What was trained at all levels, and not for a few steps, wants more of them.
    config.stream.denoising_steps = (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)
    config.stream.shift = 3.0

    config.sample.anchors = ("none",)
    return config
