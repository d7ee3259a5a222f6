"""Videos out: every format whole or not at all, in the colours that went in, with the texts that went in."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from adastate_jax.data.decoding import decode_frames, frame_pixels
from adastate_jax.errors import UserError
from adastate_jax.media import VideoWriter, open_writer, read_image, read_metadata, write_image, writers

ROOT = Path(__file__).parents[2]


def ramp(frames=5, size=16):
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 40, (frames, size, size, 3))


def test_video_round_trip(tmp_path):
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(ramp(2))
        assert not (tmp_path / "a.mp4").exists()
        writer.write(ramp(3))
    with av.open(str(tmp_path / "a.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 16
    assert [round(frame.mean() / 40) for frame in frames] == [0, 1, 0, 1, 2]


def test_the_same_frames_make_the_same_file(tmp_path):
    """Whatever is in memory that the encoder was given but did not fill."""
    program = """
import sys
from adastate_jax.data.worlds import WorldConfig, render_world
from adastate_jax.media import VideoWriter
video = render_world(WorldConfig(height=240, width=240, num_frames=64), 1, 0).video
with VideoWriter(sys.argv[1]) as writer:
    writer.write(video)
"""
    files = []
    for fill in ("0", "200"):
        path = tmp_path / f"{fill}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", program, path], env=environment, cwd=ROOT, check=True)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_an_interrupted_video_leaves_nothing(tmp_path):
    def interrupted():
        with VideoWriter(tmp_path / "a.mp4") as writer:
            writer.write(ramp())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    with VideoWriter(tmp_path / "b.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_last_frames_are_compressed_waits_for_the_thread(tmp_path, monkeypatch):
    """The container is closed when nobody writes to it any more, and frames that have not begun are left out."""
    closing, done = threading.Event(), []

    def write(encoder, frame):
        done.append("frame")
        assert closing.wait(60)
        if len(done) == 1:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the main thread has its exception, and would go on
            assert done == ["frame"]
        original(encoder, frame)
        done.append("written")

    def abandon(encoder):
        done.append("abandoned")
        closed(encoder)

    original, closed = writers.Mp4.write, writers.Mp4.abandon
    monkeypatch.setattr(writers.Mp4, "write", write)
    monkeypatch.setattr(writers.Mp4, "abandon", abandon)

    def interrupted():
        with VideoWriter(tmp_path / "a.mp4") as writer:
            writer.write(ramp(64))
            closing.set()  # what follows is the writer's own waiting

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["frame", "written", "abandoned"]
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_named(tmp_path):
    """Where it is opened, while it is written, and when it gets its name."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.mp4: cannot be written \(.*exists|.*Not a directory\)"):
        VideoWriter(tmp_path / "file" / "a.mp4")

    for name in ("folder.mp4", "folder.gif", "folder.webp"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=rf"{name}: cannot be written \(Is a directory\)"):
            VideoWriter(tmp_path / name)
    for path, message in (
        (Path("/proc/a.mp4"), "cannot be written"),
        (tmp_path / ("x" * 252 + ".gif"), r"cannot be written \(File name too long\)"),
        (tmp_path / "a.avi", r"must end in \.mp4, \.gif, \.webp, or name a folder"),
        (tmp_path / "file", r"cannot be written \(Not a directory\)"),
    ):
        with pytest.raises(UserError, match=message):
            VideoWriter(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.gif", "folder.mp4", "folder.webp"]


OUTPUTS = ("a.mp4", "a.gif", "a.webp", "a.MP4", "pictures")
TEXTS = {"prompt": 'héllo\n"日本" = ; # \\ <a & b>', "seed": "5", "mode": "a word of Pillow's", "long": "x" * 70000}


def colours(frames=6, height=48, width=64):
    """Soft shapes of all hues."""
    time, row, column = np.mgrid[:frames, :height, :width]
    phases = np.stack([column / 9 + time / 3, row / 7, (row + column) / 11 - time / 3], axis=-1)
    return (128 + 110 * np.sin(phases)).astype(np.uint8)


def read_back(path):
    if path.is_dir():
        return np.stack([iio.imread(picture) for picture in sorted(path.iterdir())])
    return np.stack([frame_pixels(frame, frame.height, frame.width) for _, frame in decode_frames(path)])


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_format_keeps_frames_and_texts(tmp_path, name):
    for metadata in (TEXTS, None):
        for frames in (colours(), colours(1), colours(4, 30, 46)):
            path = tmp_path / f"{frames.shape} {bool(metadata)}" / name
            with open_writer(path, metadata) as writer:
                writer.write(frames[:3])
                writer.write(frames[3:])
            found = read_back(path)
            assert found.shape == frames.shape
            error = np.abs(found.astype(int) - frames).mean(axis=(1, 2, 3))
            assert error.max() < (0.01 if path.is_dir() else 10)  # a GIF's dither is the most
            assert read_metadata(path) == (metadata or {})
            assert len(list(path.parent.iterdir())) == 1


def test_animations_run_at_sixteen_frames_per_second_and_repeat(tmp_path):
    for name in ("a.gif", "a.webp"):
        with open_writer(tmp_path / name) as writer:
            writer.write(colours(32))
        with Image.open(tmp_path / name) as picture:
            durations = []
            for number in range(picture.n_frames):
                picture.seek(number)
                picture.load()
                durations.append(picture.info["duration"])
            assert len(durations) == 32
            assert picture.info["loop"] == 0
        assert sum(durations) == pytest.approx(2000, abs=12)  # a GIF counts in hundredths of a second


@pytest.mark.parametrize("size", [(64, 96), (720, 1280)])
def test_the_mp4_says_which_colours_it_holds(tmp_path, size):
    """Decoded as the file says, the colours are those that went in; with another matrix, they are others."""
    path = tmp_path / "a.mp4"
    for colour in ((220, 30, 30), (30, 200, 60), (40, 60, 220), (255, 255, 255), (0, 0, 0)):
        with VideoWriter(path) as writer:
            writer.write(np.full((2, *size, 3), colour, np.uint8))
        with av.open(str(path)) as video:
            frame = next(video.decode(video=0))
            tagged = (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range)
            assert tagged == (Colorspace.ITU709, ColorPrimaries.BT709, ColorTrc.BT709, ColorRange.MPEG)
            codec = video.streams.video[0].codec_context
            assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == tagged
            found = frame_pixels(frame, *size)[size[0] // 2, size[1] // 2].astype(int)
            assert np.abs(found - colour).max() <= 2
            other = frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU601)[0, 0].astype(int)
            assert (np.abs(other - colour).max() > 8) == (len(set(colour)) > 1)  # grey has no colour to lose


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("a.mp4", [colours(2, 31, 48)], r"an mp4 has even sides, not \[31, 48\] pixels"),
        ("a.gif", [colours(2), colours(2, 16, 16)], r"must all be \[48, 64\] pixels, not \[16, 16\]"),
        ("a.webp", [colours(2).astype(np.float32)], r"must be uint8 \[F, H, W, 3\], not float32"),
        ("a", [colours(2)[0]], r"must be uint8 \[F, H, W, 3\], not uint8 \[48, 64, 3\]"),
    ],
)
def test_frames_of_another_kind_are_refused_and_nothing_is_left(tmp_path, name, frames, message):
    def write():
        with open_writer(tmp_path / name) as writer:
            for some in frames:
                writer.write(some)

    with pytest.raises(UserError, match=message):
        write()
    assert os.listdir(tmp_path) == []


def test_a_link_is_written_through_and_a_device_is_not_replaced(tmp_path):
    target = tmp_path / "elsewhere" / "target.mp4"
    target.parent.mkdir()
    (tmp_path / "link.mp4").symlink_to(target)
    (tmp_path / "null.mp4").symlink_to(os.devnull)
    with VideoWriter(tmp_path / "link.mp4") as writer:
        writer.write(colours())
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(read_back(target)) == 6
    with pytest.raises(UserError, match=r"null\.mp4: cannot be written \(neither a file nor a folder\)"):
        VideoWriter(tmp_path / "null.mp4")
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp", ""])
@pytest.mark.parametrize("letter", ["x", "é", "12:30 "])
def test_any_name_that_the_file_system_takes_is_written(tmp_path, letter, ending):
    stem = letter * ((250 - len(ending)) // len(letter.encode()))
    with open_writer(tmp_path / (stem + ending), TEXTS) as writer:
        writer.write(colours(2))
    assert os.listdir(tmp_path) == [stem + ending]
    assert read_metadata(tmp_path / (stem + ending)) == TEXTS
    assert len(read_back(tmp_path / (stem + ending))) == 2


def test_a_folder_of_pictures_replaces_its_like_and_nothing_else(tmp_path):
    folder = tmp_path / "takes.v2"
    with pytest.raises(UserError, match=r"takes\.v2: must end in"):
        open_writer(folder)
    for frames in (colours(5), colours(3)):
        with open_writer(f"{folder}/") as writer:
            writer.write(frames)
        assert sorted(os.listdir(folder)) == [f"frame_{number:05d}.png" for number in range(len(frames))]
        np.testing.assert_array_equal(read_back(folder), frames)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written \(it holds 'notes\.txt', which is of another kind\)"):
        open_writer(folder)
    assert len(os.listdir(folder)) == 4
    assert os.listdir(tmp_path) == ["takes.v2"]


@pytest.mark.parametrize("name", ["a.mp4", "pictures"])
def test_what_appears_while_a_video_is_written_is_kept(tmp_path, name):
    """Beside a file the video gets the next number; a folder of somebody else's is refused."""

    def write():
        with open_writer(tmp_path / name, replace=False) as writer:
            writer.write(colours())
            with open_writer(tmp_path / name) as other:
                other.write(colours(2))
        return writer.path

    if name == "a.mp4":
        assert write() == tmp_path / "a-2.mp4"
        assert len(read_back(tmp_path / "a-2.mp4")) == 6
    else:
        with pytest.raises(UserError, match=r"pictures: cannot be written \(it holds 'frame_0000"):
            write()
    assert len(read_back(tmp_path / name)) == 2


def test_a_full_disk_is_one_line_whenever_it_fills(tmp_path):
    """With every size that a file may reach, for every format: the whole video is there, or a line and nothing."""
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from media.test_writers import colours
from adastate_jax.errors import UserError
from adastate_jax.media import open_writer
frames, folder, failures = colours(12, 96, 128), Path(sys.argv[1]), 0
for name in ("a.mp4", "a.gif", "a.webp", "pictures"):
    for room in (0, 10, 100, 500, 1000, 2000, 3000, 5000, 7500, 10000, 20000, 1 << 24):
        path = folder / str(room) / name
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            with open_writer(path, {"prompt": "a red ball"}) as writer:
                writer.write(frames)
        except UserError as error:
            assert str(error).startswith(f"{path}: cannot be written (") and len(str(error).splitlines()) == 1
            assert list(path.parent.iterdir()) == [], room
            failures += 1
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            with open_writer(folder / name) as writer:
                writer.write(frames)
            assert path.is_dir() or path.stat().st_size >= (folder / name).stat().st_size, (name, room)
            path.rename(folder / f"{room} {name}")
print(failures)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_picture_is_whole_and_its_failure_is_said(tmp_path):
    image = colours(1)[0]
    write_image(tmp_path / "a.png", image, TEXTS)
    np.testing.assert_array_equal(iio.imread(tmp_path / "a.png"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", *image.shape[:2])[0], image)
    assert read_metadata(tmp_path / "a.png") == TEXTS
    with pytest.raises(UserError, match=r"a\.png/b\.png: cannot be written \(.*exists|.*Not a directory\)"):
        write_image(tmp_path / "a.png" / "b.png", image)
    assert os.listdir(tmp_path) == ["a.png"]


def test_texts_of_others_are_read_and_what_has_none_is_named(tmp_path):
    for name, message in (("none.mp4", "no such file"), ("text.mp4", "neither"), ("cut.gif", "not a readable picture")):
        if name != "none.mp4":
            (tmp_path / name).write_bytes(b"GIF89a" if name == "cut.gif" else b"words")
        with pytest.raises(UserError, match=message):
            read_metadata(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no PNG files"):
        read_metadata(tmp_path / "empty")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.gif", comment=b"made elsewhere")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.webp", xmp=b"<broken")
    assert read_metadata(tmp_path / "other.gif") == read_metadata(tmp_path / "other.webp") == {}
