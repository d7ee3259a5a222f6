"""Live meters: what `evaluation` measures of a finished video, of each chunk as it comes."""

import math

import cv2
import numpy as np

from adastate_jax.evaluation.drift import DriftMeter
from adastate_jax.evaluation.motion import MotionMeter
from adastate_jax.serving.protocol import Meters


class LiveMeters:
    """Of one session; holds the take's first frame."""

    def __init__(self, fps: int):
        self._fps = fps
        self._take = -1
        self._first: list[np.ndarray] = []

    def measure(self, chunk: int, take: int, frames: np.ndarray, panels: int) -> Meters | None:
        """The meters of a chunk of frames uint8 [F, H, panels · W, 3]; None of a single frame."""
        parts = [np.ascontiguousarray(part) for part in np.split(frames, panels, axis=2)]
        if take != self._take:
            self._take, self._first = take, [part[0] for part in parts]
        if len(frames) < 2:
            return None
        motion, lock, drift, hue = [], [], [], []
        for first, part in zip(self._first, parts, strict=True):
            motion.append(self._motion(part))
            meter = DriftMeter()
            meter.add(0.0, first)
            meter.add(1.0, part[-1])
            look = meter.result().values
            lock.append(round(float(look["ssim"][1]), 4))
            drift.append(round(1.0 - float(look["histogram"][1]), 4))
            hue.append(_mean_hue(part[-1]))
        return Meters(chunk=chunk, motion=motion, lock=lock, drift=drift, hue=hue)

    def _motion(self, frames: np.ndarray) -> float:
        meter = MotionMeter(self._fps)
        for number, frame in enumerate(frames):
            meter.add(number / self._fps, frame)
        return round(float(meter.result().pairs["motion"].mean()), 2)


def _mean_hue(frame: np.ndarray) -> float:
    """Mean hue of a frame in degrees, weighted by saturation, on the circle."""
    hsv = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV).astype(np.float64)
    angle, weight = hsv[..., 0] * math.pi / 90, hsv[..., 1]
    turned = math.atan2(float((np.sin(angle) * weight).sum()), float((np.cos(angle) * weight).sum()))
    return round(math.degrees(turned) % 360, 1)
