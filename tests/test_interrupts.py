"""How commands end by a signal, at any moment."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adastate_jax import interrupts

ROOT = Path(__file__).parents[1]
PATIENCE = 60  # seconds that a slow machine gets; what is interrupted would take ten times as long


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
