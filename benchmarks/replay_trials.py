"""Twenty random sessions of a server, and whether their session files replay to the same latents, bit for bit.

python -m benchmarks.replay_trials --sessions=20

A server of the bundled model runs in a process of its own. Each session takes random controls at random chunks:
prompts with every transition, restarts with other seeds, anchors or a picture, pauses, and breaks of the connection,
from which the client comes back. Then this process replays it from its file. Exit code 1 if any latents differ.
"""

import argparse
import collections
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

import adastate_jax as ada
from adastate_jax.generation.takes import read_session, replay
from adastate_jax.serving.client import Client
from adastate_jax.serving.protocol import Pictures
from adastate_jax.streaming.names import TRANSITIONS

PROMPTS = (
    "a camera pans left over green hills with a red ball",
    "a camera pans right over clay with a blue box",
    "a camera pans up over sand dunes with a white ball",
    "a camera pans down over green hills",
)
ANCHORS = (["static", "adastate"], ["adastate"], ["adastate", "none"], ["longlive"])


class Visitor:
    """A client that shows chunks and acts at random; `done` counts what was applied."""

    def __init__(self, address: str, trial: int, done: collections.Counter):
        self.choices, self.done = random.Random(trial), done
        self.client = Client(address, realtime=False)
        self.sent: dict[int, str] = {}
        self.client.begin(self.choices.choice(PROMPTS), trial)

    def run(self, chunks: int) -> None:
        while self.client.chunk + 1 < chunks:
            message = self.client.hear()
            if isinstance(message, Pictures):
                if message.chunk > self.client.chunk and message.first + len(message.frames) == message.count:
                    self.client.shown(message.chunk)
                    if self.choices.random() < 0.4:
                        self.act()
            elif message is None:
                raise TimeoutError(f"nothing came behind chunk {self.client.chunk}")
            elif message["type"] == "applied" and message["number"] in self.sent:
                self.done[self.sent.pop(message["number"])] += 1
        self.client.finish()

    def act(self) -> None:
        kind = self.choices.choice(("prompt", "prompt", "prompt", "restart", "picture", "pause", "reconnect"))
        settings = {}
        if kind == "prompt":
            transition = self.choices.choice(TRANSITIONS)
            settings = {"text": self.choices.choice(PROMPTS), "transition": transition}
            settings["chunks"] = self.choices.randint(1, 5)
            name = f"prompt, {transition}"
        elif kind == "restart":
            name, settings = kind, {"seed": self.choices.randrange(2**32), "anchors": self.choices.choice(ANCHORS)}
        elif kind == "picture":
            name, settings = "restart from a picture", {"picture": self.send_picture()}
        elif kind == "pause":
            self.client.control("pause")
            self.hear_state("paused")
            self.client.control("resume")
            self.hear_state("running")
            self.done["pause"] += 1
            return
        else:
            with contextlib.closing(self.client._socket.socket):  # without a word
                pass
            self.client.open()
            self.done["reconnect"] += 1
            return
        if self.choices.random() < 0.3:  # for later: several may come due at one chunk
            settings["at"] = self.client.chunk + self.choices.randint(1, 6)
        self.sent[self.client.control("prompt" if kind == "prompt" else "restart", **settings)] = name

    def hear_state(self, state: str) -> None:
        """Waits for it; pictures that come meanwhile are shown."""
        while self.client.state != state:
            message = self.client.hear()
            if isinstance(message, Pictures) and message.first + len(message.frames) == message.count:
                self.client.shown(message.chunk)

    def send_picture(self) -> str:
        colour = [self.choices.randrange(256) for _ in range(3)]
        _, png = cv2.imencode(".png", np.full((40, 60, 3), colour, np.uint8))
        session = self.client.session
        path = f"/v1/sessions/{session['id']}/picture?key={session['key']}"
        return json.loads(self.client.request("POST", path, png.tobytes()))["picture"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=24, help="of each session")
    options = parser.parse_args()
    model, done, takes, compared, different = ada.load("tiny"), collections.Counter(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "adastate_jax.serve", "--checkpoint=tiny", "--port=0"]
        command += [f"--recordings={folder}/live"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                address = server.stdout.readline().strip()
                for trial in range(options.sessions):
                    visitor = Visitor(address, trial, done)
                    with contextlib.closing(visitor.client):
                        visitor.run(options.chunks)
                        file = Path(folder, "session.json")
                        file.write_bytes(visitor.client.fetch("session.json"))
                    session = read_session(file, model)
                    takes += len(session)
                    checksums = [checksum for take in session for checksum in take.checksums]
                    steps = list(replay(model, session))
                    made = len(json.loads(file.read_text())["timings_ms"]["network"])
                    assert len(steps) == len(checksums) == made >= options.chunks
                    compared += len(steps)
                    different += sum(a.checksum != b for a, b in zip(steps, checksums, strict=True))
            finally:
                server.terminate()
    print(f"{options.sessions} sessions, {takes} takes, {compared} chunks replayed, {different} differ")
    for name, count in sorted(done.items()):
        print(f"{count:4} × {name}")
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
