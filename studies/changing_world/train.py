"""Trains the runs of the study in the order of its plan; what is done is skipped, what was stopped goes on."""

import collections
import itertools
import shutil
import threading
from pathlib import Path

from adastate_jax.files import whole_folder
from studies.changing_world import CONFIG, FINAL_SEEDS, SCREENING_SEED, STARTS, once, start_of, workdir_of
from studies.changing_world.gates import check_teacher
from studies.changing_world.measure import Run, decision_file, screen
from studies.changing_world.memory import held, returns, until
from studies.changing_world.plan import SCREENING, kept, longer, needed, shorter
from studies.changing_world.worlds import with_withheld
from studies.rows import columns_of, read_rows, rows_where, write_rows
from studies.runs import done_file, train_all, train_one
from studies.statistics import mean_of_told


def train(folder: Path, jobs: int) -> None:
    """Trains the teacher, the starts, the screening, and what its rule leaves, `jobs` at a time on cores of their own.

    Raises:
        UserError: the teacher does not pass its gates, or a run failed or was stopped.
    """
    train_runs(folder, [(arm, SCREENING_SEED) for arm in SCREENING], jobs)
    train_runs(folder, final_runs(decide(folder, jobs)), jobs)


def train_runs(folder: Path, runs: list[Run], jobs: int) -> None:
    """Trains some runs, and before each what it starts from, with its own seed: there is one teacher alone."""
    folder.mkdir(parents=True, exist_ok=True)
    locks = collections.defaultdict(threading.Lock)

    def train_run(run: Run) -> None:
        for before in needed(run[0]):
            train_run(_run_before(before, run[1]))
        with locks[run]:  # others may need it, too
            _train_run(folder, *run)

    train_run(("teacher", 0))
    check_teacher(folder)
    train_all(starts_ahead(runs), train_run, jobs)


def _run_before(arm: str, seed: int) -> Run:
    return arm, 0 if arm == "teacher" else seed


def starts_ahead(runs: list[Run], ahead: int = 3) -> list[Run]:
    """The runs by what they start from, each start before the last runs of the one before: no core need wait long."""
    ordered: list[Run] = []
    for start, group in itertools.groupby(sorted(runs, key=_place), key=_place):
        group = list(group)
        if start:
            at = max(len(ordered) - ahead, 0)
            ordered[at:at] = [(STARTS[start - 1], seed) for seed in dict.fromkeys(seed for _, seed in group)]
        ordered += group
    return ordered


def _place(run: Run) -> int:
    """1 and more for the runs that start from one of `STARTS`."""
    return 0 if once(run[0]) else STARTS.index(start_of(run[0])) + 1


def is_screened(folder: Path) -> bool:
    """Whether all arms of the screening are trained."""
    return all(done_file(workdir_of(folder, arm, SCREENING_SEED)).exists() for arm in SCREENING)


def decide(folder: Path, jobs: int) -> dict[str, str]:
    """The arms that the screening leaves, by what they are kept for, see `plan.kept`.

    What it found is kept: a decision does not change when an instrument does.
    """
    path = decision_file(folder)
    if not path.exists():
        roles = kept(*screened(screen(folder, jobs, [(arm, SCREENING_SEED) for arm in SCREENING])))
        write_rows(path, [{"part": role, "arm": arm} for role, arm in roles.items()])
        print("; ".join(f"{role}: {arm}" for role, arm in roles.items()), flush=True)
    return {row["part"]: row["arm"] for row in read_rows(path)}


def final_runs(roles: dict[str, str]) -> list[Run]:
    """The runs of all seeds, and the longer ones of one seed."""
    arms = dict.fromkeys(roles.values())
    return [(arm, seed) for seed in FINAL_SEEDS for arm in arms] + [(arm, SCREENING_SEED) for arm in longer(roles)]


def screened(rows: dict[str, list[dict[str, str]]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What `kept` asks: what is held between 2.5 and 6 training lengths, and motion and look of known captions."""
    videos, back = with_withheld(columns_of(rows["videos"])), returns(columns_of(rows["visits"]))
    arms = [arm for arm in dict.fromkeys(videos["arm"]) if arm != "truth"]
    memory = {arm: held(back, (back["arm"] == arm) & until(back, 6.0)) for arm in arms}

    def mean(arm: str, name: str, horizon: float) -> float:
        return mean_of_told(videos[name][rows_where(videos, arm=arm, horizon=horizon, withheld=False)])

    def of_truth(arm: str, name: str, horizon: float) -> float:
        return mean(arm, name, horizon) / mean("truth", name, horizon)

    shown = {
        arm: {
            **{name: mean(arm, name, 6.0) for name in ("pan", "hue")},
            "seen": of_truth(arm, "seen", 6.0),
            **{name: of_truth(arm, name, 1.0) for name in ("brightness", "saturation", "contrast")},
        }
        for arm in arms
    }
    return memory, shown


def _train_run(folder: Path, arm: str, seed: int) -> None:
    overrides = []
    if arm != "teacher":
        start = workdir_of(folder, *_run_before(start_of(arm), seed))
        overrides = [f"--config.seed={seed}", f"--config.start_from={start}"]
    if arm == "anchored_tenth":
        overrides.append(f"--config.initialize.weights={workdir_of(folder, 'anchored', seed) / 'initialize'}")
    workdir = workdir_of(folder, arm, seed)
    if (before := shorter(arm)) and not workdir.exists():
        with whole_folder(workdir) as copy:
            shutil.copytree(workdir_of(folder, before, seed), copy, dirs_exist_ok=True)
    train_one(f"{CONFIG}:{arm}", workdir, overrides)
