"""Tables and a figure of the study, from the rows of `measure` alone."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

from studies.changing_world import HORIZONS, PERIOD, STARTS, UNTRAINED, once
from studies.changing_world.claims import MOST_REPLACED, Measured, claims_table
from studies.changing_world.contents import LONGEST
from studies.changing_world.memory import first_returns, half_life, half_life_interval, held, returns, strata, until
from studies.changing_world.plan import is_adaptive, recipe
from studies.changing_world.worlds import with_withheld
from studies.rows import read_columns, require_rows, rows_where
from studies.statistics import mean_of_told, summarize, summary_of
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
BASELINE = "anchored/adaptive"  # the paper's own, which the others are compared with
COMPARED = ("pan", "hue", "saturation", "contrast")  # at the last horizon, beside what is held until each


def report(results: Path) -> None:
    """Writes tables.md and memory.png into `results`, from the rows there.

    Raises:
        UserError: there are no rows.
    """
    require_rows(results / "videos.csv.gz")
    videos = _read_videos(results)
    visits = read_columns(results / "visits.csv.gz")
    back, contents = returns(visits), read_columns(results / "contents.csv.gz")
    names = list(dict.fromkeys(videos["arm"]))
    collapsed = "; ".join(f"{arm}, seed {seed} ({why})" for (arm, seed), why in _collapsed(videos).items()) or "none"
    lines = [f"Collapsed at 1×: {collapsed}. They are in the tables like the others."]
    decision = read_columns(results / "decision.csv.gz")
    if decision:
        roles = dict(zip(decision["part"], decision["arm"], strict=True))
        lines += ["", *_decision_table(roles), "", *claims_table(Measured(videos, back, contents), roles)]
    lines += ["", *_held_table(back, names), "", *_memory_table(back, names), "", *_replacement_table(back, names)]
    lines += ["", *_half_life_table(back, names), "", *_own_replacements_table(visits, back, names)]
    for horizon in HORIZONS:
        lines += ["", *_overview_table(videos, names, horizon)]
    lines += ["", *_caption_table(videos, names), "", *_comparison_table(videos, back, names)]
    seconds = read_columns(results / "seconds.csv.gz")
    lines += ["", *_recipes_table(back, seconds, names)]
    more = (("contents", _contents_table), ("attention", _attention_table), ("windows", _windows_table))
    for kind, table in more:
        columns = read_columns(results / f"{kind}.csv.gz")
        if columns:
            lines += ["", *table(columns)]
    lines += ["", *_seconds_table(seconds)]
    with tempfile.TemporaryDirectory(dir=results) as partial:
        (Path(partial) / "tables.md").write_text("\n".join(lines).rstrip() + "\n")
        _draw(back, contents, names, Path(partial) / "memory.png")
        for path in Path(partial).iterdir():
            path.replace(results / path.name)


def _read_videos(results: Path) -> Columns:
    """Columns of the videos as `MEASURES` describes them."""
    columns = with_withheld(read_columns(results / "videos.csv.gz"))
    columns["reversed"] = (columns["hue"] < 0).astype(float)
    for name, horizon in itertools.product(_OF_TRUTH, HORIZONS):
        here = columns["horizon"] == horizon
        true = here & (columns["arm"] == "truth")
        if true.any():
            columns[name][here] /= mean_of_told(columns[name][true])
    return columns


def _collapsed(videos: Columns) -> dict[tuple[str, int], str]:
    """The runs whose look at the first horizon is not the truth's, and in what."""
    found = {}
    for arm, seed in dict.fromkeys(zip(videos["arm"], videos["seed"].astype(int), strict=True)):
        here = rows_where(videos, arm=arm, seed=seed, horizon=HORIZONS[0], withheld=False)
        for name in () if once(arm) else ("brightness", "saturation", "contrast"):
            mean = mean_of_told(videos[name][here])
            if abs(mean - 1) > COLLAPSE:
                found.setdefault((arm, seed), f"{name} {mean:.2f} of the truth's")
    return found


def _decision_table(roles: dict[str, str]) -> list[str]:
    lines = ["**What the screening left**", "", *head("kept as", "arm")]
    return lines + [row(role, f"`{arm}`") for role, arm in roles.items()]


def _table(title: str, first: str, names: list[str], columns: dict[str, Callable[[str], str]]) -> list[str]:
    """A row for each of `names`, without those of which nothing is told; each column's function gives a cell."""
    lines = [f"**{title}**", "", *head(first, *columns)]
    for name in names:
        cells = [of_name(name) for of_name in columns.values()]
        if any(cells):
            lines.append(row(name, *cells))
    return lines


def _held_table(back: Columns, names: list[str]) -> list[str]:
    def of(stratum: np.ndarray, horizon: float) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            here = (back["arm"] == arm) & stratum & until(back, horizon)
            return f"{cell(*summary_of(back, 'memory_origin', here)[:2])} of {here.sum()}" if here.any() else ""

        return of_arm

    kinds = zip(("kept", "renewed"), strata(back), strict=True)
    columns = {f"{kind}, {n:g}×": of(stratum, n) for kind, stratum in kinds for n in HORIZONS}
    title = (
        "What is held: memory of the colour in which a ball last left after it was replaced in view (renewed), or the "
        "first ball, where none was replaced (kept); of how many balls; 0 is chance"
    )
    return _table(title, "arm", names, columns)


def _memory_table(back: Columns, names: list[str]) -> list[str]:
    def of(name: str, horizon: float) -> Callable[[str], str]:
        return lambda arm: cell(*summary_of(back, name, (back["arm"] == arm) & until(back, horizon)))

    columns = {f"{x}, {n:g}×": of(f"memory_{x}", n) for x in ("last", "first") for n in HORIZONS}
    title = (
        "Memory of the colour of the ball before, a stale one too, and of the video's first: of balls that come back "
        "until a horizon, from the one before on; 0 is chance"
    )
    return _table(title, "arm", names, columns)


def _replacement_table(back: Columns, names: list[str]) -> list[str]:
    def shares(replaced: int) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            here = (back["arm"] == arm) & first_returns(back, replaced, MOST_REPLACED)
            kinds = ("last", "first") if replaced else ("last",)
            found = [summarize(back[f"was_{x}"][here], back["seed"][here], back["video"][here]) for x in kinds]
            return " / ".join(cell(*x[:2]) for x in found) + f" of {here.sum()}" if here.any() else ""

        return of_arm

    title = (
        "Share of balls that come back as they were seen last / as the first one was, at the first return after a "
        "replacement in view, by their number; where these colours differ"
    )
    ends = [*map(str, range(MOST_REPLACED)), f"{MOST_REPLACED} or more"]
    return _table(title, "arm", names, {f"after {text}": shares(number) for number, text in enumerate(ends)})


def _half_life_table(back: Columns, names: list[str]) -> list[str]:
    def life(stratum: np.ndarray) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            here = (back["arm"] == arm) & stratum
            periods, is_gone = half_life(back, here)
            if np.isnan(periods):
                return ""
            low, high = (x * PERIOD for x in half_life_interval(back, here))
            return f"{'' if is_gone else 'more than '}{periods * PERIOD:.1f} [{low:.1f}, {high:.1f}]"

        return of_arm

    kept, renewed = map(life, strata(back))
    title = "Half-life in chunks of a colour that is not replaced, and of one that replaced another in view"
    return _table(title, "arm", names, {"kept": kept, "renewed": renewed})


def _own_replacements_table(visits: Columns, back: Columns, names: list[str]) -> list[str]:
    def share(columns: Columns, rows: np.ndarray) -> Callable[[str], str]:
        values = (columns["entry"] != columns["exit"]).astype(float)

        def of_arm(arm: str) -> str:
            here = (columns["arm"] == arm) & rows
            return cell(*summarize(values[here], columns["seed"][here], columns["video"][here])) if here.any() else ""

        return of_arm

    columns = {
        "first ball": share(visits, visits["number"] == 0),
        "later ones": share(visits, visits["number"] > 0),
        "the second, if the first was not": share(back, (back["number"] == 1) & (back["replaced"] == 0)),
        "the second, if the first was": share(back, (back["number"] == 1) & (back["replaced"] > 0)),
    }
    return _table("How often a ball takes another colour in view", "arm", names, columns)


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
    """Each arm with several seeds minus `BASELINE`, seed by seed."""
    several = [x for x in names if not once(x) and len(np.unique(videos["seed"][videos["arm"] == x])) > 1]

    def apart(number: Callable[[Columns, np.ndarray], float], columns: Columns) -> Callable[[str], str]:
        def of_arm(arm: str) -> str:
            if arm == BASELINE or BASELINE not in several:
                return ""
            of_both = [columns["arm"] == x for x in (arm, BASELINE)]
            seeds = np.intersect1d(*(columns["seed"][x] for x in of_both))
            found = np.subtract(*([number(columns, x & (columns["seed"] == seed)) for seed in seeds] for x in of_both))
            return cell(found.mean(), found.std(ddof=1) / np.sqrt(len(found)), signed=True)

        return of_arm

    def held_until(horizon: float) -> Callable[[Columns, np.ndarray], float]:
        return lambda columns, here: held(columns, here & until(columns, horizon))

    def look(name: str) -> Callable[[Columns, np.ndarray], float]:
        last = rows_where(videos, horizon=HORIZONS[-1], withheld=False)
        return lambda columns, here: mean_of_told(columns[name][here & last])

    columns = {f"held, {x:g}×": apart(held_until(x), back) for x in HORIZONS[1:]}
    columns |= {f"{name}, {HORIZONS[-1]:g}×": apart(look(name), videos) for name in COMPARED}
    title = f"Minus `{BASELINE}` of the same training seed: mean ± standard error over training seeds"
    return _table(title, "arm", several, columns)


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
            shares = [
                columns["share"][rows_where(columns, arm=arm, part=part, chunks=chunks, changed=changed)].mean()
                for changed in (1, 0)
                if rows_where(columns, arm=arm, part=part, chunks=chunks, changed=changed).any()
            ]
            return " / ".join(f"{x:.3f}" for x in shares)

        return of_key

    title = (
        "Share of a content frame's attention outside itself that a part gets, by chunks from a ball's replacement in "
        "view / from a ball that is not replaced"
    )
    apart = sorted(set(columns["chunks"]))
    return _table(title, "arm, part", [f"{arm}, {part}" for arm, part in keys], {f"{x:+g}": of(x) for x in apart})


def _windows_table(columns: Columns) -> list[str]:
    def of(sigma: float) -> Callable[[str], str]:
        def of_start(start: str) -> str:
            here = rows_where(columns, sigma=sigma, start=float(start))
            return f"{columns['right'][here].mean():.2f}, {columns['error'][here].mean():.2f}"

        return of_start

    title = (
        "What the teacher makes of true windows under noise, by their first frame: share of balls in the right colour, "
        "mean square error"
    )
    starts = [f"{x:g}" for x in sorted(set(columns["start"]))]
    return _table(title, "from frame", starts, {f"noise {x:g}": of(x) for x in sorted(set(columns["sigma"]))})


def _recipes_table(back: Columns, seconds: Columns, names: list[str]) -> list[str]:
    """The recipes with a state, the cheapest first."""
    trained = {arm: seconds["processor"][seconds["arm"] == arm].mean() for arm in dict.fromkeys(seconds["arm"])}
    recipes = [arm for arm in names if not once(arm) and is_adaptive(arm) and recipe(arm) <= set(trained)]
    costs = {arm: sum(trained[x] for x in recipe(arm)) / 60 for arm in recipes}

    def held_until(horizon: float) -> Callable[[str], str]:
        return lambda arm: cell(held(back, (back["arm"] == arm) & until(back, horizon)), np.nan)

    columns = {"minutes": lambda arm: f"{costs[arm]:.1f}", **{f"held, {x:g}×": held_until(x) for x in HORIZONS}}
    title = "Recipes with a state, the cheapest first: minutes of a processor behind the teacher, and what is held"
    return _table(title, "arm", sorted(recipes, key=costs.__getitem__), columns)


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
        panels[0].plot(HORIZONS, [held(back, of_arm & until(back, x)) for x in HORIZONS], **style)
        shares = [back["was_last"][of_arm & first_returns(back, x, MOST_REPLACED)] for x in range(MOST_REPLACED + 1)]
        panels[1].plot([x.mean() if len(x) else np.nan for x in shares], **style)
        if contents and arm in contents["arm"]:
            rows = [rows_where(contents, arm=arm, part="anchor", since=x) for x in range(LONGEST + 1)]
            panels[2].plot([contents["last"][x].mean() if x.any() else np.nan for x in rows], **style)
    titles = (
        "memory of what was seen last, kept and renewed, until a horizon",
        "share that comes back as seen last, after so many replacements",
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
