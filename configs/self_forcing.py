"""Self-Forcing's recipe on the small world of configs/tiny.py: no anchor, no horizon weights, the released gradient.

python -m adastate_jax.train --config=configs/self_forcing.py --workdir=runs/self_forcing

Sources: [paper] arXiv 2506.08009, [sf] guandeh17/Self-Forcing. Sizes, rates and numbers of steps are those of
configs/tiny.py, which learns in minutes; what is set here is what makes it Self-Forcing.
"""

import pathlib
import runpy

TINY = pathlib.Path(__file__).with_name("tiny.py")


def get_config():
    config = runpy.run_path(str(TINY))["get_config"]()

    # [sf] configs/self_forcing_dmd.yaml: a chunk sees all of the training video before it, and no anchor
    config.stream.anchor = {"name": "none"}
    config.stream.past_frames = config.distill.rollout_frames - config.stream.chunk_frames

    # [sf] ODE regression first; earlier chunks are noisy there, each at a level of its own
    config.initialize.context = "noisy"

    # [sf] model/dmd.py: every frame counts alike; [sf] pipeline/self_forcing_training.py: a chunk's last noisy pass
    # stays in the cache's autograd graph, so that later chunks' losses reach its keys and values
    config.distill.horizon_alpha = 0.0
    config.distill.cache_gradient = "straight_through"
    config.distill.critic_ratio = 5  # [sf] configs/self_forcing_dmd.yaml dfake_gen_update_ratio

    config.sample.anchors = ("none", "static")
    return config
