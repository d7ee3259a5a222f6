"""Synthetic clips whose motion is known exactly: plane waves evaluated at moving coordinates, never resampled."""

import cv2
import numpy as np

from adastate_jax.media import VideoWriter


def waves(height, width, places, seed=0, count=24):
    """A clip of plane waves, uint8 [F, H, W, 3]; `places` yields for every frame the complex coordinates of the pixels,
    in pixels from the centre, so that the clip's motion is that of the coordinates."""
    rng = np.random.default_rng(seed)
    short = min(height, width)
    length = np.exp(rng.uniform(np.log(max(6.0, short / 30)), np.log(short), count))
    wave = 2 * np.pi / length * np.exp(1j * rng.uniform(0, 2 * np.pi, count))
    phase = rng.uniform(0, 2 * np.pi, (3, count))
    strength = np.sqrt(length / length.max())
    frames = []
    for place in places:
        angle = (np.conj(wave) * place[..., None]).real.astype(np.float32)
        frames.append(np.cos(angle) @ (strength * np.cos(phase)).T + np.sin(angle) @ (strength * np.sin(phase)).T)
    frames = np.stack(frames)
    return np.clip(np.round(128 + 35 * frames / frames[0].std()), 0, 255).astype(np.uint8)


def moving(height, width, num_frames, pan=(0.0, 0.0), zoom=0.0, roll=0.0, **options):
    """A clip seen by a camera that moves by `pan` pixels (right, down), e^zoom and `roll` radians clockwise a frame."""
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    pixels = x + 1j * y[:, None]
    turns = np.exp(np.arange(num_frames) * complex(-zoom, roll))
    return waves(
        height, width, (turn * pixels + number * complex(*pan) for number, turn in enumerate(turns)), **options
    )


def still(height, width, num_frames, **options):
    """A frozen clip, uint8 [F, H, W, 3]."""
    return moving(height, width, 1, **options).repeat(num_frames, 0)


def brightened(frames, levels):
    """Adds levels [F] to frames, clipped."""
    changed = frames.astype(float) + np.asarray(levels, float)[:, None, None, None]
    return np.clip(np.round(changed), 0, 255).astype(np.uint8)


def write_video(path, frames, fps=16):
    """Encodes uint8 frames [F, H, W, 3] of even size."""
    with VideoWriter(path, fps) as writer:
        writer.write(frames)
    return path


def write_motion_jpeg(path, frames, fps=16):
    """Encodes uint8 frames [F, H, W, 3] of any size as an .avi: no H.264, and its header comes first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, frames.shape[2:0:-1])
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path
