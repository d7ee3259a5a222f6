"""How a video's look changes with time: drift of colour, contrast and sharpness, and the lock to its first frame.

All of it is read off single frames, so it works at any size. A frozen video drifts by nothing and is locked perfectly,
and a wanted camera move unlocks a scene: read these numbers beside the motion. At 32 × 32 pixels the window of the
structural similarity (11 pixels) covers a third of the frame, which makes it blunt, and `sharpness` says more of how a
frame was shrunk than of blur.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np

ATTRIBUTES = ("luma", "contrast", "saturation", "colourfulness", "sharpness", "clipped")
_SHORT_SIDE = 480  # pixels, at most, of the frames whose look is measured
_LOCK_SIDE = 60  # pixels, at most: where things are, not their texture
_BINS = (24, 12, 12)  # of hue, saturation and value, before smoothing
_MIN_VARIANCE = 0.1  # of the Laplacian, in squared levels: less is rounding
_MAX_POINTS = 300  # of a series to fit a slope to
WINDOW_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class DriftSeries:
    """A video's look over time: `times` float64 `[F]` in seconds, and by name float64 `[F]`.

    `luma`, `contrast` (its standard deviation) and `saturation` in grey levels of 255, `colourfulness` as Hasler and
    Süsstrunk 2003 define it, `sharpness` the natural logarithm of the variance of the Laplacian, `clipped` the % of
    pixels that are black or white; `ssim` and `histogram`, similarities to frame 0, where 1 is the same.
    """

    times: np.ndarray
    values: dict[str, np.ndarray]


# --- one frame ----------------------------------------------------------------------------------------------------


def shrink(frame: np.ndarray, short_side: int) -> np.ndarray:
    """Area-averages a picture `[H, W]` or `[H, W, C]` to a shorter side of at most `short_side` pixels."""
    height, width = frame.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return frame
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def frame_look(frame: np.ndarray) -> dict[str, float]:
    """The look of a frame uint8 RGB `[H, W, 3]`: a value for each of `ATTRIBUTES` (units at `DriftSeries`)."""
    frame = shrink(frame, _SHORT_SIDE)
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    red, green, blue = (frame[..., channel].astype(np.float32) for channel in range(3))
    across, along = red - green, (red + green) / 2 - blue
    return {
        "luma": float(luma.mean()),
        "contrast": float(luma.std()),
        "saturation": float(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1].mean()),
        "colourfulness": math.hypot(across.std(), along.std()) + 0.3 * math.hypot(across.mean(), along.mean()),
        "sharpness": math.log(max(float(cv2.Laplacian(luma, cv2.CV_32F).var()), _MIN_VARIANCE)),
        "clipped": 100.0 * float(((luma <= 4) | (luma >= 251)).mean()),
    }


def structural_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """SSIM (Wang et al. 2004: Gaussian window of 11 pixels, σ 1.5) of luma `[h, w]` in levels of 255, at most 1."""

    def blur(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    first, second = first.astype(np.float64), second.astype(np.float64)
    mean_first, mean_second = blur(first), blur(second)
    variance_first = blur(first**2) - mean_first**2
    variance_second = blur(second**2) - mean_second**2
    covariance = blur(first * second) - mean_first * mean_second
    light, texture = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_first * mean_second + light) * (2 * covariance + texture)
    similarity /= (mean_first**2 + mean_second**2 + light) * (variance_first + variance_second + texture)
    return float(similarity.mean())


def colour_histogram(frame: np.ndarray) -> np.ndarray:
    """Histogram of hue, saturation and value of a frame uint8 RGB `[h, w, 3]`: float64 `[24, 12, 12]`, of sum 1.

    Neighbouring bins are blended, so that a colour that crosses the edge of a bin does not jump.
    """
    hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
    grey = hsv[..., 1].astype(np.uint16) * hsv[..., 2] < 16 * 255
    hsv[grey, 0] = 0  # the hue of a grey is noise
    counts = cv2.calcHist([hsv], [0, 1, 2], None, _BINS, [0, 180, 0, 256, 0, 256]).astype(np.float64)
    for axis, beyond in enumerate(("wrap", "edge", "edge")):  # hue is a circle
        padded = np.pad(counts, [(int(axis == other),) * 2 for other in range(3)], mode=beyond)
        before, here, after = (padded.take(np.arange(_BINS[axis]) + offset, axis) for offset in range(3))
        counts = (before + 2 * here + after) / 4
    return counts / counts.sum()


def histogram_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """1 − the Bhattacharyya (Hellinger) distance of two histograms of sum 1: in [0, 1], 1 is the same."""
    return 1.0 - math.sqrt(max(0.0, 1.0 - float(np.sqrt(first * second).sum())))


# --- a stream of frames -------------------------------------------------------------------------------------------


class DriftMeter:
    """Measures the look frame by frame; holds nothing but the first frame's, whatever the length of the video."""

    def __init__(self):
        self._first = None
        self._times: list[float] = []
        self._values: list[dict[str, float]] = []

    def add(self, seconds: float, frame: np.ndarray) -> None:
        """Takes the next frame, uint8 RGB `[H, W, 3]`, shown `seconds` after the first one."""
        small = shrink(frame, _LOCK_SIDE)
        luma, histogram = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), colour_histogram(small)
        if self._first is None:
            self._first = luma, histogram
        self._times.append(seconds)
        lock = {
            "ssim": structural_similarity(self._first[0], luma),
            "histogram": histogram_similarity(self._first[1], histogram),
        }
        self._values.append(frame_look(frame) | lock)

    def result(self) -> DriftSeries:
        """Everything measured so far. Raises `ValueError` before the first frame."""
        if not self._values:
            raise ValueError("it has no frames")
        names = self._values[0]
        return DriftSeries(
            np.array(self._times), {name: np.array([value[name] for value in self._values]) for name in names}
        )


# --- the whole video ----------------------------------------------------------------------------------------------


def end_windows(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of `times` `[N]` are the beginning and which the end: bool `[N]` each, never empty.

    5 seconds each, or a quarter of a video shorter than 20 seconds.
    """
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    window = min(WINDOW_SECONDS, (times[-1] - times[0] + step) / 4)
    tolerance = step / 2
    first = times - times[0] < window - tolerance
    last = times[-1] - times < window - tolerance
    first[0] = last[-1] = True
    return first, last


def first_against_last(times: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Means of a series `[N]` over its beginning and its end (`end_windows`); NaN where no value is finite."""
    first, last = end_windows(times)
    return mean_or_nan(values[first]), mean_or_nan(values[last])


def mean_or_nan(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def theil_sen_slope(times: np.ndarray, values: np.ndarray) -> float:
    """Slope of a series `[N]` per unit of time: the median over all pairs of points (Theil 1950, Sen 1968).

    Robust to almost a third of outliers. Long series are averaged to 300 points first. NaN for fewer than two points.
    """
    if len(times) < 2:
        return math.nan
    times, values = _average(times), _average(values)
    earlier, later = np.triu_indices(len(times), 1)
    return float(np.median((values[later] - values[earlier]) / (times[later] - times[earlier])))


def _average(values):
    """Averages neighbours of a series so that no more points are left than a slope is fitted to."""
    points = min(len(values), _MAX_POINTS)
    starts = np.arange(points) * len(values) // points
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values))


def summarize_drift(series: DriftSeries, cuts: Sequence[int] = ()) -> dict[str, float]:
    """A video's drift and lock in single numbers (see `adastate_jax.evaluation.measure.METRICS` for each one).

    cuts: the numbers of the frames that begin a new shot, which are no jitter.
    """
    times = series.times
    summary = {}
    for name in ("ssim", "histogram"):
        values = series.values[name]
        summary[f"lock_{name}"] = float(values[1:].mean()) if len(values) > 1 else math.nan
        summary[f"lock_{name}_end"] = first_against_last(times, values)[1]
    for name in ATTRIBUTES:
        first, last = first_against_last(times, series.values[name])
        summary[f"{name}_first"] = first
        summary[f"{name}_drift"] = last - first
        summary[f"{name}_slope"] = 60 * theil_sen_slope(times, series.values[name])
    changes = np.diff(series.values["luma"])
    changes[np.array(cuts, int) - 1] = math.nan
    summary["luma_jitter"] = mean_or_nan(np.abs(np.diff(changes)))
    return summary
