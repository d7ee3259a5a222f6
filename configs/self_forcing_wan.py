"""Self-Forcing's own recipe at its size: a 14B teacher, a 1.3B critic and student, no anchor, no horizon weights.

python -m adastate_jax.train --config=configs/self_forcing_wan.py --workdir=runs/self_forcing --config.mesh.fsdp=64

The files are those of configs/adastate_wan.py, but for the student: it starts from what configs/wan_initialize.py
leaves in runs/wan_initialize. From the published checkpoints/ode_init.pt instead:

python -m adastate_jax.convert --source=ode_init.pt --output=weights/ode_init

and --config.student.weights=weights/ode_init. Sources: [paper] arXiv 2506.08009, [sf] guandeh17/Self-Forcing.
"""

import pathlib
import runpy

ADASTATE = pathlib.Path(__file__).with_name("adastate_wan.py")


def get_config():
    config = runpy.run_path(str(ADASTATE))["get_config"]()  # what is not here is Self-Forcing's there, too

    # [sf] inference and training see all 21 frames and have no anchor: local_attn_size -1, sink_size 0
    config.stream.anchor = {"name": "none"}
    config.stream.past_frames = 18

    config.student.weights = "runs/wan_initialize/initialize"  # [sf] generator_ckpt: checkpoints/ode_init.pt
    config.distill.steps = 600  # [paper] iterations
    config.distill.batch_size = 64  # [sf] configs/self_forcing_dmd.yaml total_batch_size
    config.distill.horizon_alpha = 0.0  # [sf] model/dmd.py: every frame counts alike
    # [sf] pipeline/self_forcing_training.py: a chunk's last noisy pass stays in the cache's autograd graph; the paper's
    # section 3.2 has no such gradient, which is `stop`
    config.distill.cache_gradient = "straight_through"

    config.sample.anchors = ("none",)
    return config
