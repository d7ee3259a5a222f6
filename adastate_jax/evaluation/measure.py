"""One video in, all of its numbers out, in one pass and bounded memory; and what each number means."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator

import imageio.v3 as iio
import numpy as np

from adastate_jax.data.decoding import decode_frames, frame_pixels, read_header, reasons, upright_size
from adastate_jax.errors import UserError
from adastate_jax.evaluation.drift import DriftMeter, first_against_last, shrink, summarize_drift
from adastate_jax.evaluation.motion import (
    FLOOR_MOTION,
    MotionMeter,
    chunk_profile,
    sampling_interval,
    summarize_motion,
    within_shots,
)
from adastate_jax.media import contact_sheet

_THUMBNAILS = 8
_THUMBNAIL_SIDE = 176  # pixels of the longer side, at most
_SMALL_SIDE = 96  # pixels, to which smaller thumbnails are enlarged
_WEAK_SUPPORT = 0.3  # share of the followed places
_VERY_FAST = 8.0  # % of the shorter side per frame, where DIS begins to lose what it follows


@dataclasses.dataclass(frozen=True)
class Settings:
    """The stream's chunks in video frames: the first is shorter where the codec gives one frame for the first latent.

    The defaults are Wan's: 3 latent frames a chunk, 9 frames and then 12. A codec of one frame per latent frame and
    chunks of 3 has 3 and 3. Raises `UserError` naming the field when a value makes no sense.
    """

    first_chunk: int = 9
    chunk: int = 12

    def __post_init__(self):
        for field in ("first_chunk", "chunk"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} is {getattr(self, field)}: give at least 1 frame")


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a number means: a short label, its unit, one line of explanation, and the largest magnitude that still
    counts as good (or the smallest, where `at_least`), if there is one."""

    label: str
    unit: str
    text: str
    limit: float | None = None
    at_least: bool = False

    def is_beyond(self, value: float) -> bool:
        """Whether a value misses the limit."""
        if self.limit is None or math.isnan(value):
            return False
        return value < self.limit if self.at_least else abs(value) > self.limit


def _look(name, unit, text, limit=None):
    return {
        f"{name}_first": Metric(f"{name} first", unit, f"{text}, over the first 5 s (a quarter of a short video)"),
        f"{name}_drift": Metric(f"{name} drift", unit, f"{text}: the last 5 s minus the first 5 s", limit),
        f"{name}_slope": Metric(f"{name} slope", f"{unit}/min", f"{text}: Theil-Sen slope over the whole video"),
    }


_OF_255 = "levels"
METRICS: dict[str, Metric] = {
    "motion": Metric(
        "motion", "%h/s", "mean length of the optical flow, in % of the frame height per second", FLOOR_MOTION, True
    ),
    "motion_kept": Metric("motion kept", "%", "motion in the last 5 s over motion in the first 5 s", 70.0, True),
    "dynamic_radius": Metric(
        "dynamic radius", "% side", "mean flow of the fastest 5 % of pixels over 1/8 s, in % of the shorter side"
    ),
    "dynamic_rule": Metric(
        "dynamic (DIS)",
        "share",
        "1 if a quarter of the pairs move by over 2.34 % side: VBench's rule, but with DIS flow instead of RAFT",
    ),
    "pan_x": Metric("pan right", "%w/s", "camera moving right, in % of the frame width per second, signed"),
    "pan_y": Metric("pan down", "%h/s", "camera moving down, in % of the frame height per second, signed"),
    "pan_speed": Metric("pan speed", "%h/s", "speed of the camera's pan whatever its direction"),
    "zoom": Metric("zoom in", "%/s", "growth of the picture per second (natural logarithm), signed"),
    "roll": Metric("roll", "°/s", "camera turning clockwise, signed"),
    "camera_support": Metric("camera support", "share", "share of the followed places that agree with the camera"),
    "object_motion": Metric(
        "object motion", "%h/s", "mean flow left over once the camera's part is taken away, where a camera is found"
    ),
    "flicker_vbench": Metric(
        "1 - flicker", "share", "VBench's formula: (255 - mean difference of neighbouring frames) / 255"
    ),
    "flicker_warped": Metric("flicker", _OF_255, "difference of neighbouring frames once motion is compensated"),
    "luma_jitter": Metric("luma jitter", _OF_255, "mean second difference of the mean luma"),
    "acceleration_ratio": Metric("acceleration", "ratio", "change of velocity from pair to pair, over the velocity"),
    "interpolation_error": Metric(
        "smoothness error", _OF_255, "error of odd frames when predicted from both neighbours by half the flow"
    ),
    "seam_ratio": Metric("plain seam", "ratio", "difference of frames at chunk borders over elsewhere (medians)"),
    "seam_ratio_warped": Metric(
        "warped seam", "ratio", "the same, once motion is compensated; it cannot see a pure shift", 1.5
    ),
    "seam_ratio_flow": Metric("flow seam", "ratio", "change of velocity at chunk borders over elsewhere (medians)"),
    "cuts": Metric("cuts", "", "shot cuts; nothing is measured across them but VBench's numbers and seams"),
    "lock_histogram": Metric("colour lock", "share", "mean similarity of colour histograms to the first frame"),
    "lock_histogram_end": Metric("colour lock, end", "share", "the same over the last 5 s"),
    "lock_ssim": Metric("SSIM lock", "share", "mean SSIM of small luma to the first frame; a camera move lowers it"),
    "lock_ssim_end": Metric("SSIM lock, end", "share", "the same over the last 5 s"),
    **_look("luma", _OF_255, "mean luma", 5.0),
    **_look("contrast", _OF_255, "standard deviation of luma"),
    **_look("saturation", _OF_255, "mean HSV saturation", 8.0),
    **_look("colourfulness", "", "colourfulness (Hasler and Süsstrunk 2003)"),
    **_look("sharpness", "ln", "logarithm of the variance of the Laplacian of luma"),
    **_look("clipped", "%", "pixels that are black or white"),
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """All numbers of one video.

    `metrics` has an entry for each of `METRICS`, NaN where it cannot be measured. `series` maps names to (seconds
    `[N]`, values `[N]`), NaN across shot cuts. `chunk_profile` float64 `[chunk]` is the motion-compensated difference
    by position in the chunk, entry 0 across the border. `contact_sheet` is a JPEG of frames evenly over the video;
    `notes` say what to beware of.
    """

    num_frames: int
    seconds: float
    fps: float
    height: int
    width: int
    metrics: dict[str, float]
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    chunk_profile: np.ndarray
    contact_sheet: bytes
    notes: tuple[str, ...]


def measure_frames(frames: np.ndarray, fps: float = 16, settings: Settings = Settings()) -> Measurement:
    """Measures frames uint8 RGB `[F, H, W, 3]` shown at `fps` per second.

    Raises `ValueError` for another shape or type, or fewer than two frames.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return _measure(((number / fps, frame) for number, frame in enumerate(frames)), fps, settings)


def measure_video(
    path: str | os.PathLike,
    settings: Settings = Settings(),
    progress: Callable[[int], None] = lambda frames: None,
) -> Measurement:
    """Measures a video file, one frame at a time; `progress` is called with the number of frames newly measured.

    Raises `Unusable` (of `data.decoding`) for a file that is empty, damaged, without video or with a single frame.
    """
    with reasons(path):
        header = read_header(path)
        with contextlib.closing(upright_frames(path)) as frames:
            return _measure(_counted(frames, progress), float(header.fps), settings)


def upright_frames(path: str | os.PathLike) -> Iterator[tuple[float, np.ndarray]]:
    """Decodes a video: (seconds since the first frame, uint8 RGB `[H, W, 3]`), all of the first frame's size.

    Raises as `adastate_jax.data.decoding.decode_frames` does.
    """
    size = None
    for seconds, frame in decode_frames(path):
        size = size or upright_size(frame)
        yield seconds, frame_pixels(frame, *size)


def _counted(frames, progress):
    for frame in frames:
        yield frame
        progress(1)


def _measure(frames: Iterable[tuple[float, np.ndarray]], fps: float, settings: Settings) -> Measurement:
    motion, drift, thumbnails = MotionMeter(fps), DriftMeter(), _Thumbnails()
    for seconds, frame in frames:
        motion.add(seconds, frame)
        drift.add(seconds, frame)
        thumbnails.add(seconds, frame)
    moved, looked = motion.result(), drift.result()
    times = looked.times
    moved_within = within_shots(moved)
    metrics = summarize_motion(moved, settings.first_chunk, settings.chunk) | summarize_drift(looked, moved.cuts)
    motion_first, motion_last = first_against_last(times[1:], moved_within["motion"])
    still = not motion_first >= FLOOR_MOTION
    metrics["motion_kept"] = math.nan if still else 100.0 * motion_last / motion_first
    series = {name: (times[1:], values) for name, values in moved_within.items()}
    series |= {name: (times, values) for name, values in looked.values.items()}
    return Measurement(
        num_frames=len(times),
        seconds=float(times[-1] + np.median(np.diff(times))),
        fps=fps,
        height=frame.shape[0],
        width=frame.shape[1],
        metrics={name: metrics[name] for name in METRICS},
        series=series,
        chunk_profile=chunk_profile(moved_within["warped_difference"], settings.first_chunk, settings.chunk),
        contact_sheet=thumbnails.contact_sheet(),
        notes=_notes(metrics, moved, times, frame.shape),
    )


def _notes(metrics, moved, times, shape):
    notes = []
    if metrics["contrast_first"] < 2.0 and abs(metrics["contrast_drift"]) < 2.0:
        notes.append("blank: the frames show next to nothing, so read no more than their brightness and colour")
    elif metrics["motion"] < FLOOR_MOTION:
        notes.append("nearly still: its low drift and flicker and its lock are what a photograph would get")
    untracked = float(np.isnan(moved.pairs["zoom"]).mean())
    if untracked > 0.5:
        notes.append(f"nothing to follow in {untracked:.0%} of the frames, so the camera is unknown there")
    elif metrics["camera_support"] < _WEAK_SUPPORT:
        notes.append(
            f"only {metrics['camera_support']:.0%} of what is followed agrees on a camera: do not trust its move, nor "
            "what is left for objects"
        )
    if moved.cuts:
        listed = ", ".join(f"{times[cut]:.1f}" for cut in moved.cuts[:6])
        more = f" and {len(moved.cuts) - 6} more" if len(moved.cuts) > 6 else ""
        notes.append(f"shot cuts at {listed} s{more}: lock and drift compare different shots")
    if metrics["dynamic_radius"] / sampling_interval(moved.fps) > _VERY_FAST:
        notes.append("very fast: the flow loses motion of this size, so the motion may be higher than it says")
    if min(shape[:2]) < 64:
        notes.append("small frames: object motion below about 1 %h/s is noise, SSIM and sharpness are blunt")
    return tuple(notes)


class _Thumbnails:
    """Small frames evenly over a video of unknown length: every n-th is kept, and n doubles when there are too many."""

    def __init__(self):
        self._kept: list[np.ndarray] = []
        self._stride, self._count, self._seconds = 1, 0, 0.0

    def add(self, seconds, frame):
        if self._count % self._stride == 0:
            self._seconds = seconds
            height, width = frame.shape[:2]
            self._kept.append(shrink(frame, max(1, round(_THUMBNAIL_SIDE * min(height, width) / max(height, width)))))
            if len(self._kept) > 8 * _THUMBNAILS:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._count += 1

    def contact_sheet(self):
        frames = np.stack(self._kept)
        scale = max(1, _SMALL_SIDE // max(frames.shape[1:3]))
        sheet = contact_sheet([(f"0 s to {self._seconds:.1f} s", frames)], scale, min(_THUMBNAILS, len(frames)))
        return iio.imwrite("<bytes>", sheet, plugin="pillow", extension=".jpg", quality=85)
