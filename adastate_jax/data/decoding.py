"""Video files → frames as players show them: upright, in their own colours, without what the file hides.

What is wrong with a file is a `ValueError` or an `av.FFmpegError` here, whose message says so of "it", the file.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation

from adastate_jax.data.animations import decode_webp, is_webp, webp_header

# The most pixels of a frame: 8K. A header that states more is damaged, and its frames would fill the memory.
MAX_FRAME_PIXELS = 1 << 25
# Seconds that a frame is shown. Slides are shown for minutes; what is longer and beyond the end that the file states,
# or longer than a day, is a damaged timestamp.
_LONG_FRAME, _LONGEST_FRAME = 60.0, 86400.0
_GROUND = 255  # what transparent pixels are put on: white, as on a page
# Without the last two, 219 red of 255 comes out as 217: the fast conversion rounds coarsely and repeats chroma.
_EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
_UNSPECIFIED = 2  # as a matrix, and as primaries (ITU-T H.273)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a video file says of itself.

    Frames per second, number of frames shown (0 where it does not say), size in pixels as stored, names of the codec
    and of the pixel format, and the width of the stored pixels over their height.
    """

    fps: Fraction
    num_frames: int
    height: int
    width: int
    codec: str
    pixel_format: str
    pixel_aspect: Fraction


class Unusable(Exception):
    """A file that has to be left out; the message is the reason, and speaks of "it"."""


@contextlib.contextmanager
def reasons(path: str | os.PathLike) -> Iterator[None]:
    """Makes an `Unusable` of whatever a video file can cause while it is read."""
    try:
        if os.stat(path).st_size == 0:
            raise Unusable("it is empty (0 bytes)")
        yield
    except av.FFmpegError as error:
        raise Unusable(f"it cannot be decoded as video ({error.strerror})") from error
    except OSError as error:
        raise Unusable(f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Unusable(str(error)) from error
    except (cv2.error, MemoryError) as error:
        raise Unusable(f"it cannot be used ({' '.join(str(error).split()) or 'out of memory'})") from error


def open_video(path: str | os.PathLike) -> av.container.InputContainer:
    """Opens a file for reading; only files, whatever its name looks like, and whatever it refers to."""
    return av.open(f"file:{os.fspath(path)}", options={"protocol_whitelist": "file"})


def best_stream(container: av.container.InputContainer) -> av.VideoStream:
    """FFmpeg's choice of video: the highest resolution, cover pictures last; `ValueError` where there is none."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("it has no video stream")
    codec = stream.codec_context
    if codec is None:
        raise ValueError("its video is of an unknown codec")
    _refuse_size(codec.width, codec.height)
    return stream


def _refuse_size(width, height):
    if width * height > MAX_FRAME_PIXELS:
        raise ValueError(f"its frames of {width} x {height} pixels are larger than any that are read")


def frame_rate(stream: av.VideoStream) -> Fraction:
    """Frames per second by the header; a stream without a rate says nothing, and 25 is the commonest."""
    return Fraction(stream.average_rate or 25)


def read_header(path: str | os.PathLike) -> Header:
    """Reads a video file's header.

    Raises `av.FFmpegError` where the file cannot be opened, and `ValueError` where it has no video.
    """
    if is_webp(path):
        rate, num_frames, height, width = webp_header(path)
        _refuse_size(width, height)
        return Header(rate, num_frames, height, width, "webp", "rgba", Fraction(1))
    with open_video(path) as container:
        stream = best_stream(container)
        codec, rate = stream.codec_context, frame_rate(stream)
        num_frames = _stated_frames(container, stream)
        if not num_frames:
            begin, end = _stated_span(container, stream) or (0, 0)
            num_frames = round((end - begin) * rate)
        pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        return Header(rate, num_frames, codec.height, codec.width, codec.name, codec.pix_fmt or "", pixel_aspect)


def decode_frames(path: str | os.PathLike) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes a file's best video stream, one frame at a time: (seconds since the first frame, frame).

    Frames that an edit list hides are left out, and so is what comes before the first frame that can be decoded, as in
    a recording that begins between two key frames. Seconds increase strictly; a stream without timestamps is taken at
    its nominal rate.

    Raises:
        av.FFmpegError: the file cannot be decoded.
        ValueError: it has no video, is damaged, ends well before the length that it states (said after the last
            frame), or holds what this package does not show (a picture turned by other than quarter turns).
    """
    if is_webp(path):
        read_header(path)
        yield from _in_time(decode_webp(path))
        return
    with open_video(path) as container:
        stream = best_stream(container)
        stream.thread_type = "SLICE"  # threads by frame lose errors, and good frames with them, as it happens
        interval = float(1 / frame_rate(stream))
        span = _stated_span(container, stream)  # before decoding, which may change where the stream begins
        first, last, shown, count = None, 0.0, interval, 0
        for seconds, frame in _in_time(_decode(container, stream), interval, _stated_end(container, span)):
            _refuse_what_cannot_be_shown(frame)
            first = (frame.time or 0.0) if first is None else first
            last, count = seconds, count + 1
            shown = max(interval, float((frame.duration or 0) * (frame.time_base or 0)))
            yield seconds, frame
        if count:
            _check_complete(container, stream, span, first, last + shown, count)


def _in_time(frames, interval=0.0, end=math.inf):
    """(seconds since the first frame, frame) of (seconds by the file's clock or None, frame), increasing strictly.

    end: by the file's clock.
    """
    first = last = None
    for time, frame in frames:
        if last is None:
            first, seconds = time or 0.0, 0.0
        else:
            seconds = last + interval if time is None or time - first <= last else time - first
            late = time is not None and time > end + _LONG_FRAME
            if seconds - last > (_LONG_FRAME if late else _LONGEST_FRAME):
                raise ValueError(f"it shows nothing new from {last:.2f} s to {seconds:.2f} s, so it is damaged")
        last = seconds
        yield seconds, frame


def _decode(container, stream):
    """(seconds by the file's clock or None, frame) of a stream; damage counts only once a frame was good."""
    good = error = None
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError as found:
            if good is not None:
                raise ValueError(f"it is cut off or damaged after {good:.2f} s") from None
            error = error or found
            continue
        for frame in frames:
            if not frame.is_corrupt:
                good = frame.time or 0.0
                yield frame.time, frame
            elif good is not None:
                raise ValueError(f"its frame at {frame.time or 0.0:.2f} s is damaged")
    if error and good is None:
        raise error


def _refuse_what_cannot_be_shown(frame):
    _refuse_size(frame.width, frame.height)
    orientation(frame)


def _check_complete(container, stream, span, first, seconds, count):
    """Raises ValueError where a tenth of the video or more is missing at its end, or of its frames.

    span: as stated; first: time of the first frame by the file's clock; seconds: from there to the end of the last;
    count: of frames.
    """
    begin, end = span or (first, first + seconds)
    if seconds < 0.9 * (end - first):
        raise ValueError(
            f"it ends after {seconds:.1f} s of the {end - first:.1f} s that it states, so it is cut off or damaged"
        )
    late = max(0.0, first - begin) * float(frame_rate(stream))  # frames before the first that can be decoded
    stated = _stated_frames(container, stream)
    if count < 0.9 * (stated - late):
        raise ValueError(f"it has {count} of the {stated} frames that it states, so it is cut off or damaged")


def _stated_frames(container, stream):
    """The number of frames that the header states, without those that an mp4's edit list hides; 0 for none stated."""
    if not stream.frames or "mp4" not in container.format.name:
        return stream.frames
    return sum(not entry.is_discard for entry in stream.index_entries)


def _stated_span(container, stream):
    """(begin, end) of the video in seconds by the file's clock, or None where only the whole file's length is stated,
    which may be that of its sound."""
    if stream.duration:
        begin = (stream.start_time or 0) * stream.time_base
        return float(begin), float(begin + stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        begin, length = (container.start_time or 0) / av.time_base, container.duration / av.time_base
        # Matroska states the time of its end, which is not its length where it begins later than 0.
        return begin, length + (0.0 if "matroska" in container.format.name else begin)
    return None


def _stated_end(container, span):
    """When the video ends at the latest, in seconds by the file's clock; infinity where the file does not say."""
    if span:
        return span[1]
    return ((container.start_time or 0) + container.duration) / av.time_base if container.duration else math.inf


# --- pixels -------------------------------------------------------------------------------------------------------


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a frame is shown by its display matrix: (transposed, then rows reversed, then columns reversed).

    The matrix (ISO/IEC 14496-12, 8.3.2.3) maps stored places to shown ones, x' = a x + c y and y' = b x + d y. Its
    scale is left out, as players do. Raises `ValueError` where it turns by other than quarter turns.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None or matrix.buffer_size < 36:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(float)
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if 0.02 * max(straight, crossed) < min(straight, crossed):  # about a degree, as for FFmpeg
        raise ValueError("its display matrix turns the picture by other than quarter turns")
    return (True, b < 0, c < 0) if crossed > straight else (False, d < 0, a < 0)


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Height and width of a frame as it is shown, in stored pixels."""
    transposed, _, _ = orientation(frame)
    return (frame.width, frame.height) if transposed else (frame.height, frame.width)


def frame_pixels(frame: av.VideoFrame, height: int, width: int, pixel_aspect: Fraction | float = 1) -> np.ndarray:
    """A decoded frame upright, scaled to cover `height` × `width` and cropped at its centre: uint8 RGB `[H, W, 3]`.

    Colours are converted as the frame is tagged; an untagged one is BT.601, or BT.709 where it is larger than standard
    definition, as in players. HDR (PQ, HLG) is brought to SDR: its reference white of 203 cd/m² (ITU-R BT.2408) is
    white, and what is brighter is white too. Transparency is put on white. `pixel_aspect` is the width of the stored
    pixels over their height.
    """
    pixels = _rgb(frame)
    transposed, rows_reversed, columns_reversed = orientation(frame)
    if transposed:
        pixels = pixels.swapaxes(0, 1)
        pixel_aspect = 1 / pixel_aspect
    pixels = pixels[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1]
    return fit_pixels(pixels, height, width, pixel_aspect)


def _rgb(frame):
    if any(component.is_alpha for component in frame.format.components):
        return on_plain_ground(frame.to_ndarray(format="rgba"))
    if frame.color_trc in _HDR:
        return _standard_range(frame).to_ndarray()
    large = frame.width >= 1280 or frame.height > 576
    guessed = Colorspace.ITU709 if large and frame.colorspace == _UNSPECIFIED else None
    return frame.to_ndarray(format="rgb24", src_colorspace=guessed, interpolation=_EXACT)


def _standard_range(frame):
    """An HDR frame in RGB with the primaries and the transfer of BT.709, by FFmpeg's conversion."""
    if frame.colorspace == _UNSPECIFIED:
        frame.colorspace = Colorspace.BT2020
    if frame.color_primaries == _UNSPECIFIED:
        frame.color_primaries = ColorPrimaries.BT2020
    return frame.reformat(
        format="rgb24", dst_color_trc=ColorTrc.BT709, dst_color_primaries=ColorPrimaries.BT709, interpolation=_EXACT
    )


def on_plain_ground(pixels: np.ndarray) -> np.ndarray:
    """Puts pixels uint8 `[H, W, 4]`, alpha last and not multiplied in, on white: uint8 `[H, W, 3]`."""
    alpha = pixels[..., 3:]
    if alpha.min() == 255:
        return pixels[..., :3]
    shares = alpha.astype(np.uint16)
    composed = pixels[..., :3] * shares + _GROUND * (255 - shares)
    return ((composed + 127) // 255).astype(np.uint8)


def fit_pixels(pixels: np.ndarray, height: int, width: int, pixel_aspect: Fraction | float = 1) -> np.ndarray:
    """Scales a picture `[h, w, 3]` to cover `height` × `width` and crops its centre: uint8 `[height, width, 3]`.

    Shrinking averages areas, which is what keeps thin structures from flickering; enlarging is bicubic.
    """
    rows, columns, _ = pixels.shape
    aspect = width / height / float(pixel_aspect)  # of the crop, in stored pixels
    crop_rows = min(rows, max(1, round(columns / aspect)))
    crop_columns = min(columns, max(1, round(rows * aspect)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    cropped = pixels[top : top + crop_rows, left : left + crop_columns]
    if cropped.shape[:2] == (height, width):
        return np.ascontiguousarray(cropped)
    shrinking = crop_rows >= height and crop_columns >= width
    kind = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(cropped), (width, height), interpolation=kind)
