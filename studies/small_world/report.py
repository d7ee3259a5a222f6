"""Tables and figures of the study, from the rows of `measure` alone."""

import itertools
import tempfile
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from studies.rows import read_columns, require_rows, rows_where
from studies.small_world import ANCHORS, HORIZONS, LENT, UNSEEN, once
from studies.statistics import paired_rows, summarize, summary_of
from studies.tables import cell, head, row

matplotlib.use("Agg")
from matplotlib import pyplot

NEARLY_ALL = 0.95  # of the videos; where fewer tell, a table with intervals says how many
COLLAPSE = 0.2  # of the truth's brightness, saturation or contrast at the first horizon

# (column, what it is in a table)
MEASURES = {
    "pan": "signed pan / truth",
    "hue": "signed turn of the hue / truth",
    "reversed": "share of videos whose hue turns against the caption",
    "hue_lock": "cosine of the hue to the first frame's, minus the truth's",
    "picture_lock": "correlation with the first frame, minus the truth's",
    "brightness": "brightness / truth",
    "saturation": "saturation / truth",
    "contrast": "contrast / truth",
    "seen": "share of frames with a subject / truth",
    "identity": "share of subjects that come back in the first one's colour",
    "memory": "identity, where 0 is what the first colour of another video of the caption would make it",
    "variety": "share of the caption's other videos whose first subject has another colour / truth",
}
OVERVIEW = ("pan", "hue", "reversed", "saturation", "contrast", "seen", "memory", "variety")  # of tables and figures
FIRST = "first"  # the folder of the rows of the same arms when they were trained before, from the teacher on
BASELINE = "adaptive"  # what the arms are compared with
_DIFFERENCES = ("hue_lock", "picture_lock")
# Not to be compared with the truth's mean: they are so by what they are.
_ITSELF = ("pan", "hue", "reversed", "identity", "memory")


def compared_with_truth(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with each measure as `MEASURES` describes it, and `memory_weight`, of a value in an arm's mean."""
    columns = dict(columns)
    columns["reversed"] = np.where(np.isfinite(columns["hue"]), columns["hue"] < 0, np.nan)
    # Of the way from chance to always right; the less chance leaves open, the less a video tells.
    columns["memory_weight"] = 1 - columns["chance"]
    with np.errstate(invalid="ignore", divide="ignore"):
        memory = (columns["identity"] - columns["chance"]) / columns["memory_weight"]
    columns["memory"] = np.where(columns["memory_weight"] > 0, memory, np.nan)
    columns["variety"] = _by_video(columns)
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


def _by_video(columns: dict[str, np.ndarray]) -> np.ndarray:
    """`variety` with the same mean, but each video's value as if the others were not drawn again with it.

    It is a mean over pairs of videos. A bootstrap that draws the one and keeps the other finds half of the error;
    twice a video's deviation from the mean of its caption makes it whole (the projection of a U-statistic).
    """
    variety = columns["variety"]
    keys = [np.unique(columns[name], return_inverse=True)[1] for name in ("arm", "seed", "noise", "horizon", "caption")]
    group = np.unique(np.stack(keys), axis=1, return_inverse=True)[1].ravel()
    told = np.isfinite(variety)
    with np.errstate(invalid="ignore"):
        means = np.bincount(group, np.where(told, variety, 0)) / np.bincount(group, told)
    return 2 * variety - means[group]


def collapsed(columns: dict[str, np.ndarray]) -> dict[tuple[str, int], str]:
    """Distilled runs whose look at the first horizon is off by more than `COLLAPSE`, and in what.

    Takes compared columns. What another anchor's stream makes of a run is not its collapse.
    """
    found = {}
    for arm in filter(_distilled, dict.fromkeys(columns["arm"])):
        for seed in np.unique(columns["seed"][columns["arm"] == arm]):
            here = (columns["arm"] == arm) & (columns["seed"] == seed) & (columns["horizon"] == HORIZONS[0])
            for name in ("brightness", "saturation", "contrast"):
                mean = columns[name][here].mean()
                if abs(mean - 1) > COLLAPSE:
                    found.setdefault((arm, int(seed)), f"{name} {mean:.2f} of the truth's")
    return found


def _distilled(arm: str) -> bool:
    """Whether the arm is a distilled student with the stream that it was distilled with."""
    return not once(arm) and ":" not in arm


def report(results: Path) -> None:
    """Writes tables.md and the figures into `results`, from the rows there.

    Raises:
        UserError: there are no rows.
    """
    require_rows(results / "videos.csv.gz")
    columns, gone = _read_videos(results)
    summary = _summarize_all(columns)
    names = list(dict.fromkeys(columns["arm"]))
    left_out = "; ".join(f"{arm}-{seed} ({why})" for (arm, seed), why in gone.items()) or "none"
    lines = [f"Collapsed and left out: {left_out}."]
    for horizon in HORIZONS:
        lines += ["", *_overview_table(summary, names, horizon)]
    for horizon in HORIZONS:
        lines += ["", *_difference_table(columns, names, horizon)]
    for measure_name in MEASURES:
        lines += ["", *_measure_table(columns, summary, names, measure_name)]
    if (results / FIRST / "videos.csv.gz").exists():
        first = _summarize_all(_read_videos(results / FIRST)[0])
        lines += ["", *_apart_table(summary, first)]
        for horizon in HORIZONS:
            of_both = [arm for arm in names if (OVERVIEW[0], arm, horizon) in first]
            lines += ["", *_overview_table(first, of_both, horizon, "The first time, at")]
    for kind, table in (("swaps", _swap_table), ("contents", _contents_table), ("attention", _attention_table)):
        columns = read_columns(results / f"{kind}.csv.gz")
        if columns:  # an arm with an anchor, or any student, was measured
            lines += ["", *table(_without(columns, gone))]
    with tempfile.TemporaryDirectory(dir=results) as partial:
        (Path(partial) / "tables.md").write_text("\n".join(lines).rstrip() + "\n")
        _draw(summary, names, Path(partial))
        for path in Path(partial).iterdir():
            path.replace(results / path.name)


def _read_videos(results: Path) -> tuple[dict[str, np.ndarray], dict[tuple[str, int], str]]:
    """Compared columns of the videos without those of collapsed runs, and these."""
    columns = compared_with_truth(read_columns(results / "videos.csv.gz"))
    gone = collapsed(columns)
    return _without(columns, gone), gone


def _summarize_all(columns: dict[str, np.ndarray]) -> dict[tuple[str, str, float], tuple[float, float, float, float]]:
    """`summarize` of every measure, arm and horizon."""
    return {
        (measure_name, arm, horizon): summary_of(columns, measure_name, here)
        for arm in dict.fromkeys(columns["arm"])
        for horizon in HORIZONS
        for here in [(columns["arm"] == arm) & (columns["horizon"] == horizon)]
        for measure_name in MEASURES
    }


def _apart_table(summary: dict, first: dict) -> list[str]:
    lines = [
        "**How far distilled arms are from the first time's: in the mean over arms, at most, and how many within two "
        "standard errors of the difference**",
        "",
        *head("at", *OVERVIEW),
    ]
    for horizon in HORIZONS:
        cells = []
        for name in OVERVIEW:
            both = [key for key in first if key in summary and key[0::2] == (name, horizon) and _distilled(key[1])]
            apart = {key[1]: abs(summary[key][0] - first[key][0]) for key in both}
            errors = {key[1]: np.hypot(summary[key][1], first[key][1]) for key in both}
            told = {arm: value for arm, value in apart.items() if np.isfinite(value) and np.isfinite(errors[arm])}
            if not told:
                cells.append("")
                continue
            farthest = max(told, key=told.get)
            near = sum(value <= 2 * errors[arm] for arm, value in told.items())
            mean = np.mean(list(told.values()))
            cells.append(f"{mean:.3f}, {told[farthest]:.2f} ({farthest}), {near} of {len(told)}")
        lines.append(row(f"{horizon:g}×", *cells))
    return lines


def _overview_table(summary: dict, names: list[str], horizon: float, at: str = "At") -> list[str]:
    lines = [f"**{at} {horizon:g}×: mean ± standard error over training seeds**", "", *head("arm", *OVERVIEW)]
    for arm in names:
        cells = [cell(*summary[measure_name, arm, horizon][:2]) for measure_name in OVERVIEW]
        if any(cells):
            lines.append(row(arm, *cells))
    return lines


def _difference_table(columns: dict[str, np.ndarray], names: list[str], horizon: float) -> list[str]:
    lines = [
        f"**At {horizon:g}×: `{BASELINE}` minus the others, by training seed, noise and caption, with 95 % intervals**",
        "",
        *head("minus", *OVERVIEW),
    ]
    for arm in filter(_distilled, names):
        cells = [cell(*paired_difference(columns, arm, name, horizon), signed=True) for name in OVERVIEW]
        if arm != BASELINE and any(cells):
            lines.append(row(arm, *cells))
    return lines if len(lines) > 4 else []


def paired_difference(
    columns: dict[str, np.ndarray], arm: str, measure_name: str, horizon: float
) -> tuple[float, float, float, float]:
    """`summarize` of `BASELINE` minus `arm`, video by video of the same seeds."""
    baseline, other = (rows_where(columns, arm=name, horizon=horizon) for name in (BASELINE, arm))
    return summary_of(columns, measure_name, paired_rows(columns, baseline, other))


def _measure_table(columns: dict[str, np.ndarray], summary: dict, names: list[str], measure_name: str) -> list[str]:
    text = MEASURES[measure_name]
    lines = [f"**{text[0].upper()}{text[1:]}**", "", *head("arm", *(f"{horizon:g}×" for horizon in HORIZONS))]
    for arm in names:
        cells = []
        for horizon in HORIZONS:
            cells.append(cell(*summary[measure_name, arm, horizon]))
            here = (columns["arm"] == arm) & (columns["horizon"] == horizon)
            told = np.isfinite(columns[measure_name][here])
            if cells[-1] and told.mean() < NEARLY_ALL:
                cells[-1] += f" of {told.mean():.0%}"
        lines.append(row(arm, *cells))
    return lines


def _without(columns: dict[str, np.ndarray], gone: dict[tuple[str, int], str]) -> dict[str, np.ndarray]:
    """The columns without the rows of some runs, whatever they stream with."""
    keys = zip(columns["arm"], columns["seed"], strict=True)
    keep = np.array([(arm.partition(":")[0], int(seed)) not in gone for arm, seed in keys])
    return {name: values[keep] for name, values in columns.items()}


def _swap_table(columns: dict[str, np.ndarray]) -> list[str]:
    lines = [
        "**What exchanging a part of the cache with another video's does to the next chunk and to the next ball**",
        "",
        *head("arm", "exchanged", "next chunk moves", "its own colour", "the other's", "videos"),
    ]
    for arm in dict.fromkeys(columns["arm"]):
        for swap in dict.fromkeys(columns["swap"]):
            here = rows_where(columns, arm=arm, swap=swap)
            found = [summary_of(columns, name, here) for name in ("moved", "own_colour", "other_colour")]
            lines.append(row(arm, "nothing" if swap == "own" else swap, *(cell(*x) for x in found), str(here.sum())))
    return lines


def _contents_table(columns: dict[str, np.ndarray]) -> list[str]:
    spans = ["in view", *(f"{first} to {after - 1} frames" for first, after in itertools.pairwise(UNSEEN[1:]))]
    spans.append(f"{UNSEEN[-1]} or more")
    lines = [
        "**How often the colour of the ball last seen is told right, by how long it has been out of view**",
        "",
        *head("arm", "from", *spans),
    ]
    for arm in dict.fromkeys(columns["arm"]):
        of_arm = columns["arm"] == arm
        for part in dict.fromkeys(columns["part"][of_arm]):
            spans_of = [rows_where(columns, arm=arm, part=part, unseen=first) for first in UNSEEN]
            found = [summary_of(columns, "right", here) for here in spans_of]
            lines.append(row(arm, part, *(cell(*x) for x in found)))
        answers = [columns["answers"][of_arm & (columns["part"] == part) & (columns["unseen"] == x)] for x in UNSEEN]
        total = sum(x.sum() for x in answers)
        lines.append(row(arm, "share of the answers", *(f"{x.sum() / total:.2f}" if total else "" for x in answers)))
    return lines


def _attention_table(columns: dict[str, np.ndarray]) -> list[str]:
    lines = ["**Share of a content frame's attention outside itself that a frame gets, in the mean over its part**", ""]
    lines += head("arm", "anchor", "state", "oldest in the window", "newest in the window", "of its own chunk")
    for arm in dict.fromkeys(columns["arm"]):
        shares = [
            [_attention_of(columns, arm, seed, part, end) for seed in np.unique(columns["seed"][columns["arm"] == arm])]
            for part, end in (("anchor", None), ("state", None), ("window", 0), ("window", -1), ("chunk", None))
        ]
        cells = [cell(*summarize(np.array(x), np.arange(len(x)), np.zeros(len(x)))[:2]) for x in shares]
        lines.append(row(arm, *cells))
    return lines


def _attention_of(columns: dict[str, np.ndarray], arm: str, seed: float, part: str, end: int | None) -> float:
    """Mean share of a part's frames, or that of its first or last one; NaN where there is none."""
    here = (columns["arm"] == arm) & (columns["seed"] == seed) & (columns["part"] == part)
    shares = columns["share"][here][np.argsort(columns["frame"][here])]
    return float(np.mean(shares if end is None else shares[end])) if len(shares) else float("nan")


def _draw(summary: dict, names: list[str], results: Path) -> None:
    """A panel per measure, a line per arm over the horizons; a figure per group of arms."""
    started_apart = ("recurrent", "unanchored")
    distilled = [name for name in names if _distilled(name)]
    alike = [name for name in distilled if not name.startswith(started_apart)]
    figures = {
        "anchors": [name for name in alike if name in ANCHORS],
        "ablations": [name for name in alike if name not in ANCHORS or name == BASELINE],
        "starts": [name for name in distilled if name in ("static", BASELINE) or name.startswith(started_apart)],
        **{student: [name for name in names if name.partition(":")[0] == student] for student in LENT},
    }
    for file, shown in figures.items():
        if set(shown) <= {"static", BASELINE}:  # nothing to compare them with
            continue
        figure, panels = pyplot.subplots(2, 4, figsize=(15, 7), layout="constrained")
        others = itertools.cycle(f"C{number}" for number in range(10) if number != 1)
        colours = {arm: "C1" if arm.rpartition(":")[2] == BASELINE else next(others) for arm in shown}
        for panel, measure_name in zip(panels.flat, OVERVIEW, strict=True):
            for arm, colour in {"truth": "black", **colours}.items():
                found = np.array([summary[measure_name, arm, horizon] for horizon in HORIZONS])
                panel.plot(HORIZONS, found[:, 0], marker="o", color=colour, label=arm, linewidth=1 + (colour == "C1"))
                panel.fill_between(HORIZONS, found[:, 2], found[:, 3], color=colour, alpha=0.12, linewidth=0)
            panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
            panel.set_xscale("log")
            panel.set_xticks(HORIZONS, [f"{h:g}×" for h in HORIZONS])
            panel.minorticks_off()
            panel.set_title(textwrap.fill(f"{measure_name}: {MEASURES[measure_name]}", 50), fontsize=8)
            panel.grid(alpha=0.3)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
        figure.savefig(results / f"{file}.png", dpi=90)
        pyplot.close(figure)
