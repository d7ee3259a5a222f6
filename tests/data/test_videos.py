"""Laws of real clips: true to the file's timing, never across a cut, bounded memory, bad files named and skipped."""

import dataclasses
import itertools
import json
import os
import pathlib
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest

from adastate_jax.data import footage as footage_module
from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.decoding import decode_frames, fit_pixels, frame_pixels
from adastate_jax.data.folders import list_files, read_captions, scan_folder
from adastate_jax.data.footage import ClipConfig, Footage, clip_frames, read_clips, scan_footage
from adastate_jax.data.videos import videos
from adastate_jax.data.worlds import WorldConfig, render_world
from adastate_jax.errors import UserError

REAL_CLIP = pathlib.Path(__file__).parents[2] / ".." / "shared/clips" / "nasa_13013.mp4"
needs_real_clip = pytest.mark.skipif(not REAL_CLIP.exists(), reason=f"the real video {REAL_CLIP.name} is not here")


def write_video(path, frames, times, aspect=1):
    """Encodes uint8 frames `[F, H, W, 3]` shown at `times` seconds, to the millisecond and nearly without loss."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "4", "preset": "ultrafast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.sample_aspect_ratio = Fraction(aspect)
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clock_frames(times):
    """Frames of 24 × 128 that tell their time: a soft bar moves right at 30 pixels per second."""
    distance = np.arange(128) - 16 - 30 * np.asarray(times)[:, None]
    bar = np.round(200 * np.exp(-((distance / 4) ** 2)))
    return np.broadcast_to(bar[:, None, :, None], (len(times), 24, 128, 3)).astype(np.uint8)


def clock_times(video):
    """Times in seconds told by `clock_frames`."""
    profile = np.where(video > 20, video, 0).sum(axis=(1, 3), dtype=float)
    return (profile @ np.arange(128) / profile.sum(axis=1) - 16) / 30


def shots(lengths, height=48, width=64):
    """Worlds of the given lengths one after the other, each of another palette."""
    palettes = itertools.cycle(["meadow", "dusk", "desert", "ocean", "moon"])
    worlds = [
        render_world(
            WorldConfig(height, width, length, motions=("pan left", "follow up"), palettes=(palette,)), 0, number
        ).video
        for number, (length, palette) in enumerate(zip(lengths, palettes, strict=False))
    ]
    return np.concatenate(worlds)


@pytest.mark.parametrize("rate", [12, 16, 24, 25, 29.97, 60])
def test_clips_keep_the_time_of_any_frame_rate(tmp_path, rate):
    times = np.arange(round(3 * rate)) / rate
    path = write_video(tmp_path / "clock.mkv", clock_frames(times), times)
    starts, frames = clip_frames(scan_footage(path), ClipConfig(24, 128, 15, stride=12))
    np.testing.assert_allclose(starts, [0.0, 0.75, 1.5], atol=1e-3)  # the fourth would end at 3.19 s
    for start, video in zip(starts, read_clips(path, frames, 24, 128), strict=True):
        error = np.abs(clock_times(video) - start - np.arange(15) / 16)
        assert error.max() < 0.5 / rate + 0.01


def test_clips_keep_the_time_of_a_variable_frame_rate(tmp_path):
    intervals = np.random.default_rng(0).choice([0.02, 0.04, 0.08], size=60)
    times = np.concatenate([[0.0], np.cumsum(intervals)])
    path = write_video(tmp_path / "clock.mkv", clock_frames(times), times)
    starts, frames = clip_frames(scan_footage(path), ClipConfig(24, 128, 16))
    assert len(starts) == int(times[-1])
    for start, video in zip(starts, read_clips(path, frames, 24, 128), strict=True):
        assert np.abs(clock_times(video) - start - np.arange(16) / 16).max() < 0.04 + 0.01


def test_a_file_at_the_clips_own_rate_loses_and_repeats_no_frame(tmp_path):
    for rate, step in ((16, 1), (32, 2)):
        times = np.round(np.arange(2 * rate) / rate, 3)  # a container's milliseconds
        _, frames = clip_frames(Footage(times, (), 2.0), ClipConfig(8, 8, 16))
        np.testing.assert_array_equal(frames, step * np.arange(32).reshape(2, 16))


def test_clips_fill_each_shot_and_cross_no_cut():
    rng = np.random.default_rng(1)
    for _ in range(50):
        times = np.cumsum(rng.uniform(0.01, 0.06, size=200))
        times -= times[0]
        cuts = tuple(np.sort(rng.choice(np.arange(1, 200), size=5, replace=False)).tolist())
        config = ClipConfig(8, 8, 9, stride=int(rng.integers(0, 12)))
        starts, frames = clip_frames(Footage(times, cuts, times[-1] + 0.03), config)
        shot = np.searchsorted(cuts, frames, side="right")
        assert (shot == shot[:, :1]).all()
        assert (np.diff(frames, axis=1) >= 0).all()
        np.testing.assert_allclose(times[frames], starts[:, None] + np.arange(9) / 16, atol=0.065)
        edges = np.array([0.0, *times[list(cuts)], times[-1] + 0.03])
        room = np.diff(edges) - 9 / 16 + 2e-3  # the tolerance for rounded timestamps
        stride = (config.stride or 9) / 16
        assert len(starts) == sum(int(left // stride) + 1 for left in room if left > 0)


def test_cuts_are_found_wherever_they_are_and_only_there(tmp_path):
    lengths = (2, 40, 37, 61, 2)  # also within two frames of either end
    frames = shots(lengths)
    path = write_video(tmp_path / "shots.mp4", frames, np.arange(len(frames)) / 16)
    assert scan_footage(path).cuts == tuple(np.cumsum(lengths)[:-1])
    usable, skipped = scan_folder(tmp_path, ClipConfig(48, 64, 15))
    assert skipped == []
    assert (usable[0].frames[:, 0]).tolist() == [2, 17, 42, 57, 79, 94, 109, 124]
    assert np.isin(np.cumsum(lengths), usable[0].frames[:, 1:]).sum() == 0
    for numbers, clip in zip(usable[0].frames, read_clips(path, usable[0].frames, 48, 64), strict=True):
        assert np.abs(clip.astype(int) - frames[numbers]).mean() < 3  # the very pixels, but for the codec


def test_a_dissolve_is_left_out(tmp_path):
    config = WorldConfig(48, 64, 72, fps=24, speed=(0.05, 0.1), motions=("pan left",), palettes=("ocean",))
    before, after = (
        render_world(config, 0, 0).video,
        render_world(dataclasses.replace(config, palettes=("snow",)), 0, 1).video,
    )
    share = np.clip((np.arange(72) - 24) / 24, 0, 1)[:, None, None, None]
    path = write_video(
        tmp_path / "dissolve.mp4", (before * (1 - share) + after * share).astype(np.uint8), np.arange(72) / 24
    )
    cuts = scan_footage(path).cuts
    assert set(range(26, 48)) <= set(cuts)
    assert cuts[0] > 18
    assert cuts[-1] < 54
    path = write_video(tmp_path / "calm.mp4", before, np.arange(72) / 24)
    assert scan_footage(path).cuts == ()


def test_reading_holds_one_clip_of_frames(tmp_path, monkeypatch):
    frames = shots((90,), 16, 16)
    path = write_video(tmp_path / "long.mkv", frames, np.arange(90) / 16)
    live, most = set(), [0]

    def counted(*arguments):
        pixels = frame_pixels(*arguments)
        live.add(id(pixels))
        weakref.finalize(pixels, live.discard, id(pixels))
        most[0] = max(most[0], len(live))
        return pixels

    monkeypatch.setattr(footage_module, "frame_pixels", counted)
    numbers = np.arange(76)[:, None] + np.arange(10)  # every frame is wanted by ten clips
    assert sum(1 for _ in read_clips(path, numbers, 16, 16)) == 76
    assert most[0] <= 11


def test_pixels_cover_the_frame_and_keep_their_shape(tmp_path):
    disc = np.zeros((90, 160, 3), np.uint8)
    rows, columns = np.mgrid[:90, :160]
    disc[np.hypot(rows - 44.5, columns - 79.5) < 30] = 255
    for height, width in ((45, 60), (60, 45), (30, 80), (180, 200)):
        seen = fit_pixels(disc, height, width)[..., 0] > 127
        assert seen.shape == (height, width)
        across, along = seen.any(axis=0).sum(), seen.any(axis=1).sum()
        if height > 30:  # there the disc is cropped
            assert across == pytest.approx(along, abs=2)
        np.testing.assert_array_equal(seen, seen[::-1, ::-1])
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(fit_pixels(stripes, 16, 16).astype(int)) == 0  # averaged, not sampled

    squeezed = disc[:, ::2]  # stored pixels twice as wide as high
    path = write_video(tmp_path / "wide.mkv", squeezed[None].repeat(3, axis=0), np.arange(3) / 16, aspect=2)
    (clip,) = read_clips(path, np.array([[0, 1, 2]]), 45, 80)
    assert np.abs(clip[0].astype(int) - fit_pixels(disc, 45, 80)).mean() < 4


def test_unusable_files_are_named_with_the_reason_and_skipped(tmp_path, capsys):
    frames = shots((48,))
    good = write_video(tmp_path / "good.mp4", frames, np.arange(48) / 16)
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
    (tmp_path / "notes.md").write_text("not a video")
    (tmp_path / "cut_off.mp4").write_bytes(good.read_bytes()[:-2000])
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere.mp4")
    write_video(tmp_path / "short.mp4", frames[:8], np.arange(8) / 16)
    usable, skipped = scan_folder(tmp_path, ClipConfig(16, 16, 15))
    assert [file.name for file in usable] == ["good.mp4"]
    assert [len(line.splitlines()) for line in skipped] == [1] * 6
    reasons = dict(line.removeprefix("skipped ").split(": it ", 1) for line in skipped)
    assert sorted(reasons) == ["cut_off.mp4", "dangling.mp4", "noise.mp4", "notes.md", "short.mp4", "zero.mp4"]
    assert "0 bytes" in reasons["zero.mp4"]
    assert "cannot be decoded" in reasons["noise.mp4"]
    assert "longest shot lasts 0.50 s and a clip 0.94 s" in reasons["short.mp4"]
    printed = capsys.readouterr()
    assert printed.out == ""
    for line in skipped:
        assert line in printed.err


def test_a_file_cut_off_after_its_header_is_noticed(tmp_path):
    path = tmp_path / "streamed.mp4"
    write_video(path, shots((64,)), np.arange(64) / 16)
    with (
        av.open(os.fspath(path)) as source,
        av.open(os.fspath(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "fast.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(ValueError, match=r"cut off or damaged|Invalid data"):
        scan_footage(tmp_path / "fast.mp4")


def test_a_folder_with_nothing_to_use_is_named(tmp_path):
    config = ClipConfig(8, 8, 15)
    with pytest.raises(UserError, match="missing does not exist"):
        videos(tmp_path / "missing", config)
    with pytest.raises(UserError, match="holds no video files"):
        videos(tmp_path, config)
    (tmp_path / "zero.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable video \(skipped zero.mp4: it is empty"):
        open_source(videos(tmp_path, config), tmp_path / "cache", "train")
    with pytest.raises(UserError, match="stride"):
        ClipConfig(8, 8, 15, stride=-1)


def test_captions_come_from_the_table_or_from_beside(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "b.mp4", "sub/c.mp4", "d.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("from\nbeside\n")
    (tmp_path / "b.txt").write_text("overruled")
    (tmp_path / "captions.json").write_text(json.dumps({"b.mp4": "from the table", "sub/c.mp4": "ñandú"}))
    names = list_files(tmp_path)
    assert names == ["a.mp4", "b.mp4", "d.mp4", "sub/c.mp4"]
    expected = {"a.mp4": "from beside", "b.mp4": "from the table", "d.mp4": "", "sub/c.mp4": "ñandú"}
    assert read_captions(tmp_path, names) == expected
    for content, message in (('{"e.mp4": "?"}', "e.mp4"), ("[1]", "not an object"), ("{\n", "line 2 is not JSON")):
        (tmp_path / "captions.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_captions(tmp_path, names)
    (tmp_path / "captions.json").unlink()
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        read_captions(tmp_path, names)


def test_the_dataset_splits_by_file_and_follows_the_folder(tmp_path):
    folder, cache = tmp_path / "videos", tmp_path / "cache"
    folder.mkdir()
    frames = shots((32,))
    for number in range(4):
        write_video(folder / f"{number}.mp4", frames, np.arange(32) / 16)
    (folder / "2.txt").write_text("two")
    config = ClipConfig(16, 24, 8)
    dataset = videos(folder, config, validation_fraction=0.25)
    sources = {split: open_source(dataset, cache, split) for split in ("train", "validation")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 12, "validation": 4}
    batches = {split: read_batch(source, np.arange(len(source))) for split, source in sources.items()}
    assert not set(batches["train"]["source"]) & set(batches["validation"]["source"])
    for batch in batches.values():
        assert batch["video"].shape[1:] == (8, 16, 24, 3)
        np.testing.assert_allclose(np.unique(batch["start"]), [0, 0.5, 1, 1.5], atol=1e-3)
        assert all(caption == ("two" if name == "2.mp4" else "") for caption, name in _pairs(batch))

    (folder / "3.txt").write_text("three")
    changed = videos(folder, config, validation_fraction=0.25)
    assert changed(data_dir=cache).data_dir != dataset(data_dir=cache).data_dir
    captions = [
        pair for split in sources for pair in _pairs(read_batch(open_source(changed, cache, split), [0, 1, 2, 3]))
    ]
    assert all(caption == "three" for caption, name in captions if name == "3.mp4")


def _pairs(batch):
    return list(zip(batch["caption"], batch["source"], strict=True))


@needs_real_clip
def test_a_real_file_with_many_streams_and_a_cut(tmp_path):
    footage = scan_footage(REAL_CLIP)
    assert len(footage.timestamps) == 390  # the larger of its two video streams, at 29.97 frames per second
    assert footage.end == pytest.approx(13.013, abs=1e-3)
    # One hard cut, and a dissolve of about a second from frame 147 on, in which every frame is one.
    assert footage.cuts[-1] == 240
    assert set(range(149, 180)) <= set(footage.cuts) <= {*range(144, 186), 240}
    starts, frames = clip_frames(footage, ClipConfig(48, 64, 24))
    assert not ((frames[:, 0] < 240) & (frames[:, -1] >= 240)).any()
    assert not np.isin(frames, np.arange(149, 180)).any()
    np.testing.assert_allclose(
        footage.timestamps[frames], starts[:, None] + np.arange(24) / 16, atol=0.5 / 29.97 + 2e-3
    )
    clips = list(read_clips(REAL_CLIP, frames, 48, 64))
    assert len(clips) == len(starts) == 7
    _, first = next(decode_frames(REAL_CLIP))
    np.testing.assert_array_equal(clips[0][0], frame_pixels(first, 48, 64))
