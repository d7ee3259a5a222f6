"""Trains the runs of the study in the order of its plan; what is done is skipped, what was stopped goes on."""

from pathlib import Path

from adastate_jax.config.files import parse_config
from studies.changing_world import CONFIG, FINAL_SEEDS, LENGTH, SCREENING_SEED, STARTS, workdir_of
from studies.changing_world.gates import check_teacher
from studies.changing_world.measure import Run, screen
from studies.changing_world.memory import mean_memory, returns
from studies.changing_world.plan import SCREENING, kept, longer
from studies.rows import columns_of
from studies.runs import done_file, train_all, train_one


def train(folder: Path, jobs: int) -> None:
    """Trains the teacher, the starts, the screening, and what its rule leaves, `jobs` at a time on cores of their own.

    Raises:
        UserError: the teacher does not pass its gates, or a run failed or was stopped.
    """
    train_runs(folder, [*((start, 0) for start in STARTS), *((arm, SCREENING_SEED) for arm in SCREENING)], jobs)
    final, longest = decide(folder, jobs)
    train_runs(folder, [*final, *longest], jobs)


def train_runs(folder: Path, runs: list[Run], jobs: int) -> None:
    """Trains some runs, and before them what they start from."""
    folder.mkdir(parents=True, exist_ok=True)
    _train_run(folder, "teacher", 0)
    check_teacher(folder)
    starts = dict.fromkeys((_start_of(arm), 0) for arm, _ in runs)
    before = dict.fromkeys([("anchored", 0), *(run for run in starts if run[0] != "teacher")])
    train_all(before, lambda run: _train_run(folder, *run), 1)
    train_all(runs, lambda run: _train_run(folder, *run), jobs)


def is_screened(folder: Path) -> bool:
    """Whether all arms of the screening are trained."""
    return all(done_file(workdir_of(folder, arm, SCREENING_SEED)).exists() for arm in SCREENING)


def decide(folder: Path, jobs: int) -> tuple[list[Run], list[Run]]:
    """The runs that the screening leaves: of all seeds, and the longer ones of one seed.

    What it found is kept: a decision does not change when an instrument does.
    """
    path = folder / "decision"
    if not path.exists():
        final = kept(*screened(screen(folder, jobs, [(arm, SCREENING_SEED) for arm in SCREENING])))
        path.write_text("\n".join(final) + "\n")
        print(f"kept: {', '.join(final)}", flush=True)
    final = tuple(path.read_text().split())
    return [(arm, seed) for seed in FINAL_SEEDS for arm in final], [(arm, SCREENING_SEED) for arm in longer(final)]


def screened(rows: dict[str, list[dict[str, str]]]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What `kept` asks: memory of the colour seen last between 2.5 and 6 training lengths, and motion and look."""
    videos, back = columns_of(rows["videos"]), returns(columns_of(rows["visits"]))
    span = (back["frame"] >= 2.5 * LENGTH) & (back["frame"] < 6 * LENGTH)
    arms = [arm for arm in dict.fromkeys(videos["arm"]) if arm != "truth"]
    memory = {arm: mean_memory(back, "last", span & (back["arm"] == arm)) for arm in arms}

    def mean(arm: str, name: str, horizon: float) -> float:
        return float(videos[name][(videos["arm"] == arm) & (videos["horizon"] == horizon)].mean())

    motion = {
        arm: {
            **{name: mean(arm, name, 6.0) for name in ("pan", "hue")},
            **{x: mean(arm, x, 1.0) / mean("truth", x, 1.0) for x in ("brightness", "saturation", "contrast")},
        }
        for arm in arms
    }
    return memory, motion


def _start_of(arm: str) -> str:
    return Path(parse_config([f"--config={CONFIG}:{arm}"]).start_from).name


def _train_run(folder: Path, arm: str, seed: int) -> None:
    overrides = []
    if arm != "teacher":
        overrides = [f"--config.seed={seed}", f"--config.start_from={folder / _start_of(arm)}"]
    if arm == "anchored_tenth":
        overrides.append(f"--config.initialize.weights={folder / 'anchored' / 'initialize'}")
    train_one(f"{CONFIG}:{arm}", workdir_of(folder, arm, seed), overrides)
