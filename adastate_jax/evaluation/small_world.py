"""What a world of `data/worlds.py` shows, read back from its pixels: its pan, its hue and the colour of its subject.

For small frames with a sideways pan, a landscape of one hue and subjects on the middle row, where optical flow finds
nothing to hold on to. Each of these is read off true videos too, so that an estimate is always compared with what the
same estimator says of the truth.
"""

import numpy as np

from adastate_jax.data.palettes import COLOURS

_STEP = 0.25  # pixels between the shifts that are tried
_SHARE = 0.6  # of the subject's radius: the middle of a subject, away from its rim
_PAINT = 0.92  # how bright the middle of a subject is painted
_FARTHEST = 45.0  # levels of 255 between a patch and a colour that is still taken for it, root of the sum over RGB


def pan_per_frame(videos: np.ndarray, largest: float) -> np.ndarray:
    """How far the camera moves right from frame to frame, in pixels, at most `largest`: [V, F, H, W, 3] → [V, F − 1].

    The sideways shift at which two frames differ least where they overlap. Only mean brightness is compared, which a
    turning hue does not change. Frames that do not differ are still.
    """
    luma = videos.astype(np.float32).mean(axis=-1)
    for _ in range(2):
        # Interpolation blurs by how far it is from whole pixels, and noise would pull the estimate towards the shifts
        # that blur most; of frames without fine detail, it takes little.
        edged = np.pad(luma, ((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge")
        luma = (edged[..., :-2] + 2 * edged[..., 1:-1] + edged[..., 2:]) / 4
    before, after = luma[:, :-1], luma[:, 1:]
    width = luma.shape[-1]
    steps = round(largest / _STEP)
    tried = _STEP * np.array(sorted(range(-steps, steps + 1), key=abs), np.float32)  # no shift first: it wins a tie
    errors = []
    for shift in tried:
        # A camera that moves right shows at column x what was at x + shift; the frames are shifted by half of it each.
        columns = np.arange(width, dtype=np.float32)
        half = abs(shift) / 2
        inside = (columns >= half) & (columns <= width - 1 - half)
        old = _at(before, columns[inside] + shift / 2)
        new = _at(after, columns[inside] - shift / 2)
        old, new = (x - x.mean(axis=(-2, -1), keepdims=True) for x in (old, new))
        power = np.square(old).mean(axis=(-2, -1)) + np.square(new).mean(axis=(-2, -1))
        errors.append(np.square(old - new).mean(axis=(-2, -1)) / np.maximum(power, 1e-3))
    return tried[np.argmin(errors, axis=0)]


def _at(frames, columns):
    """Frames [..., W] at fractional columns, all within 0 … W − 1."""
    left = np.minimum(np.floor(columns).astype(int), frames.shape[-1] - 2)
    share = columns - left
    return (1 - share) * frames[..., left] + share * frames[..., left + 1]


def hue(videos: np.ndarray) -> np.ndarray:
    """The hue of each frame's mean colour in turns, red 0, green 1/3, blue 2/3: [V, F, H, W, 3] → [V, F]."""
    red, green, blue = np.moveaxis(videos.astype(np.float64).mean(axis=(2, 3)), -1, 0)
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi) % 1.0


def hue_per_frame(hues: np.ndarray) -> np.ndarray:
    """By how much hues [V, F] turn from frame to frame, in (−1/2, 1/2] turns: [V, F − 1]."""
    return 0.5 - (0.5 - np.diff(hues, axis=1)) % 1.0


def look(videos: np.ndarray) -> dict[str, np.ndarray]:
    """`brightness`, `saturation` and `contrast` of each frame in levels of 255: [V, F, H, W, 3] → [V, F] each.

    Saturation is the mean distance from grey, contrast the deviation of mean brightness over the frame.
    """
    pixels = videos.astype(np.float32)
    grey = pixels.mean(axis=-1)
    return {
        "brightness": grey.mean(axis=(2, 3)),
        "saturation": np.sqrt(np.square(pixels - grey[..., None]).sum(axis=-1)).mean(axis=(2, 3)),
        "contrast": grey.std(axis=(2, 3)),
    }


def resemblance(videos: np.ndarray) -> np.ndarray:
    """Correlation of each frame's brightness with the first frame's, [V, F, H, W, 3] → [V, F] in −1 … 1."""
    grey = videos.astype(np.float32).mean(axis=-1).reshape(*videos.shape[:2], -1)
    grey -= grey.mean(axis=-1, keepdims=True)
    grey /= np.maximum(np.linalg.norm(grey, axis=-1, keepdims=True), 1e-3)
    return np.einsum("vfp,vp->vf", grey, grey[:, 0])


def subject_colours(videos: np.ndarray, colours: tuple[str, ...], radius: float) -> np.ndarray:
    """Which of `colours` the subject on the middle row has in each frame: [V, F, H, W, 3] → index [V, F], −1 for none.

    radius: of the subject, a fraction of the frame's shorter side. A patch of the middle of a subject is compared with
    each colour at every column; the nearest wins if it is near enough.
    """
    height, width = videos.shape[2:4]
    half = max(round(_SHARE * radius * min(height, width)), 1)
    row = height // 2
    patch = videos[:, :, row - half : row + half].astype(np.float32).mean(axis=2)  # [V, F, W, 3]
    sums = np.cumsum(np.pad(patch, ((0, 0), (0, 0), (1, 0), (0, 0))), axis=2)
    means = (sums[:, :, 2 * half :] - sums[:, :, : -2 * half]) / (2 * half)  # [V, F, columns, 3]
    paint = _PAINT * np.array([COLOURS[name] for name in colours], np.float32)
    distance = np.linalg.norm(means[..., None, :] - paint, axis=-1).min(axis=2)  # [V, F, colours]
    nearest = distance.argmin(axis=-1)
    return np.where(distance.min(axis=-1) <= _FARTHEST, nearest, -1)


def visits(found: np.ndarray, absence: int) -> dict[str, np.ndarray]:
    """Each time that subjects are in view, as columns [N]: its `video`, its `number` there, and what follows.

    `frame` is the first one; `entry` and `exit` are the colours that it begins and ends with, and `since` is the frame
    from which on it has the latter; `switches` is how often a colour is another one than before. Less than `absence`
    frames in which none is seen are within a visit. What is seen in a single frame is none: now and then a patch of the
    ground has a subject's colour.

    Args:
        found: of `subject_colours`, [V, F].
    """
    columns = {name: [] for name in ("video", "number", "frame", "entry", "exit", "since", "switches")}
    for video, colours in enumerate(found):
        frames = np.flatnonzero(colours >= 0)
        parts = np.split(frames, np.flatnonzero(np.diff(frames) > absence) + 1)
        for number, seen in enumerate(part for part in parts if len(part) > 1):
            shown = colours[seen]
            others = np.flatnonzero(shown != shown[-1])
            since = seen[others[-1] + 1] if len(others) else seen[0]
            told = video, number, seen[0], shown[0], shown[-1], since, (np.diff(shown) != 0).sum()
            for values, value in zip(columns.values(), told, strict=True):
                values.append(int(value))
    return {name: np.array(values, int) for name, values in columns.items()}
