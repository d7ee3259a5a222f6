"""All stages on a folder of real video files: clips of 15 frames at 16 fps that cross no cut, 32×32 pixels.

python -m adastate_jax.train --config=configs/clips.py --workdir=runs/clips --config.data.folder=DIR

Captions are read from NAME.txt beside each file, or from a captions.json in the folder; without them clips have none.
"""

import pathlib
import runpy

TINY = pathlib.Path(__file__).with_name("tiny.py")


def get_config():
    config = runpy.run_path(str(TINY))["get_config"]()
    config.data.kind = "videos"
    config.data.clips.height = config.data.clips.width = 32
    config.data.clips.num_frames = 15
    config.data.clips.stride = 3
    config.pretrain.steps = config.pretrain.optimizer.decay_steps = 400
    config.initialize.steps = 150
    config.initialize.trajectories = 64
    config.distill.steps = 60
    return config
