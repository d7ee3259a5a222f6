"""What visits of balls say of memory: whether a ball comes back as it was seen last, or first, or long ago.

All of it is of columns of rows of `measure_visits`, in which a video is one of an arm, a training and a noise seed.
"""

import numpy as np

from studies.changing_world import PER_CAPTION

Columns = dict[str, np.ndarray]


def returns(visits: Columns) -> Columns:
    """The visits but for each video's first, with what came before them: columns [N].

    `last` and `first`: the colour seen last before, and that of the video's beginning; `replaced`: how often a colour
    was replaced in view before; `origin` and `age`: the colour that was shown when it was last replaced (or when the
    first ball left), and the visits since. Of each of the three, `was_…` is whether the ball comes back in it, and
    `memory_…` the same on a scale where 0 is chance: how often it would in that of another video of the same caption at
    the same place. `memory_…_weight` is for its mean: the less chance leaves open, the less a row tells.
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
    last = np.append(-1, visits["exit"][:-1])
    columns = {
        **visits,
        "caption": visits["video"] // PER_CAPTION,
        "last": last,
        "first": visits["entry"][start],
        "replaced": changes - changes[start],
        "origin": visits["exit"][origin],
        "age": np.arange(count) - origin,
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


def mean_memory(columns: Columns, name: str, here: np.ndarray) -> float:
    """The mean memory of `last`, `first` or `origin` in some rows; NaN if none of them tells."""
    memory, weight = columns[f"memory_{name}"], columns[f"memory_{name}_weight"]
    told = here & np.isfinite(memory)
    return float(np.average(memory[told], weights=weight[told])) if weight[told].sum() else float("nan")


def half_life(columns: Columns, here: np.ndarray, fewest: int = 30) -> tuple[float, bool]:
    """After how many returns half of a value is gone, and whether it is: else the returns that were seen.

    By age, memory of the colour that was shown when it was last replaced, as long as none is replaced in view; the
    first age at which it is below a half, on the line from the one before. An age of fewer than `fewest` rows ends it.
    """
    before, last = 1.0, float("nan")
    for age in np.unique(columns["age"][here]):
        rows = here & (columns["age"] == age)
        memory = mean_memory(columns, "origin", rows)
        if rows.sum() < fewest or np.isnan(memory):
            break
        if memory < 0.5:
            return float(age - (0.5 - memory) / (before - memory)), True
        before, last = memory, float(age)
    return last, False
