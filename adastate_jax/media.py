"""Pictures and videos out: atomic mp4 files, panels side by side, contact sheets, loss curves."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import cv2
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

FPS = 16
_LABEL_HEIGHT = 18


class VideoWriter:
    """An H.264 file that grows frame by frame under a hidden name and gets its own name when it is complete.

    A context manager; leaving it by an exception, or without a frame, removes the unfinished file.
    """

    def __init__(self, path: str | Path, fps: int = FPS):
        self.path = Path(path)
        self._fps = fps
        self._stream = None
        self._partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._partial), "w", options={"movflags": "+faststart"})

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frames: np.ndarray) -> None:
        """Appends frames [F, H, W, 3] uint8; H and W even, and the same in every call."""
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": "16"})
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def __exit__(self, kind, *_) -> None:
        complete = kind is None and self._stream is not None
        if complete:
            self._container.mux(self._stream.encode())
        self._container.close()
        if complete:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


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
