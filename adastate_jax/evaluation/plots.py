"""Pictures of measurements, as PNG bytes: over time, lock against motion, and seams."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from adastate_jax.evaluation.measure import Measurement
from adastate_jax.evaluation.motion import FLOOR_LEVELS

# Okabe and Ito's colours, which colour-blind readers can tell apart, from the most to the least legible on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A800")
_PANELS = (
    ("motion", "motion, %h/s"),
    ("object_motion", "object motion, %h/s"),
    ("histogram", "colour lock to the first frame"),
    ("ssim", "SSIM lock to the first frame"),
    ("warped_difference", "flicker, levels"),
    ("luma", "luma, levels"),
    ("contrast", "contrast, levels"),
    ("saturation", "saturation, levels"),
    ("colourfulness", "colourfulness"),
    ("sharpness", "sharpness, ln"),
)
_FROM_ZERO = ("motion", "object_motion", "warped_difference")
_MAX_THIN_LINES = 12  # videos drawn singly; more are noise
_BINS = 120

Groups = Mapping[str, Sequence[Measurement]]


def group_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each group, by its place in the list."""
    return {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}


def over_time(groups: Groups) -> bytes:
    """Above, motion, lock and flicker, and below, drift, against time, a line per group (its videos' median): PNG."""
    colours = group_colours(list(groups))
    figure = new_figure(17, 5.2)
    axes = figure.subplots(2, 5, sharex=True)
    longest = max(video.seconds for videos in groups.values() for video in videos)
    for axis, (name, title) in zip(axes.flat, _PANELS, strict=True):
        for group, videos in groups.items():
            times, lines = _binned([video.series[name] for video in videos], longest)
            if len(videos) > _MAX_THIN_LINES:
                low, high = np.nanpercentile(lines, (25, 75), axis=0)
                axis.fill_between(times, low, high, color=colours[group], alpha=0.15, linewidth=0)
            elif len(videos) > 1:
                axis.plot(times, lines.T, color=colours[group], alpha=0.5, linewidth=0.7)
            axis.plot(times, np.nanmedian(lines, axis=0), color=colours[group], linewidth=1.8, label=group)
        axis.set_title(title, fontsize=10, loc="left")
        axis.margins(x=0.01)
        if name in _FROM_ZERO:
            axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    return as_png(figure)


def _binned(series, longest):
    """Series (times, values) averaged to common bins: bin centres `[T]`, values `[videos, T]`, NaN where
    there are none. Bins are at least a quarter of a second, unless the video is shorter than a few of them."""
    bins = int(np.clip(longest * 4, 12, _BINS))
    lines = np.full((len(series), bins), np.nan)
    for line, (times, values) in zip(lines, series, strict=True):
        finite = np.isfinite(values)
        index = np.minimum((times[finite] / longest * bins).astype(int), bins - 1)
        counts = np.bincount(index, minlength=bins)
        sums = np.bincount(index, weights=values[finite], minlength=bins)
        line[counts > 0] = sums[counts > 0] / counts[counts > 0]
    used = np.isfinite(lines).any(0)
    return (np.arange(bins)[used] + 0.5) * longest / bins, lines[:, used]


def lock_against_motion(groups: Groups) -> bytes:
    """Every video by its lock to the first frame (x) and its motion (y), groups' means large: PNG.

    Upwards is more motion and rightwards a tighter lock; a frozen video sits at the lower right.
    """
    colours = group_colours(list(groups))
    figure = new_figure(6.2, 4.6)
    axis = figure.subplots()
    for group, videos in groups.items():
        x = np.array([video.metrics["lock_histogram_end"] for video in videos])
        y = np.array([video.metrics["motion"] for video in videos])
        axis.scatter(x, y, s=18, color=colours[group], alpha=0.45, linewidth=0)
        axis.scatter(x.mean(), y.mean(), s=110, color=colours[group], edgecolor="white", linewidth=1.2, label=group)
    axis.set(xlabel="colour lock to the first frame at the end", ylabel="motion, %h/s", xlim=(0, 1.02))
    axis.set_ylim(bottom=0)
    for points in axis.collections:  # those of a frozen video lie on the edge, and are shown whole
        points.set_clip_on(False)
        points.set_zorder(3)
    return as_png(figure)


def chunk_profiles(groups: Groups) -> bytes:
    """Motion-compensated difference by position in the chunk over its mean, one line per group: PNG.

    Position 0 crosses the border between chunks; a seamless video is flat.
    """
    colours = group_colours(list(groups))
    figure = new_figure(6.2, 4.6)
    axis = figure.subplots()
    axis.axhline(1, color="#999999", linewidth=0.8)
    for group, videos in groups.items():
        profiles = np.stack([video.chunk_profile for video in videos])
        profiles = np.maximum(profiles[np.isfinite(profiles).all(1)], FLOOR_LEVELS)
        if len(profiles):
            mean = (profiles / profiles.mean(1, keepdims=True)).mean(0)
            axis.plot(np.arange(len(mean)), mean, "o-", color=colours[group], markersize=4, label=group)
    axis.set(xlabel="frame within the chunk (0 is the border)", ylabel="flicker, 1 is the mean")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    return as_png(figure)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts keep clear of each other."""
    return Figure((width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))


def as_png(figure: Figure) -> bytes:
    """Draws a figure in the style of all of them, under one legend for what its panels name."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
    named = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if len(named) > 1:
        columns = min(len(named), 6)
        figure.legend(
            named.values(), named.keys(), loc="outside upper center", ncols=columns, fontsize=9, frameon=False
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
