"""Videos as players show them: upright, without what is hidden, in their own colours; and what is refused."""

import itertools
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from adastate_jax.data import decoding
from adastate_jax.data.decoding import Unusable, decode_frames, frame_pixels, read_header, upright_size
from adastate_jax.data.footage import scan_footage
from adastate_jax.errors import UserError
from adastate_jax.evaluation.measure import measure_video
from adastate_jax.media import read_last_frames


def brightening(frames=32, height=48, width=64):
    """Frame k has the brightness 20 + 6 k, and a gradient that keeps it from being blank."""
    gradient = np.mgrid[:height, :width].sum(axis=0) // 4
    return np.stack([np.repeat((20 + 6 * k + gradient)[..., None], 3, axis=2) for k in range(frames)]).astype(np.uint8)


def encode(path, frames, codec="libx264", pixel_format="yuv420p", rate=16, tags=None, container=None, **options):
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for pixels in frames:
            layout = "rgba" if pixels.shape[-1] == 4 else "rgb24"
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format=layout)))
        file.mux(stream.encode())
    return path


def copy(source, target, shift=0.0, skip=0, container=None):
    """As `ffmpeg -c copy`: packets from number `skip` on, `shift` seconds later."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=container or {}) as written:
        stream = read.streams.video[0]
        copied = written.add_stream_from_template(stream)
        ticks = round(Fraction(shift) / stream.time_base)
        packets = [packet for packet in read.demux(stream) if packet.dts is not None]
        for packet in packets[skip:]:
            packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, copied
            written.mux(packet)
    return target


def shown(path):
    """Seconds and numbers of `brightening`'s frames that a file shows."""
    found = [(seconds, frame_pixels(frame, *upright_size(frame))) for seconds, frame in decode_frames(path)]
    first = brightening(1)[0].mean()
    return [seconds for seconds, _ in found], [round((pixels.mean() - first) / 6) for _, pixels in found]


# --- the display matrix -------------------------------------------------------------------------------------------

ONE = 1 << 16
# a b / c d of the matrix, and what becomes of the picture.
MATRICES = {
    "as it is": ((1, 0, 0, 1), lambda image: image),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda image: image[::-1]),
    "half a turn": ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
    "a quarter turn clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "a quarter turn back": ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    "transposed": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
}


def with_matrix(path, a, b, c, d):
    """Writes a display matrix into an mp4's track header, after its version, times, number, length and layer."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", *(round(ONE * value) for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_a_clip_is_shown_as_its_matrix_says(tmp_path, name):
    image = np.full((48, 64, 3), 200, np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32] = (220, 20, 20), (20, 180, 20), (20, 20, 220)
    path = encode(tmp_path / "a.mp4", np.stack([image] * 8), pixel_format="yuv444p", crf="4")
    matrix, expected = MATRICES[name]
    for scale in (1, 0.5):  # players leave the scale out
        with_matrix(path, *(scale * value for value in matrix))
        _, frame = next(decode_frames(path))
        assert upright_size(frame) == expected(image).shape[:2]
        found = read_last_frames(path, 1, *expected(image).shape[:2])[0]
        assert np.abs(found.astype(int) - expected(image)).mean() < 3


def test_a_clip_that_is_turned_by_less_is_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", brightening())
    assert len(shown(with_matrix(path, 0.99999, 0.01, -0.01, 0.99999))[0]) == 32  # half a degree is nothing
    assert len(shown(with_matrix(path, 0, 0, 0, 0))[0]) == 32  # written by broken muxers
    with_matrix(path, 0.8, 0.6, -0.6, 0.8)
    with pytest.raises(ValueError, match="other than quarter turns"):
        scan_footage(path)
    with pytest.raises(UserError, match=r"a\.mp4: not a readable video \(its display matrix turns"):
        read_last_frames(path, 1, 8, 8)


# --- what is hidden, shifted, or missing --------------------------------------------------------------------------


@pytest.mark.parametrize("bframes", ["0", "3"])
def test_frames_that_an_edit_list_hides_are_not_there(tmp_path, bframes):
    """`ffmpeg -ss 1 -c copy` keeps the frames from the key frame on, and hides those before the first second."""
    path = encode(tmp_path / "whole.mp4", brightening(), bf=bframes, g="64")
    cut = copy(path, tmp_path / "cut.mp4", -1, container={"avoid_negative_ts": "disabled", "use_editlist": "1"})
    seconds, numbers = shown(cut)
    assert len(seconds) == read_header(cut).num_frames
    assert numbers == list(range(32 - len(numbers), 32))
    assert 12 <= len(numbers) <= 16  # the reordered ones at the edge may go too
    np.testing.assert_allclose(np.diff(seconds), 1 / 16, atol=1e-3)
    assert measure_video(cut).num_frames == len(numbers)
    assert scan_footage(cut).end == pytest.approx(len(numbers) / 16, abs=1e-3)
    damaged = bytearray(cut.read_bytes())
    del damaged[len(damaged) * 2 // 3 :]
    cut.write_bytes(damaged)
    with pytest.raises(Unusable):
        measure_video(cut)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "ts"])
@pytest.mark.parametrize("shift", [0, 2, 100, -1])
def test_a_shifted_clock_changes_nothing(tmp_path, ending, shift):
    """`-itsoffset`, and timestamps below zero."""
    path = encode(tmp_path / "whole.mp4", brightening(), bf="0")
    container = {"avoid_negative_ts": "disabled", "use_editlist": "0"} if shift < 0 else {}
    moved = copy(path, tmp_path / f"moved.{ending}", shift, container=container)
    seconds, numbers = shown(moved)
    assert numbers == list(range(32))
    np.testing.assert_allclose(seconds, np.arange(32) / 16, atol=2e-3)
    assert measure_video(moved).num_frames == 32
    assert len(read_last_frames(moved, 5, 16, 16)) == 5


@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mkv"), ("libx264", "ts"), ("libvpx-vp9", "webm")])
def test_a_recording_that_begins_between_key_frames_starts_at_the_next(tmp_path, codec, ending):
    options = {"g": "8"} if codec == "libx264" else {"g": "8", "deadline": "realtime", "cpu-used": "8"}
    path = encode(tmp_path / f"whole.{ending}", brightening(), codec, **options)
    _, numbers = shown(copy(path, tmp_path / f"cut.{ending}", skip=3))
    assert numbers[-24:] == list(range(8, 32))
    assert len(numbers) <= 25  # the frame before the next key frame may need none of those that are missing
    assert measure_video(tmp_path / f"cut.{ending}").num_frames == len(numbers)


def moved_apart(path, target, late):
    """A copy in which packet k begins `late[k]` seconds later, and lasts until the next one begins."""
    with av.open(str(path)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        copied = written.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.dts is not None]
        for packet, seconds in zip(packets, late, strict=True):
            packet.pts = packet.dts = packet.dts + round(seconds / stream.time_base)
            packet.stream = copied
        for packet, following in itertools.pairwise(packets):
            packet.duration = following.dts - packet.dts
        for packet in packets:
            written.mux(packet)
    return target


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov", "webm"])
@pytest.mark.parametrize("slides", [[0, 0, 0, 0, 300, 600, 900, 7200], [150 * k for k in range(8)]])
def test_a_slide_is_shown_for_minutes(tmp_path, ending, slides):
    """Frames that last for minutes, or for two hours, beside ones that do not."""
    codec = {"webm": "libvpx-vp9"}.get(ending, "libx264")
    options = {"bf": "0"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
    path = encode(tmp_path / f"whole.{ending}", brightening(8), codec, **options)
    moved = moved_apart(path, tmp_path / f"slides.{ending}", slides)
    seconds, numbers = shown(moved)
    assert numbers == list(range(8))
    np.testing.assert_allclose(seconds, np.arange(8) / 16 + slides, atol=2e-3)
    assert len(scan_footage(moved).timestamps) == 8


@pytest.mark.parametrize("seconds", [120, 3600])
def test_a_last_slide_may_be_the_longest(tmp_path, seconds):
    path = encode(tmp_path / "whole.mp4", brightening(), bf="0")
    with av.open(str(path)) as read, av.open(str(tmp_path / "slide.mp4"), "w") as written:
        stream = read.streams.video[0]
        copied = written.add_stream_from_template(stream)
        packets = [packet for packet in read.demux(stream) if packet.dts is not None]
        packets[-1].duration = round(seconds / stream.time_base)
        for packet in packets:
            packet.stream = copied
            written.mux(packet)
    assert shown(tmp_path / "slide.mp4")[1] == list(range(32))


def test_a_slide_show_of_an_animation(tmp_path):
    frames = [Image.fromarray(frame) for frame in brightening(3)]
    for name in ("a.webp", "a.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=[250_000] * 3)
        assert shown(tmp_path / name)[0] == [0, 250, 500]


def test_a_frame_that_no_clip_can_have_is_damage(tmp_path):
    """Far behind the end that the file states, or shown for longer than a day."""
    path = encode(tmp_path / "whole.mkv", brightening(8), bf="0")
    gap = moved_apart(path, tmp_path / "gap.mkv", [0] * 7 + [1000])
    assert shown(gap)[1] == list(range(8))  # it states as much
    data = gap.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # the duration, in milliseconds
    gap.write_bytes(data[:at] + struct.pack(">d", 500.0) + data[at + 8 :])
    days = moved_apart(path, tmp_path / "days.mkv", [0] * 7 + [100_000])
    for damaged in (gap, days):
        with pytest.raises(ValueError, match=r"shows nothing new from .* so it is damaged"):
            scan_footage(damaged)


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "http:x.mp4", "concat:a|b.mp4", "100%d.mp4", "x" * 246 + ".mp4", "-é.mp4"]
)
def test_any_file_name_is_a_file(tmp_path, name):
    encode(tmp_path / "a.mp4", brightening(8)).rename(tmp_path / name)
    assert len(shown(tmp_path / name)[0]) == read_header(tmp_path / name).num_frames == 8


# --- colours ------------------------------------------------------------------------------------------------------


# Linear BT.709 to linear BT.2020 (ITU-R BT.2087).
WIDER = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def perceptual_quantizer(nits):
    """SMPTE ST 2084's code of a luminance."""
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hybrid_log_gamma(nits):
    """ITU-R BT.2100's HLG code of a grey of a display of 1000 cd/m², whose system gamma is 1.2."""
    scene = (nits / 1000) ** (1 / 1.2)
    logarithm = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), logarithm)


GREYS = [[level] * 3 for level in (0.0, 0.02, 0.18, 0.5, 1.0)]
COLOURS = [[0.8, 0.5, 0.4], [0.2, 0.4, 0.3], [0.3, 0.3, 0.6]]


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    ("transfer", "code", "linear"),
    [(16, perceptual_quantizer, GREYS + COLOURS), (18, hybrid_log_gamma, GREYS)],
)
def test_high_dynamic_range_is_brought_to_the_standard_one(tmp_path, transfer, code, linear, tagged):
    """White is BT.2408's reference, 203 cd/m², and a screen's gamma 2.4 (BT.1886); with HLG's system gamma, a colour's
    channels depend on one another, so that the law is told of greys alone."""
    for number, colour in enumerate([*linear, [4.0] * 3]):
        coded = code(WIDER @ np.array(colour) * 203)
        pixels = np.broadcast_to(np.round(coded * 65535).astype(np.uint16), (32, 32, 3))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb48le")
        with av.open(str(tmp_path / f"{number}.mkv"), "w") as file:
            stream = file.add_stream("ffv1", rate=16)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv444p10le"
            codec = stream.codec_context
            codec.color_trc, codec.color_range = transfer, 1
            if tagged:
                codec.colorspace, codec.color_primaries = 9, 9
            for _ in range(2):
                converted = frame.reformat(
                    format="yuv444p10le", dst_colorspace=Colorspace.BT2020, dst_color_range=ColorRange.MPEG
                )
                converted.pts = None
                file.mux(stream.encode(converted))
            file.mux(stream.encode())
        found = read_last_frames(tmp_path / f"{number}.mkv", 1, 8, 8)[0, 4, 4].astype(int)
        expected = 255 * np.clip(colour, 0, 1) ** (1 / 2.4)
        assert np.abs(found - expected).max() <= 6, (colour, found, expected)


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601, Colorspace.BT2020, None])
def test_colours_are_converted_as_the_file_says(tmp_path, size, matrix):
    """Untagged, as players take it: BT.709 above standard definition, BT.601 up to it."""
    meant = matrix or (Colorspace.ITU709 if size[0] > 576 else Colorspace.ITU601)
    red = av.VideoFrame.from_ndarray(np.full((*size, 3), (220, 30, 30), np.uint8), format="rgb24")
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if matrix is not None:
            stream.codec_context.colorspace = {Colorspace.BT2020: 9}.get(matrix, int(matrix))
        for _ in range(2):
            converted = red.reformat(format="yuv420p", dst_colorspace=meant)
            file.mux(stream.encode(converted))
        file.mux(stream.encode())
    _, frame = next(decode_frames(tmp_path / "a.mp4"))
    assert np.abs(frame_pixels(frame, 8, 8).astype(int) - (220, 30, 30)).max() <= 3


def test_a_transparent_animation_is_put_on_white(tmp_path):
    frames = np.zeros((4, 32, 32, 4), np.uint8)
    frames[:, :, :16], frames[:, :, 16:] = (30, 30, 220, 255), (255, 0, 255, 0)
    path = encode(tmp_path / "a.mkv", frames, codec="ffv1", pixel_format="bgra")
    found = read_last_frames(path, 1, 32, 32)[0]
    assert (found[:, 16:] == 255).all()
    assert (found[:, :16] == (30, 30, 220)).all()


def test_an_animated_webp_is_a_video(tmp_path):
    path = encode(tmp_path / "a.webp", brightening(), codec="libwebp_anim", quality="95")
    seconds, numbers = shown(path)
    assert numbers == list(range(32))
    np.testing.assert_allclose(seconds, np.arange(32) / 16, atol=2e-3)
    header = read_header(path)
    assert (round(float(header.fps)), header.num_frames, header.height, header.width) == (16, 32, 48, 64)
    assert measure_video(path).num_frames == 32
    assert len(read_last_frames(path, 4, 16, 16)) == 4
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.webp: not a readable video \(it is a WebP that is cut off or damaged"):
        read_last_frames(path, 4, 16, 16)


def test_frames_beyond_any_video_are_refused(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", brightening(8))
    monkeypatch.setattr(decoding, "MAX_FRAME_PIXELS", 48 * 64 - 1)
    with pytest.raises(Unusable, match="its frames of 64 x 48 pixels are larger than any that are read"):
        measure_video(path)
