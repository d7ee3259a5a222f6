"""What a teacher must show before anything is distilled from it."""

from pathlib import Path

import numpy as np

from adastate_jax.config.files import load_config
from adastate_jax.data.worlds import World, WorldConfig
from adastate_jax.errors import UserError
from studies.changing_world import LENGTH, NOISE_SEEDS, PER_CAPTION
from studies.changing_world.measure import measure_videos, measure_visits
from studies.changing_world.memory import returns
from studies.changing_world.worlds import colours_of, worlds_of_each_caption
from studies.rollouts import roll_out_teacher
from studies.runs import done_file

# Least and most of each; see `found_in`.
GATES = {
    "pan": (0.9, 1.1),
    "hue": (0.8, 1.2),
    "landscape": (0.9, 1.0),
    "changing": (0.35, 0.65),
    "steady": (0.8, 1.0),
    "last after a change": (0.8, 1.0),
    "last without one": (0.8, 1.0),
    "withheld pan": (0.8, 1.2),
    "withheld hue": (0.7, 1.3),
    "withheld landscape": (0.8, 1.0),
}


def check_teacher(folder: Path) -> None:
    """Raises a `UserError` unless the teacher's videos are as `GATES` asks; looks once at a trained one."""
    path, done = folder / "teacher.gates", done_file(folder / "teacher")
    if path.exists() and path.stat().st_mtime >= done.stat().st_mtime:
        return
    config = load_config(folder / "teacher" / "config.json").data.worlds
    worlds = worlds_of_each_caption(config, LENGTH)
    prompts = [world.caption for world in worlds]
    videos = [roll_out_teacher(folder / "teacher", prompts, noise) for noise in NOISE_SEEDS]
    found = found_in(np.concatenate(videos), worlds * len(videos), config)
    told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    failed = [name for name, (least, most) in GATES.items() if not least <= found[name] <= most]
    if failed:
        needed = ", ".join(f"{name} between {GATES[name][0]} and {GATES[name][1]}" for name in failed)
        raise UserError(f"{folder}/teacher: no arm is distilled from it ({told}; needed: {needed}); train it longer")
    path.write_text(f"{told}\n")
    print(f"teacher: {told}", flush=True)


def found_in(videos: np.ndarray, worlds: list[World], config: WorldConfig) -> dict[str, float]:
    """Of what the gates are: of videos uint8 [V, F, H, W, 3] of one training length, one for each of the worlds.

    Pan and hue are of the truth, `landscape` the share of videos that show theirs; these are of captions that are known
    from training, and of `withheld` ones. `changing` is the share of videos whose first ball changes its colour,
    `steady` that of balls that do so once at most, `last` that of balls which come back as they were seen last.
    """
    found = colours_of(videos, config)
    rows = list(measure_videos(videos, found, worlds, config))
    columns = {name: np.array([row[name] for row in rows]) for name in ("pan", "hue", "landscape")}
    withheld = np.isin([world.caption for world in worlds], config.withheld)
    visits = list(measure_visits(found))
    visits = {name: np.array([row[name] for row in visits]) for name in visits[0]}
    per_noise = PER_CAPTION * len({world.caption for world in worlds})
    visits = {"arm": np.zeros(len(visits["video"])), "seed": np.zeros(len(visits["video"])), **visits}
    visits["noise"], visits["video"] = divmod(visits["video"], per_noise)
    begin, back = visits["number"] == 0, returns(visits)
    after = {name: back["was_last"][(back["replaced"] > 0) == name] for name in (True, False)}
    return {
        **{name: float(values[~withheld].mean()) for name, values in columns.items()},
        "changing": float((visits["entry"] != visits["exit"])[begin].mean()),
        "steady": _mean((visits["switches"] < 2).astype(float)),
        "last after a change": _mean(after[True]),
        "last without one": _mean(after[False]),
        **{f"withheld {name}": float(values[withheld].mean()) for name, values in columns.items()},
    }


def _mean(values: np.ndarray) -> float:
    """NaN where there is none: no gate lets that pass."""
    return float(values.mean()) if len(values) else float("nan")
