"""One video → clips of fixed length, size and frame rate that never cross a shot cut.

A file is decoded twice and never held: a first pass notes the frames' timestamps and the cuts between shots, which
tells exactly which frames make which clip; a second pass decodes, resizes and hands out the clips.
"""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from scenedetect import AdaptiveDetector, FrameTimecode

from adastate_jax.data.decoding import decode_frames, frame_pixels, read_header
from adastate_jax.errors import UserError

# A dissolve or fade: over a quarter of a second the picture changes by this mean absolute difference (of 255), and
# its middle is the mean of its ends to within this fraction of the change. With a moving camera the middle is a picture
# of its own: over 138 procedural worlds, from slow to fast, the fraction never fell below 0.13.
_BLEND_CHANGE = 10.0
_BLEND_RESIDUE = 0.1
_FASTEST = 240.0  # frames per second; a header that states more means its clock
# Containers round timestamps to a millisecond; nothing below twice that is a difference.
_TIME_TOLERANCE = 2e-3


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The clips to cut: size in pixels, length in frames at `fps`, and `stride` frames from one start to the next.

    A stride of 0 means clips that follow each other without overlap. Raises `UserError` naming the field when a value
    makes no sense.
    """

    height: int
    width: int
    num_frames: int
    fps: int = 16
    stride: int = 0

    def __post_init__(self):
        for field in ("height", "width", "num_frames", "fps"):
            if getattr(self, field) < 1:
                raise UserError(f"clip {field} is {getattr(self, field)}: give at least 1")
        if self.stride < 0:
            raise UserError(f"clip stride is {self.stride}: give a number of frames, or 0 for clips without overlap")


@dataclasses.dataclass(frozen=True)
class Footage:
    """What the first pass learns of a video.

    `timestamps` float64 `[N]` are seconds since the first frame, increasing; `cuts` the numbers of the frames that
    begin a new shot (within a dissolve, every frame does); `end` the time in seconds at which the last frame ends.
    """

    timestamps: np.ndarray
    cuts: tuple[int, ...]
    end: float


# --- the first pass: times and cuts -------------------------------------------------------------------------------


def scan_footage(path: str | os.PathLike, progress: Callable[[float], None] = lambda seconds: None) -> Footage:
    """Decodes a whole video for its timestamps and its shot cuts.

    Cuts are found by PySceneDetect's adaptive detector: a change of content that stands out from the changes around it,
    so a fast camera is not mistaken for a cut. It does not see gradual transitions; dissolves and fades between calm
    shots are recognised by their pictures being linear in time, those between fast shots are not. `progress` is called
    with the seconds decoded so far. Raises as `decode_frames` does, and `ValueError` where there is
    no frame.
    """
    detector = AdaptiveDetector(min_scene_len=1)
    # The detector judges a frame by its neighbours on both sides. Repeating the first and the last frame gives the
    # outermost ones neighbours too; otherwise a cut within two frames of either end would go unseen.
    padding = detector.window_width
    timestamps, cuts, small = [], set(), None
    lag = max(2, round(min(float(read_header(path).fps), _FASTEST) / 8))
    recent = collections.deque(maxlen=2 * lag + 1)

    def look(number):
        for cut in detector.process_frame(FrameTimecode(number + padding, 25.0), small):
            cuts.add(cut.frame_num - padding)

    for number, (seconds, frame) in enumerate(decode_frames(path)):
        scale = min(1.0, 256 / max(frame.width, frame.height))
        size = {"width": max(1, round(frame.width * scale)), "height": max(1, round(frame.height * scale))}
        small = frame.reformat(**size).to_ndarray(format="bgr24")
        if number == 0:
            for repeat in range(-padding, 0):
                look(repeat)
        look(number)
        recent.append(cv2.resize(small, (64, 36), interpolation=cv2.INTER_AREA).astype(np.float32))
        if len(recent) == recent.maxlen and _is_blend(recent[0], recent[lag], recent[-1]):
            # Half a lag on either side for the ends of the transition, where the change is still small.
            cuts.update(range(number - 2 * lag - lag // 2, number + lag // 2 + 2))
        timestamps.append(seconds)
        if number % 64 == 0:
            progress(seconds)
    if not timestamps:
        raise ValueError("it has no frames")
    for repeat in range(padding):
        look(len(timestamps) + repeat)

    times = np.array(timestamps)
    end = times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0.0)
    return Footage(times, tuple(cut for cut in sorted(cuts) if 0 < cut < len(times)), float(end))


def _is_blend(before, middle, after):
    change = np.abs(after - before).mean()
    return change > _BLEND_CHANGE and np.abs(middle - (before + after) / 2).mean() < _BLEND_RESIDUE * change


def clip_frames(footage: Footage, config: ClipConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which frames make which clip: start times float64 `[C]` in seconds, frame numbers int64 `[C, F]`.

    Frame k of a clip is the one whose timestamp is nearest to start + k / fps (the earlier of two equally near), so the
    rate of the file does not matter, nor whether it is constant. A clip lasts F / fps seconds and lies within one
    shot; clips start where a shot starts and then every `stride` / fps seconds. C may be 0.
    """
    bounds = [0, *footage.cuts, len(footage.timestamps)]
    edges = [*footage.timestamps[bounds[:-1]], footage.end]
    stride = (config.stride or config.num_frames) / config.fps
    offsets = np.arange(config.num_frames) / config.fps
    starts, frames = [np.zeros(0)], [np.zeros((0, config.num_frames), np.int64)]
    for first, last, begin, end in zip(bounds[:-1], bounds[1:], edges[:-1], edges[1:], strict=True):
        room = end - begin - config.num_frames / config.fps + _TIME_TOLERANCE
        if room < 0:
            continue
        begins = begin + stride * np.arange(math.floor(room / stride) + 1)
        wanted = begins[:, None] + offsets - _TIME_TOLERANCE / 2  # the bias decides ties, and decides them all alike
        times = footage.timestamps[first:last]
        after = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
        before = after - 1
        after = np.minimum(after, len(times) - 1)
        nearest = np.where(times[after] - wanted < wanted - times[before], after, before)
        starts.append(begins)
        frames.append(first + nearest)
    return np.concatenate(starts), np.concatenate(frames)


# --- the second pass: pixels --------------------------------------------------------------------------------------


def read_clips(path: str | os.PathLike, frames: np.ndarray, height: int, width: int) -> Iterator[np.ndarray]:
    """Decodes clips, given the numbers of their frames `[C, F]` in order of time: uint8 RGB `[F, H, W, 3]` each.

    No more than one clip's frames are held at a time, whatever the length of the file. Raises `ValueError` where the
    file has fewer frames than asked for.
    """
    pixel_aspect = read_header(path).pixel_aspect
    wanted = set(np.unique(frames).tolist())
    held: dict[int, np.ndarray] = {}
    clip, number = 0, -1
    with contextlib.closing(decode_frames(path)) as decoded:
        for number, (_, frame) in enumerate(decoded):
            if number in wanted:
                held[number] = frame_pixels(frame, height, width, pixel_aspect)
            while clip < len(frames) and frames[clip, -1] <= number:
                yield np.stack([held[int(index)] for index in frames[clip]])
                clip += 1
                needed = frames[clip, 0] if clip < len(frames) else number + 1
                held = {index: pixels for index, pixels in held.items() if index >= needed}
            if clip == len(frames):
                return
    raise ValueError(f"it has only {number + 1} frames now")
