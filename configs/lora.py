"""Distillation of adapters alone: the last stage of configs/tiny.py again, on frozen networks with LoRA.

python -m adastate_jax.train --config=configs/tiny.py --workdir=runs/tiny
python -m adastate_jax.train --config=configs/lora.py --workdir=runs/lora
python -m adastate_jax.convert --source=runs/lora --to=lora --output=adapters

The second leaves adapters in its checkpoints and streams with them merged; the third writes the student's as a file
that ComfyUI reads (with --names=diffusers, diffusers), and `convert --lora`.
"""

import pathlib
import runpy

TINY = pathlib.Path(__file__).with_name("tiny.py")


def get_config():
    config = runpy.run_path(str(TINY))["get_config"]()
    config.start_from = "runs/tiny"
    config.stages = ("distill", "sample")
    for network in (config.student, config.critic):
        network.lora.rank = 8
        network.lora.alpha = 8.0
    # A few percent of the weights want larger steps.
    config.distill.student.learning_rate = 1e-3
    config.distill.critic.learning_rate = 2e-3
    return config
