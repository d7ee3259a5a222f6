"""Pictures and videos in and out: what a stream starts from, atomic mp4 files, panels, contact sheets, loss curves."""

import concurrent.futures
import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import av
import cv2
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from adastate_jax.data.videos import decode_frames, fit_pixels, read_clips
from adastate_jax.errors import UserError

FPS = 16
_LABEL_HEIGHT = 18


class VideoWriter:
    """An H.264 file that grows frame by frame under a hidden name and gets its own name when it is complete.

    A context manager; leaving it by an exception, or without a frame, removes the unfinished file. Frames are
    compressed in a thread of their own, while the caller makes the next ones.

    Raises:
        UserError: the file cannot be written; said at once where it can be known, else by `write` or at the end.
    """

    def __init__(self, path: str | Path, fps: int = FPS, metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        self._fps = fps
        self._stream = None
        self._partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        with self._naming_the_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()  # the container opens it only when the first frame comes
        self._container = av.open(str(self._partial), "w", options={"movflags": "+faststart+use_metadata_tags"})
        self._container.metadata.update(metadata or {})
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "video")
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frames: np.ndarray) -> None:
        """Appends frames [F, H, W, 3] uint8; H and W even, and the same in every call.

        Returns while they are being compressed, but not before those of the last call are; raises what stopped them.
        """
        with self._naming_the_file():
            self._wait()
        self._writing = self._thread.submit(self._compress, frames)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _compress(self, frames: np.ndarray) -> None:
        if self._stream is None:
            # With its macroblock tree, x264 reads memory that it did not set: the same frames make other files.
            options = {"crf": "16", "x264-params": "mbtree=0"}
            self._stream = self._container.add_stream("libx264", rate=self._fps, options=options)
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def __exit__(self, kind, *_) -> None:
        complete = kind is None
        with self._naming_the_file(), contextlib.ExitStack() as stack:
            stack.callback(self._partial.unlink, missing_ok=True)  # a file that got its own name is not there any more
            with self._container:
                self._thread.shutdown()
                if complete:
                    self._wait()
                    complete = self._stream is not None
                if complete:
                    self._container.mux(self._stream.encode())
            if complete:
                self._partial.replace(self.path)


def open_writer(path: str | Path, metadata: Mapping[str, str] | None = None) -> VideoWriter:
    """A writer of frames for what the path's ending says, with texts that `read_metadata` finds in the file again.

    Raises:
        UserError: the ending is of no known format, or as `VideoWriter`.
    """
    if Path(path).suffix != ".mp4":
        raise UserError(f"{path}: must end in .mp4")
    return VideoWriter(path, metadata=metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that a video file holds; raises UserError if it is missing, or no video."""
    try:
        with av.open(str(path)) as container:
            return dict(container.metadata)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error})") from None


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """A picture, upright, scaled to cover height × width and cropped at its centre: uint8 [1, height, width, 3].

    Raises:
        UserError: it is missing, or no picture.
    """
    pixels = cv2.imread(str(path))
    if pixels is None:
        raise UserError(f"{path}: {'not a readable picture' if Path(path).is_file() else 'no such file'}")
    return fit_pixels(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), height, width)[None]


def read_last_frames(path: str | Path, count: int, height: int, width: int) -> np.ndarray:
    """The end of a video at 16 frames per second, whatever its own rate: uint8 [n, height, width, 3].

    Frames are scaled to cover height × width and cropped at their centre; n is `count`, or less of a shorter video.

    Raises:
        UserError: the file is missing, no video, or damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        times = np.array([seconds for seconds, _ in decode_frames(path)])
        if not len(times):
            raise ValueError("it has no frames")
        ages = np.arange(min(count, int(times[-1] * FPS + 1e-3) + 1))[::-1] / FPS
        numbers = np.abs(times - (times[-1] - ages[:, None])).argmin(axis=1)
        return next(read_clips(path, numbers[None], height, width))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{path}: not a readable video ({error})") from None


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeats pixels: [F, H, W, 3] → [F, H · scale, W · scale, 3]."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def side_by_side(panels: Mapping[str, np.ndarray], scale: int) -> np.ndarray:
    """Videos of one length, each [F, H, W, 3] uint8, next to each other under their names, enlarged."""
    columns = []
    for name, frames in panels.items():
        large = enlarge(frames, scale)
        strip = _label(name, large.shape[2])
        columns.append(np.concatenate([np.broadcast_to(strip, (len(large), *strip.shape)), large], axis=1))
    joined = np.concatenate(columns, axis=2)
    even = [(0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)]
    return np.pad(joined, even)


def _label(text: str, width: int) -> np.ndarray:
    strip = np.full((_LABEL_HEIGHT, width, 3), 24, np.uint8)
    cv2.putText(strip, text, (4, _LABEL_HEIGHT - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (235, 235, 235), 1, cv2.LINE_AA)
    return strip


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Writes a PNG, uint8 [H, W, 3], whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial.png")
    cv2.imwrite(str(partial), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    partial.replace(path)


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], scale: int, columns: int = 12) -> np.ndarray:
    """One row per video, `columns` frames evenly over its length, left to right.

    rows: (label, frames [F, H, W, 3] uint8), all of one frame size.
    """
    sheet = []
    for label, frames in rows:
        chosen = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        chosen = np.pad(enlarge(chosen, scale), ((0, 0), (0, 2), (0, 2), (0, 0)))
        row = np.concatenate(list(chosen), axis=1)
        sheet += [_label(label, row.shape[1]), row]
    return np.concatenate(sheet, axis=0)


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def loss_curves(records: Sequence[Mapping], path: str | Path) -> None:
    """Draws every metric whose name holds `loss` against the step, one panel per stage and metric, as a PNG."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if "loss" in name:
                series[record["stage"], name].append((record["step"], value))
    figure, axes = pyplot.subplots(1, max(len(series), 1), figsize=(4 * max(len(series), 1), 3), squeeze=False)
    for axis, ((stage, name), points) in zip(axes[0], series.items(), strict=False):
        steps, values = np.array(points).T
        width = max(len(values) // 50, 1)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps, values, alpha=0.25)
        axis.plot(steps[width - 1 :], smooth)
        axis.set(title=f"{stage}: {name}", xlabel="step", yscale="log" if values.min() > 0 else "linear")
    figure.tight_layout()
    partial = Path(path).with_name(f".{Path(path).stem}.partial.png")
    figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    partial.replace(path)
