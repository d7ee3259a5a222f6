"""The study of docs/reproduction.md: which anchor moves, and which remembers, in the world of configs/small_world.py.

python -m studies.small_world train --folder=runs/small_world      # hours; stops and resumes at any time
python -m studies.small_world measure --folder=runs/small_world    # rolls out and measures every trained arm
python -m studies.small_world report                               # tables and figures from the measurements

`measure` writes one row per video and horizon into docs/small_world/videos.csv.gz, what exchanging anchors does into
swaps.csv.gz, what can be read from the cache into contents.csv.gz, and what looks at it into attention.csv.gz; `report`
reads nothing else. Arms that are not trained yet are left out, and named.
"""

import importlib.util

from studies import ROOT

CONFIG = ROOT / "configs" / "small_world.py"
RESULTS = ROOT / "docs" / "small_world"

HORIZONS = (1.0, 2.5, 6.0, 20.0)  # in training rollouts
ABSENCE = 4  # frames without a subject after which it counts as coming back
UNSEEN = (0, 1, 3, 6, 12)  # frames since a subject was seen, the first of each span that is told apart

# Students before distillation, and their folders.
STARTS = {"initialized": "teacher", "unanchored": "unanchored", "recurrent": "recurrent"}

ANCHORS = ("none", "static", "ema", "memory", "ping_pong", "adaptive")  # the arms that differ in nothing else
# Students that stream with those arms' anchors too, as `initialized:none`: before distillation, and after one without.
LENT = ("initialized", "unanchored_none")


def arms() -> tuple[list[str], list[str]]:
    """The arms that the configuration knows: those of the study, and those beside it."""
    spec = importlib.util.spec_from_file_location("small_world_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.ARMS), list(module.FURTHER)


def once(arm: str) -> bool:
    """Whether the arm has no training seed."""
    return arm.partition(":")[0] in ("truth", "teacher", *STARTS)
