"""The command: what it finds, what it writes, what it says, and how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation.clips import moving, still, write_video

from adastate_jax import evaluate
from adastate_jax.console import run_command
from adastate_jax.data.decoding import Unusable
from adastate_jax.errors import UserError
from adastate_jax.evaluation.measure import Measurement, Settings
from adastate_jax.generation import loading, video_stream


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two folders of one name each with a clip, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "adaptive" / "samples" / "pan.mp4", moving(32, 48, 6, pan=(2.0, 0.0)))
    write_video(folder / "static" / "samples" / "frozen.mp4", still(32, 48, 6))
    (folder / "static" / "samples" / "empty.mp4").touch()
    return folder


def exit_code(*arguments):
    with pytest.raises(SystemExit) as exited:
        run_command(evaluate.main, list(map(str, arguments)))
    return exited.value.code


def test_folders_become_groups_of_a_report(videos, tmp_path, capsys):
    folders = (videos / "adaptive", videos / "static")
    code = exit_code(*folders, f"--output={tmp_path / 'report'}", "--jobs=1", "--first-chunk=2", "--chunk=2")
    captured = capsys.readouterr()
    assert code == 0
    content = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [(video["group"], video["name"]) for video in content["videos"]] == [
        ("adaptive/samples", "pan.mp4"),
        ("static/samples", "frozen.mp4"),
    ]
    assert content["settings"] == {"first_chunk": 2, "chunk": 2}
    assert all(video["metrics"]["seam_ratio"] is not None for video in content["videos"])
    assert len(content["skipped"]) == 1
    assert "empty.mp4: it is empty (0 bytes)" in captured.err
    *lines, name = captured.out.splitlines()
    assert name == str(tmp_path / "report" / "report.html")
    assert captured.err.startswith("starting to measure\n")
    assert captured.err.splitlines()[-1] == "writing the report"
    assert [line.split(":")[0] for line in lines] == ["adaptive/samples", "static/samples"]
    assert all("motion" in line and "drift" in line for line in lines)
    assert "12/12 " in captured.err  # the progress bar counts the frames of both


def test_processes_measure_the_same(videos):
    files = sorted(videos.rglob("*.mp4"))
    alone = evaluate.measure_files(files, Settings(), 1)
    together = evaluate.measure_files(files, Settings(), 2)
    assert [type(result) for result in together] == [Measurement, Unusable, Measurement]
    for one, other in zip(alone, together, strict=True):
        assert str(getattr(one, "metrics", one)) == str(getattr(other, "metrics", other))


def test_the_bar_is_there_before_the_headers_are_read(videos, monkeypatch, capsys):
    said, read_header = [], evaluate.read_header

    def read(file):
        said.append(capsys.readouterr().err)
        return read_header(file)

    monkeypatch.setattr(evaluate, "read_header", read)
    evaluate.measure_files(sorted(videos.rglob("*.mp4")), Settings(), 1)
    assert said[0].startswith("measure (starting): 0")
    assert len(said) == 3
    assert "12/12 " in capsys.readouterr().err


def test_a_report_is_lost_to_no_other(videos, tmp_path, monkeypatch, capsys):
    """A default name is numbered, a given one is refused before any work, and only a report is ever replaced."""
    monkeypatch.chdir(tmp_path)
    clip = videos / "static" / "samples" / "frozen.mp4"
    for name in ("report", "report-2"):
        assert exit_code(clip, "--jobs=1") == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{name}/report.html"
    before = Path("report/report.html").stat().st_mtime_ns
    monkeypatch.setattr(evaluate, "measure_files", lambda *_: pytest.fail("it was measured"))
    assert exit_code(clip, "--output=report") == 2
    assert "--output=report: exists; name another, or add --overwrite" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert exit_code(clip, "--output=report", "--overwrite", "--jobs=1") == 0
    assert Path("report/report.html").stat().st_mtime_ns > before
    Path("report/notes.txt").write_text("mine")
    capsys.readouterr()
    monkeypatch.setattr(evaluate, "measure_files", lambda *_: pytest.fail("it was measured"))
    assert exit_code(clip, "--output=report", "--overwrite", "--jobs=1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--output=report: cannot be written (it holds 'notes.txt', which is of another kind)" in error
    assert Path("report/notes.txt").read_text() == "mine"
    assert Path("report/metrics.json").exists()
    assert sorted(os.listdir()) == ["report", "report-2"]


def damaged(folder):
    """Files that are no whole videos, each in another way."""
    good = write_video(folder / "good.mp4", moving(32, 48, 12)).read_bytes()
    contents = {
        "a cut.mp4": good[: len(good) * 3 // 4],
        "b empty.mp4": b"",
        "c noise.webm": np.random.default_rng(0).bytes(5000),
        "d zeros.mkv": bytes(5000),
        "e header only.mp4": good[:600],
        "f text.avi": b"no video\n" * 100,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "g gone.mp4").symlink_to(folder / "nowhere")
    return list(contents)


@pytest.mark.parametrize("jobs", [1, 2])
def test_damaged_videos_among_good_ones_are_skipped_by_name(tmp_path, capsys, jobs):
    (tmp_path / "videos").mkdir()
    names = damaged(tmp_path / "videos")
    assert exit_code(tmp_path / "videos", f"--output={tmp_path / 'report'}", f"--jobs={jobs}") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped ")]
    for line, name in zip(lines, names, strict=True):
        assert f"{name}: it " in line
    content = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [video["name"] for video in content["videos"]] == ["good.mp4"]
    assert [Path(entry["name"]).name for entry in content["skipped"]] == names


def test_a_video_whose_process_is_killed_is_skipped_and_the_others_are_measured(tmp_path):
    """A decoder that crashes takes its process with it, and the pool's others."""
    files = [write_video(tmp_path / f"{name}.mp4", moving(32, 48, 4)) for name in ("a", "kill", "b")]
    program = """
import os, sys
from pathlib import Path
from adastate_jax import evaluate
from adastate_jax.evaluation.measure import Settings

def measure_or_die(file, settings, count_frames):
    return os._exit(9) if file.stem == "kill" else measure(file, settings, count_frames)

measure, evaluate._measure = evaluate._measure, measure_or_die
if __name__ == "__main__":
    for result in evaluate.measure_files(list(map(Path, sys.argv[1:])), Settings(), 2):
        print(getattr(result, "num_frames", result))
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, tmp_path / "program.py", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    killed = "the process that measured it was killed, perhaps for want of memory"
    assert done.stdout.splitlines() == ["4", killed, "4"]


def test_names_that_are_no_text_are_shown_as_escapes(tmp_path, capsys):
    source = write_video(tmp_path / "a.mp4", moving(32, 48, 4))
    folder = tmp_path / os.fsdecode(b"caf\xe9\x1b[31m")
    folder.mkdir()
    source.rename(folder / os.fsdecode(b"\xff\n.mp4"))
    assert exit_code(folder, f"--output={tmp_path / 'report'}", "--jobs=1") == 0
    assert capsys.readouterr().out.startswith("caf\\udce9\\x1b[31m: 1 video,")
    (video,) = json.loads((tmp_path / "report" / "metrics.json").read_text())["videos"]
    assert (video["group"], video["name"]) == ("caf\\udce9\\x1b[31m", "\\udcff .mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.mp4", "--output=report"], "none.mp4: no such file or folder"),
        (["nothing", "--output=report"], "nothing: holds no videos"),
        (["one.mp4", "--output=report"], "one.mp4: it has 1 frame, and motion needs two"),
        (["empty.mp4", "text.mp4", "--output=report"], "empty.mp4: it is empty (0 bytes) (and 1 more)"),
        (["one.mp4", "--output=text.mp4"], "text.mp4: is a file; name a folder"),
        (["one.mp4", "--output=report", "--jobs=0"], "--jobs=0: give at least 1"),
        (["one.mp4", "--output=report", "--chunk=0"], "chunk is 0: give at least 1 frame"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_report(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    Path("nothing/readme.txt").touch()
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("no video")
    write_video(Path("one.mp4"), still(32, 32, 1))
    assert exit_code(*arguments, *(["--jobs=1"] if "--jobs=0" not in arguments else [])) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not Path("report").exists()


def test_groups_are_named_by_what_tells_them_apart(tmp_path, monkeypatch):
    for name in ("a/x/0.mp4", "b/x/0.mp4", "b/y/0.mp4", "b/.hidden/0.mp4", "top.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    groups = [group for _, group in evaluate.find_videos([tmp_path / "a", tmp_path / "b", tmp_path / "b/y/0.mp4"])]
    assert groups == ["a/x", "b/x", "y"]
    monkeypatch.chdir(tmp_path)
    top = Path("top.mp4")
    assert evaluate.find_videos([top]) == [(top, "current folder")]
    assert evaluate.find_videos([Path(), top])[-1] == (top, tmp_path.name)
    named = evaluate.find_videos([top, Path("a/x/0.mp4")])
    assert [group for _, group in named] == ["current folder", "x"]


# --- export -------------------------------------------------------------------------------------------------------


def test_videos_are_exported_and_the_rest_is_listed(videos, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("pan\nfrozen\nrain\n")
    source = tmp_path / "source"
    write_video(source / "pan.mp4", moving(32, 48, 4))
    write_video(source / "frozen.mp4", moving(32, 48, 4))
    write_video(source / "other.mp4", moving(32, 48, 4))
    options = (f"--vbench={tmp_path / 'vbench'}", f"--prompts={prompts}", "--samples=1")
    assert exit_code("export", *options, f"--videos={source}") == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["missing rain-0.mp4"]
    assert "other.mp4: belongs to no prompt" in captured.err
    assert "2 of 3 videos, 0 problems" in captured.err

    (source / "other.mp4").rename(source / "rain.mp4")
    assert exit_code("export", *options, f"--videos={source}") == 0
    assert exit_code("export", *options, "--check") == 0
    (tmp_path / "vbench" / "notes.txt").touch()
    assert exit_code("export", *options, "--check") == 1
    assert "problem notes.txt" in capsys.readouterr().out


def test_a_model_generates_what_is_missing(tmp_path, monkeypatch):
    asked = []

    def stream(model, text, seconds, seed, anchor):
        asked.append((model, text, seconds, seed, anchor))
        yield moving(32, 48, 4)

    monkeypatch.setattr(loading, "load", lambda path: f"the model of {path.name}")
    monkeypatch.setattr(video_stream, "stream", stream)
    (tmp_path / "prompts.txt").write_text("rain\n")
    (tmp_path / "extended.txt").write_text("heavy rain on a tin roof\n")
    options = (
        f"--vbench={tmp_path / 'vbench'}",
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--extended={tmp_path / 'extended.txt'}",
        f"--checkpoint={tmp_path / 'run'}",
        "--samples=2",
        "--seconds=0.25",
        "--seed=7",
        "--anchor=static",
    )
    assert exit_code("export", *options) == 0
    text = "heavy rain on a tin roof"
    assert asked == [("the model of run", text, 0.25, seed, "static") for seed in (7, 8)]
    (tmp_path / "vbench" / "rain-0.mp4").unlink()
    assert exit_code("export", *options) == 0
    assert [seed for *_, seed, _ in asked] == [7, 8, 7]
    assert exit_code("export", *options, "--seconds=1") == 2  # another length in the same folder


def test_export_refuses_what_makes_no_sense(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\n")
    options = [f"--vbench={tmp_path / 'vbench'}", f"--prompts={prompts}"]
    for bad, message in (
        ((f"--checkpoint={tmp_path / 'none'}",), "none: no such folder"),
        ((f"--videos={tmp_path / 'none'}",), "does not exist"),
        (("--check",), "no such folder; export into it first"),
        ((f"--checkpoint={tmp_path}", "--seconds=nan"), "--seconds=nan: must be positive"),
        (("--check", "--samples=6"), "samples is 6"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(["export", *options, *bad])
    assert not (tmp_path / "vbench").exists()
