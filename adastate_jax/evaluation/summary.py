"""Measured videos in groups, and a number over the videos of a group."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from adastate_jax.evaluation.measure import Measurement

_BOOTSTRAP = 2000
FEWEST = 8  # videos, of which a bootstrap tells an interval: of five, its 95 % would be 84 %


@dataclasses.dataclass(frozen=True)
class Video:
    """A measured file: its name for people, the group it belongs to, and its numbers."""

    name: str
    group: str
    measurement: Measurement


@dataclasses.dataclass(frozen=True)
class Summary:
    """A number over the videos of a group.

    Mean, 95 % bootstrap interval of the mean (NaN for fewer than 8 videos), median, mean magnitude (of signed numbers
    that cancel out), and how many of how many videos have it.
    """

    mean: float
    low: float
    high: float
    median: float
    magnitude: float
    count: int
    videos: int


def summarize_group(values: Sequence[float]) -> Summary:
    """Summarises a number over videos; NaN values are left out, and all is NaN where none is left.

    The bootstrap is seeded: the same values give the same interval.
    """
    finite = np.array([value for value in values if math.isfinite(value)])
    if not len(finite):
        return Summary(*[math.nan] * 5, 0, len(values))
    low = high = math.nan
    if len(finite) >= FEWEST:
        drawn = np.random.default_rng(0).integers(len(finite), size=(_BOOTSTRAP, len(finite)))
        low, high = np.percentile(finite[drawn].mean(1), [2.5, 97.5])
    middle, magnitude = float(np.median(finite)), float(np.abs(finite).mean())
    return Summary(float(finite.mean()), float(low), float(high), middle, magnitude, len(finite), len(values))


def by_group(videos: Sequence[Video]) -> dict[str, list[Video]]:
    """Videos by group, both in the order given."""
    groups: dict[str, list[Video]] = {}
    for video in videos:
        groups.setdefault(video.group, []).append(video)
    return groups
