"""Two steps a chunk instead of eight: causal consistency with the model of configs/own_videos.py as its teacher.

python -m adastate_jax.train --config=configs/own_videos.py:worlds --workdir=runs/own
python -m adastate_jax.train --config=configs/causal_consistency.py:worlds --workdir=runs/consistency

On your own videos `:worlds` goes, and --config.data.folder=DIR comes to both. No trajectories are drawn;
`configs/causal_forcing_wan.py` is the published recipe at its size.
"""

import pathlib
import runpy

OWN = pathlib.Path(__file__).with_name("own_videos.py")


def get_config(kind: str = "videos"):
    config = runpy.run_path(str(OWN))["get_config"](kind)
    config.start_from = "runs/own"  # its clips and its codec
    config.teacher.weights = "runs/own/initialize"
    config.initialize.weights = ""  # a copy of the teacher
    config.initialize.targets = "consistency"
    config.initialize.ode_steps = 16
    config.initialize.guidance_scale = 0.0
    config.initialize.steps = config.initialize.optimizer.decay_steps = 200
    config.initialize.optimizer.learning_rate = 3e-4
    config.initialize.optimizer.warmup_steps = 0
    config.initialize.ema_decay = 0.95
    config.initialize.ema_start = 20

    config.stream.denoising_steps = (1000.0, 500.0)
    return config
