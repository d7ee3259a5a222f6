"""Rolls out what is trained, and measures what the videos show; the instruments are in evaluation/small_world.py."""

import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from adastate_jax.config.files import load_config
from adastate_jax.data.worlds import World, WorldConfig
from adastate_jax.errors import UserError
from adastate_jax.evaluation import small_world
from adastate_jax.generation.loading import load
from adastate_jax.media import contact_sheet, write_image
from studies.changing_world import ABSENCE, HORIZONS, LENGTH, NOISE_SEEDS, UNTRAINED, workdir_of
from studies.changing_world.contents import measure_cache
from studies.changing_world.windows import measure_windows
from studies.changing_world.worlds import colours_of, worlds_of_each_caption
from studies.rollouts import glimpses, roll_out, roll_out_teacher
from studies.rows import read_rows, write_rows
from studies.runs import done_file, measure_all
from studies.statistics import mean_of_told

LARGEST_PAN = 6.0  # pixels a frame, twice the true pan
KINDS = ("videos", "visits", "contents", "attention", "windows")  # of rows, a file each
Run = tuple[str, int]  # arm and training seed


def measure(folder: Path, jobs: int, results: Path, runs: list[Run], final: list[Run]) -> None:
    """Measures the truth, the teacher and the trained ones of `runs`, and writes the tables' rows into `results`.

    Of all, videos of one noise seed; of those of `final`, of all noise seeds, and what the cache holds. What is
    measured stays in `folder`/measured, and is measured again only after it was trained again.

    Raises:
        UserError: nothing is trained there.
    """
    if not done_file(folder / "teacher").exists():
        raise UserError(f"{folder}: no teacher is trained there; run `train` first, or name another --folder")
    trained = [run for run in dict.fromkeys([*final, *runs]) if done_file(workdir_of(folder, *run)).exists()]
    for arm, seed in [run for run in dict.fromkeys([*runs, *final]) if run not in trained]:
        print(f"{workdir_of(folder, arm, seed).name}: not trained yet, left out")
    measured = [("truth", 0), ("teacher", 0), *sorted(trained, key=[*dict.fromkeys([*runs, *final])].index)]
    wanted = [(*run, part) for run in measured for part in _parts(run, run in final or run[0] in UNTRAINED)]
    (folder / "measured").mkdir(exist_ok=True)
    measure_all([one for one in wanted if not _is_measured(folder, *one)], measure_run, jobs, folder)
    results.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        rows = [row for one in wanted for row in read_rows(_part_file(folder, *one, kind))]
        (results / f"{kind}.csv.gz").unlink(missing_ok=True)
        if rows:
            write_rows(results / f"{kind}.csv.gz", rows)
    if decision_file(folder).exists():
        write_rows(results / decision_file(folder).name, read_rows(decision_file(folder)))
    write_rows(results / "seconds.csv.gz", [_seconds(folder, *run) for run in measured if run[0] != "truth"])
    shown = [
        (arm, np.load(_part_file(folder, arm, seed, "0", "npy")))
        for arm, seed in measured
        if seed == 0 and ((arm, seed) in final or arm in UNTRAINED)
    ]
    write_image(results / "frames.png", contact_sheet(shown, scale=3, columns=len(shown[0][1])))


def decision_file(folder: Path) -> Path:
    """What the screening left: rows of an arm and what it is kept for."""
    return folder / "decision.csv.gz"


def _seconds(folder: Path, arm: str, seed: int) -> dict[str, object]:
    """How long a run took to train, in the clock's seconds and in those that processors worked for it."""
    seconds, processor = done_file(workdir_of(folder, arm, seed)).read_text().split()
    return {"arm": arm, "seed": seed, "seconds": int(seconds), "processor": int(processor)}


def screen(folder: Path, jobs: int, runs: list[Run]) -> dict[str, list[dict[str, str]]]:
    """Rows of what decides about a screening, by kind: the truth's and those of `runs`, of one noise seed."""
    wanted = [(*run, "0") for run in [("truth", 0), *runs]]
    (folder / "measured").mkdir(exist_ok=True)
    measure_all([one for one in wanted if not _is_measured(folder, *one)], measure_run, jobs, folder)
    return {kind: [row for one in wanted for row in read_rows(_part_file(folder, *one, kind))] for kind in KINDS[:2]}


def _parts(run: Run, is_final: bool) -> list[str]:
    """What is measured of a run: videos of each noise seed, and its cache."""
    if run[0] == "truth" or not is_final:
        return ["0"]
    return [*map(str, NOISE_SEEDS), *(() if run[0] in UNTRAINED else ("cache",))]


def _part_file(folder: Path, arm: str, seed: int, part: str, kind: str) -> Path:
    ending = "npy" if kind == "npy" else f"{kind}.csv.gz"
    return folder / "measured" / f"{workdir_of(folder, arm, seed).name}.{part}.{ending}"


def _is_measured(folder: Path, arm: str, seed: int, part: str) -> bool:
    """Whether this part of a run is measured since it was trained; the file asked for is the last that is written."""
    path = _part_file(folder, arm, seed, part, "attention" if part == "cache" else "npy")
    trained = done_file(folder / "teacher" if arm == "truth" else workdir_of(folder, arm, seed))
    return path.exists() and path.stat().st_mtime >= trained.stat().st_mtime


@functools.cache
def _true_worlds(folder: Path) -> list[World]:
    worlds = load_config(folder / "teacher" / "config.json").data.worlds
    return worlds_of_each_caption(worlds, round(max(HORIZONS) * LENGTH))


def measure_run(folder: Path, arm: str, seed: int, part: str) -> str:
    """Measures a part of a run and writes its rows; returns what it is called."""
    worlds = _true_worlds(folder)
    workdir = workdir_of(folder, arm, seed)

    def write(kind: str, rows: Iterator[dict[str, object]]) -> None:
        rows = [{"arm": arm, "seed": seed, **row} for row in rows]
        if rows:
            write_rows(_part_file(folder, arm, seed, part, kind), rows)

    if part == "cache":
        contents, attention = measure_cache(load(workdir), worlds)
        write("contents", contents)
        write("attention", attention)
    else:
        noise, prompts = int(part), [truth.caption for truth in worlds]
        if arm == "truth":
            videos = np.stack([truth.video for truth in worlds])
        elif arm == "teacher":
            videos = roll_out_teacher(workdir, prompts, noise)
            if noise == NOISE_SEEDS[0]:
                write("windows", measure_windows(workdir, worlds))
        else:
            videos = roll_out(load(workdir), prompts, noise, len(worlds[0].video))
        config = load_config(folder / "teacher" / "config.json").data.worlds
        found = colours_of(videos, config)
        write("videos", ({"noise": noise, **row} for row in measure_videos(videos, found, worlds, config)))
        write("visits", ({"noise": noise, **row} for row in measure_visits(found)))
        path = _part_file(folder, arm, seed, part, "npy")
        partial = path.with_name(f".{path.stem}.partial.npy")
        np.save(partial, glimpses(videos[0], LENGTH))
        partial.replace(path)
    jax.clear_caches()
    return f"{workdir.name}, {'cache' if part == 'cache' else f'noise {part}'}"


def measure_visits(found: np.ndarray) -> Iterator[dict[str, object]]:
    """Rows of one visit of a ball each, see `small_world.visits`."""
    columns = small_world.visits(found, ABSENCE)
    for values in zip(*columns.values(), strict=True):
        yield {name: int(value) for name, value in zip(columns, values, strict=True)}


def measure_videos(
    videos: np.ndarray, found: np.ndarray, worlds: list[World], config: WorldConfig
) -> Iterator[dict[str, object]]:
    """Rows of one video and one horizon each; a horizon's numbers are of its last training length of frames.

    How the landscape looks is told from frames without a ball: who loses balls has not lost contrast.

    videos: uint8 [V, F, H, W, 3], each for the caption of one of the `worlds`.
    found: of `colours_of`.
    """
    pan_truth = np.array([world.pan_x for world in worlds]) * config.width / config.fps
    hue_truth = np.array([world.hue_turn for world in worlds]) / config.fps
    landscapes = np.array([world.palette for world in worlds])
    names = sorted(set(landscapes))
    truths = np.stack([world.video for world in worlds])
    bare = _means_without_balls(truths.mean(axis=(2, 3, 4)), colours_of(truths, config))
    true_means = np.array([mean_of_told(bare[landscapes == name]) for name in names])
    hues = small_world.hue(videos)
    for horizon in HORIZONS:
        end = round(horizon * LENGTH)
        if end > videos.shape[1]:
            return
        shown, turned = videos[:, end - LENGTH : end], hues[:, end - LENGTH : end]
        seen = found[:, end - LENGTH : end]
        look = {name: _means_without_balls(values, seen) for name, values in small_world.look(shown).items()}
        nearest = np.abs(look["brightness"][:, None] - true_means).argmin(axis=1)
        means = {
            "pan": small_world.pan_per_frame(shown, LARGEST_PAN).mean(axis=1) / pan_truth,
            "hue": small_world.hue_per_frame(turned).mean(axis=1) / hue_truth,
            "landscape": (np.array(names)[nearest] == landscapes).astype(float),
            **look,
            "seen": (seen >= 0).mean(axis=1),
        }
        for index in range(len(videos)):
            row = {name: float(values[index]) for name, values in means.items()}
            yield {"video": index, "horizon": horizon, **row}


def _means_without_balls(values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Means over a video's frames that show no ball: [V, F], [V, F] → [V], NaN where each of them shows one."""
    bare = found < 0
    with np.errstate(invalid="ignore"):
        return np.where(bare, values, 0.0).sum(axis=1) / bare.sum(axis=1)
