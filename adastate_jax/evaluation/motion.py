"""How a video moves: motion, camera, flicker, smoothness and the seams between chunks, from dense optical flow.

The flow is DIS and not RAFT (`adastate_jax.evaluation.flow` says what that means, and what fails on small frames): what
is computed by VBench's rule here is not VBench's number. A still video has perfect flicker, smoothness and seams, and
one that falls apart has much motion, so read all of it beside the drift.
"""

import collections
import dataclasses
import math
from typing import NamedTuple

import cv2
import numpy as np

from adastate_jax.evaluation.drift import mean_or_nan
from adastate_jax.evaluation.flow import (
    consistent_pixels,
    fit_camera,
    flow_luma,
    followed_pixels,
    interpolation_error,
    object_flow,
    optical_flow,
    speed,
    top_radius,
    warp,
)

# VBench counts a pair of frames as moving from 6 pixels on at a shorter side of 256 (vbench/dynamic_degree.py).
RADIUS_THRESHOLD = 100 * 6 / 256
_PERCENT = 100.0
_MIN_CONSISTENT = 0.05  # share of the frame
# Ratios of two small numbers say nothing: both sides of a ratio are at least this.
FLOOR_LEVELS = 0.25
FLOOR_MOTION = 0.5


@dataclasses.dataclass(frozen=True)
class MotionSeries:
    """What was measured of a video's motion.

    `pairs` holds series float64 `[F − 1]`, entry i between frames i and i + 1: `motion`, `object_motion` and
    `pan_speed` in % of the frame height per second; `pan_x`, `pan_y` in % of the frame width and height and `zoom` in %
    per second, `roll` in degrees per second; `support` in [0, 1]; `difference` and `warped_difference` in grey levels;
    `consistent`, the share of pixels whose flow there and back agrees; `flow_change`, the change of velocity from the
    pair before, in % of the height per second (NaN at first). `radii` `[R]` are the mean radii of the fastest 5 % of
    pixels, in % of the shorter side, between frames about 1/8 s apart; `interpolation` `[I]` the errors of odd frames
    predicted from their neighbours, in levels; `cuts` the numbers of the frames that begin a new shot.
    """

    pairs: dict[str, np.ndarray]
    radii: np.ndarray
    interpolation: np.ndarray
    cuts: tuple[int, ...]
    sampled_frames: int
    fps: float


# --- a stream of frames -------------------------------------------------------------------------------------------


def sampling_interval(fps: float) -> int:
    """Of how many frames VBench's rule looks at one (vbench/dynamic_degree.py)."""
    return max(1, round(fps / 8))


class _Previous(NamedTuple):
    """The last frame, and the flow that led to it; no flow before the second frame."""

    seconds: float
    frame: np.ndarray
    flow: np.ndarray | None = None
    rate: float = math.nan
    consistent: np.ndarray | None = None


class MotionMeter:
    """Measures motion frame by frame; holds a few frames at a time, whatever the length of the video."""

    def __init__(self, fps: float):
        """`fps` as the file's header states it."""
        self._fps = fps
        self._interval = sampling_interval(fps)
        self._lumas = collections.deque(maxlen=max(self._interval, 2) + 1)
        self._count = 0
        self._previous: _Previous | None = None
        self._pairs: list[dict[str, float]] = []
        self._radii: list[float] = []
        self._interpolation: list[float] = []

    def add(self, seconds: float, frame: np.ndarray) -> None:
        """Takes the next frame, uint8 RGB `[H, W, 3]`, shown `seconds` after the first one."""
        luma = flow_luma(frame)
        self._lumas.append(luma)
        number = self._count
        self._count += 1
        if number == 0:
            self._previous = _Previous(seconds, frame)
            return
        flow = self._add_pair(seconds, frame)
        if number % 2 == 0:
            before, middle = self._lumas[-3], self._lumas[-2]
            # The odd frames are predicted, as in VBench; half of all that would be possible, at half the cost.
            over_two = optical_flow(before, luma)
            self._interpolation.append(interpolation_error(before, middle, luma, over_two))
        if number % self._interval == 0:
            if self._interval == 2:
                flow = over_two
            elif self._interval > 2:
                flow = optical_flow(self._lumas[-1 - self._interval], luma)
            self._radii.append(top_radius(flow))

    def _add_pair(self, seconds, frame):
        previous = self._previous
        first, second = self._lumas[-2], self._lumas[-1]
        height, width = first.shape
        forward, backward = optical_flow(first, second), optical_flow(second, first)
        consistent = consistent_pixels(forward, backward)
        textured = followed_pixels(first, consistent)
        camera = fit_camera(first, second, forward, textured)
        rate = 1 / max(seconds - previous.seconds, 1e-3)
        per_second = rate * _PERCENT / height
        warped = np.abs(warp(second, forward) - first)
        share = float(consistent.mean())
        # Where next to nothing can be followed (a cut, a flash), the whole frame has changed and all of it counts.
        warped_difference = warped[consistent].mean() if share > _MIN_CONSISTENT else warped.mean()
        change = math.nan
        if previous.flow is not None:
            # The previous flow lies on the grid of the frame before: what it leads to is where this one starts.
            difference = warp(forward * rate, previous.flow) - previous.flow * previous.rate
            change = mean_or_nan(speed(difference)[previous.consistent]) * _PERCENT / height
        self._pairs.append(
            {
                "motion": float(speed(forward).mean()) * per_second,
                "object_motion": mean_or_nan(speed(object_flow(forward, camera))[textured]) * per_second,
                "pan_x": camera.pan_x * rate * _PERCENT,
                "pan_y": camera.pan_y * rate * _PERCENT,
                "pan_speed": math.hypot(camera.pan_x * width, camera.pan_y * height) * per_second,
                "zoom": camera.zoom * rate * _PERCENT,
                "roll": math.degrees(camera.roll) * rate,
                "support": camera.support,
                "difference": float(cv2.absdiff(frame, previous.frame).mean()),
                "warped_difference": float(warped_difference),
                "consistent": share,
                "flow_change": change,
            }
        )
        self._previous = _Previous(seconds, frame, forward, rate, consistent)
        return forward

    def result(self) -> MotionSeries:
        """Everything measured so far. Raises `ValueError` for fewer than two frames."""
        if self._count < 2:
            raise ValueError(f"it has {self._count} frame{'s'[: self._count != 1]}, and motion needs two")
        pairs = {name: np.array([pair[name] for pair in self._pairs]) for name in self._pairs[0]}
        sampled = -(-self._count // self._interval)
        return MotionSeries(
            pairs, np.array(self._radii), np.array(self._interpolation), _find_cuts(pairs), sampled, self._fps
        )


def _find_cuts(pairs):
    """Numbers of the frames that begin a new shot: nothing can be followed there, and unlike elsewhere."""
    usual = np.median(pairs["difference"])
    lost = (pairs["consistent"] < 0.3) & (pairs["warped_difference"] > 8.0)
    return tuple(int(pair) + 1 for pair in np.flatnonzero(lost & (pairs["difference"] > 3 * usual + 10)))


# --- the whole video ----------------------------------------------------------------------------------------------


def moves_by_vbench_rule(radii: np.ndarray, sampled_frames: int, fps: float) -> bool | None:
    """Whether a video counts as moving (vbench/dynamic_degree.py, `check_move`), here on DIS flow.

    radii `[R]` in % of the shorter side between the `sampled_frames` frames; `fps` of the file. None below three
    sampled frames, where VBench's rule asks for no moving pair at all.
    """
    needed = round(4 * sampled_frames / 16)
    if needed == 0 or sampled_frames < 3:
        return None
    threshold = RADIUS_THRESHOLD * max(1.0, 8 / fps)
    return int((radii > threshold).sum()) >= needed


def chunk_borders(num_frames: int, first_chunk: int, chunk: int) -> np.ndarray:
    """Numbers of the frames that begin a chunk, frame 0 left out: int64 `[B]`, all below `num_frames`."""
    return np.arange(first_chunk, num_frames, chunk)


def seam_ratio(values: np.ndarray, first_chunk: int, chunk: int, floor: float) -> float:
    """Median of a series `[F − 1]` over pairs of frames across a chunk border, over its median elsewhere.

    1 is a seamless video. Both medians are raised to `floor`, in the unit of the series, so that noise in a still video
    is no seam. NaN where there is no border or nothing else.
    """
    at_border = np.zeros(len(values), bool)
    at_border[chunk_borders(len(values) + 1, first_chunk, chunk) - 1] = True
    at_border, elsewhere = (values[part & np.isfinite(values)] for part in (at_border, ~at_border))
    if not len(at_border) or not len(elsewhere):
        return math.nan
    return float(max(np.median(at_border), floor) / max(np.median(elsewhere), floor))


def chunk_profile(values: np.ndarray, first_chunk: int, chunk: int) -> np.ndarray:
    """Mean of a series `[F − 1]` by the pair's position in its chunk, float64 `[chunk]`: entry 0 crosses the border.

    The first chunk, which may have another length, is left out; NaN where the video is too short.
    """
    later = values[first_chunk - 1 :]
    rows = np.full(-(-max(len(later), 1) // chunk) * chunk, math.nan)
    rows[: len(later)] = later
    rows = rows.reshape(-1, chunk)
    finite = np.isfinite(rows)
    with np.errstate(invalid="ignore"):
        return np.where(finite, rows, 0).sum(0) / finite.sum(0)


def within_shots(series: MotionSeries) -> dict[str, np.ndarray]:
    """The series of pairs with NaN where a shot cut lies between the frames that a value is of."""
    first = np.arange(len(series.pairs["motion"]))
    kept = _unspoiled(series.cuts, first, 1)
    changes = _unspoiled(series.cuts, first - 1, 2)  # of velocity: of two pairs
    return {
        name: np.where(changes if name == "flow_change" else kept, values, math.nan)
        for name, values in series.pairs.items()
    }


def _unspoiled(cuts, first, length):
    """Which of the spans that begin at frames `first` `[N]` and end `length` frames later have no cut: bool `[N]`."""
    cuts = np.array(cuts, int)
    return ~((cuts > first[:, None]) & (cuts <= first[:, None] + length)).any(1)


def summarize_motion(series: MotionSeries, first_chunk: int, chunk: int) -> dict[str, float]:
    """A video's motion in single numbers (see `adastate_jax.evaluation.measure.METRICS` for what each one is).

    Chunk lengths in video frames. What lies across a shot cut is left out, except in `dynamic_rule` and
    `flicker_vbench`, as VBench counts it, and in the seam ratios, for a cut at a border is a seam; `cuts` says how many
    there are. NaN stands for what cannot be measured.
    """
    pairs = series.pairs
    mean = {name: mean_or_nan(values) for name, values in within_shots(series).items()}
    interval = sampling_interval(series.fps)
    radii = series.radii[_unspoiled(series.cuts, interval * np.arange(len(series.radii)), interval)]
    interpolation = series.interpolation[_unspoiled(series.cuts, 2 * np.arange(len(series.interpolation)), 2)]
    moves = moves_by_vbench_rule(series.radii, series.sampled_frames, series.fps)
    return {
        "motion": mean["motion"],
        "dynamic_radius": mean_or_nan(radii),
        "dynamic_rule": math.nan if moves is None else float(moves),
        **{name: mean[name] for name in ("pan_x", "pan_y", "pan_speed", "zoom", "roll")},
        "camera_support": mean["support"],
        "object_motion": mean["object_motion"],
        "flicker_vbench": (255.0 - float(pairs["difference"].mean())) / 255.0,
        "flicker_warped": mean["warped_difference"],
        "acceleration_ratio": mean["flow_change"] / max(mean["motion"], FLOOR_MOTION),
        "interpolation_error": mean_or_nan(interpolation),
        "seam_ratio": seam_ratio(pairs["difference"], first_chunk, chunk, FLOOR_LEVELS),
        "seam_ratio_warped": seam_ratio(pairs["warped_difference"], first_chunk, chunk, FLOOR_LEVELS),
        "seam_ratio_flow": seam_ratio(pairs["flow_change"], first_chunk, chunk, FLOOR_MOTION),
        "cuts": float(len(series.cuts)),
    }
