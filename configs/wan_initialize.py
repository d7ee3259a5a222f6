"""Self-Forcing's initialisation at its size: Wan2.1-T2V-1.3B made causal by regression on its own ODE trajectories.

python -m adastate_jax.train --config=configs/wan_initialize.py --workdir=runs/wan_initialize --config.mesh.fsdp=64

configs/self_forcing_wan.py goes on from there. The trajectories take 671 GB of disk (5 states of 21 frames in float32,
42 MB each), in the work directory. The files are those of configs/adastate_wan.py without teacher and
student: weights/critic of 1.3B draws the trajectories and is what the student starts from; and data/prompts.

Sources: [paper] arXiv 2506.08009, [sf] guandeh17/Self-Forcing, [causvid] tianweiy/CausVid, from which it has the stage.
"""

import pathlib
import runpy

ADASTATE = pathlib.Path(__file__).with_name("adastate_wan.py")


def get_config():
    config = runpy.run_path(str(ADASTATE))["get_config"]()
    config.stages = ("initialize",)
    config.stream.anchor = {"name": "none"}
    config.stream.past_frames = 18

    # [paper] trajectories of the base model of 1.3B; the student is a copy of it
    config.teacher.weights = "weights/critic"
    for size in ("dim", "ffn_dim", "num_heads", "num_layers"):
        config.teacher[size] = 0  # as the model
    config.critic.weights = config.student.weights = ""
    config.initialize.trajectories = 16000  # [paper] 16k pairs
    config.initialize.ode_steps = 48  # [sf] 48 Euler steps
    # Conventional guidance 6, [sf]. Theirs are drawn at shift 8, whose levels are not those that the student is used
    # at; here trajectories go through the student's own levels, at its shift of 5.
    config.initialize.guidance_scale = 5.0
    config.initialize.context = "noisy"  # [sf] model/ode_regression.py: each chunk at a level of its own
    # Rate and betas: [causvid] configs/wan_causal_ode.yaml. Neither length nor batch of Self-Forcing's initialisation
    # is stated: our reading, 3000 as [causvid] released (wan_causal_ode_checkpoint_model_003000, two clips on each
    # of 64 devices), at Self-Forcing's batch.
    config.initialize.optimizer.learning_rate = 2e-6
    config.initialize.optimizer.betas = (0.9, 0.999)
    config.initialize.steps = 3000
    config.initialize.batch_size = 64
    return config
