"""Files appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from adastate_jax.errors import UserError
from adastate_jax.media import VideoWriter, contact_sheet, loss_curves, read_metrics, side_by_side, write_image

ROOT = Path(__file__).parents[1]


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


def test_panels_and_sheets(tmp_path):
    joined = side_by_side({"adaptive": ramp(), "static": ramp()}, 3)
    assert joined.shape[0] == 5
    assert joined.shape[2] == 2 * 48
    assert joined.shape[1] % 2 == 0
    sheet = contact_sheet([("one", ramp(9)), ("two", ramp(9))], 2, columns=3)
    assert sheet.shape[1] == 3 * (32 + 2)
    write_image(tmp_path / "sheet.png", sheet)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_loss_curves_of_a_cut_short_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"stage": "a", "step": 0, "loss": 2.0}\n{"stage": "a", "step": 1, "loss": 1.0}\n{"stage": "a", "st'
    )
    records = read_metrics(path)
    assert [record["step"] for record in records] == [0, 1]
    loss_curves(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
