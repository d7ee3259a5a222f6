"""Rolls out what is trained, and measures what the videos show; the instruments are in evaluation/small_world.py."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from adastate_jax.config.files import load_config, parse_config
from adastate_jax.config.run import Config
from adastate_jax.data.worlds import World, WorldConfig
from adastate_jax.errors import UserError
from adastate_jax.evaluation import small_world
from adastate_jax.generation.loading import Model, load
from adastate_jax.media import contact_sheet, write_image
from adastate_jax.streaming.schedule import StreamConfig
from studies.rollouts import glimpses, roll_out, roll_out_teacher, worlds_for
from studies.rows import read_rows, write_rows
from studies.runs import done_file, measure_all
from studies.small_world import ABSENCE, ANCHORS, CONFIG, HORIZONS, LENT, STARTS, arms, once
from studies.small_world.memory import measure_attention, measure_contents, measure_swaps

VIDEOS = 128
NOISE_SEEDS = (0, 1)
LARGEST_PAN = 6.0  # pixels a frame, twice the true pan
GATES = {"pan": 0.9, "hue": 0.8}  # of the truth: a teacher with less teaches no arm
_WITHOUT_CACHE = ("truth", "teacher")  # what is no stream
_GLIMPSED = ("truth", "teacher", "initialized", *ANCHORS, "recurrent_start")
_GLIMPSED += ("unanchored_none", "unanchored_none:static", "unanchored_none:adaptive")
KINDS = ("videos", "swaps", "contents", "attention")  # of rows, a file each


def measure(folder: Path, jobs: int, results: Path) -> None:
    """Measures the truth, the teacher, the students and every trained arm, and writes the tables' rows into `results`.

    What is measured stays in `folder`/measured, and is measured again only after it was trained again; remove that
    folder where an instrument has changed.

    Raises:
        UserError: nothing is trained there.
    """
    if not (folder / "teacher.seconds").exists():
        raise UserError(f"{folder}: no teacher is trained there; run `train` first, or name another --folder")
    names = [name for group in arms() for name in group]
    seeds = sorted({int(path.stem.rpartition("-")[2]) for path in folder.glob("*-*.seconds")})
    runs = [("truth", 0), ("teacher", 0)]
    for student, seed in [*((start, 0) for start in STARTS), *((name, seed) for seed in seeds for name in names)]:
        if done_file(_folder_of(folder, student, seed)).exists():
            runs += ((arm, seed) for arm in _streams(folder, student, seed, names))
        else:
            print(f"{_folder_of(folder, student, seed).name}: not trained yet, left out")
    parts = folder / "measured"
    parts.mkdir(exist_ok=True)
    missing = [run for run in runs if not all(_is_measured(folder, *run))]
    measure_all(missing, _measure_run, jobs, folder)
    results.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        rows = [row for name, seed in runs for row in read_rows(parts / f"{name}-{seed}.{kind}.csv.gz")]
        (results / f"{kind}.csv.gz").unlink(missing_ok=True)
        if rows:  # swaps need an anchor
            write_rows(results / f"{kind}.csv.gz", rows)
    shown = [
        (name, np.load(parts / f"{name}-{seed}.npy"))
        for name, seed in runs
        if (seed in seeds[:1] or once(name)) and name in _GLIMPSED
    ]
    write_image(results / "frames.png", contact_sheet(shown, scale=3, columns=len(shown[0][1])))


def _folder_of(folder: Path, student: str, seed: int) -> Path:
    return folder / (STARTS.get(student, "teacher") if once(student) else f"{student}-{seed}")


def _streams(folder: Path, student: str, seed: int, names: list[str]) -> list[str]:
    """What a student is measured as: with its own stream and, if it is `LENT`, with those of other anchors."""
    if student not in LENT:
        return [student]
    streams = {load_config(_folder_of(folder, student, seed) / "config.json").stream: student}
    for name in names:
        if name in ANCHORS:
            streams.setdefault(_stream_of(name), f"{student}:{name}")
    return list(streams.values())


def _stream_of(arm: str) -> StreamConfig:
    return parse_config([f"--config={CONFIG}:{arm}"]).stream


def _load_student(folder: Path, arm: str, seed: int) -> Model:
    student, _, stream = arm.partition(":")
    model = load(_folder_of(folder, student, seed))
    if not stream:
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, stream=_stream_of(stream)))


@functools.cache
def _true_worlds(folder: Path) -> tuple[Config, list[World]]:
    config = load_config(folder / "teacher" / "config.json")
    return config, worlds_for(config.data.worlds, round(max(HORIZONS) * config.distill.rollout_frames), VIDEOS)


def _is_measured(folder: Path, arm: str, seed: int) -> tuple[bool, bool]:
    """Whether a run's videos are measured, and whether what its cache holds is; of either, this file is the last."""
    trained = done_file(_folder_of(folder, arm.partition(":")[0], seed)).stat().st_mtime

    def is_newer(kind):
        path = folder / "measured" / f"{arm}-{seed}.{kind}"
        return path.exists() and path.stat().st_mtime >= trained

    without_cache = arm in _WITHOUT_CACHE or ":" in arm  # what a cache holds is asked of what was trained with it
    return is_newer("npy"), without_cache or is_newer("attention.csv.gz")


def _measure_run(folder: Path, arm: str, seed: int) -> str:
    config, worlds = _true_worlds(folder)
    model = None if arm in _WITHOUT_CACHE else _load_student(folder, arm, seed)
    of_videos, of_cache = _is_measured(folder, arm, seed)
    parts = folder / "measured"

    def write(kind, rows):
        rows = [{"arm": arm, "seed": seed, **row} for row in rows]
        if rows:
            write_rows(parts / f"{arm}-{seed}.{kind}.csv.gz", rows)

    if not of_videos:
        prompts, length = [truth.caption for truth in worlds], config.distill.rollout_frames
        rows, shown = [], None
        for noise in NOISE_SEEDS if arm != "truth" else (0,):
            if arm == "truth":
                videos = np.stack([truth.video for truth in worlds])
            elif arm == "teacher":
                videos = roll_out_teacher(folder / "teacher", prompts, noise)
            else:
                videos = roll_out(model, prompts, noise, len(worlds[0].video))
            shown = videos[0] if shown is None else shown
            found = measure_videos(videos, worlds, config.data.worlds, length)
            rows.extend({"noise": noise, **row} for row in found)
        write("videos", rows)
        partial = parts / f".{arm}-{seed}.partial.npy"
        np.save(partial, glimpses(shown, length))
        partial.replace(parts / f"{arm}-{seed}.npy")
    if not of_cache:
        if model.config.stream.anchor.frames:
            write("swaps", measure_swaps(model, worlds, NOISE_SEEDS[0]))
        write("contents", measure_contents(model, worlds))
        write("attention", measure_attention(model, worlds))
    jax.clear_caches()
    return f"{arm}-{seed}"


def check_teacher(folder: Path) -> None:
    """Raises a `UserError` unless the teacher's videos move and turn as `GATES` asks; looks once at a trained one."""
    path = folder / "teacher.gates"
    if path.exists() and path.stat().st_mtime >= (folder / "teacher.seconds").stat().st_mtime:
        return
    config = load_config(folder / "teacher" / "config.json")
    worlds, length = worlds_for(config.data.worlds, config.data.num_frames, VIDEOS), config.data.num_frames
    videos = roll_out_teacher(folder / "teacher", [truth.caption for truth in worlds], NOISE_SEEDS[0])
    rows = list(measure_videos(videos, worlds, config.data.worlds, length))
    found = {name: float(np.mean([row[name] for row in rows])) for name in GATES}
    told = ", ".join(f"{name} {value:.2f} of the truth" for name, value in found.items())
    if any(found[name] < least for name, least in GATES.items()):
        needed = ", ".join(f"{name} {least}" for name, least in GATES.items())
        raise UserError(f"{folder}/teacher: no arm is distilled from it ({told}; needed: {needed}); train it longer")
    path.write_text(f"{told}\n")
    print(f"teacher: {told}", flush=True)


def measure_videos(
    videos: np.ndarray, worlds: list[World], config: WorldConfig, rollout_frames: int
) -> Iterator[dict[str, object]]:
    """Rows of one video and one horizon each; a horizon's numbers are of its last training length of frames.

    videos: uint8 [V, F, H, W, 3], each for the caption of one of the `worlds`.
    """
    pan_truth = np.array([world.pan_x for world in worlds]) * config.width / config.fps
    hue_truth = np.array([world.hue_turn for world in worlds]) / config.fps
    captions = np.unique([world.caption for world in worlds], return_inverse=True)[1]
    hues = small_world.hue(videos)
    found = small_world.subject_colours(videos, config.colours, config.subject_radius[0])
    for horizon in HORIZONS:
        end = round(horizon * rollout_frames)
        if end > videos.shape[1]:
            return
        start = end - rollout_frames
        shown = videos[:, start:end]
        with_first = np.concatenate([videos[:, :1], shown], axis=1)
        means = {
            "pan": small_world.pan_per_frame(shown, LARGEST_PAN).mean(axis=1) / pan_truth,
            "hue": small_world.hue_per_frame(hues[:, start:end]).mean(axis=1) / hue_truth,
            "hue_lock": np.cos(2 * np.pi * (hues[:, start:end] - hues[:, :1])).mean(axis=1),
            "picture_lock": small_world.resemblance(with_first)[:, 1:].mean(axis=1),
            **{name: values.mean(axis=1) for name, values in small_world.look(shown).items()},
            **_read_subjects(found[:, :end], start, captions),
        }
        for index in range(len(videos)):
            yield {
                "video": index,
                "caption": int(captions[index]),
                "horizon": horizon,
                **{name: float(values[index]) for name, values in means.items()},
            }


def _read_subjects(found: np.ndarray, start: int, captions: np.ndarray) -> dict[str, np.ndarray]:
    """How often subjects are seen from frame `start` on, and whose colour they have on coming back, each [V].

    found: the subject's colour in each frame [V, F], −1 for none. A video's own colour is that of its first subject.
    Videos that all have one colour come back right without remembering it, and so do those that take it from the
    caption: so `chance` tells how often the first colours of the other videos of the caption would have been right.
    """
    seen = found >= 0
    result = {name: np.full(len(found), np.nan) for name in ("identity", "chance", "variety")}
    first = found[np.arange(len(found)), seen.argmax(axis=1)]
    for index in np.flatnonzero(first >= 0):
        own = first[index]
        others = first[(captions == captions[index]) & (first >= 0) & (np.arange(len(first)) != index)]
        if not len(others):
            continue
        result["variety"][index] = (others != own).mean()
        absences = np.convolve(~seen[index], np.ones(ABSENCE), "valid") == ABSENCE
        absences[: seen[index].argmax()] = False
        if not absences.any():
            continue
        back = seen[index] & (np.arange(found.shape[1]) >= max(start, absences.argmax() + ABSENCE))
        if back.any():
            result["identity"][index] = (found[index, back] == own).mean()
            result["chance"][index] = (found[index, back][:, None] == others).mean()
    return {"seen": seen[:, start:].mean(axis=1), **result}
