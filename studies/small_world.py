"""The study of docs/reproduction.md: which anchor moves, and which remembers, in the world of configs/small_world.py.

python -m studies.small_world train --folder=runs/small_world      # hours; stops and resumes at any time
python -m studies.small_world measure --folder=runs/small_world    # rolls out and measures every trained arm
python -m studies.small_world report                               # tables and figures from the measurements

`measure` writes one row per video and horizon into docs/small_world/videos.csv.gz, and what exchanging anchors does
into swaps.csv.gz; `report` reads nothing else. Arms that are not trained yet are left out, and named.
"""

import argparse
import csv
import dataclasses
import functools
import gzip
import importlib.util
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from adastate_jax.checkpoint import latest_step, load_tree
from adastate_jax.config import Config, load_config, parse_config
from adastate_jax.data.worlds import World, WorldConfig, render_world
from adastate_jax.diffusion import draw_normal
from adastate_jax.evaluation import small_world
from adastate_jax.generate import (
    Frozen,
    Model,
    abstract_dit,
    abstract_frozen,
    decode_frames,
    embed_prompts,
    load,
    with_shardings,
)
from adastate_jax.media import contact_sheet, write_image
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.rollout import RolloutCarry, initial_carry, rollout, seed_keys
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.initialize import ode_sigmas, sample_trajectory
from adastate_jax.video_stream import stream_batch

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "small_world.py"
RESULTS = ROOT / "docs" / "small_world"

HORIZONS = (1.0, 2.5, 6.0, 20.0)  # in training rollouts
VIDEOS = 128
NOISE_SEEDS = (0, 1)
WORLD_SEED = 10_000  # of the worlds whose captions are the prompts; no world of the training data
LARGEST_PAN = 6.0  # pixels a frame, twice the true pan
ABSENCE = 4  # frames without a subject after which it counts as coming back
COLLAPSE = 0.2  # of the truth's brightness, saturation or contrast at the first horizon
SWAP_CHUNK, SWAP_CHUNKS = 8, 14  # when anchors are exchanged, and how long the stream goes on

# Students before distillation, and their folders; `initialized:none` is one of them with another arm's stream.
STARTS = {"initialized": "teacher", "unanchored": "unanchored"}

# (column, what it is in a table)
MEASURES = {
    "pan": "signed pan / truth",
    "hue": "signed turn of the hue / truth",
    "hue_lock": "cosine of the hue to the first frame's, minus the truth's",
    "picture_lock": "correlation with the first frame, minus the truth's",
    "brightness": "brightness / truth",
    "saturation": "saturation / truth",
    "contrast": "contrast / truth",
    "seen": "share of frames with a subject / truth",
    "identity": "share of subjects that come back in the first one's colour",
    "memory": "that share, minus the share in the first colour of another video of the caption / truth",
    "variety": "share of the caption's other videos whose first subject has another colour / truth",
}
OVERVIEW = ("pan", "hue", "hue_lock", "picture_lock", "memory", "variety", "seen", "contrast")  # of tables and figures
ANCHORS = ("none", "static", "ema", "memory", "ping_pong", "adaptive")  # the rest vary something in the last of them
BASELINE = "adaptive"  # what the arms are compared with
_DIFFERENCES = ("hue_lock", "picture_lock")
_ITSELF = ("pan", "hue", "identity")  # not to be compared with the truth's mean: they are so by what they are


def arms() -> tuple[list[str], list[str]]:
    """The arms that the configuration knows: those of the study, and those that are trained longer."""
    spec = importlib.util.spec_from_file_location("small_world_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.ARMS), list(module.LONGER)


# --- training ---------------------------------------------------------------------------------------------------------


def train(folder: Path, names: list[str], seeds: list[int], jobs: int) -> None:
    """Trains the teacher, then all else, `jobs` at a time on processor cores of their own; done runs are skipped."""
    _train_one(folder, "teacher", 0, None)
    waiting = iter([("unanchored", 0), *((name, seed) for seed in seeds for name in names)])

    def work(share):
        for name, seed in waiting:  # a list's iterator may be shared between threads
            _train_one(folder, name, seed, share)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, _share_cores(jobs)))


def _share_cores(jobs: int) -> list[list[int] | None]:
    """The processor cores of each of several runs at a time; None is all."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[job::jobs] for job in range(jobs)] if 1 < jobs <= len(cores) else [None] * jobs


def _train_one(folder: Path, name: str, seed: int, cores: list[int] | None) -> None:
    workdir = folder / (STARTS.get(name, name) if _once(name) else f"{name}-{seed}")
    done = folder / f"{workdir.name}.seconds"
    if done.exists():
        return
    command = [sys.executable, "-m", "adastate_jax.train", f"--config={CONFIG}:{name}", f"--workdir={workdir}"]
    if name != "teacher":
        command += [f"--config.seed={seed}", f"--config.start_from={folder / 'teacher'}"]
    environment = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # faster: the buffers of a step are new each time
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compilations"),
    }
    start = time.monotonic()
    with (folder / f"{workdir.name}.log").open("ab") as log:
        subprocess.run(
            command,
            check=True,
            stderr=log,
            env=environment,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
    seconds = time.monotonic() - start
    stage = "initialize" if _once(name) else "distill"
    if latest_step(workdir / stage) != getattr(load_config(workdir / "config.json"), stage).steps:
        raise SystemExit(f"{workdir} was stopped before its end; the same command goes on from there")
    done.write_text(f"{seconds:.0f}\n")
    print(f"{workdir.name}: {seconds:.0f} s", flush=True)


# --- measuring --------------------------------------------------------------------------------------------------------


def worlds_for(config: WorldConfig, frames: int) -> list[World]:
    """The true videos, ordered by caption."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    config = WorldConfig(**{**fields, "num_frames": frames})
    return sorted((render_world(config, WORLD_SEED, i) for i in range(VIDEOS)), key=lambda world: world.caption)


def measure_videos(
    videos: np.ndarray, worlds: list[World], config: WorldConfig, rollout_frames: int
) -> Iterator[dict[str, object]]:
    """Rows of one video and one horizon each; a horizon's numbers are of its last training length of frames.

    videos: uint8 [V, F, H, W, 3], each for the caption of one of the `worlds`.
    """
    pan_truth = np.array([world.pan_x for world in worlds]) * config.width / config.fps
    hue_truth = np.array([world.hue_turn for world in worlds]) / config.fps
    captions = np.array([world.caption for world in worlds])
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
                "horizon": horizon,
                **{name: float(values[index]) for name, values in means.items()},
            }


def _read_subjects(found: np.ndarray, start: int, captions: np.ndarray) -> dict[str, np.ndarray]:
    """How often subjects are seen from frame `start` on, and whose colour they have on coming back, each [V].

    found: the subject's colour in each frame [V, F], −1 for none. A video's own colour is that of its first subject.
    Videos that all have one colour come back right without remembering it, and so do those that take it from the
    caption: so what comes back is compared with the colour of every other video of its caption too.
    """
    seen = found >= 0
    result = {name: np.full(len(found), np.nan) for name in ("identity", "memory", "variety")}
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
            of_others = (found[index, back][:, None] == others).mean()
            result["memory"][index] = result["identity"][index] - of_others
    return {"seen": seen[:, start:].mean(axis=1), **result}


def roll_out(model: Model, prompts: list[str], seed: int, frames: int) -> np.ndarray:
    """Videos uint8 [V, F, H, W, 3]; sample i's noise is of seed · V + i."""
    chunks = stream_batch(model, prompts, seed * len(prompts), frames)
    return np.concatenate(list(chunks), axis=1)


def roll_out_teacher(folder: Path, prompts: list[str], seed: int) -> np.ndarray:
    """The bidirectional teacher's own videos of one training length, by the ODE that the student learned from."""
    config, mesh = load_config(folder / "config.json"), make_mesh()
    step = latest_step(folder / "pretrain")
    teacher = load_tree(folder / "pretrain" / str(step), with_shardings(abstract_dit(config), mesh), "ema")
    frozen: Frozen = load_tree(folder / "frozen", with_shardings(abstract_frozen(config), mesh))
    keys = seed_keys(seed * len(prompts), len(prompts))
    shape = (config.data.num_frames, *config.latent_shape)
    sigmas = ode_sigmas(config.stream, config.initialize.ode_steps)

    @jax.jit
    def draw(teacher, text, null_text):
        noise = jax.vmap(lambda key: draw_normal(key, shape))(keys)
        guidance = config.initialize.guidance_scale
        return sample_trajectory(teacher, noise, text, null_text, sigmas, guidance, config.initialize.ode_steps)[:, -1]

    latents = draw(teacher, embed_prompts(frozen, prompts), embed_prompts(frozen, [config.negative_prompt]))
    return np.asarray(decode_frames(frozen.codec, latents, (), True)[0])


# --- exchanging anchors -----------------------------------------------------------------------------------------------


def measure_swaps(model: Model, worlds: list[World], seed: int) -> Iterator[dict[str, object]]:
    """What a stream becomes when, midway, its anchor or its window is exchanged with another video's of its caption.

    Yields a row per video and exchange: how far the next chunk's latents move (in units of how far the other video's
    chunk is), and in the frames after the next absence, which share of the subjects has the colour of its own video
    and which that of the other, where these differ.
    """
    config, stream = model.config, model.config.stream
    prompts = [world.caption for world in worlds]
    other = np.empty(len(prompts), int)
    for caption in set(prompts):
        same = np.flatnonzero([prompt == caption for prompt in prompts])
        other[same] = np.roll(same, 1)
    text = jax.jit(model.student.text_keys_values)(model.embed(prompts))
    keys = seed_keys(seed * len(prompts), len(prompts))

    @jax.jit
    def begin(student, text):
        carry = initial_carry(student.config, stream, keys, *config.latent_shape[:2])
        return rollout(student, carry, text, stream, config.latent_shape, SWAP_CHUNK)

    @jax.jit
    def go_on(student, carry, text):
        return rollout(student, carry, text, stream, config.latent_shape, SWAP_CHUNKS, SWAP_CHUNK)[1]

    carry, before = begin(model.student, text)
    streams = {"own": go_on(model.student, carry, text)}
    for name in ("anchor", "window"):
        streams[name] = go_on(model.student, _exchanged(carry, name, other), text)
    streams["erased anchor"] = go_on(model.student, _erased(carry), text)

    def colours(latents):
        frames = decode_frames(model.codec, jnp.concatenate([before, latents], axis=1), (), True)[0]
        world = config.data.worlds
        return small_world.subject_colours(np.asarray(frames), world.colours, world.subject_radius[0])

    past = SWAP_CHUNK * stream.chunk_frames
    own_found = colours(streams["own"])
    first = np.array([found[(found >= 0).argmax()] for found in own_found])
    next_chunk = {name: np.asarray(latents[:, : stream.chunk_frames]) for name, latents in streams.items()}
    apart = np.abs(next_chunk["own"] - next_chunk["own"][other]).mean(axis=(1, 2, 3, 4))
    apart[apart == 0] = np.nan  # the only video of its caption
    for name, latents in streams.items():
        found = colours(latents)
        moved = np.abs(next_chunk[name] - next_chunk["own"]).mean(axis=(1, 2, 3, 4)) / apart
        for index, colour in enumerate(found):
            if first[index] < 0 or first[other[index]] < 0 or first[index] == first[other[index]]:
                continue
            absent = np.convolve(colour[past:] < 0, np.ones(ABSENCE), "valid") == ABSENCE
            after = colour[past + absent.argmax() + ABSENCE :] if absent.any() else colour[:0]
            after = after[after >= 0]
            yield {
                "swap": name,
                "video": index,
                "moved": float(moved[index]),
                "own_colour": float((after == first[index]).mean()) if len(after) else float("nan"),
                "other_colour": float((after == first[other[index]]).mean()) if len(after) else float("nan"),
            }


def _exchanged(carry: RolloutCarry, part: str, other: np.ndarray) -> RolloutCarry:
    """The carry with every sample's anchor or window replaced by another sample's."""
    cache = {"anchor": carry.cache.anchor, "window": carry.cache.window}
    # Keys and values are [layers, B, tokens, heads, head_dim]; what else an anchor has is the same for all samples.
    cache[part] = jax.tree.map(lambda x: x[:, other] if x.ndim == 5 else x, cache[part])
    return RolloutCarry(Cache(**cache), carry.chunk, carry.keys)


def _erased(carry: RolloutCarry) -> RolloutCarry:
    """The carry with an anchor of zeros."""
    anchor = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 5 else x, carry.cache.anchor)
    return RolloutCarry(Cache(anchor, carry.cache.window), carry.chunk, carry.keys)


def measure(folder: Path, names: list[str], seeds: list[int], jobs: int) -> None:
    """Measures the truth, the teacher, the initialised student and every trained arm, and writes the tables' rows.

    What is measured stays in `folder`/measured, and is not measured again.
    """
    runs = [("truth", 0), ("teacher", 0), *((name, 0) for name in _starts(folder, names))]
    for seed, name in itertools.product(seeds, names):
        if (folder / f"{name}-{seed}.seconds").exists():
            runs.append((name, seed))
        else:
            print(f"{name}-{seed}: not trained yet, left out")
    parts = folder / "measured"
    parts.mkdir(exist_ok=True)
    missing = [run for run in runs if not (parts / f"{run[0]}-{run[1]}.npy").exists()]
    spawn = multiprocessing.get_context("spawn")
    shares = spawn.Queue()
    for share in _share_cores(jobs):
        shares.put(share)
    with ProcessPoolExecutor(jobs, spawn, _take_cores, (shares,)) as pool:
        for future in [pool.submit(_measure_run, folder, parts, *run) for run in missing]:
            print(f"{future.result()}: measured", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for kind in ("videos", "swaps"):
        rows = [row for name, seed in runs for row in _read_part(parts / f"{name}-{seed}.{kind}.csv.gz")]
        (RESULTS / f"{kind}.csv.gz").unlink(missing_ok=True)
        if rows:  # swaps need an anchor
            write_rows(RESULTS / f"{kind}.csv.gz", rows)
    shown = [(name, np.load(parts / f"{name}-{seed}.npy")) for name, seed in runs if seed == seeds[0] or _once(name)]
    write_image(RESULTS / "frames.png", contact_sheet(shown, scale=3, columns=len(shown[0][1])))


def _once(arm: str) -> bool:
    """Whether the arm has no training seed."""
    return arm.partition(":")[0] in ("truth", "teacher", *STARTS)


def _starts(folder: Path, names: list[str]) -> list[str]:
    """The students before distillation, each with its own stream and with each other stream of the arms."""
    found = []
    for start, where in STARTS.items():
        if not (folder / f"{where}.seconds").exists():
            print(f"{where}: not trained yet, left out")
            continue
        streams = {load_config(folder / where / "config.json").stream: start}
        for name in names:
            streams.setdefault(_stream_of(name), f"{start}:{name}")
        found += streams.values()
    return found


def _stream_of(arm: str) -> StreamConfig:
    return parse_config([f"--config={CONFIG}:{arm}"]).stream


def _load_student(folder: Path, arm: str, seed: int) -> Model:
    if not _once(arm):
        return load(folder / f"{arm}-{seed}")
    start, _, stream = arm.partition(":")
    model = load(folder / STARTS[start])
    if not stream:
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, stream=_stream_of(stream)))


def _take_cores(shares) -> None:
    share = shares.get()
    if share:
        os.sched_setaffinity(0, share)


@functools.cache
def _true_worlds(folder: Path) -> tuple[Config, list[World]]:
    config = load_config(folder / "teacher" / "config.json")
    return config, worlds_for(config.data.worlds, round(max(HORIZONS) * config.distill.rollout_frames))


def _measure_run(folder: Path, parts: Path, arm: str, seed: int) -> str:
    config, worlds = _true_worlds(folder)
    prompts, length = [truth.caption for truth in worlds], config.distill.rollout_frames
    rows, swaps, shown = [], [], None
    model = None if arm in ("truth", "teacher") else _load_student(folder, arm, seed)
    for noise in NOISE_SEEDS if arm != "truth" else (0,):
        if arm == "truth":
            videos = np.stack([truth.video for truth in worlds])
        elif arm == "teacher":
            videos = roll_out_teacher(folder / "teacher", prompts, noise)
        else:
            videos = roll_out(model, prompts, noise, len(worlds[0].video))
        shown = videos[0] if shown is None else shown
        found = measure_videos(videos, worlds, config.data.worlds, length)
        rows.extend({"arm": arm, "seed": seed, "noise": noise, **row} for row in found)
        if model and model.config.stream.anchor.frames:
            found = measure_swaps(model, worlds, noise)
            swaps.extend({"arm": arm, "seed": seed, "noise": noise, **row} for row in found)
    write_rows(parts / f"{arm}-{seed}.videos.csv.gz", rows)
    if swaps:
        write_rows(parts / f"{arm}-{seed}.swaps.csv.gz", swaps)
    np.save(parts / f"{arm}-{seed}.npy", glimpses(shown, length))  # the last: with it, the run is measured
    jax.clear_caches()
    return f"{arm}-{seed}"


def _read_part(path: Path) -> list[dict[str, str]]:
    if not path.exists():  # no anchor to exchange
        return []
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def glimpses(video: np.ndarray, length: int) -> np.ndarray:
    """Every third frame of the first training length and, after a white one, of the video's last: [F, H, W, 3]."""
    last = video[-length:] if len(video) > length else np.full_like(video, 255)
    return np.concatenate([video[:length:3], np.full_like(video[:1], 255), last[::3]])


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes rows of one set of columns as gzipped CSV, the same bytes for the same rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    partial.replace(path)


# --- reporting --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, np.ndarray]:
    """Columns of a file of `write_rows`: text where one is, else float64."""
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: x if name in ("arm", "swap") else x.astype(float) for name, x in columns.items()}


def summarize(values: np.ndarray, seeds: np.ndarray, videos: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard error over training seeds (NaN for one), and a 95 % interval by a bootstrap of seeds and videos.

    values, seeds, videos: [N]; NaN values are left out.
    """
    kept = np.isfinite(values)
    values, seeds, videos = values[kept], seeds[kept], videos[kept]
    if not len(values):
        return (float("nan"),) * 4
    # Sums and counts by seed and video make a resample a product of multiplicities.
    seed_names, seed = np.unique(seeds, return_inverse=True)
    video_names, video = np.unique(videos, return_inverse=True)
    total, count = np.zeros((2, len(seed_names), len(video_names)))
    np.add.at(total, (seed, video), values)
    np.add.at(count, (seed, video), 1)
    by_seed = total.sum(axis=1) / count.sum(axis=1)
    error = by_seed.std(ddof=1) / np.sqrt(len(by_seed)) if len(by_seed) > 1 else float("nan")
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        of_seed = np.bincount(rng.integers(len(seed_names), size=len(seed_names)), minlength=len(seed_names))
        of_video = np.bincount(rng.integers(len(video_names), size=len(video_names)), minlength=len(video_names))
        weight = of_seed[:, None] * of_video
        if (weight * count).sum():
            draws.append((weight * total).sum() / (weight * count).sum())
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(values.mean()), float(error), float(low), float(high)


def compared_with_truth(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with each measure as `MEASURES` describes it."""
    result = dict(columns)
    for name in MEASURES:
        values = columns[name].copy()
        for horizon in HORIZONS if name not in _ITSELF else ():
            here = columns["horizon"] == horizon
            if here.any():
                truth = np.nanmean(columns[name][here & (columns["arm"] == "truth")])
                values[here] = values[here] - truth if name in _DIFFERENCES else values[here] / truth
        result[name] = values
    return result


def collapsed(columns: dict[str, np.ndarray]) -> dict[tuple[str, int], str]:
    """Distilled runs whose look at the first horizon is off by more than `COLLAPSE`, and in what.

    Takes compared columns.
    """
    found = {}
    for arm in (name for name in dict.fromkeys(columns["arm"]) if not _once(name)):
        for seed in np.unique(columns["seed"][columns["arm"] == arm]):
            here = (columns["arm"] == arm) & (columns["seed"] == seed) & (columns["horizon"] == HORIZONS[0])
            for name in ("brightness", "saturation", "contrast"):
                mean = columns[name][here].mean()
                if abs(mean - 1) > COLLAPSE:
                    found.setdefault((arm, int(seed)), f"{name} {mean:.2f} of the truth's")
    return found


def report() -> None:
    """Writes docs/small_world/tables.md and the figures."""
    columns = compared_with_truth(read_rows(RESULTS / "videos.csv.gz"))
    gone = collapsed(columns)
    keep = np.array([(arm, int(seed)) not in gone for arm, seed in zip(columns["arm"], columns["seed"], strict=True)])
    columns = {name: values[keep] for name, values in columns.items()}
    names = list(dict.fromkeys(columns["arm"]))
    summary = {
        (measure_name, arm, horizon): summarize(
            columns[measure_name][here], columns["seed"][here], columns["video"][here]
        )
        for arm in names
        for horizon in HORIZONS
        for here in [(columns["arm"] == arm) & (columns["horizon"] == horizon)]
        for measure_name in MEASURES
    }
    left_out = "; ".join(f"{arm}-{seed} ({why})" for (arm, seed), why in gone.items()) or "none"
    lines = [f"Collapsed and left out: {left_out}."]
    for horizon in HORIZONS:
        lines += ["", *_overview_table(summary, names, horizon)]
    for horizon in HORIZONS:
        lines += ["", *_difference_table(columns, names, horizon)]
    for measure_name in MEASURES:
        lines += ["", *_measure_table(summary, names, measure_name)]
    lines += ["", *_swap_table(gone)]
    (RESULTS / "tables.md").write_text("\n".join(lines) + "\n")
    _draw(summary, names)


def _overview_table(summary: dict, names: list[str], horizon: float) -> list[str]:
    lines = [f"**At {horizon:g}×: mean ± standard error over training seeds**", "", _row("arm", *OVERVIEW)]
    lines.append(_row(*["---"] * (1 + len(OVERVIEW))))
    for arm in names:
        cells = [_cell(*summary[measure_name, arm, horizon][:2]) for measure_name in OVERVIEW]
        if any(cells):
            lines.append(_row(arm, *cells))
    return lines


def _difference_table(columns: dict[str, np.ndarray], names: list[str], horizon: float) -> list[str]:
    lines = [
        f"**At {horizon:g}×: `{BASELINE}` minus the others, by training seed, noise and caption, with 95 % intervals**",
        "",
        _row("minus", *OVERVIEW),
        _row(*["---"] * (1 + len(OVERVIEW))),
    ]
    for arm in names:
        cells = [_cell(*paired_difference(columns, arm, name, horizon), signed=True) for name in OVERVIEW]
        if arm != BASELINE and any(cells):
            lines.append(_row(arm, *cells))
    return lines if len(lines) > 4 else []


def paired_difference(
    columns: dict[str, np.ndarray], arm: str, measure_name: str, horizon: float
) -> tuple[float, float, float, float]:
    """`summarize` of `BASELINE` minus `arm`, video by video of the same seeds; an arm without seeds meets each seed."""
    of_arm = {}
    for name in (BASELINE, arm):
        here = (columns["arm"] == name) & (columns["horizon"] == horizon)
        keys = zip(columns["seed"][here], columns["noise"][here], columns["video"][here], strict=True)
        of_arm[name] = dict(zip(keys, columns[measure_name][here], strict=True))
    pairs = []
    for (seed, noise, video), value in of_arm[BASELINE].items():
        other = of_arm[arm].get((0.0 if _once(arm) else seed, 0.0 if arm == "truth" else noise, video))
        if other is not None:
            pairs.append((value - other, seed, video))
    return summarize(*np.array(pairs).reshape(-1, 3).T)


def _measure_table(summary: dict, names: list[str], measure_name: str) -> list[str]:
    text = MEASURES[measure_name]
    lines = [f"**{text[0].upper()}{text[1:]}**", "", _row("arm", *(f"{horizon:g}×" for horizon in HORIZONS))]
    lines.append(_row(*["---"] * (1 + len(HORIZONS))))
    for arm in names:
        lines.append(_row(arm, *(_cell(*summary[measure_name, arm, horizon]) for horizon in HORIZONS)))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(mean: float, error: float, low: float = np.nan, high: float = np.nan, signed: bool = False) -> str:
    """A table's cell; what is NaN is left out."""
    if not np.isfinite(mean):
        return ""
    sign = "+" if signed else ""
    text = f"{mean:{sign}.2f}"
    if np.isfinite(error):
        text += f" ± {error:.2f}"
    if np.isfinite(low):
        text += f" [{low:{sign}.2f}, {high:{sign}.2f}]"
    return text


def _swap_table(gone: dict[tuple[str, int], str]) -> list[str]:
    if not (RESULTS / "swaps.csv.gz").exists():  # no arm with an anchor was measured
        return []
    columns = read_rows(RESULTS / "swaps.csv.gz")
    lines = ["**What exchanging a part of the cache with another video's does**", ""]
    lines += [
        _row("arm", "exchanged", "next chunk moves", "own colour comes back", "the other's comes back"),
        _row(*["---"] * 5),
    ]
    for arm in dict.fromkeys(columns["arm"]):
        for swap in dict.fromkeys(columns["swap"]):
            here = (columns["arm"] == arm) & (columns["swap"] == swap)
            here &= np.array([(arm, int(seed)) not in gone for seed in columns["seed"]])
            cells = [
                _cell(*summarize(columns[name][here], columns["seed"][here], columns["video"][here]))
                for name in ("moved", "own_colour", "other_colour")
            ]
            if any(cells):
                lines.append(_row(arm, "nothing" if swap == "own" else swap, *cells))
    return lines


def _draw(summary: dict, names: list[str]) -> None:
    """A panel per measure, a line per arm over the horizons: of anchors, ablations, and before distillation."""
    groups = {start: [name for name in names if name.partition(":")[0] == start] for start in STARTS}
    distilled = [name for name in names if not _once(name)]
    anchors = [name for name in distilled if name in ANCHORS]
    figures = {"anchors": anchors, "ablations": [n for n in distilled if n not in anchors or n == BASELINE], **groups}
    for file, shown in figures.items():
        shown = ["truth", *shown]
        figure, panels = pyplot.subplots(2, 4, figsize=(15, 7), layout="constrained")
        for panel, measure_name in zip(panels.flat, OVERVIEW, strict=True):
            for number, arm in enumerate(shown):
                found = np.array([summary[measure_name, arm, horizon] for horizon in HORIZONS])
                colour = "black" if arm == "truth" else f"C{number}"
                panel.plot(
                    HORIZONS, found[:, 0], marker="o", color=colour, label=arm, linewidth=2 if arm == BASELINE else 1
                )
                panel.fill_between(HORIZONS, found[:, 2], found[:, 3], color=colour, alpha=0.12, linewidth=0)
            panel.set_xscale("log")
            panel.set_xticks(HORIZONS, [f"{h:g}×" for h in HORIZONS])
            panel.minorticks_off()
            panel.set_title(MEASURES[measure_name], fontsize=8)
            panel.grid(alpha=0.3)
        panels[0, 0].legend(fontsize=8)
        figure.savefig(RESULTS / f"{file}.png", dpi=90)
        pyplot.close(figure)


def main() -> None:
    study, longer = arms()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure", "report"))
    parser.add_argument("--folder", type=Path, default=Path("runs/small_world"))
    parser.add_argument("--arms", nargs="+", choices=study + longer, metavar="ARM", help="default: those of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    if options.command == "train":
        options.folder.mkdir(parents=True, exist_ok=True)
        train(options.folder.resolve(), options.arms or study, options.seeds, options.jobs)
    elif options.command == "measure":
        measure(options.folder.resolve(), options.arms or study + longer, options.seeds, options.jobs)
    else:
        report()


if __name__ == "__main__":
    main()
