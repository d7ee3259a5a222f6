"""Small real videos and pictures, and damaged copies of them: what hostile, broken or cut files look like."""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np

_EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
# (ending, codec, pixel format, options of the codec, of the container)
_KINDS = (
    ("mp4", "libx264", "yuv420p", {"g": "8", "bf": "2"}, {}),
    ("mp4", "libx264", "yuv420p", {"g": "8"}, {"movflags": "faststart"}),
    ("mp4", "mpeg4", "yuv420p", {"g": "8"}, {"movflags": "frag_keyframe+empty_moov"}),
    ("webm", "libvpx-vp9", "yuv420p", {"g": "8", "deadline": "realtime", "cpu-used": "8"}, {}),
    ("mkv", "libx264", "yuv420p", {"g": "8", "bf": "2"}, {}),
    ("gif", "gif", "rgb8", {}, {}),
    ("avi", "mpeg4", "yuv420p", {"g": "8"}, {}),
    ("ts", "mpeg2video", "yuv420p", {"g": "8"}, {}),
    ("webp", "libwebp_anim", "yuv420p", {}, {}),
)


def pattern(frames: int = 16, height: int = 32, width: int = 48) -> np.ndarray:
    """A moving colour pattern, uint8 [F, H, W, 3]."""
    time, row, column = np.mgrid[:frames, :height, :width]
    phases = np.stack([column / 4 + time / 3, row / 3 + time / 3, (row + column) / 6 + time / 3], axis=-1)
    return (128 + 100 * np.sin(phases)).astype(np.uint8)


def make_videos(folder: Path) -> list[Path]:
    """A video of `pattern` in each of several formats, at 16 frames per second."""
    paths = []
    for number, (ending, codec, pixel_format, options, container_options) in enumerate(_KINDS):
        path = folder / f"{number}.{ending}"
        with av.open(str(path), "w", options=container_options) as container:
            stream = container.add_stream(codec, rate=16, options=options)
            stream.height, stream.width, stream.pix_fmt = 32, 48, pixel_format
            for pixels in pattern():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        paths.append(path)
    return paths


def make_pictures(folder: Path) -> list[Path]:
    """The first frame of `pattern` in each of several formats: colour, palette, alpha, grey of 8 and 16 bits."""
    colour = pattern(1)[0]
    alpha = np.dstack([colour, colour[..., 1]])
    deep = colour[..., 0].astype(np.uint16) * 257
    palette = {"mode": "P"}
    pictures = {
        "a.jpg": (colour, {}),
        "b.png": (colour, {}),
        "c.png": (alpha, {}),
        "d.png": (deep, {}),
        "e.png": (colour[..., 0] // 16, palette),
        "f.gif": (colour[..., 0] // 16, palette),
        "g.webp": (alpha, {}),
        "h.bmp": (colour, {}),
        "i.tiff": (colour, {"compression": "tiff_lzw"}),
        "j.tiff": (deep, {}),
    }
    for name, (pixels, options) in pictures.items():
        path = folder / name
        path.write_bytes(iio.imwrite("<bytes>", pixels, plugin="pillow", extension=path.suffix, **options))
    return [folder / name for name in pictures]


def mutate(whole: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy of a file: bytes flipped, cut, moved, doubled, or put in from another file; fields overwritten."""
    data = bytearray(whole)
    for _ in range(rng.integers(1, 4)):
        size = max(len(data), 8)
        # Half of the damage is in the header, which is small.
        at = int(rng.integers(min(size, 700) if rng.random() < 0.5 else size))
        length = int(rng.integers(1, max(2, size // 8)))
        match rng.integers(9):
            case 0:
                for place in rng.integers(len(data) or 1, size=rng.integers(1, 20)):
                    data[place : place + 1] = bytes([rng.integers(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << rng.integers(8))])
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                data[at : at + length] = bytes(length)
            case 6:
                field = _EXTREMES[rng.integers(len(_EXTREMES))]
                data[at : at + 4] = struct.pack(">I" if rng.random() < 0.5 else "<I", field)
            case 7:
                start = int(rng.integers(len(other)))
                data[at : at + length] = other[start : start + length]
            case 8:
                data += rng.bytes(length)
    return bytes(data)


def mutants(paths: list[Path], folder: Path, count: int, seed: int) -> Iterator[Path]:
    """`count` damaged copies of files, in turn, in a folder; damage comes from files of the same kind too."""
    rng = np.random.default_rng(seed)
    contents = [path.read_bytes() for path in paths]
    for number, place in zip(range(count), itertools.cycle(range(len(paths)))):
        path = folder / f"{number:04d}{paths[place].suffix}"
        path.write_bytes(mutate(contents[place], contents[rng.integers(len(paths))], rng))
        yield path
