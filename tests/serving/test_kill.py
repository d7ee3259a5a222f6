"""A server that is killed: what its sessions left is there, and the next server hands it out."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
from small_run import write_run

import adastate_jax as ada
from adastate_jax.errors import UserError
from adastate_jax.generation.takes import read_session
from adastate_jax.serving.client import Client

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def served(folder: Path):
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "adastate_jax.serve", f"--checkpoint={folder / 'run'}", "--port=0"]
    command += [f"--recordings={folder / 'live'}", f"--cache={folder / 'cache'}", "--anchors", "static"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def test_recordings_outlive_a_server_that_is_killed(tmp_path):
    """Of a finished session, and of one that runs: playable, and complete up to the last chunk that it has."""
    write_run(tmp_path / "run")
    with served(tmp_path) as (server, address):
        finished, running = Client(address, realtime=False), Client(address, realtime=False)
        finished.begin("one", 1)
        finished.follow(0.75)  # four chunks
        finished.finish()
        whole = finished.fetch("video.mp4"), finished.fetch("session.json")
        running.begin("two", 2)
        running.follow(1.3)  # seven
        server.send_signal(signal.SIGKILL)
        server.wait()
    with served(tmp_path) as (_, address):
        again = Client(address)
        again.session = finished.session
        assert (again.fetch("video.mp4"), again.fetch("session.json")) == whole
        again.session = running.session
        said = json.loads(again.fetch("session.json"))
        assert said["ended"] is None
        with av.open(io.BytesIO(again.fetch("video.mp4"))) as container:
            frames = sum(1 for _ in container.decode(video=0))
        chunks = len(said["timings_ms"]["network"])
        assert chunks >= 3  # seven were shown; of those, four at most wait to be recorded
        assert frames >= 3 * (chunks - 1)
        (tmp_path / "session.json").write_text(json.dumps(said))
        (take,) = read_session(tmp_path / "session.json", ada.load(tmp_path / "run"))
        assert take.chunks == chunks
        again.session = {**running.session, "key": "0" * 32}
        with pytest.raises(UserError, match="no recording has this id and key"):
            again.fetch("video.mp4")
