"""A folder of real videos → clips of fixed length, size and frame rate that never cross a shot cut.

Every file is decoded twice and never held: a first pass notes the frames' timestamps and the cuts between shots, which
tells exactly which frames make which clip; a second pass decodes, resizes and hands out the clips. Captions come from
`captions.json` in the folder ({"file name": "caption"}), or from `NAME.txt` beside the video `NAME.mp4`.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import av
import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from scenedetect import AdaptiveDetector, FrameTimecode

from adastate_jax.data.builder import Examples, SequentialBuilder, named_configuration
from adastate_jax.errors import UserError

# A dissolve or fade: over a quarter of a second the picture changes by this mean absolute difference (of 255), and
# its middle is the mean of its ends to within this fraction of the change. With a moving camera the middle is a picture
# of its own: over 138 procedural worlds, from slow to fast, the fraction never fell below 0.13.
_BLEND_CHANGE = 10.0
_BLEND_RESIDUE = 0.1
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


@dataclasses.dataclass(frozen=True)
class FileClips:
    """The clips of one file: its name within the folder, its caption, start times `[C]` in seconds and the numbers of
    the frames that make each clip, int64 `[C, F]`."""

    name: str
    caption: str
    starts: np.ndarray
    frames: np.ndarray


class _Unusable(Exception):
    """A file that has to be skipped; the message is the reason."""


# --- decoding -----------------------------------------------------------------------------------------------------


def decode_frames(path: str | os.PathLike) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes a file's best video stream, one frame at a time: (seconds since the first frame, frame).

    Seconds increase strictly; a stream without timestamps is taken at its nominal rate. "Best" is FFmpeg's choice where
    there are several streams: the highest resolution, cover pictures last. Raises `av.FFmpegError` where
    the file cannot be decoded, and `ValueError` where it has no video.
    """
    with av.open(os.fspath(path)) as container:
        stream = _best_stream(container)
        stream.thread_type = "AUTO"
        interval = 1 / _rate(stream)
        first = last = None
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"its frame at {last or 0.0:.2f} s is damaged")
            time = frame.time
            if first is None:
                first = time or 0.0
                seconds = 0.0
            else:
                seconds = last + interval if time is None or time - first <= last else time - first
            last = seconds
            yield seconds, frame


def frame_pixels(frame: av.VideoFrame, height: int, width: int, pixel_aspect: Fraction | float = 1) -> np.ndarray:
    """A decoded frame upright, scaled to cover `height` × `width` and cropped at its centre: uint8 RGB `[H, W, 3]`.

    Shrinking averages areas, which is what keeps thin structures from flickering; enlarging is bicubic. `pixel_aspect`
    is the width of the stored pixels over their height.
    """
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns:
        pixels = np.rot90(pixels, quarter_turns)
    if quarter_turns % 2:
        pixel_aspect = 1 / pixel_aspect
    return fit_pixels(pixels, height, width, pixel_aspect)


def fit_pixels(pixels: np.ndarray, height: int, width: int, pixel_aspect: Fraction | float = 1) -> np.ndarray:
    """Scales a picture `[h, w, 3]` to cover `height` × `width` and crops its centre: uint8 `[height, width, 3]`."""
    rows, columns, _ = pixels.shape
    aspect = width / height / float(pixel_aspect)  # of the crop, in stored pixels
    crop_rows = min(rows, max(1, round(columns / aspect)))
    crop_columns = min(columns, max(1, round(rows * aspect)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    cropped = pixels[top : top + crop_rows, left : left + crop_columns]
    if cropped.shape[:2] == (height, width):
        return np.ascontiguousarray(cropped)
    shrinking = crop_rows >= height and crop_columns >= width
    kind = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(cropped), (width, height), interpolation=kind)


# --- the first pass: times and cuts -------------------------------------------------------------------------------


def scan_footage(path: str | os.PathLike, progress: Callable[[float], None] = lambda seconds: None) -> Footage:
    """Decodes a whole video for its timestamps and its shot cuts.

    Cuts are found by PySceneDetect's adaptive detector: a change of content that stands out from the changes around it,
    so a fast camera is not mistaken for a cut. It does not see gradual transitions; dissolves and fades between calm
    shots are recognised by their pictures being linear in time, those between fast shots are not. `progress` is called
    with the seconds decoded so far. Raises as `decode_frames` does, and `ValueError` where the file ends well before
    the length that it states.
    """
    detector = AdaptiveDetector(min_scene_len=1)
    # The detector judges a frame by its neighbours on both sides. Repeating the first and the last frame gives the
    # outermost ones neighbours too; otherwise a cut within two frames of either end would go unseen.
    padding = detector.window_width
    timestamps, cuts, small = [], set(), None
    rate, stated = _stated_rate_and_seconds(path)
    lag = max(2, round(rate / 8))
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
    if end < 0.9 * stated:
        raise ValueError(f"it ends after {end:.1f} s of the {stated:.1f} s that it states, so it is cut off or damaged")
    return Footage(times, tuple(cut for cut in sorted(cuts) if 0 < cut < len(times)), float(end))


def _is_blend(before, middle, after):
    change = np.abs(after - before).mean()
    return change > _BLEND_CHANGE and np.abs(middle - (before + after) / 2).mean() < _BLEND_RESIDUE * change


def _stated_rate_and_seconds(path):
    """Frames per second and the video stream's length by the file's header; 0 s where none is stated for the stream."""
    with av.open(os.fspath(path)) as container:
        stream = _best_stream(container)
        return _rate(stream), float(stream.duration * stream.time_base) if stream.duration else 0.0


def _best_stream(container):
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("it has no video stream")
    return stream


def _rate(stream):
    return float(stream.average_rate or 25)  # a stream without a rate says nothing; 25 is the commonest


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
    with av.open(os.fspath(path)) as container:
        pixel_aspect = _best_stream(container).sample_aspect_ratio or 1
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


# --- folders ------------------------------------------------------------------------------------------------------


def list_files(folder: str | os.PathLike) -> list[str]:
    """The names of the files that may be videos, relative to `folder`, sorted; hidden files and captions left out.

    Raises `UserError` if the folder is missing or holds no such file.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"video folder {folder} does not exist or is no folder: give a folder of video files")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    videos = [name for name in names if name.suffix != ".txt" and name.as_posix() != "captions.json"]
    if not videos:
        raise UserError(f"video folder {folder} holds no video files: put some there, or give another folder")
    return [name.as_posix() for name in videos]


def read_captions(folder: str | os.PathLike, names: Sequence[str]) -> dict[str, str]:
    """Captions by file name, "" for a file without; `captions.json` goes before `NAME.txt`.

    Raises `UserError` for a caption file that is not UTF-8, or a `captions.json` that is not {"file": "caption"} or
    names a file that is not there.
    """
    folder = pathlib.Path(folder)
    captions = dict.fromkeys(names, "")
    for name in names:
        beside = (folder / name).with_suffix(".txt")
        if beside.is_file():
            captions[name] = " ".join(_read_text(beside).split())
    table = folder / "captions.json"
    if table.is_file():
        try:
            listed = json.loads(_read_text(table))
        except json.JSONDecodeError as error:
            raise UserError(
                f'{table}, line {error.lineno} is not JSON ({error.msg}): write {{"file": "caption"}}'
            ) from error
        if not isinstance(listed, dict) or not all(isinstance(caption, str) for caption in listed.values()):
            raise UserError(f'{table} is not an object of texts: write {{"file": "caption"}}')
        unknown = sorted(set(listed) - set(names))
        if unknown:
            raise UserError(f"{table} captions {unknown[0]!r}, which is not in the folder: correct or remove the entry")
        captions |= {name: " ".join(caption.split()) for name, caption in listed.items()}
    return captions


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"caption file {path} is not UTF-8: save it as UTF-8") from error


def scan_folder(folder: str | os.PathLike, config: ClipConfig) -> tuple[list[FileClips], list[str]]:
    """Finds all clips of a folder: (files with at least one clip, in order of name; one line per skipped file).

    A skipped file's line names it and says why: unreadable, damaged, without video, too short. Shows a progress bar on
    stderr. Raises `UserError` as `list_files` and `read_captions` do, or if no file is usable.
    """
    folder = pathlib.Path(folder)
    names = list_files(folder)
    captions = read_captions(folder, names)
    usable, skipped = [], []
    with tqdm.tqdm(names, desc="scanning videos", unit="file", file=sys.stderr) as progress:
        for name in progress:

            def report(seconds, name=name):
                progress.set_postfix_str(f"{name} {seconds:.0f} s")

            try:
                starts, frames = _find_clips(folder / name, config, report)
            except _Unusable as reason:
                skipped.append(f"skipped {name}: {reason}")
                tqdm.tqdm.write(skipped[-1], file=sys.stderr)
            else:
                usable.append(FileClips(name, captions[name], starts, frames))
    if not usable:
        raise UserError(
            f"video folder {folder} has no usable video ({skipped[0]}"
            f"{f'; {len(skipped) - 1} more' if len(skipped) > 1 else ''}): add others or shorten the clips"
        )
    return usable, skipped


def _find_clips(path, config, progress):
    try:
        if path.stat().st_size == 0:
            raise _Unusable("it is empty (0 bytes)")
        footage = scan_footage(path, progress)
    except av.FFmpegError as error:
        raise _Unusable(f"it cannot be decoded as video ({error.strerror})") from error
    except OSError as error:
        raise _Unusable(f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _Unusable(str(error)) from error
    starts, frames = clip_frames(footage, config)
    if not len(starts):
        edges = np.array([0.0, *footage.timestamps[list(footage.cuts)], footage.end])
        raise _Unusable(
            f"it is too short, its longest shot lasts {np.diff(edges).max():.2f} s "
            f"and a clip {config.num_frames / config.fps:.2f} s"
        )
    return starts, frames


# --- the dataset --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class VideosConfig(tfds.core.BuilderConfig):
    """A dataset of the clips in `folder`; `files` is (name, bytes, modification time in ns) of all that is in it."""

    folder: str = ""
    clips: ClipConfig | None = None
    validation_fraction: float = 0.0
    files: tuple[tuple[str, int, int], ...] = ()


class Videos(SequentialBuilder):
    """TFDS builder of real clips; make one with `videos`.

    Features: `video` uint8 `[F, H, W, 3]`, `caption`, `source` (the file's name in the folder) and `start`, seconds
    into that file. Splits: `train`, and `validation` if asked for.
    """

    VERSION = tfds.core.Version("1.0.0")  # raise it when the clips cut from the same file change

    def _info(self):
        clips = self.builder_config.clips
        shape = (clips.num_frames, clips.height, clips.width, 3)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clips of real videos.",
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes"),
                    "caption": tfds.features.Text(),
                    "source": tfds.features.Text(),
                    "start": tfds.features.Scalar(np.float32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        config = self.builder_config
        files, _ = scan_folder(config.folder, config.clips)
        splits = {"train": files}
        if config.validation_fraction:
            splits = _split_files(files, config.validation_fraction, config.folder)
        return {
            name: Examples(sum(len(file.starts) for file in part), self._generate_examples(part))
            for name, part in splits.items()
        }

    def _generate_examples(self, files):
        config = self.builder_config
        for file in files:
            path = pathlib.Path(config.folder) / file.name
            clips = read_clips(path, file.frames, config.clips.height, config.clips.width)
            try:
                for start, video in zip(file.starts, clips, strict=True):
                    example = {"video": video, "caption": file.caption, "source": file.name, "start": start}
                    yield f"{file.name}:{start:.4f}", example
            except (av.FFmpegError, ValueError) as error:
                raise UserError(f"video {path} changed while it was read ({error}): run again") from error


def _split_files(files, fraction, folder):
    """Whole files go to either split, by the hash of their names: clips of one file look alike, so validation on files
    seen in training would flatter the model."""
    if len(files) < 2:
        raise UserError(f"video folder {folder} has one usable file: validation needs two, or validation_fraction 0")
    shuffled = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    count = min(max(1, round(fraction * len(files))), len(files) - 1)
    held_out = {file.name for file in shuffled[:count]}
    return {
        "train": [file for file in files if file.name not in held_out],
        "validation": [file for file in files if file.name in held_out],
    }


def videos(folder: str | os.PathLike, clips: ClipConfig, validation_fraction: float = 0.0) -> Callable[..., Videos]:
    """A dataset of all clips in a folder and its subfolders, for `open_source`.

    `validation_fraction` of the files, at least one if it is above 0, go to the split `validation`. A folder in which a
    file's name, size or modification time changed is another dataset, so it is built anew. Raises `UserError` if
    the folder is missing or holds nothing.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: give a fraction from 0 up to below 1")
    folder = pathlib.Path(folder).absolute()
    list_files(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    status = [(path, path.stat()) for path in paths]
    files = tuple((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in status)
    label = f"{clips.height}x{clips.width}x{clips.num_frames}"
    fields = {"folder": str(folder), "clips": clips, "validation_fraction": validation_fraction, "files": files}
    return functools.partial(Videos, config=named_configuration(VideosConfig, label, fields))
