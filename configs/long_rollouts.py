"""The student of configs/tiny.py goes on with rollouts longer than its teacher's clips, two ways, in minutes.

python -m adastate_jax.train --config=configs/long_rollouts.py --workdir=runs/windows
python -m adastate_jax.train --config=configs/long_rollouts.py:segments --workdir=runs/segments

Before either, once: python -m adastate_jax.train --config=configs/tiny.py --workdir=runs/tiny

The first draws a window of 15 frames from rollouts of 45 for every update (Self-Forcing++, arXiv 2510.02283). The
second goes on with one rollout from update to update: 15 frames, then 12 at a time behind three that are seen again,
to 51; before one of them its prompt changes, and the cache is made anew (LongLive's streaming long tuning, arXiv
2509.22622).
"""

import pathlib
import runpy

TINY = pathlib.Path(__file__).with_name("tiny.py")


def get_config(setting: str = "windows"):
    if setting not in ("windows", "segments"):
        raise ValueError(f"unknown setting {setting!r}; it is windows or segments")
    config = runpy.run_path(str(TINY))["get_config"]()
    config.stages = ("distill", "sample")
    config.start_from = "runs/tiny"  # its data and its teacher
    config.student.weights = "runs/tiny/distill"  # and its student

    config.distill.steps = 60
    config.distill.scored_frames = 15  # a clip of the world, which the teacher was trained on
    if setting == "windows":
        config.distill.rollout_frames = 45
    else:
        config.distill.rollout_frames = 51
        config.distill.continue_rollout = True
        config.distill.overlap_frames = 3  # [LongLive] 18 new frames behind 3
        config.distill.prompt_change = "renew"  # [LongLive] trains with global_sink: false
    config.distill.student.learning_rate = 2e-5
    config.distill.critic.learning_rate = 4e-5

    config.sample.horizon = 1
    return config
