"""Trains the runs of the study, several at a time; what is done is skipped, what was stopped goes on."""

from pathlib import Path

from adastate_jax.config.files import parse_config
from studies.runs import train_all, train_one
from studies.small_world import CONFIG, STARTS, once
from studies.small_world.measure import check_teacher


def train(folder: Path, names: list[str], seeds: list[int], jobs: int) -> None:
    """Trains what arms start from, then all else, `jobs` at a time on processor cores of their own.

    Done runs are skipped.

    Raises:
        UserError: the teacher does not move as it should, or a run failed or was stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in dict.fromkeys(["teacher", *map(_start_of, names)]):
        _train_run(folder, start, 0)
        check_teacher(folder)
    runs = dict.fromkeys([("unanchored", 0), *((name, seed) for seed in seeds for name in names)])
    train_all(runs, lambda run: _train_run(folder, *run), jobs)


def _start_of(arm: str) -> str:
    return Path(parse_config([f"--config={CONFIG}:{arm}"]).start_from).name


def _train_run(folder: Path, name: str, seed: int) -> None:
    workdir = folder / (STARTS.get(name, name) if once(name) else f"{name}-{seed}")
    start = [] if name == "teacher" else [f"--config.seed={seed}", f"--config.start_from={folder / _start_of(name)}"]
    train_one(f"{CONFIG}:{name}", workdir, start)
