"""Frames next to each other: videos side by side, contact sheets."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

_LABEL_HEIGHT = 18


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
    """Repeats pixels: [F, H, W, 3] → [F, H · scale, W · scale, 3]."""
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def fitted(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames [F, h, w, 3] uint8, as large as fits into [F, height, width, 3], in the middle of black."""
    if frames.shape[1:3] == (height, width):
        return frames
    factor = min(height / frames.shape[1], width / frames.shape[2])
    tall, wide = round(frames.shape[1] * factor), round(frames.shape[2] * factor)
    ground = np.zeros((len(frames), height, width, 3), np.uint8)
    top, left = (height - tall) // 2, (width - wide) // 2
    for frame, place in zip(frames, ground, strict=True):
        place[top : top + tall, left : left + wide] = cv2.resize(frame, (wide, tall), interpolation=cv2.INTER_AREA)
    return ground


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
