"""The pixels of procedural videos: the ground that a camera sees, and the subject on it."""

import functools
import math
from collections.abc import Callable

import numpy as np


def paint_ground(config, palette, key, pan, zoom, hue, seconds):
    """Colours of the landscape, float32 `[F, H, W, 3]` in [0, 1]. One world unit is one frame height at time 0.

    hue `[F]`: how far the palette's hues are turned, in turns.
    """
    height, width = config.height, config.width
    aspect = width / height
    view = np.exp(-zoom * seconds)[:, None]
    # One row and one column beyond the frame: relief shading needs every pixel's upper left neighbour.
    columns = ((np.arange(-1, width) + 0.5) / width - 0.5) * aspect
    rows = (np.arange(-1, height) + 0.5) / height - 0.5
    x = pan[0] * aspect * seconds[:, None] + view * columns  # [F, W + 1]
    y = pan[1] * seconds[:, None] + view * rows  # [F, H + 1]

    # Octaves fade in and out by their size *on screen*. Below three pixels they would flicker, so `finest` is no less;
    # beyond one and a half frames they are a constant. A pan never changes the weights, and an endless zoom never runs
    # out of detail.
    smallest = config.finest / height
    finest, coarsest = math.log2(smallest * view.min()), math.log2(1.6 * view.max())
    field = np.zeros((len(seconds), height + 1, width + 1), np.float32)
    power = np.zeros((len(seconds), 1, 1), np.float32)
    for octave in range(math.floor(finest), math.ceil(coarsest) + 1):
        size = 2.0**octave
        on_screen = size / view[:, 0]
        weight = on_screen**1.2 * _smoothstep(smallest, 8 / 3 * smallest, on_screen) * _smoothstep(1.6, 0.8, on_screen)
        seen = weight > 0.0
        if not seen.any():
            continue
        weight = weight[seen, None, None].astype(np.float32)
        octave_key = _mix(key ^ _mix(np.uint64(octave + 2**20)))
        shift = (_unit(_mix(octave_key ^ np.uint64(1))), _unit(_mix(octave_key ^ np.uint64(2))))
        noise = _gradient_noise(x[seen] / size + 64.0 * shift[0], y[seen] / size + 64.0 * shift[1], octave_key)
        field[seen] += weight * noise
        power[seen] += weight**2
    # Gradient noise has a standard deviation close to a quarter; half of the heights then lie in the middle third.
    elevation = 0.5 + 0.95 * field / np.sqrt(power)

    slope = (elevation[:, 1:, 1:] - elevation[:, :-1, :-1]) * np.float32(height / 8)
    shade = 1.0 + np.float32(palette.relief) * np.tanh(slope)
    ramp = _ramp(palette)
    steps = len(ramp) - 1
    entry = np.clip(elevation[:, 1:, 1:] * steps, 0, steps).astype(np.intp)
    if hue.any():
        ramps = np.clip(np.einsum("fij,nj->fni", _hue_rotation(hue), ramp), 0.0, 1.0)
        colours = ramps[np.arange(len(seconds))[:, None, None], entry]
    else:
        colours = ramp[entry]
    return np.clip(colours * shade[..., None], 0.0, 1.0).astype(np.float32)


def _gradient_noise(x, y, key):
    """Gradient noise of the whole lattice `key` at columns x `[F, W]` and rows y `[F, H]`, float32 `[F, H, W]`.

    A camera that does not rotate makes the interpolation separable, so a frame is two products of small matrices:
    rows × lattice × columns, once for each component of the lattice's gradients.
    """
    first_x, blend_x, lever_x = _lattice_weights(x)
    first_y, blend_y, lever_y = _lattice_weights(y)
    lattice_x = first_x[:, None, None] + np.arange(blend_x.shape[-1])
    lattice_y = first_y[:, None, None] + np.arange(blend_y.shape[-1])[:, None]
    hashed = _mix(_mix(lattice_x.astype(np.uint64) ^ key) + lattice_y.astype(np.uint64))  # [F, nodes y, nodes x]
    angle = (2.0 * np.pi) * _unit(hashed).astype(np.float32)
    pull_x = blend_y @ np.cos(angle) @ lever_x.transpose(0, 2, 1)
    pull_y = lever_y @ np.sin(angle) @ blend_x.transpose(0, 2, 1)
    return pull_x + pull_y


def _lattice_weights(position):
    """Interpolation along one axis: `[F, N]` → first node `[F]`, blend and blend × distance `[F, N, nodes]`."""
    node = np.floor(position).astype(np.int64)
    first = node.min(axis=1)
    fraction = (position - node).astype(np.float32)
    fade = fraction**3 * (fraction * (fraction * 6.0 - 15.0) + 10.0)
    offset = node - first[:, None]
    nodes = np.arange(offset.max() + 2)
    lower = offset[..., None] == nodes
    upper = offset[..., None] + 1 == nodes
    blend = lower * (1.0 - fade)[..., None] + upper * fade[..., None]
    distance = lower * fraction[..., None] + upper * (fraction - 1.0)[..., None]
    return first, blend, blend * distance


def _mix(value):
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): uint64 → uint64 that looks random."""
    with np.errstate(over="ignore"):  # wrapping around is the point
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def _unit(hashed):
    """uint64 → float64 in [0, 1)."""
    return (hashed >> np.uint64(11)) * 2.0**-53


def _smoothstep(start, end, value):
    """0 at `start`, 1 at `end` (which may be the smaller of the two), smooth in between."""
    fraction = np.clip((value - start) / (end - start), 0.0, 1.0)
    return fraction * fraction * (3.0 - 2.0 * fraction)


@functools.cache
def _ramp(palette):
    """The palette as a table, float32 `[1024, 3]`."""
    places = [place for place, _ in palette.stops]
    colours = np.array([[int(code[i : i + 2], 16) / 255.0 for i in (1, 3, 5)] for _, code in palette.stops])
    level = np.linspace(0.0, 1.0, 1024)
    return np.stack([np.interp(level, places, colours[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def _hue_rotation(turns):
    """Rotations of RGB about the grey axis, `[F]` turns → float32 `[F, 3, 3]`; greys and mean brightness stay."""
    angle = 2.0 * np.pi * turns[:, None, None]
    grey = np.full((3, 3), 1.0 / 3.0)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3.0)
    return (np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * cross + grey).astype(np.float32)


def subjects_passed_by(config, direction, speed, key, start, seconds):
    """Where the subjects standing along a pan's way appear: `[K, F, 2]`, frame widths and heights from the centre."""
    spacing = config.subject_spacing
    travelled = speed * seconds
    # The first subject starts ahead of the middle, so the camera passes it within a second or so.
    ahead = 0.1 + 0.15 * (start[0] + 1.0)
    numbers = np.arange(math.floor((travelled[0] - 1.0) / spacing) - 1, math.ceil((travelled[-1] + 1.0) / spacing) + 2)
    hashed = _mix(numbers.astype(np.uint64) ^ key)
    jitter = (_unit(hashed) - 0.5) * 0.3 * spacing * (numbers != 0) * config.subject_scatter
    aside = (_unit(_mix(hashed)) - 0.5) * 0.56 * config.subject_scatter
    along = (numbers * spacing + jitter)[:, None] + ahead - travelled
    visible = (np.abs(along) < 0.8).any(axis=1)
    across = np.array([abs(direction[1]), abs(direction[0])])
    return along[visible, :, None] * direction + aside[visible, None, None] * across


def subject_followed(direction, start, seconds):
    """A followed subject stays near the centre and sways a little: `[1, F, 2]`, as above."""
    phase = 2.0 * np.pi * (0.7 * seconds + start[0])
    across = np.array([abs(direction[1]), abs(direction[0])])
    return (0.05 * np.sin(phase)[:, None] * across + 0.08 * start)[None]


def paint_subject(video, shape, colours, centre, radii):
    """Paints one anti-aliased subject and its shadow into `video` in place.

    video float32 `[F, H, W, 3]` in [0, 1]; colours `[F, 3]` in 0 … 255; centre `[F, 2]` in frame widths and heights
    from the middle; radii `[F]` in fractions of the frame's shorter side.
    """
    _, height, width, _ = video.shape
    pixels = (radii * min(height, width))[:, None, None]
    x = np.arange(width) + 0.5 - width * (0.5 + centre[:, 0, None, None])  # [F, 1, W], pixels
    y = np.arange(height)[:, None] + 0.5 - height * (0.5 + centre[:, 1, None, None])  # [F, H, 1], pixels
    outline = _OUTLINES[shape]

    drop = 0.28 * pixels
    softness = 0.3 * pixels + 1.0
    shadow = np.clip(0.5 - outline(x - drop, y - drop, pixels) / softness, 0.0, 1.0)
    video *= (1.0 - 0.45 * shadow[..., None]).astype(np.float32)

    distance = outline(x, y, pixels)
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
    rim = np.clip(1.0 + distance / (0.22 * pixels), 0.0, 1.0)  # 1 on the edge, 0 inside
    light = 1.0 - 0.16 * (x + y) / pixels - 0.45 * rim
    paint = colours[:, None, None].astype(np.float32) / 255.0 * np.clip(light, 0.2, 1.15)[..., None].astype(np.float32)
    video += cover * (np.minimum(paint, 1.0) - video)


def _ball(x, y, radius):
    return np.hypot(x, y) - radius


def _box(x, y, radius):
    side, corner = 0.62 * radius, 0.24 * radius
    across, along = np.abs(x) - side, np.abs(y) - side
    outside = np.hypot(np.maximum(across, 0.0), np.maximum(along, 0.0))
    return outside + np.minimum(np.maximum(across, along), 0.0) - corner


def _diamond(x, y, radius):
    return (np.abs(x) + np.abs(y) - 1.15 * radius) * math.sqrt(0.5)


def _ring(x, y, radius):
    return np.abs(np.hypot(x, y) - 0.75 * radius) - 0.32 * radius


# Signed distance to the outline in pixels, negative inside.
_OUTLINES: dict[str, Callable] = {"ball": _ball, "box": _box, "diamond": _diamond, "ring": _ring}
