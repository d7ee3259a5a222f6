"""Causal-Forcing's teacher, and Causal-Forcing++'s student of it, frame by frame, at their size of 1.3B.

python -m adastate_jax.train --config=configs/causal_forcing_wan.py:teacher --workdir=runs/causal_teacher
python -m adastate_jax.train --config=configs/causal_forcing_wan.py --workdir=runs/causal_consistency
python -m adastate_jax.sample --checkpoint=runs/causal_consistency --anchor=causal_forcing_two_step --prompt="a fox"

Each with --config.mesh.fsdp=64, say. The first is the teacher-forced causal model, of your videos alone; the second
has it as its teacher, and needs no trajectories. Distillation goes on from there with
--config.student.weights=runs/causal_consistency/initialize. Before, once: weights/critic and the encoders as in
configs/adastate_wan.py, and the videos as in configs/own_latents.py.

Sources: [cf] arXiv 2602.02214, [cf++] arXiv 2605.15141, and what their released configurations state.
"""

import pathlib
import runpy

ADASTATE = pathlib.Path(__file__).with_name("adastate_wan.py")


def get_config(stage: str = "student"):
    if stage not in ("teacher", "student"):
        raise ValueError(f"unknown setting {stage!r}; there are teacher and student")
    config = runpy.run_path(str(ADASTATE))["get_config"]()
    config.stages = ("initialize",)
    config.data.kind = "latents"
    config.data.latents = "data/clips"
    config.data.captions = "data/captions"
    config.data.embeddings = ""

    # [cf++] frame by frame, all earlier frames in sight, no anchor, two steps
    config.stream.chunk_frames = 1
    config.stream.past_frames = 20
    config.stream.anchor = {"name": "none"}
    config.stream.denoising_steps = (1000.0, 500.0)

    config.critic.weights = config.student.weights = ""
    for size in ("dim", "ffn_dim", "num_heads", "num_layers"):
        config.teacher[size] = 0  # as the model
    config.initialize.context = "clean"  # [cf] teacher forcing
    config.initialize.optimizer.learning_rate = 2e-6  # of both stages
    config.initialize.optimizer.betas = (0.0, 0.999)
    if stage == "teacher":
        config.initialize.targets = "clips"
        config.initialize.weights = "weights/critic"  # [cf] Wan2.1-T2V-1.3B
        config.initialize.steps = 2000  # [cf] at least; 5000 to 10,000 are better
        config.initialize.batch_size = 64  # [cf] one clip on each of 64 devices, our reading
        config.initialize.weighting = "bell"  # [cf] Wan's weight of a timestep
        config.teacher.weights = ""
        return config
    config.initialize.targets = "consistency"
    config.teacher.weights = "runs/causal_teacher/initialize"  # and the student starts from it
    config.initialize.ode_steps = 48  # [cf++] a grid of 48 at shift 5
    config.initialize.guidance_scale = 2.0  # [cf++] conventional guidance 3
    config.initialize.ema_decay = 0.99  # [cf++]
    config.initialize.ema_start = 200  # [cf++]
    config.initialize.steps = 3000  # [cf++] at least
    config.initialize.batch_size = 64  # not stated: our reading
    return config
