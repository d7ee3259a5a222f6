"""How commands behave in a terminal: where output goes, what is said, how they end."""

import importlib
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from adastate_jax import __main__, interrupts, sample, verify
from adastate_jax.__main__ import COMMANDS
from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command
from adastate_jax.data.worlds import WorldConfig, caption_pattern
from adastate_jax.errors import UserError
from adastate_jax.generation.shipped import shipped_config
from adastate_jax.models.attention import BACKENDS
from adastate_jax.streaming import names, presets

ROOT = Path(__file__).parents[1]
PATIENCE = 60  # seconds that a slow machine gets; what is interrupted would take ten times as long


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


# --- signals ----------------------------------------------------------------------------------------------------------

# What a command does when the signal comes; it has a claimed and a half-written file open, and says so.
WORK = {
    "sleeps": "time.sleep(600)",
    # A callback of C's, as JAX has one there: what is raised in it is reported, and dropped.
    "drops it": "gc.callbacks.append(lambda *_: time.sleep(0.5)); ready(); gc.collect(); time.sleep(600)",
    "swallows it": """
    try:
      ready(); time.sleep(600)
    except BaseException:
      pass
    time.sleep(600)""",
    # As long as a compilation, and as deaf to signals, which are handled between two operations of Python.
    "computes in C": "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}
COMMAND = """
import gc, hashlib, sys, time
from pathlib import Path
from adastate_jax.console import run_command
from adastate_jax.files import claimed, whole_file
from adastate_jax.interrupts import if_stopped

def ready():
  Path(sys.argv[1], "ready").touch()

def main(arguments):
  out = Path(sys.argv[1], "out.mp4")
  with if_stopped(f"{out} was not written"), claimed(out), whole_file(out) as half:
    half.write_text("half")
    WORK

run_command(main)
"""


def start(code, folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def wait_for(path):
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_a_command_whatever_it_does(work, number, code, tmp_path):
    work = WORK[work] if "ready()" in WORK[work] else f"ready(); {WORK[work]}"
    process = start(COMMAND.replace("WORK", work), tmp_path)
    wait_for(tmp_path / "ready")
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert errors == f"stopped; {tmp_path / 'out.mp4'} was not written\n"
    assert os.listdir(tmp_path) == ["ready"]


COMPLETING = """
import os, signal, sys
from pathlib import Path
from adastate_jax.console import run_command
from adastate_jax.files import whole_file, whole_folder
from adastate_jax.interrupts import if_unwritten

out = Path(sys.argv[1], "out.mp4")
before = out.stat().st_ino if out.exists() else None
close = os.close

def close_late(descriptor):
  close(descriptor)
  if out.exists() and out.stat().st_ino != before:
    os.close = close
    os.kill(os.getpid(), signal.SIGTERM)

def main(arguments):
  os.close = close_late
  with if_unwritten(out), whole_file(out) as half:
    half.write_text("whole")
    if arguments[1:]:
      os.kill(os.getpid(), signal.SIGTERM)

run_command(main)
"""


@pytest.mark.parametrize("replaced", [False, True])
def test_a_signal_that_comes_when_the_file_is_complete_says_so(replaced, tmp_path):
    output = tmp_path / "out.mp4"
    for early, text, kept in ((True, "was not written", "old"), (False, "is written", "whole")):
        output.unlink(missing_ok=True)
        if replaced:
            output.write_text("old")
        process = start(COMPLETING, tmp_path, *(["early"] if early else []))
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (143, f"stopped; {output} {text}\n")
        assert (output.read_text() if output.exists() else "old") == kept


SAVING = """
import sys, time
from pathlib import Path
from adastate_jax import interrupts
from adastate_jax.console import run_command

def main(arguments):
  folder = Path(sys.argv[1])
  with interrupts.deferred("stopping as soon as all is saved") as stop:
    (folder / "ready").touch()
    while not stop.requested:
      time.sleep(0.05)
    time.sleep(float(arguments[1]))
    (folder / "saved").touch()

run_command(main)
"""


def test_what_there_is_to_save_is_saved_first(tmp_path):
    process = start(SAVING, tmp_path, "4")  # longer than a command that saves nothing gets
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # schedulers repeat it
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert errors == "SIGTERM: stopping as soon as all is saved\nstopped\n"
    assert (tmp_path / "saved").exists()


def test_a_second_interrupt_does_not_wait_for_that(tmp_path):
    process = start(SAVING, tmp_path, "600")
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "SIGINT: stopping as soon as all is saved\n"
    time.sleep(0.5)  # sooner, it would be the same one again
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert not (tmp_path / "saved").exists()


def test_signals_are_deferred_without_a_command_too():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = []

    def train():
        with interrupts.deferred("stopping") as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.requested:
                time.sleep(0.01)
            done.append("saved")

    with pytest.raises(interrupts.Stopped):
        train()
    assert done == ["saved"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert interrupts.received() is None


def test_a_deferral_within_another_is_part_of_it():
    done = []

    def train():
        with interrupts.deferred("outer") as outer:
            with interrupts.deferred("inner") as inner:
                os.kill(os.getpid(), signal.SIGTERM)
                while not inner.requested:
                    time.sleep(0.01)
                done.append(outer.requested)
            done.append("saved")  # leaving the inner one raises nothing
            with interrupts.deferred("another") as another:
                done.append(another.requested)
        done.append("not reached")

    with pytest.raises(interrupts.Stopped):
        train()
    assert done == [True, "saved", True]
    assert interrupts._state.deferral is None


def test_a_deferral_of_another_thread_leaves_the_main_ones_alone():
    done = []

    def elsewhere():
        with interrupts.deferred("elsewhere") as stop:
            done.append(stop.requested)

    def train():
        with interrupts.deferred("stopping") as stop:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.requested:
                time.sleep(0.01)
            done.append("saved")

    with pytest.raises(interrupts.Stopped):
        train()
    assert done == [False, "saved"]


def test_a_handler_that_python_does_not_know_becomes_the_systems():
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupts._restore_handlers({signal.SIGTERM: None})
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_hooks_of_others_are_called_and_come_back(monkeypatch):
    seen = []
    hooks = [lambda unraisable: seen.append(unraisable), lambda *error: seen.append(error)]
    monkeypatch.setattr(sys, "unraisablehook", hooks[0])
    monkeypatch.setattr(sys, "excepthook", hooks[1])
    assert interrupts.install()
    try:
        assert [sys.unraisablehook, sys.excepthook] != hooks
        sys.unraisablehook("dropped")
        sys.excepthook(ValueError, "of a library", None)
    finally:
        interrupts.uninstall()
    assert [sys.unraisablehook, sys.excepthook] == hooks
    assert seen == ["dropped", (ValueError, "of a library", None)]


def catches(process: subprocess.Popen, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> number - 1 & 1)


@pytest.mark.parametrize("delay", [0.0, 0.8])
def test_an_interrupt_during_imports_shows_no_traceback(delay, tmp_path):
    output = tmp_path / "out.mp4"
    process = start(
        f"import runpy, sys; sys.argv[1:] = ['--checkpoint=tiny', '--prompt=x', '--output={output}']; "
        "runpy.run_module('adastate_jax.sample', run_name='__main__')",
        tmp_path,
    )
    while not catches(process, signal.SIGTERM):  # Python's own start takes longer on a busy machine
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.endswith("stopped\n")
    assert not os.listdir(tmp_path)


def test_a_second_signal_while_the_first_ends_the_process_does_not_hang_it(tmp_path):
    code = (
        "import os, signal, sys; from adastate_jax import interrupts; interrupts.install()\n"
        "interrupts.at_forced_end(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    process = start(code, tmp_path)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (143, "stopped\n")


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


def test_compilations_are_not_counted(capsys):
    with progress("sample", 10) as bar:
        time.sleep(0.3)
        begun = bar.start_t
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 0.25)
        assert bar.start_t == begun + 0.25
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9.0)
        assert bar.format_dict["elapsed"] >= 0
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9.0)  # nobody listens


# --- what is refused and said without JAX -----------------------------------------------------------------------------


def test_commands_are_imported_without_jax():
    code = (
        "import sys, adastate_jax, adastate_jax.__main__, adastate_jax.sample, adastate_jax.probe, adastate_jax.bench\n"
        "assert {*adastate_jax.__all__} <= {*dir(adastate_jax)}\n"
        "print(sorted({'jax', 'numpy', 'cv2', 'av'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


WRONG = {
    "train": (
        ["--config=no.py", "--workdir=a"],
        ["--config=configs/tiny.py"],
        ["--config=configs/tiny.py", "--workdir=a", "--x"],
        ["--config=configs/tiny.py", "--workdir=README.md"],
    ),
    "sample": (["--checkpoint=tiny"], ["--checkpoint=nowhere", "--prompt=x"]),
    "serve": (
        ["--checkpoint=nowhere"],
        ["--checkpoint=tiny", "--port=70000"],
        ["--checkpoint=tiny", "--anchors", "static", "none", "ema"],
        ["--checkpoint=tiny", "--token=short"],
    ),
    "watch": (
        ["http://127.0.0.1:9/", "--seconds=nan"],
        ["http://127.0.0.1:9/", "--output=a.gif"],
        ["http://127.0.0.1:9/", "--prompts=nowhere"],
    ),
    "convert": (
        ["--source=no.pt", "--output=a"],
        ["--source=configs", "--output=README.md"],
        ["--source=configs", "--output=a", "--set", "x"],
        ["--source=configs", "--output=a", "--lora=no.pt"],
        ["--source=configs", "--output=a", "--lora-alpha=1"],
    ),
    "verify": (["nowhere"], ["configs"], ["--only=x"], ["--attention=x"], ["--attention=cudnn"]),
    "evaluate": (["nowhere"], ["configs"], ["README.md", "--jobs=0"], ["README.md", "--output=README.md"]),
    "probe": (["--checkpoint=nowhere", "--prompt=x"],),
    "bench": (["--config=no.py"], ["--config=configs/tiny.py", "--repeats=0"], ["--config=configs/tiny.py", "--x"]),
    "bundle": (["--run=nowhere", "--output=a.safetensors"], ["--run=configs", "--output=a"]),
    "embed": (
        ["--checkpoint=nowhere", "--prompts=README.md", "--output=a"],
        ["--checkpoint=configs", "--prompts=nowhere", "--output=a"],
        ["--checkpoint=configs", "--prompts=README.md", "--output=a", "--batch-size=0"],
        ["--checkpoint=configs", "--prompts=README.md"],
    ),
    "encode": (
        ["--checkpoint=nowhere", "--videos=configs", "--output=a"],
        ["--checkpoint=configs", "--videos=nowhere", "--output=a"],
        ["--checkpoint=configs", "--videos=configs", "--output=a", "--stride=-1"],
    ),
}


def test_wrong_arguments_are_refused_before_jax_is_imported(tmp_path):
    assert {*WRONG} == {*COMMANDS}
    code = (
        "import importlib, json, sys\n"
        "for name, calls in json.loads(sys.argv[1]).items():\n"
        "  for arguments in calls:\n"
        "    try:\n"
        "      importlib.import_module(f'adastate_jax.{name}').main(arguments)\n"
        "    except Exception as error:\n"
        "      print(name, arguments, type(error).__name__, 'jax' in sys.modules)\n"
        "    else:\n"
        "      print(name, arguments, 'accepted')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(WRONG)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [f"{name} {call} UserError False" for name, calls in WRONG.items() for call in calls]
    assert done.stdout.splitlines() == expected
    assert "starting" not in done.stderr


def test_a_command_that_starts_says_so(tmp_path):
    """Before the imports that take seconds."""
    code = (
        "import importlib, json, sys\n"
        "class Stop(BaseException): pass\n"
        "def starting(what='JAX'):\n"
        "  raise Stop('jax' in sys.modules)\n"
        "for name, arguments in json.loads(sys.argv[1]).items():\n"
        "  module = importlib.import_module(f'adastate_jax.{name}')\n"
        "  module.starting = starting\n"
        "  try:\n"
        "    module.main(arguments)\n"
        "  except Stop as stop:\n"
        "    print(name, stop)\n"
    )
    right = {
        "train": ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"],
        "sample": ["--checkpoint=tiny", "--prompt=x", f"--output={tmp_path / 'a.mp4'}"],
        "convert": ["--source=configs", f"--output={tmp_path / 'a'}"],
        "verify": [],
        "probe": ["--checkpoint=tiny", "--prompt=x", f"--output={tmp_path / 'a'}"],
        "bench": ["--config=configs/tiny.py", f"--output={tmp_path / 'a'}"],
        "bundle": ["--run=configs", f"--output={tmp_path / 'a.safetensors'}"],
        "embed": ["--checkpoint=configs", "--prompts=README.md", f"--output={tmp_path / 'a'}"],
        "encode": ["--checkpoint=configs", "--videos=configs", f"--output={tmp_path / 'a'}"],
    }
    command = [sys.executable, "-c", code, json.dumps(right)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} False" for name in right]
    assert os.listdir(tmp_path) == []


def test_the_package_has_what_it_lists():
    import adastate_jax as ada

    for name in ada.__all__:
        assert getattr(ada, name).__module__.startswith("adastate_jax.")
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        _ = ada.sampler


def test_names_that_are_known_without_jax_are_the_real_ones():
    assert verify.ATTENTION == BACKENDS
    assert tuple(presets.PRESETS) == names.PRESET_NAMES
    assert tuple(presets.ANCHORS) == names.STRATEGY_NAMES
    assert names.STREAM_NAMES == presets.STREAM_NAMES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as exited:
        importlib.import_module(f"adastate_jax.{name}").main(["--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"python -m adastate_jax.{name} " in text.partition("example")[2]


def test_all_commands_are_listed(capsys):
    texts = {path.stem: path.read_text() for path in (ROOT / "adastate_jax").glob("*.py")}
    assert {*COMMANDS} == {name for name, text in texts.items() if "run_command(main)" in text}
    assert all("interrupts.install()" in texts[name] for name in COMMANDS)
    for arguments in ([], ["--help"]):
        assert __main__._dispatch(arguments) == 0
        assert capsys.readouterr().out.count("\n  ") == len(COMMANDS)
    with pytest.raises(UserError, match="nonsense: no such command; use one of sample, serve, watch, train"):
        __main__._dispatch(["nonsense"])
    with pytest.raises(UserError, match="--anchor: invalid choice: 'x'"):
        __main__._dispatch(["sample", "--anchor=x"])


def test_the_words_that_the_shipped_model_knows_are_told(capsys):
    words = caption_pattern(WorldConfig(**shipped_config("tiny")["data"]["worlds"]))
    assert words == "a camera pans left/right over green hills/sand dunes/purple mountains with a red/white ball"
    assert words in (ROOT / "README.md").read_text()
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    assert words in capsys.readouterr().out
