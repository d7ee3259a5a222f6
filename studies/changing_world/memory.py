"""What visits of balls say of memory: whether a ball comes back as it was seen last, or first, or long ago.

All of it is of columns of rows of `measure_visits`, in which a video is one of an arm, a training and a noise seed.
"""

import numpy as np

from studies.changing_world import HORIZONS, LENGTH, PER_CAPTION, PERIOD_FRAMES

Columns = dict[str, np.ndarray]
FEWEST = 30  # rows; of fewer no memory is told


def returns(visits: Columns) -> Columns:
    """The visits but for each video's first, with what came before them: columns [N].

    `last` and `first`: the colour seen last before, and that of the video's beginning; `replaced`: how often a colour
    was replaced in view before, and `renews`: whether it was at the visit before this one; `origin`: the colour that
    was shown when one was last replaced, or when the first ball left, and `age`: the periods from ball to ball since,
    of the time that passed, whether a ball came or not. Of each of the three colours, `was_…` is whether the ball comes
    back in it, and `memory_…` the same on a scale where 0 is chance: how often it would in that of another video of the
    same caption at the same place. `memory_…_weight` is for its mean: a row tells less, the less chance leaves open.

    Who comes back in a stale colour has a stale `last` from then on. What is held through returns, right or wrong ones,
    is `origin`.
    """
    order = np.lexsort([visits[name] for name in ("number", "video", "noise", "seed", "arm")])
    visits = {name: values[order] for name, values in visits.items()}
    count = len(order)
    begins = visits["number"] == 0
    start = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    changed = visits["entry"] != visits["exit"]
    changes = np.cumsum(changed) - changed  # before the visit
    fresh = np.where(begins | changed, np.arange(count), 0)
    origin = np.maximum.accumulate(np.append(0, fresh[:-1]))  # the latest visit before that replaced, or began
    columns = {
        **visits,
        "caption": visits["video"] // PER_CAPTION,
        "last": np.append(-1, visits["exit"][:-1]),
        "first": visits["entry"][start],
        "replaced": changes - changes[start],
        "renews": np.append(False, changed[:-1]),
        "origin": visits["exit"][origin],
        "age": np.maximum(np.rint((visits["frame"] - visits["frame"][origin]) / PERIOD_FRAMES), 1.0),
    }
    columns = {name: values[~begins] for name, values in columns.items()}
    for name, alike in (("last", "number"), ("first", "number"), ("origin", "age")):
        columns[f"was_{name}"] = (columns["entry"] == columns[name]).astype(float)
        weight = 1 - _chance(columns, columns[name], columns[alike])
        with np.errstate(invalid="ignore", divide="ignore"):
            memory = 1 - (1 - columns[f"was_{name}"]) / weight
        columns[f"memory_{name}"] = np.where(weight > 0, memory, np.nan)
        columns[f"memory_{name}_weight"] = np.where(weight > 0, weight, 0.0)
    return columns


def _chance(columns: Columns, expected: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """How often a ball has the colour `expected` in another row of its arm, seed, caption and place; NaN for none."""
    keys = [np.unique(x, return_inverse=True)[1] for x in (columns["arm"], columns["seed"], columns["caption"], alike)]
    group = np.unique(np.stack(keys), axis=1, return_inverse=True)[1].ravel()
    colours = int(max(expected.max(initial=0), columns["entry"].max(initial=0))) + 1
    counts = np.zeros((group.max(initial=0) + 1, colours))
    np.add.at(counts, (group, expected.astype(int)), 1)
    entry = columns["entry"].astype(int)
    own = columns["entry"] == expected
    others = counts.sum(axis=1)[group] - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(others > 0, (counts[group, entry] - own) / others, np.nan)


def mean_memory(columns: Columns, name: str, here: np.ndarray, fewest: int = 1) -> float:
    """The mean memory of `last`, `first` or `origin` in some rows; NaN if fewer than `fewest` of them tell."""
    memory, weight = columns[f"memory_{name}"], columns[f"memory_{name}_weight"]
    told = here & np.isfinite(memory)
    enough = told.sum() >= fewest and weight[told].sum() > 0
    return float(np.average(memory[told], weights=weight[told])) if enough else float("nan")


def until(back: Columns, horizon: float) -> np.ndarray:
    """Which rows are of balls that come back between the horizon before (or the beginning) and this one."""
    before = max((x for x in HORIZONS if x < horizon), default=0.0)
    return (back["frame"] >= before * LENGTH) & (back["frame"] < horizon * LENGTH)


def first_returns(back: Columns, replaced: int, most: int) -> np.ndarray:
    """Which rows are the first return after so many replacements (`most`: and more): one for each replacement.

    Those alone in which the colours seen last and first differ, so that it shows what is remembered. After none: each
    video's first return, unless a colour was replaced before it.
    """
    here = np.minimum(back["replaced"], most) == replaced
    if replaced:
        return here & (back["renews"] > 0) & (back["last"] != back["first"])
    return here & (back["number"] == 1)


def held(back: Columns, here: np.ndarray) -> float:
    """Memory of `origin` in some rows: the mean of where no colour was replaced before and of where one was.

    Each counts half, as in the truth, however often an arm replaces colours; NaN if either has less than `FEWEST` rows.
    """
    return float(np.mean([mean_memory(back, "origin", here & x, FEWEST) for x in strata(back)]))


def strata(back: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have no replacement before them, and which have."""
    return back["replaced"] == 0, back["replaced"] > 0


def half_life(columns: Columns, here: np.ndarray, fewest: int = FEWEST) -> tuple[float, bool]:
    """After how many periods from ball to ball half of a value is gone, and whether it is: else those that were seen.

    By age, memory of `origin`; the first age at which it is below a half, on the line from the one before. An age of
    fewer than `fewest` rows ends it.
    """
    before, last, reached = 1.0, 0.0, float("nan")
    for age in np.unique(columns["age"][here]):
        memory = mean_memory(columns, "origin", here & (columns["age"] == age), fewest)
        if np.isnan(memory):
            break
        if memory < 0.5:
            return float(age - (age - last) * (0.5 - memory) / (before - memory)), True
        before, last, reached = memory, float(age), float(age)
    return reached, False


def half_life_interval(columns: Columns, here: np.ndarray, draws: int = 100) -> tuple[float, float]:
    """Between which periods half of the value is gone in 95 of 100 bootstraps over videos; NaN if none tells.

    Where half is never gone, the periods that were seen stand for it.
    """
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(here)
    videos, video = np.unique(columns["video"][rows], return_inverse=True)
    found = []
    for _ in range(draws):
        times = rng.multinomial(len(videos), np.full(len(videos), 1 / len(videos)))
        chosen = np.repeat(rows, times[video])
        drawn = {name: columns[name][chosen] for name in ("age", "memory_origin", "memory_origin_weight")}
        found.append(half_life(drawn, np.ones(len(chosen), bool))[0])
    found = [x for x in found if np.isfinite(x)]
    return tuple(np.percentile(found, [2.5, 97.5])) if found else (float("nan"),) * 2
