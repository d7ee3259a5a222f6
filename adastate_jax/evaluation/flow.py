"""Optical flow between two frames, and what of it the camera did.

No downloaded weights: the flow is OpenCV's DIS (Kroeger et al. 2016), a classical estimator. It loses motion beyond
about a tenth of the frame between two frames, and in flat areas it is zero whatever moves.

Signs are those of `adastate_jax.data.worlds`. `pan_x > 0` is a camera moving right and `pan_y > 0` one moving down, so
the content goes the other way; `zoom > 0` spreads the content outwards; `roll > 0` turns the camera clockwise and the
content anticlockwise.

Sizes. Flow is computed on luma whose shorter side is at most 256 pixels, and at least 128: smaller frames are enlarged.
Pans are then within 2 % of the truth in the median down to 32 × 32 pixels. What fails there: flow is smooth over a
few pixels, so a subject of 4 pixels vanishes in its surroundings, and its error, about 0.02 pixels, is 1 % of the
height per second at 16 frames per second, which is where object motion begins to be seen.
"""

import dataclasses
import math

import cv2
import numpy as np

_SHORT_SIDE = (128, 256)  # pixels, of the frames that flow is computed on
_LONG_SIDE = 1024  # pixels, to which a frame may be enlarged
_SMALLEST_SIDE = 8  # pixels, of the frames themselves
_MIN_GRADIENT = 0.25  # levels per pixel: with less than this in any direction, a place cannot be followed
_MIN_POINTS = 12  # places that can be followed, below which no camera is fitted
_AXES = ((1, 0), (0, 1))  # the orders of Sobel's derivatives


@dataclasses.dataclass(frozen=True)
class Camera:
    """The camera's move between two frames.

    `pan_x`, `pan_y` in frame widths and heights at the centre, `zoom` the natural logarithm of the scale, `roll` in
    radians, `support` the share of the followed places that agree, in [0, 1]; all NaN where too few can be followed.
    """

    pan_x: float
    pan_y: float
    zoom: float
    roll: float
    support: float


_NO_CAMERA = Camera(*[math.nan] * 5)


def flow_luma(frame: np.ndarray) -> np.ndarray:
    """Luma for `optical_flow`: uint8 RGB `[H, W, 3]` → uint8 `[h, w]`, the shorter side between 128 and 256 pixels.

    Raises `ValueError` for a frame with a side below 8 pixels.
    """
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    height, width = luma.shape
    short, long = sorted((height, width))
    if short < _SMALLEST_SIDE:
        raise ValueError(f"its frames are {width} x {height} pixels, and motion needs {_SMALLEST_SIDE}")
    scale = min(max(short, _SHORT_SIDE[0]), _SHORT_SIDE[1]) / short
    scale = min(scale, max(1.0, _LONG_SIDE / long))
    if scale == 1:
        return luma
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(luma, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4)


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dense flow by DIS: luma uint8 `[h, w]` twice → float32 `[h, w, 2]`, (x, y) in pixels from `first` to `second`."""
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(first, second, None)


def warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Samples `image` `[h, w]` or `[h, w, C]` where `flow` `[h, w, 2]` (pixels) leads from every pixel: float32.

    Linear, because OpenCV's cubic kernel shifts pictures by up to 0.05 pixels.
    """
    x, y = _targets(flow)
    return cv2.remap(image.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _targets(flow):
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    return x, flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]


def speed(flow: np.ndarray) -> np.ndarray:
    """Length of a flow `[h, w, 2]` at every pixel: float32 `[h, w]`."""
    return cv2.magnitude(flow[..., 0], flow[..., 1])


def consistent_pixels(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Where flow there and back agrees and stays within the frame: `[h, w, 2]` twice → bool `[h, w]`.

    The tolerance is that of Sundaram, Brox and Keutzer 2010; what fails is occluded, or cannot be followed.
    """
    returned = warp(backward, forward)
    tolerance = 0.01 * (speed(forward) ** 2 + speed(returned) ** 2) + 0.5
    return _inside(forward) & (speed(forward + returned) ** 2 < tolerance)


def _inside(flow):
    height, width = flow.shape[:2]
    x, y = _targets(flow)
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def followed_pixels(luma: np.ndarray, consistent: np.ndarray) -> np.ndarray:
    """Where flow means something: textured in both directions, and agreeing there and back.

    Luma uint8 `[h, w]` of the first frame and consistent bool `[h, w]` → bool `[h, w]`. Flat areas have a flow of
    nothing in DIS, whatever the camera does.
    """
    spacing = _grid_spacing(luma)
    x, y = (cv2.Sobel(luma, cv2.CV_32F, *order, scale=1 / 8) for order in _AXES)
    xx, yy, xy = (cv2.boxFilter(product, -1, (spacing, spacing)) for product in (x * x, y * y, x * y))
    weakest = (xx + yy) / 2 - cv2.magnitude((xx - yy) / 2, xy)  # the structure tensor's smaller eigenvalue
    return consistent & (weakest > _MIN_GRADIENT**2)


def _grid_spacing(luma):
    return max(4, min(luma.shape) // 16)


def fit_camera(first: np.ndarray, second: np.ndarray, flow: np.ndarray, followed: np.ndarray) -> Camera:
    """The similarity that most of the followed places agree on, by RANSAC on a grid of 16 rows, then by intensity.

    Luma uint8 `[h, w]` twice, the flow from the first to the second float32 `[h, w, 2]` in pixels, followed bool
    `[h, w]`. What covers most of the picture is taken for the background, so a subject that fills the frame is taken
    for the camera.
    """
    height, width = first.shape
    spacing = _grid_spacing(first)
    rows, columns = np.mgrid[spacing // 2 : height : spacing, spacing // 2 : width : spacing]
    rows, columns = rows[1:-1, 1:-1].ravel(), columns[1:-1, 1:-1].ravel()  # flow is worst along the border
    seen = followed[rows, columns]
    rows, columns = rows[seen], columns[seen]
    if len(rows) < _MIN_POINTS:
        return _NO_CAMERA
    start = np.stack([columns - (width - 1) / 2, rows - (height - 1) / 2], -1)
    tolerance = min(height, width) / 256
    matrix, inliers = cv2.estimateAffinePartial2D(
        start, start + flow[rows, columns], method=cv2.RANSAC, ransacReprojThreshold=tolerance, confidence=0.999
    )
    if matrix is None:
        return _NO_CAMERA
    turn, shift = complex(matrix[0, 0], matrix[1, 0]), complex(matrix[0, 2], matrix[1, 2])
    background = followed & (speed(flow - _similarity_flow(turn, shift, height, width)) < 2 * tolerance)
    turn, shift = _align(first, second, background, turn, shift)
    return Camera(
        pan_x=-shift.real / width,
        pan_y=-shift.imag / height,
        zoom=math.log(abs(turn)),
        roll=-math.atan2(turn.imag, turn.real),
        support=float(inliers.mean()),
    )


def _align(first, second, background, turn, shift):
    """Refines place → turn · place + shift (complex, from the centre) so that the two frames' background matches.

    DIS rounds towards whole pixels: it is 2 to 3 % off at movements of half a pixel, and worse below. A few steps of
    Gauss-Newton on the intensities themselves, on every fourth pixel, take that away. A change of brightness is fitted
    along, so that it is not taken for motion. Where the steps lead astray, the start is returned.
    """
    height, width = first.shape
    chosen = np.zeros_like(background)
    chosen[1:-1:2, 1:-1:2] = background[1:-1:2, 1:-1:2]
    rows, columns = np.nonzero(chosen)
    x, y = columns - (width - 1) / 2, rows - (height - 1) / 2
    # Linear interpolation blurs between the pixels, and a frame blurred more and more from its centre outwards looks
    # like a zoom; the second derivatives take that back (see `seen`), and make interpolation exact to third order.
    curved = [cv2.Sobel(second, cv2.CV_32F, *order, ksize=1) for order in ((2, 0), (0, 2))]
    layers = cv2.merge([second.astype(np.float32), *curved])
    reference = first[rows, columns].astype(np.float32)
    across, along = (cv2.Sobel(first, cv2.CV_32F, *order, scale=1 / 8)[rows, columns] for order in _AXES)
    jacobian = np.stack([across, along, across * x + along * y, along * x - across * y, np.ones_like(across)], -1)
    refined, moved = turn, shift
    for _ in range(6):
        places = refined * (x + 1j * y) + moved + complex(width - 1, height - 1) / 2
        column, row = (part.astype(np.float32)[:, None] for part in (places.real, places.imag))
        seen = cv2.remap(layers, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]
        bend = [part * (1 - part) / 2 for part in (column[:, 0] % 1, row[:, 0] % 1)]
        seen = seen[:, 0] - bend[0] * seen[:, 1] - bend[1] * seen[:, 2]
        step = np.linalg.lstsq(jacobian.T @ jacobian, jacobian.T @ (reference - seen), rcond=1e-10)[0]
        moved += complex(step[0], step[1])
        refined += complex(step[2], step[3])
    radius = min(height, width) / 2
    astray = abs(moved - shift) + abs(refined - turn) * radius > min(height, width) / 128
    return (turn, shift) if astray else (refined, moved)


def _similarity_flow(turn, shift, height, width):
    """The flow of place → turn · place + shift, places from the centre in pixels: float32 `[h, w, 2]`."""
    turn = turn - 1
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    y = (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2))[:, None]
    flow = np.empty((height, width, 2), np.float32)
    flow[..., 0] = turn.real * x - turn.imag * y + shift.real
    flow[..., 1] = turn.imag * x + turn.real * y + shift.imag
    return flow


def object_flow(flow: np.ndarray, camera: Camera) -> np.ndarray:
    """What is left of a flow `[h, w, 2]` in pixels without the camera's part; NaN where no camera is known."""
    height, width = flow.shape[:2]
    turn = np.exp(complex(camera.zoom, -camera.roll))
    return flow - _similarity_flow(turn, -complex(camera.pan_x * width, camera.pan_y * height), height, width)


def top_radius(flow: np.ndarray) -> float:
    """Mean radius of the fastest 5 % of pixels of a flow `[h, w, 2]`, in % of the shorter side (VBench's measure)."""
    radius = speed(flow).ravel()
    count = max(1, int(len(radius) * 0.05))
    return 100.0 * float(np.partition(radius, -count)[-count:].mean()) / min(flow.shape[:2])


def interpolation_error(before: np.ndarray, middle: np.ndarray, after: np.ndarray, flow: np.ndarray) -> float:
    """Error of the middle frame when predicted from its neighbours by half the flow between them, in grey levels.

    Luma uint8 `[h, w]` three times, flow `[h, w, 2]` from `before` to `after`. Stands in for the network in
    vbench/motion_smoothness.py.
    """
    half = warp(flow, -flow / 2) / 2  # of what is *in the middle* at each pixel
    return float(np.abs((warp(before, -half) + warp(after, half)) / 2 - middle).mean())
