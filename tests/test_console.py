"""How commands behave in a terminal: where output goes, what is said, whoever listens."""

import importlib
import io
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command
from adastate_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def options_of(arguments, default="out.mp4"):
    parser = CommandParser(prog="x")
    output_argument(parser, "mp4 file", default)
    return parser.parse_args(arguments)


def claim(*arguments, **settings):
    with claimed_output(options_of(arguments), **settings) as path:
        return str(path)


def test_a_default_output_is_numbered_and_a_named_one_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert claim() == "out.mp4"
    (tmp_path / "out.mp4").touch()
    assert claim() == "out-2.mp4"
    assert claim("--overwrite") == "out.mp4"
    with pytest.raises(UserError, match=r"^--output=out.mp4: exists; name another, or add --overwrite"):
        claim("--output=out.mp4")
    assert claim("--output=out.mp4", "--overwrite") == "out.mp4"
    assert claim("--output=out.mp4", number=3) == "out-3.mp4"
    with pytest.raises(UserError, match="required: --output"):
        options_of([], default=None)
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.html").touch()
    assert claim("--output=folder", folder=True) == "folder"
    for arguments, folder, message in (
        (["--output=folder"], False, "folder: is a folder; name a file"),
        (["--output=file", "--overwrite"], True, "file: is a file; name a folder"),
        (["--output=full"], True, "full: exists; name another, or add --overwrite"),
        (["--output=file/x.mp4"], False, r"file/x.mp4: cannot be written \(File exists\)"),
        (["--output=/proc/x.mp4"], False, "/proc/x.mp4: cannot be written"),
        ([f"--output={'x' * 252}.mp4"], False, r"cannot be written \(File name too long\)"),
    ):
        with pytest.raises(UserError, match=message):
            claim(*arguments, folder=folder)
    full = {"folder": True, "replaces": lambda name: name.endswith(".png")}
    with pytest.raises(UserError) as refused:
        claim("--output=full", "--overwrite", **full)
    assert str(refused.value) == (
        "--output=full: cannot be written (it holds 'report.html', which is of another kind); name another"
    )
    (tmp_path / "full" / "report.html").rename(tmp_path / "full" / "frame.png")
    assert claim("--output=full", "--overwrite", **full) == "full"
    with claimed_output(options_of(["--output=new.mp4"])), pytest.raises(UserError, match="another process is writing"):
        claim("--output=new.mp4")


@pytest.mark.parametrize(
    ("arguments", "folder", "message"),
    [
        (
            ["--output=/", "--overwrite"],
            True,
            "--output=/: cannot be written (it names no file or folder); name another",
        ),
        (["--output=/"], False, "--output=/: cannot be written (it names no file or folder); name another"),
        (
            ["--output=/proc", "--overwrite"],
            True,
            "--output=/proc: cannot be written (it is a mount point); name another",
        ),
        (["--output=."], False, "--output=.: cannot be written (it names no file or folder); name another"),
        (["--output=."], True, "--output=.: cannot be written (it names no file or folder); name another"),
        (["--output="], True, "--output=.: cannot be written (it names no file or folder); name another"),
        (["--output=.."], True, "--output=..: cannot be written (it names no file or folder); name another"),
        (["--output=new/..", "--overwrite"], True, "new/..: cannot be written (it names no file or folder)"),
        (["--output=../work"], True, "--output=../work: cannot be written (the working folder is in it); name another"),
    ],
)
def test_an_output_without_a_name_or_in_use_is_refused(tmp_path, monkeypatch, arguments, folder, message):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UserError) as refused:
        claim(*arguments, folder=folder)
    assert message in str(refused.value)
    if not arguments[0].endswith("work") and "/proc" not in arguments[0]:  # with a number, these have another name
        with pytest.raises(UserError):
            claim(*arguments, folder=folder, number=2)
    assert os.listdir(tmp_path) == ["work"]
    assert os.listdir(".") == []


# --- standard streams -------------------------------------------------------------------------------------------------

SPEAKING = """
import os, sys
from pathlib import Path
from adastate_jax.console import progress, run_command

def main(arguments):
  with open(sys.argv[1], "w") as file, progress("work", 3) as bar:
    for step in range(3):
      os.write(2, b"a library's words")  # where stderr is closed, this must not come into the file
      file.write("work")
      bar.update(1)
  print("x" * 100_000)

run_command(main)
"""


@pytest.mark.parametrize(
    ("redirection", "code"),
    [
        (">&-", 0),
        ("2>&-", 0),
        (">&- 2>&- <&-", 0),
        (">/dev/full", 1),
        ("2>/dev/full", 0),
        ("2> >(exec true)", 0),
        ("> >(exec true); sleep 0.1", 141),
        (">/dev/null", 0),
    ],
)
def test_the_work_is_done_whoever_listens(redirection, code, tmp_path):
    command = f"sleep 0.1; exec {shlex.quote(sys.executable)} -c {shlex.quote(SPEAKING)} {tmp_path / 'out'}"
    where, _, _ = redirection.partition(";")
    done = subprocess.run(["bash", "-c", f"({command}) {where}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out").read_text() == "work" * 3
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.endswith("note: stdout: cannot be written (No space left on device)\n")


class Failing(io.StringIO):
    """A stream that fails as a library's does, without the system's number."""

    def write(self, text):
        raise OSError("the notebook has gone")

    def fileno(self):
        return self.descriptor


def test_a_stream_may_fail_without_a_number_or_be_closed(monkeypatch, tmp_path, capsys):
    with open(tmp_path / "out", "w") as file:
        failing = Failing()
        failing.descriptor = file.fileno()
        monkeypatch.setattr(sys, "stdout", failing)
        with pytest.raises(SystemExit) as exited:
            run_command(lambda arguments: print("words"), [])
    assert exited.value.code == 1
    assert capsys.readouterr().err == "note: stdout: cannot be written (the notebook has gone)\n"

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as exited:
        run_command(lambda arguments: (sys.stdout.close(), print("words"), 0)[-1], [])
    assert exited.value.code == 1
    assert capsys.readouterr().err == "note: stdout: cannot be written (I/O operation on closed file)\n"


def test_progress_into_a_pipe_is_a_few_lines(capsys):
    logger = logging.getLogger("adastate_jax.models.attention")

    def main(arguments):
        logging.basicConfig()  # as Orbax does when it is imported
        with progress("sample", 1000, unit="frame", compiles=True) as bar:
            for step in range(1000):
                if step == 500:
                    logger.info("attention: xla")
                bar.update(1)

    with pytest.raises(SystemExit):
        run_command(main, [])
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 13
    assert lines[0].startswith("sample (compiling):   0%")
    assert lines[-1].startswith("sample: 100%")
    assert lines.count("attention: xla") == 1


def test_after_a_message_it_is_said_again_that_it_compiles(capsys):
    def main(arguments):
        with progress("sample", 2, compiles=True) as bar:
            logging.getLogger("adastate_jax.models.attention").info("attention: xla")
            bar.update(1)
            logging.getLogger("adastate_jax.models.attention").info("attention: xla, again")
            bar.update(1)

    with pytest.raises(SystemExit):
        run_command(main, [])
    said = [line.partition("%")[0] for line in capsys.readouterr().err.splitlines()]
    compiling = "sample (compiling):   0"
    assert said[:3] == [compiling, "attention: xla", compiling]
    assert said.count(compiling) == 2
    assert said.count("attention: xla, again") == 1


def test_the_estimate_counts_from_the_second_unit_on(capsys):
    with progress("sample", 40, initial=10) as bar:
        bar.start_t -= 100.0  # all is got ready
        assert "?step/s" in str(bar)
        bar.update(10)
        assert bar.format_dict["elapsed"] >= 100.0
        assert "<?, ?step/s" in str(bar)
        bar.start_t -= 5.0
        bar.update(10)
        assert bar.format_dict["rate"] == pytest.approx(2.0, rel=0.1)
    with progress("sample", 3) as bar:
        bar.start_t -= 6.0
        bar.update(3)
        assert "2.00s/step" in str(bar)


def test_a_bar_without_a_total_has_one_colon(capsys):
    with progress("measure (starting)", 0, unit="frame") as bar:
        bar.set_description("measure")
    assert [line.partition(" [")[0] for line in capsys.readouterr().err.splitlines()] == [
        "measure (starting): 0frame",
        "measure: 0frame",
    ]


def test_what_is_compiled_within_is_counted_once(capsys):
    def record(event, seconds):
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}_duration", seconds)

    with progress("sample", 10) as bar:
        begun = bar.start_t
        time.sleep(0.5)
        record("jaxpr_trace", 0.1)
        record("jaxpr_trace", 0.01)  # within that, as far as the clock tells
        record("jaxpr_trace", 0.3)  # and that within this
        record("backend_compile", 0.4)
        assert bar.start_t - begun == pytest.approx(0.4, abs=0.05)


def test_compilations_are_not_counted(capsys):
    with progress("sample", 10) as bar:
        time.sleep(0.3)
        begun = bar.start_t
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.25)
        assert bar.start_t == begun + 0.25
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9.0)
        assert bar.format_dict["elapsed"] >= 0
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9.0)  # nobody listens


def test_a_missing_requirement_is_one_line(capsys):
    code = "import runpy, sys\nsys.modules['tqdm'] = None\nrunpy.run_module('adastate_jax.sample', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    line = "error: tqdm is not installed; run pip install -r requirements.txt in the environment of this Python\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    with pytest.raises(SystemExit) as exited:
        run_command(lambda arguments: importlib.import_module("no_such_module.part"), [])
    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith("error: no_such_module is not installed; run pip install -r req")
