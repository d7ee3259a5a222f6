"""Means with errors and intervals over training seeds and videos, and differences corrected for their number."""

import numpy as np
from scipy import stats

DRAWS = 1000  # of a bootstrap
FEWEST = 0.1  # of the videos; no more than these say nothing of an arm


def mean_of_told(values: np.ndarray) -> float:
    """The mean of what is finite; NaN if nothing is."""
    told = values[np.isfinite(values)]
    return float(told.mean()) if len(told) else float("nan")


def summarize(
    values: np.ndarray, seeds: np.ndarray, videos: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, float, float, float]:
    """Mean, standard error over training seeds (NaN for one), and a 95 % interval by a bootstrap of seeds and videos.

    values: [N], or [2, N] for the first mean minus the second. Where one is NaN it is left out, and where nearly all
        are, so is what is told of them.
    seeds, videos: [N].
    weights: of the values in their mean, shaped as they are; one each unless told.
    """
    values = np.atleast_2d(values)
    weights = np.ones_like(values) if weights is None else np.atleast_2d(weights)
    kept = np.isfinite(values).all(axis=0)
    if kept.sum() <= FEWEST * values.shape[1]:
        return (float("nan"),) * 4
    values, weights, seeds, videos = values[:, kept], weights[:, kept], seeds[kept], videos[kept]
    # Sums by seed and video make a resample a product of multiplicities.
    seed_names, seed = np.unique(seeds, return_inverse=True)
    video_names, video = np.unique(videos, return_inverse=True)
    total, weight = np.zeros((2, len(values), len(seed_names), len(video_names)))
    np.add.at(total, (slice(None), seed, video), values * weights)
    np.add.at(weight, (slice(None), seed, video), weights)

    def mean_of(total, weight):
        with np.errstate(invalid="ignore", divide="ignore"):
            means = total / weight
        return means[0] - means[1] if len(means) == 2 else means[0]

    by_seed = mean_of(total.sum(axis=2), weight.sum(axis=2))
    error = by_seed.std(ddof=1) / np.sqrt(len(by_seed)) if len(by_seed) > 1 else float("nan")
    rng = np.random.default_rng(0)
    of_seed, of_video = (rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in (len(seed_names), len(video_names)))
    drawn = mean_of(*(((of_seed @ of_both) * of_video).sum(axis=2) for of_both in (total, weight)))
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
    return float(mean_of(total.sum(axis=(1, 2)), weight.sum(axis=(1, 2)))), float(error), float(low), float(high)


def summary_of(columns: dict[str, np.ndarray], name: str, here: np.ndarray) -> tuple[float, float, float, float]:
    """`summarize` of the column `name` in some rows, or in [2, N] of them, that are alike in seed and video."""
    weights = columns[f"{name}_weight"][here] if f"{name}_weight" in columns else None
    seeds, videos = (np.atleast_2d(columns[key][here])[0] for key in ("seed", "video"))
    return summarize(columns[name][here], seeds, videos, weights)


def paired_rows(
    columns: dict[str, np.ndarray], first: np.ndarray, second: np.ndarray, keys: tuple[str, ...] = ()
) -> np.ndarray:
    """Rows of two selections that are alike in seed, noise, video and `keys`: bool [N] each → indices [2, M]."""
    rows = []
    for selected in (first, second):
        (here,) = np.nonzero(selected)
        named = zip(*(columns[key][here] for key in ("seed", "noise", "video", *keys)), strict=True)
        rows.append(dict(zip(named, here, strict=True)))
    return np.array([[of_one[key] for key in rows[0] if key in rows[1]] for of_one in rows], int)


def significance(differences: np.ndarray) -> float:
    """Two-sided p of a mean of paired differences, one for each training seed [N], being zero; NaN for fewer than two.

    Of Student's t. Alike differences are certain.
    """
    if len(differences) < 2:
        return float("nan")
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    if not error:
        return 0.0 if differences.any() else 1.0
    return float(2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1))


def holm(p: np.ndarray) -> np.ndarray:
    """p [N] corrected for how many they are (Holm 1979), so that any below 0.05 is wrong with at most that chance.

    NaNs are no comparisons and stay.
    """
    corrected = np.full(len(p), np.nan)
    (told,) = np.nonzero(np.isfinite(p))
    order = told[np.argsort(p[told], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return corrected
