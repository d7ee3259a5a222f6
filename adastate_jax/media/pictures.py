"""Pictures in and out."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from imageio.core.request import InitializationError
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from adastate_jax import files
from adastate_jax.data.decoding import fit_pixels, on_plain_ground
from adastate_jax.errors import UserError, writing

# The most pixels of a picture, ten times what a telephone takes; a small file that states more is made to fill memory.
MAX_PIXELS = 1 << 27
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # Pillow would run Ghostscript on it


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """A picture, upright, scaled to cover height × width and cropped at its centre: uint8 [1, height, width, 3].

    It is turned as its EXIF data say; transparent parts are put on white; grey values of 16 bits, and of floats from 0
    to 1, are brought to 8 bits. Of an animation, the first picture is taken.

    Raises:
        UserError: it is missing, no picture, cut off or damaged, larger than any that is read, or not a number
            somewhere.
    """
    path = files.existing_name(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        pixels = _read_rgb(path)
    except Exception as error:  # on a damaged file, a decoder may fail in any way
        raise UserError(f"{path}: not a readable picture ({_reason(error)}); name a PNG, JPEG or WebP file") from None
    return fit_pixels(pixels, height, width)[None]


def _reason(error):
    """What Pillow found, in a line; imageio's own message may hide it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, InitializationError):
        return "of no known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it states more than the {MAX_PIXELS} pixels that are read"
    return " ".join(str(error).split()) or type(error).__name__


def _read_rgb(path):
    """The whole picture, uint8 [H, W, 3]; raises whatever the decoder does."""
    # imageio takes names like "a.zip/b.png" apart and shows Pillow's warnings; it is given the open file instead.
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        if file.read(4) in _POSTSCRIPT:
            raise ValueError("PostScript is no picture of pixels")
        file.seek(0)
        with iio.imopen(file, "r", plugin="pillow") as picture:
            properties = picture.properties(index=0)
            height, width = properties.shape[:2]
            if height * width > MAX_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, more than the {MAX_PIXELS} that are read")
            known = picture.metadata(index=0, exclude_applied=False)
            turned = known.get("Orientation") in range(1, 9)
            if properties.dtype not in (np.uint8, np.bool_):
                return _from_deep_grey(picture.read(index=0, rotate=turned))
            # A palette, one colour or a channel of its own can be transparent.
            clear = "transparency" in known or "A" in known["mode"] or known["mode"] in ("P", "PA")
            pixels = picture.read(index=0, mode="RGBA" if clear else "RGB", rotate=turned, writeable_output=False)
    return on_plain_ground(pixels) if clear else pixels


def _from_deep_grey(values):
    """Grey values [H, W] of 16 bits or floats, as uint8 [H, W, 3]."""
    if np.issubdtype(values.dtype, np.integer):
        values = values / np.iinfo(np.uint16).max
    if not np.isfinite(values).all():
        raise ValueError("some of its values are no finite numbers")
    if values.min() < 0 or values.max() > 1:
        raise ValueError("its values are beyond 16 bits, or floats beyond 0 to 1; save it with 8 or 16 bits")
    return np.round(values * 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def write_image(path: str | Path, image: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a PNG, uint8 [H, W, 3], whole or not at all; `metadata` become its texts.

    Raises `UserError` where it cannot be written.
    """
    with writing(path):
        files.write_bytes(path, encode_png(image, metadata))


def encode_png(image: np.ndarray, metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a PNG of an image uint8 [H, W, 3], with `metadata` as texts."""
    texts = PngInfo()
    for name, text in (metadata or {}).items():
        texts.add_itxt(name, text)
    return iio.imwrite("<bytes>", image, plugin="pillow", extension=".png", pnginfo=texts)
