"""The second study of docs/reproduction.md: what is remembered of a world that changes, configs/changing_world.py.

python -m studies.changing_world train --folder=runs/changing_world      # hours; stops and resumes at any time
python -m studies.changing_world measure --folder=runs/changing_world    # rolls out and measures what is trained
python -m studies.changing_world report                                  # tables and figures from the measurements

`train` trains the teacher and looks at it (`gates.py`), then the starts and the arms of the screening with one seed,
measures what decides about them, and trains what the rule of `plan.py` leaves with two more seeds. `measure` writes
rows into docs/changing_world: videos.csv.gz, one per video and horizon; visits.csv.gz, one for each time that a ball is
in view; contents.csv.gz, what can be read from the cache; attention.csv.gz, what looks at it; windows.csv.gz, what the
teacher makes of windows of long videos; seconds.csv.gz, what each run took; decision.csv.gz, which arms the screening
left. `report` reads nothing else.
"""

import importlib.util
from pathlib import Path

from studies import ROOT

CONFIG = ROOT / "configs" / "changing_world.py"
RESULTS = ROOT / "docs" / "changing_world"

HORIZONS = (1.0, 2.5, 6.0, 20.0)  # in training lengths
LENGTH = 21  # frames, of a training video
CHUNK = 3  # frames
ABSENCE = 4  # frames without a ball after which it counts as coming back
PERIOD_FRAMES = 49.6 / 3  # from one ball to the next
PERIOD = PERIOD_FRAMES / CHUNK  # the same in chunks
PER_CAPTION = 8  # videos, of each of sixteen captions
NOISE_SEEDS = (0, 1)
SCREENING_SEED = 0
FINAL_SEEDS = (0, 1, 2)


def _load_config():
    spec = importlib.util.spec_from_file_location("changing_world_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STARTS = tuple(_load_config().STARTS)
UNTRAINED = ("truth", "teacher")  # what is no student


def once(arm: str) -> bool:
    """Whether the arm is measured with one training seed alone: the truth, the teacher, and what is not distilled."""
    return "/" not in arm


def start_of(arm: str) -> str:
    """The run that an arm, or a start, starts from."""
    return "teacher" if once(arm) else arm.split("/")[0]


def workdir_of(folder: Path, arm: str, seed: int) -> Path:
    """Where a run of an arm is trained."""
    return folder / (arm if once(arm) and not seed else f"{arm.replace('/', '.')}-{seed}")
