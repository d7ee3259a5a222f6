"""Videos out: mp4, GIF, WebP or a folder of numbered PNGs, frame by frame, and there only when they are complete."""

import concurrent.futures
import contextlib
import os
import re
import stat
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from adastate_jax import files
from adastate_jax.errors import UserError, writing
from adastate_jax.media.metadata import describe_webp, gif_comment
from adastate_jax.media.pictures import encode_png

FPS = 16
_PALETTE_PIXELS = 1 << 14  # of which a GIF's colours are chosen
_PICTURE = "frame_{:05d}.png"
_PICTURES = re.compile(r"frame_\d{5,}\.png")


def open_writer(
    path: str | Path, metadata: Mapping[str, str] | None = None, fps: int | Fraction = FPS, replace: bool = True
) -> "VideoWriter":
    """A `VideoWriter` of the format that the path's ending says: .mp4, .gif, .webp; a folder of PNGs without any.

    A path that ends in / is a folder, and so is one that is there as a folder.

    Args:
        metadata: names and texts, without NUL, to write into the file, or into every PNG; `read_metadata` reads them.
        replace: whether the video takes the place of what lies there. If not, a file that comes to lie there meanwhile
            is kept, and this one numbered: `path` of the writer is its name once it is complete.

    Raises:
        UserError: the ending is another one, or what the path names cannot be written; before any work.
    """
    return VideoWriter(path, fps, metadata, replace)


class VideoWriter:
    """A video that grows frame by frame under a hidden name and gets its own name when it is complete.

    A context manager; leaving it by an exception, or without a frame, removes the unfinished file. Frames are
    compressed in a thread of their own, while the caller makes the next ones. See `open_writer` for the formats.

    Raises:
        UserError: the file cannot be written; said at once where it can be known, else by `write` or at the end.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int | Fraction = FPS,
        metadata: Mapping[str, str] | None = None,
        replace: bool = True,
    ):
        self.path = Path(path)
        kind = _kind_of(str(path))
        with writing(self.path):
            _refuse_special(self.path)
            if kind is _Pictures:
                self._place = _whole_pictures(self.path, replace)
            else:
                self._place = files.whole_file(self.path, replace, self._name)
            self._encoder = kind(self._place.__enter__(), fps, dict(metadata or {}))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "video")
        self._writing: concurrent.futures.Future | None = None
        self._begun = False
        self._cancelled = False
        self._size: tuple[int, ...] | None = None

    def _name(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frames: np.ndarray) -> None:
        """Appends frames [F, H, W, 3] uint8; the same H and W in every call, and even ones for an mp4.

        Returns while they are being compressed, but not before those of the last call are; raises what stopped them.

        Raises:
            UserError: the frames are of another kind or size, or the file cannot be written.
        """
        shape = np.shape(frames)
        if len(shape) != 4 or shape[3] != 3 or frames.dtype != np.uint8:
            raise UserError(f"{self.path}: frames must be uint8 [F, H, W, 3], not {frames.dtype} {list(shape)}")
        self._size = self._size or shape[1:3]
        if shape[1:3] != self._size:
            raise UserError(f"{self.path}: frames must all be {list(self._size)} pixels, not {list(shape[1:3])}")
        if isinstance(self._encoder, Mp4) and any(side % 2 for side in self._size):
            raise UserError(f"{self.path}: an mp4 has even sides, not {list(self._size)} pixels; write a .webp or .gif")
        with writing(self.path):
            self._wait()
        self._writing = self._thread.submit(self._compress, frames)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _compress(self, frames: np.ndarray) -> None:
        for frame in frames:
            if self._cancelled:
                return
            self._begun = True
            self._encoder.write(frame)

    def __exit__(self, kind, error, trace) -> None:
        complete = False
        with writing(self.path):
            try:
                if kind is None:
                    self._wait()
                    if self._begun:
                        self._encoder.finish()
                        complete = True
            finally:
                self._thread.shutdown(wait=False)
                if complete:
                    self._place.__exit__(None, None, None)
                else:
                    self._abandon()

    def _abandon(self) -> None:
        """Removes the unfinished file, once nobody writes to it any more: whoever waited may have been interrupted."""
        self._cancelled = True
        try:
            # For the work, not for its thread: a join that was interrupted takes that for ended (bpo-45274).
            if self._writing is not None and not self._writing.cancel():
                concurrent.futures.wait([self._writing])
            with contextlib.suppress(OSError, av.FFmpegError):  # it may be unfinished for want of room
                self._encoder.abandon()
        finally:
            self._place.__exit__(_Unfinished, _Unfinished(), None)


class _Unfinished(Exception):
    """Why a file that got no frame, or not all of them, is removed."""


def is_picture(name: str) -> bool:
    """Whether a file's name is of a picture in a folder that is a video, which another video may replace."""
    return _PICTURES.fullmatch(name) is not None


def _kind_of(path):
    """The encoder for what a path names; UserError for an ending that none has."""
    suffix = Path(path).suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    if not suffix or path.endswith(os.sep) or os.path.isdir(path):
        return _Pictures
    raise UserError(f"{path}: must end in {', '.join(_KINDS)}, or name a folder for PNG files")


def _refuse_special(path):
    """Raises OSError for a name that is too long, and for devices and the like, whose place a file would take."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("neither a file nor a folder")


def _whole_pictures(path, replace):
    return files.whole_folder(path, lambda name: replace and is_picture(name))


# --- encoders -----------------------------------------------------------------------------------------------------


class _Container:
    """A file that FFmpeg's libraries make: frames [H, W, 3] go in one by one, then `finish` or `abandon` ends it."""

    format, codec, pixel_format = "", "", ""

    def __init__(self, path, fps, metadata):
        self.path, self.fps, self.metadata = path, fps, metadata
        self._container, self._stream = None, None
        self._count = 0

    def open(self):
        """The container, for the first frame."""
        return av.open(f"file:{self.path}", "w", format=self.format)

    def options(self):
        """Of the codec."""
        return {}

    def begin(self, height, width):
        self._container = self.open()
        self._stream = self._container.add_stream(self.codec, rate=self.fps, options=self.options())
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = self.pixel_format

    def write(self, pixels):
        if self._stream is None:
            self.begin(*pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = self._count, 1 / Fraction(self.fps)
        self._count += 1
        for converted in self.convert(frame):
            self.mux(converted)

    def convert(self, frame):
        """What the codec gets of a frame, or at the end, None."""
        return [] if frame is None else [frame]

    def mux(self, frame):
        try:
            self._container.mux(self._stream.encode(frame))
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from None

    def finish(self):
        for converted in self.convert(None):
            self.mux(converted)
        self.mux(None)
        self._close()

    def _close(self):
        try:
            self._container.close()
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from None

    def abandon(self):
        if self._container is not None:
            self._container.close()


class Mp4(_Container):
    """H.264 that any player shows, tagged as BT.709 whatever its size.

    Players take untagged video for BT.601 or BT.709 by its size, and some go by nothing but the size; of those that
    read the tags, all know BT.709, which is also what screens and sRGB frames have for primaries.
    """

    format, codec, pixel_format = "mp4", "libx264", "yuv420p"

    def open(self):
        tags = "+use_metadata_tags" if self.metadata else ""  # any name is a tag
        container = av.open(f"file:{self.path}", "w", format="mp4", options={"movflags": f"+faststart{tags}"})
        container.metadata.update(self.metadata)
        return container

    def options(self):
        # With its macroblock tree, x264 reads memory that it did not set: the same frames make other files.
        return {"crf": "16", "x264-params": "mbtree=0"}

    def begin(self, height, width):
        super().begin(height, width)
        codec = self._stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def convert(self, frame):
        if frame is None:
            return []
        tags = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
        return [frame.reformat(format=self.pixel_format, **tags)]


class _Gif(_Container):
    """A GIF that repeats, with 256 colours of its own for every frame.

    Through FFmpeg, as Pillow would hold all frames of an animation until its end.
    """

    format, codec, pixel_format = "gif", "gif", "pal8"

    def open(self):
        self._file = _CommentedGif(self.path, gif_comment(self.metadata) if self.metadata else b"")
        return av.open(self._file, "w", format="gif")

    def convert(self, frame):
        if frame is None:
            return []
        pixels = Image.fromarray(frame.to_ndarray())
        # The colours are chosen from a smaller picture: that takes far longer than to draw with them.
        fewer = pixels.reduce(max(1, round((pixels.width * pixels.height / _PALETTE_PIXELS) ** 0.5)))
        palette = fewer.quantize(256, Image.Quantize.MEDIANCUT)
        indices = np.asarray(pixels.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
        colours = np.array(palette.getpalette("RGBA"), np.uint8).reshape(-1, 4)
        colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)), constant_values=255)[:, [3, 0, 1, 2]]
        drawn = av.VideoFrame.from_ndarray((indices, np.ascontiguousarray(colours)), format="pal8")
        drawn.pts, drawn.time_base = frame.pts, frame.time_base
        return [drawn]

    def _close(self):
        super()._close()
        self._file.close()

    def abandon(self):
        with contextlib.ExitStack() as stack:
            if self._container is not None:
                stack.callback(self._file.close)
            super().abandon()


class _CommentedGif:
    """A file to write a GIF to, in which a comment follows the header and its table of colours."""

    def __init__(self, path, comment):
        self._file = open(path, "wb")  # noqa: SIM115  closed by `close`
        self._comment = comment
        self._head = b""

    def write(self, content):
        content = bytes(content)
        if self._comment:
            self._head += content
            length = 13 + (3 << (self._head[10] & 7) + 1 if len(self._head) > 10 and self._head[10] & 0x80 else 0)
            if len(self._head) < max(13, length):
                return len(content)
            self._file.write(self._head[:length] + self._comment + self._head[length:])
            self._head = self._comment = b""
        else:
            self._file.write(content)
        return len(content)

    def close(self):
        self._file.close()


class _WebP(_Container):
    """An animated WebP that repeats."""

    format, codec, pixel_format = "webp", "libwebp_anim", "yuv420p"

    def open(self):
        return av.open(f"file:{self.path}", "w", format="webp", options={"loop": "0"})

    def options(self):
        return {"quality": "90"}

    def finish(self):
        super().finish()
        if self.metadata:
            describe_webp(self.path, self.metadata, self._stream.height, self._stream.width)


class _Pictures:
    """A folder of PNGs, numbered from 0."""

    def __init__(self, folder, fps, metadata):
        self._folder, self._metadata, self._count = folder, metadata, 0

    def write(self, pixels):
        (self._folder / _PICTURE.format(self._count)).write_bytes(encode_png(pixels, self._metadata))
        self._count += 1

    def finish(self):
        """All is written."""

    def abandon(self):
        """Who made the folder removes it."""


_KINDS = {".mp4": Mp4, ".gif": _Gif, ".webp": _WebP}
