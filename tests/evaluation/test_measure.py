"""Whole videos: what the meters hand on, what a file must be, and what odd files get."""

import math

import cv2
import numpy as np
import pytest
from evaluation.clips import moving, still, write_motion_jpeg, write_video

from adastate_jax.data.decoding import Unusable, read_header
from adastate_jax.errors import UserError
from adastate_jax.evaluation.measure import METRICS, Settings, measure_frames, measure_video


@pytest.fixture(scope="module")
def pan():
    return moving(64, 96, 12, pan=(2.0, 0.0))


def test_a_file_measures_like_its_frames(pan, tmp_path):
    counted = []
    from_file = measure_video(write_video(tmp_path / "pan.mp4", pan), progress=counted.append)
    from_frames = measure_frames(pan)
    assert sum(counted) == len(pan) == from_file.num_frames
    assert (from_file.height, from_file.width, from_file.fps) == (64, 96, 16.0)
    assert from_file.seconds == pytest.approx(len(pan) / 16)
    for name in ("motion", "pan_x", "dynamic_radius", "luma_first", "lock_histogram"):
        assert from_file.metrics[name] == pytest.approx(from_frames.metrics[name], rel=0.03), name


def test_every_metric_is_there_and_every_series_fits_its_times(pan):
    measured = measure_frames(pan, settings=Settings(3, 4))
    assert list(measured.metrics) == list(METRICS)
    assert measured.chunk_profile.shape == (4,)
    for name, (times, values) in measured.series.items():
        assert len(times) == len(values), name
        assert len(times) in (len(pan), len(pan) - 1)


def test_motion_kept_compares_the_end_with_the_beginning():
    slowing = np.concatenate([moving(64, 64, 11, pan=(2.0, 0.0)), moving(64, 64, 10, pan=(1.0, 0.0))])
    kept = measure_frames(slowing).metrics["motion_kept"]
    assert kept == pytest.approx(50, rel=0.05)
    assert math.isnan(measure_frames(still(64, 64, 8)).metrics["motion_kept"])  # nothing was there to keep


def test_the_contact_sheet_is_a_picture_of_the_whole_video(pan):
    sheet = cv2.imdecode(np.frombuffer(measure_frames(pan).contact_sheet, np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape[1] == 8 * (96 + 2)
    tiny = measure_frames(moving(16, 16, 3, pan=(0.5, 0.0))).contact_sheet
    assert cv2.imdecode(np.frombuffer(tiny, np.uint8), cv2.IMREAD_COLOR).shape[1] == 3 * (96 + 2)


def test_a_long_video_s_contact_sheet_is_even():
    ramp = np.broadcast_to(2 * np.arange(70, dtype=np.uint8)[:, None, None, None], (70, 8, 8, 3))
    sheet = cv2.imdecode(np.frombuffer(measure_frames(ramp).contact_sheet, np.uint8), cv2.IMREAD_COLOR)
    levels = sheet[sheet.shape[0] // 2, 49 :: 96 + 2].mean(-1)
    np.testing.assert_allclose(np.diff(levels), 138 / 7, rtol=0.25)


def test_a_frozen_and_a_black_video_are_measured_with_a_warning(tmp_path):
    frozen = measure_video(write_video(tmp_path / "frozen.mp4", still(64, 64, 9)))
    assert frozen.metrics["lock_histogram_end"] == pytest.approx(1, abs=0.02)
    assert any("nearly still" in note for note in frozen.notes)
    black = measure_video(write_video(tmp_path / "black.mp4", np.zeros((9, 64, 64, 3), np.uint8)))
    assert black.metrics["motion"] < 0.01
    assert any("blank" in note for note in black.notes)
    assert any("nothing to follow" in note for note in black.notes)


def test_4k_is_measured():
    small = moving(216, 384, 2, pan=(1.5, 0.0))
    large = np.stack([cv2.resize(frame, (3840, 2160), interpolation=cv2.INTER_LINEAR) for frame in small])
    measured = measure_frames(large)
    assert (measured.height, measured.width) == (2160, 3840)
    assert measured.metrics["pan_x"] == pytest.approx(1600 * 1.5 / 384, rel=0.03)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("empty.mp4", b"", "0 bytes"), ("text.mp4", b"no video at all", "cannot be decoded as video")],
)
def test_what_is_no_video_is_said_to_be_none(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unusable, match=reason):
        measure_video(tmp_path / name)


def test_one_frame_and_no_file_are_unusable(tmp_path):
    with pytest.raises(Unusable, match="it has 1 frame, and motion needs two"):
        measure_video(write_video(tmp_path / "one.mp4", still(64, 64, 1)))
    with pytest.raises(Unusable, match="cannot be read"):
        measure_video(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("write", "name", "reason"),
    [
        (write_video, "pan.mp4", r"it is cut off or damaged after 0\.\d+ s"),
        (write_motion_jpeg, "pan.avi", "it has 9 of the 12 frames that it states"),
    ],
)
def test_a_file_that_was_cut_off_is_unusable(tmp_path, pan, write, name, reason):
    path = write(tmp_path / name, pan)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(Unusable, match=reason):
        measure_video(path)


def test_the_header_tells_rate_length_and_format(tmp_path, pan):
    header = read_header(write_video(tmp_path / "pan.mp4", pan, fps=24))
    assert (header.fps, header.num_frames, header.height, header.width) == (24, 12, 64, 96)
    assert (header.codec, header.pixel_format) == ("h264", "yuv420p")


def test_wrong_arrays_and_settings_are_refused(pan):
    with pytest.raises(ValueError, match=r"uint8 \[F, H, W, 3\], got float32"):
        measure_frames(pan.astype(np.float32))
    with pytest.raises(UserError, match="chunk is 0"):
        Settings(chunk=0)
