"""Tables and a figure of the study, from the rows of `measure` alone."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from adastate_jax.config.files import parse_config
from adastate_jax.data.worlds import captions
from studies.changing_world import CONFIG, HORIZONS, LENGTH, PER_CAPTION, PERIOD, STARTS, UNTRAINED, once
from studies.changing_world.memory import half_life, returns
from studies.rows import read_columns, require_rows, rows_where
from studies.statistics import holm, significance, summarize, summary_of
from studies.tables import cell, head, row

matplotlib.use("Agg")
from matplotlib import pyplot

Columns = dict[str, np.ndarray]

MEASURES = {
    "pan": "signed pan / truth",
    "hue": "signed turn of the hue / truth",
    "reversed": "share of videos whose hue turns against the caption",
    "landscape": "share of videos whose brightness is nearest to that of the caption's landscape",
    "brightness": "brightness / truth",
    "saturation": "saturation / truth",
    "contrast": "contrast / truth",
    "seen": "share of frames with a ball / truth",
}
_OF_TRUTH = ("brightness", "saturation", "contrast", "seen")
OVERVIEW = ("pan", "hue", "reversed", "landscape", "saturation", "contrast", "seen")
COLLAPSE = 0.2  # of the truth's brightness, saturation or contrast at the first horizon
MOST_REPLACED = 3  # and more
BASELINE = "anchored/adaptive"  # the paper's own, which the others are compared with
# What is compared: a measure at a horizon, or of the balls that come back until then, see `span_until`.
COMPARED = {
    "memory, 2.5×": ("memory_last", 2.5),
    "memory, 6×": ("memory_last", 6.0),
    "memory, 20×": ("memory_last", 20.0),
    **{f"{name}, 20×": (name, 20.0) for name in ("pan", "hue", "saturation", "contrast")},
}


def report(results: Path) -> None:
    """Writes tables.md and memory.png into `results`, from the rows there.

    Raises:
        UserError: there are no rows.
    """
    require_rows(results / "videos.csv.gz")
    videos, gone = _read_videos(results)
    visits = _without(read_columns(results / "visits.csv.gz"), gone)
    back = returns(visits)
    names = list(dict.fromkeys(videos["arm"]))
    left_out = "; ".join(f"{arm}, seed {seed} ({why})" for (arm, seed), why in gone.items()) or "none"
    lines = [f"Collapsed and left out: {left_out}.", "", *_memory_table(back, names)]
    lines += ["", *_replacement_table(back, names), "", *_half_life_table(back, visits, names)]
    for horizon in HORIZONS:
        lines += ["", *_overview_table(videos, names, horizon)]
    lines += ["", *_caption_table(videos, names), "", *_comparison_table(videos, back, names)]
    for kind, table in (("contents", _contents_table), ("attention", _attention_table), ("seconds", _seconds_table)):
        columns = read_columns(results / f"{kind}.csv.gz")
        if columns:
            lines += ["", *table(columns)]
    with tempfile.TemporaryDirectory(dir=results) as partial:
        (Path(partial) / "tables.md").write_text("\n".join(lines).rstrip() + "\n")
        _draw(back, read_columns(results / "contents.csv.gz"), names, Path(partial) / "memory.png")
        for path in Path(partial).iterdir():
            path.replace(results / path.name)


def _read_videos(results: Path) -> tuple[Columns, dict[tuple[str, int], str]]:
    """Columns of the videos as `MEASURES` describes them, without collapsed runs, and these."""
    columns = read_columns(results / "videos.csv.gz")
    columns["reversed"] = (columns["hue"] < 0).astype(float)
    worlds = parse_config([f"--config={CONFIG}:teacher"]).data.worlds
    withheld = np.isin(captions(worlds), worlds.withheld)
    columns["withheld"] = withheld[(columns["video"] // PER_CAPTION).astype(int)]
    for name, horizon in itertools.product(_OF_TRUTH, HORIZONS):
        here = columns["horizon"] == horizon
        true = here & (columns["arm"] == "truth")
        if true.any():
            columns[name][here] /= columns[name][true].mean()
    gone = {}
    for arm, seed in dict.fromkeys(zip(columns["arm"], columns["seed"].astype(int), strict=True)):
        if once(arm):
            continue
        here = rows_where(columns, arm=arm, seed=seed, horizon=HORIZONS[0])
        for name in ("brightness", "saturation", "contrast"):
            mean = columns[name][here].mean()
            if abs(mean - 1) > COLLAPSE:
                gone.setdefault((arm, seed), f"{name} {mean:.2f} of the truth's")
    return _without(columns, gone), gone


def _without(columns: Columns, gone: dict[tuple[str, int], str]) -> Columns:
    """The columns without the rows of some runs."""
    keep = np.array([(arm, int(seed)) not in gone for arm, seed in zip(columns["arm"], columns["seed"], strict=True)])
    return {name: values[keep] for name, values in columns.items()}


def span_until(back: Columns, horizon: float) -> np.ndarray:
    """Which rows are of balls that come back between the horizon before (or the beginning) and this one."""
    before = max((x for x in HORIZONS if x < horizon), default=0.0)
    return (back["frame"] >= before * LENGTH) & (back["frame"] < horizon * LENGTH)


def _table(title: str, first: str, names: list[str], columns: dict[str, Callable[[str], str]]) -> list[str]:
    """A row for each of `names`, without those of which nothing is told; each column's function gives a cell."""
    lines = [f"**{title}**", "", *head(first, *columns)]
    for name in names:
        cells = [of_name(name) for of_name in columns.values()]
        if any(cells):
            lines.append(row(name, *cells))
    return lines


def _memory_table(back: Columns, names: list[str]) -> list[str]:
    def of(name: str, horizon: float) -> Callable[[str], str]:
        return lambda arm: cell(*summary_of(back, name, (back["arm"] == arm) & span_until(back, horizon)))

    columns = {f"{x}, {n:g}×": of(f"memory_{x}", n) for x in ("last", "first") for n in HORIZONS}
    title = (
        "Memory of the colour seen last, and of the video's first: of balls that come back until a horizon, from the "
        "one before on; 0 is chance"
    )
    return _table(title, "arm", names, columns)


def told_apart(back: Columns, replaced: int) -> np.ndarray:
    """Which rows have so many replacements before them, and a last colour that is not the first if there was one."""
    here = np.minimum(back["replaced"], MOST_REPLACED) == replaced
    return here & (back["last"] != back["first"]) if replaced else here


def _replacement_table(back: Columns, names: list[str]) -> list[str]:
    def shares(replaced: int) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            here = (back["arm"] == arm) & told_apart(back, replaced)
            kinds = ("last", "first") if replaced else ("last",)
            found = [summarize(back[f"was_{x}"][here], back["seed"][here], back["video"][here]) for x in kinds]
            return " / ".join(cell(*x[:2]) for x in found) + f" of {here.sum()}" if here.any() else ""

        return of_arm

    title = (
        "Share of balls that come back as they were seen last / as the first one was, by how often a colour was "
        "replaced in view before; where these differ"
    )
    ends = [*map(str, range(MOST_REPLACED)), f"{MOST_REPLACED} or more"]
    return _table(title, "arm", names, {f"after {text}": shares(number) for number, text in enumerate(ends)})


def _half_life_table(back: Columns, visits: Columns, names: list[str]) -> list[str]:
    def life(arm: str) -> str:
        returned, is_gone = half_life(back, back["arm"] == arm)
        return "" if np.isnan(returned) else f"{'' if is_gone else 'more than '}{returned * PERIOD:.0f}"

    def changed(first: bool) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            here = (visits["arm"] == arm) & ((visits["number"] == 0) == first)
            values = (visits["entry"] != visits["exit"]).astype(float)
            return cell(*summarize(values[here], visits["seed"][here], visits["video"][here]))

        return of_arm

    columns = {"half-life, chunks": life, "first ball replaced": changed(True), "later ones": changed(False)}
    return _table("How long a colour is held, and how often one is replaced in view", "arm", names, columns)


def _overview_table(videos: Columns, names: list[str], horizon: float) -> list[str]:
    here = rows_where(videos, horizon=horizon, withheld=False)

    def of(name: str) -> Callable[[str], str]:
        return lambda arm: cell(*summary_of(videos, name, here & (videos["arm"] == arm))[:2])

    title = f"At {horizon:g}×, of captions known from training: mean ± standard error over training seeds"
    return _table(title, "arm", names, {name: of(name) for name in OVERVIEW})


def _caption_table(videos: Columns, names: list[str]) -> list[str]:
    def of(name: str, withheld: bool) -> Callable[[str], str]:
        here = rows_where(videos, horizon=HORIZONS[0], withheld=withheld)
        return lambda arm: cell(*summary_of(videos, name, here & (videos["arm"] == arm))[:2])

    columns = {
        f"{name}, {'withheld' if withheld else 'known'}": of(name, withheld)
        for name in ("pan", "hue", "reversed", "landscape")
        for withheld in (False, True)
    }
    return _table("Captions that were known and withheld, at 1×", "arm", names, columns)


def _comparison_table(videos: Columns, back: Columns, names: list[str]) -> list[str]:
    """Each arm with several seeds minus `BASELINE`, with p over training seeds, corrected for all of them (Holm)."""
    several = [x for x in names if not once(x) and len(np.unique(videos["seed"][videos["arm"] == x])) > 1]
    found = {}
    for arm, (title, (name, horizon)) in itertools.product(several, COMPARED.items()):
        if arm == BASELINE or BASELINE not in several:
            continue
        of_memory = name.startswith("memory")
        columns, here = (back, span_until(back, horizon)) if of_memory else (videos, videos["horizon"] == horizon)
        both = [here & (columns["arm"] == x) for x in (arm, BASELINE)]
        seeds = np.intersect1d(*(columns["seed"][x] for x in both))
        means = [[summary_of(columns, name, x & (columns["seed"] == seed))[0] for seed in seeds] for x in both]
        found[arm, title] = np.subtract(*means)
    corrected = dict(zip(found, holm(np.array([significance(apart) for apart in found.values()])), strict=True))

    def of(title: str) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            if (arm, title) not in found:
                return ""
            apart, p = found[arm, title], corrected[arm, title]
            mean = cell(apart.mean(), apart.std(ddof=1) / np.sqrt(len(apart)), signed=True)
            return f"{mean}, p {p:.3f}" if np.isfinite(p) else mean

        return of_arm

    title = (
        f"Minus `{BASELINE}` of the same training seed: mean ± standard error; p is of Student's t over the seeds, "
        f"corrected for {len(found)} comparisons (Holm)"
    )
    return _table(title, "arm", several, {title: of(title) for title in COMPARED})


def _contents_table(columns: Columns) -> list[str]:
    spans = sorted(set(columns["since"]))
    titles = ["no change" if x < 0 else f"{x:g}" for x in spans]
    keys = list(dict.fromkeys(zip(columns["arm"], columns["part"], strict=True)))

    def of(since: float) -> Callable[[str], str]:
        def of_key(key: str) -> str:
            arm, part = key.split(", ")
            here = rows_where(columns, arm=arm, part=part, since=since)
            found = [
                summarize(columns[x][here], columns["seed"][here], columns["video"][here], columns["answers"][here])
                for x in ("last", "before")
            ]
            return " / ".join(filter(None, (cell(*x[:2]) for x in (found if since >= 0 else found[:1]))))

        return of_key

    title = "How often the colour seen last / the one before it is read from the cache, by chunks since it was replaced"
    rows = [f"{arm}, {part}" for arm, part in keys]
    return _table(title, "arm, part", rows, {text: of(x) for text, x in zip(titles, spans, strict=True)})


def _attention_table(columns: Columns) -> list[str]:
    keys = dict.fromkeys(zip(columns["arm"], columns["part"], strict=True))

    def of(chunks: float) -> Callable[[str], str]:
        def of_key(key: str) -> str:
            arm, part = key.split(", ")
            shares = columns["share"][rows_where(columns, arm=arm, part=part, chunks=chunks)]
            return cell(*summarize(shares, np.arange(len(shares)), np.zeros(len(shares)))[:2]) if len(shares) else ""

        return of_key

    title = "Share of a content frame's attention outside itself that a part gets, by chunks from a change in view"
    apart = sorted(set(columns["chunks"]))
    return _table(title, "arm, part", [f"{arm}, {part}" for arm, part in keys], {f"{x:+g}": of(x) for x in apart})


def _seconds_table(columns: Columns) -> list[str]:
    def of(name: str) -> Callable[[str], str]:
        return lambda arm: f"{columns[name][columns['arm'] == arm].mean():.0f}"

    names = list(dict.fromkeys(columns["arm"]))
    return _table("Seconds of a run's training", "arm", names, {"clock": of("seconds"), "processor": of("processor")})


def _draw(back: Columns, contents: Columns, names: list[str], path: Path) -> None:
    """Memory over horizons and over replacements, and what is read from the anchor since a change."""
    several = [x for x in names if len(np.unique(back["seed"][back["arm"] == x])) > 1]
    shown = several or [x for x in names if x not in (*UNTRAINED, *STARTS)][:10]
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for number, arm in enumerate(["truth", *shown]):
        style = {"marker": "o", "color": "black" if arm == "truth" else f"C{number - 1}", "label": arm}
        of_arm = back["arm"] == arm
        memory = [summary_of(back, "memory_last", of_arm & span_until(back, x))[0] for x in HORIZONS]
        panels[0].plot(HORIZONS, memory, **style)
        shares = [back["was_last"][of_arm & told_apart(back, x)] for x in range(MOST_REPLACED + 1)]
        panels[1].plot([x.mean() if len(x) else np.nan for x in shares], **style)
        if contents and arm in contents["arm"]:
            rows = [rows_where(contents, arm=arm, part="anchor", since=x) for x in range(9)]
            panels[2].plot([contents["last"][x].mean() if x.any() else np.nan for x in rows], **style)
    titles = (
        "memory of the colour seen last, until a horizon",
        "share that comes back as seen last, by replacements before",
        "share read from the anchor, by chunks since a change",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_xscale("log")
    panels[0].set_xticks(HORIZONS, [f"{x:g}×" for x in HORIZONS])
    panels[0].minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
