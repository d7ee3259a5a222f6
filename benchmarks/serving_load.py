"""Fifty clients of one server: what a viewer notices of the others, and whether memory stays flat.

python -m benchmarks.serving_load --minutes=10

A server of the bundled model runs in a process of its own. One client steers and shows its stream in real time, first
alone for a fifth of the time, then beside 49 others: forty watch the same session (one of them reads slowly), four
wait in the queue, one floods the socket with controls, one sends garbage, one comes and vanishes again and again, and
two ask for what is not theirs. Printed: chunk intervals of the one that steers, alone and beside them; the server's
memory; every kind of refusal.
"""

import argparse
import collections
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from adastate_jax.errors import UserError
from adastate_jax.serving.client import Client

WATCHERS, QUEUED, INTRUDERS = 40, 4, 2


class Crowd:
    """Clients in threads of their own, until they are told to stop."""

    def __init__(self):
        self.over = threading.Event()
        self.refusals: collections.Counter[str] = collections.Counter()
        self._threads: list[threading.Thread] = []

    def join(self, function, *arguments) -> None:
        def run():
            while not self.over.is_set():
                try:
                    function(*arguments)
                except UserError as error:
                    self.refusals[str(error).partition(": ")[2]] += 1
                except (ConnectionClosed, OSError) as error:
                    self.refusals[f"closed: {error.rcvd.reason if getattr(error, 'rcvd', None) else error}"] += 1
                self.over.wait(1.0)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def watch(self, link: str, pause: float) -> None:
        client = Client(link, realtime=False)
        client.begin()
        with contextlib.closing(client):
            while not self.over.is_set():
                message = client.hear(5.0)
                if not isinstance(message, dict) and message is not None:
                    client.shown(message.chunk)
                    time.sleep(pause)

    def wait_in_line(self, address: str) -> None:
        client = Client(address)
        client.begin("x", 1)
        with contextlib.closing(client):
            while not self.over.is_set():
                client.hear(5.0)

    def flood(self, socket: str) -> None:
        with connect(socket, compression=None, proxy=None) as connection:
            for number in range(10**6):
                if self.over.is_set():
                    return
                connection.send(json.dumps({"type": "prompt", "number": number, "text": "x"}))
                with contextlib.suppress(TimeoutError):
                    while True:
                        message = connection.recv(0)
                        if isinstance(message, str) and json.loads(message)["type"] == "refused":
                            self.refusals[json.loads(message)["reason"]] += 1

    def babble(self, socket: str) -> None:
        with connect(socket, compression=None, proxy=None) as connection:
            while not self.over.is_set():
                connection.send(random.randbytes(random.randrange(200)))
                with contextlib.suppress(TimeoutError):
                    message = connection.recv(0.05)
                    if isinstance(message, str) and json.loads(message)["type"] == "refused":
                        self.refusals[json.loads(message)["reason"][:60]] += 1

    def vanish(self, link: str) -> None:
        client = Client(link)
        client.begin()
        client._socket.socket.close()  # without a word

    def intrude(self, address: str, session: str) -> None:
        client = Client(address)
        client.session = {"id": session, "key": "0" * 32}
        client.fetch("video.mp4")


def resident_bytes(process: subprocess.Popen) -> int:
    fields = Path(f"/proc/{process.pid}/statm").read_text().split()
    return int(fields[1]) * 4096


def steer(client: Client, seconds: float, process: subprocess.Popen, memory: list[int]) -> list[float]:
    """Shows the stream for so long; returns the intervals between its chunks."""
    client.timings.intervals.clear()
    begun, shown = time.monotonic(), (client.chunk + 1) * 0.1875

    def heard(_: float) -> None:
        if not memory or time.monotonic() - begun >= 5 * len(memory):
            memory.append(resident_bytes(process))

    client.follow(shown + seconds, (), heard)
    return sorted(client.timings.intervals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = [sys.executable, "-m", "adastate_jax.serve", "--checkpoint=tiny", "--port=0"]
        command += [f"--recordings={folder}/live", f"--queue={QUEUED}", f"--session-seconds={90 * minutes + 600:g}"]
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        stack.callback(process.terminate)
        address = process.stdout.readline().strip()
        steering = Client(address)
        steering.begin(None, 0)
        alone_memory, memory = [], []
        steering.follow(10.0)  # warm
        alone = steer(steering, 12 * minutes, process, alone_memory)
        session, key = steering.session["id"], steering.session["watch_key"]
        link = f"{address}#watch={session}.{key}"
        socket = f"ws{address.removeprefix('http').rstrip('/')}/v1/sessions/{session}?key={key}"
        crowd = Crowd()
        for number in range(WATCHERS):
            crowd.join(crowd.watch, link, 2.0 if number == 0 else 0.0)
        for _ in range(QUEUED):
            crowd.join(crowd.wait_in_line, address)
        for _ in range(INTRUDERS):
            crowd.join(crowd.intrude, address, session)
        for act in (crowd.flood, crowd.babble):
            crowd.join(act, socket)
        crowd.join(crowd.vanish, link)
        beside = steer(steering, 48 * minutes, process, memory)
        crowd.over.set()
        for name, found in (("alone", alone), ("beside 49", beside)):
            at = [found[int(share * (len(found) - 1))] for share in (0.5, 0.95)]
            print(f"{name:10} {len(found)} chunks, interval {at[0]:.4f} s (median), {at[1]:.4f} s (p95)")
        ends = sum(memory[:3]) / len(memory[:3]), sum(memory[-3:]) / len(memory[-3:])
        alone_mib, first_mib, last_mib = (size / 2**20 for size in (alone_memory[-1], *ends))
        print(f"memory     {alone_mib:.0f} MiB alone, {first_mib:.0f} -> {last_mib:.0f} MiB beside")
        print(f"the server lives: {process.poll() is None}")
        for reason, count in crowd.refusals.most_common():
            print(f"{count:8} × {reason}")


if __name__ == "__main__":
    main()
