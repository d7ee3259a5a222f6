"""From a command to its first picture, twice with one folder of compiled programs: empty, and as the first run left it.

    python -m benchmarks.ready

Per command: seconds until the first picture, and how many of them the process computed. On a machine that other work
keeps busy, the second is what to compare. Of `sample` the whole command counts, with a second of video; of `serve` it
is also noted when it says that it is ready.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adastate_jax.errors import UserError
from adastate_jax.serving.client import Client
from adastate_jax.serving.protocol import Pictures

_PROMPT = "a camera pans left over green hills with a red ball"


def sample(checkpoint: str, cache: Path) -> str:
    """A second of video; returns what was measured."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "adastate_jax.sample", f"--checkpoint={checkpoint}", f"--cache={cache}"]
        command += [f"--prompt={_PROMPT}", "--seconds=1", f"--output={folder}/video.mp4"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"sample  done after {time.monotonic() - begun:.1f} s, of which computed {computed:.1f} s"


def serve(checkpoint: str, cache: Path) -> str:
    """A session's first picture; returns what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "adastate_jax.serve", f"--checkpoint={checkpoint}", f"--cache={cache}"]
        command += ["--port=0", f"--recordings={folder}"]
        begun = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                address = re.search(r"http://\S+", process.stdout.readline()).group()
                client = Client(address, realtime=False)
                _wait_until_ready(client)
                ready, until_ready = time.monotonic() - begun, _computed(process.pid)
                client.begin()
                while not isinstance(client.hear(), Pictures):
                    pass
                first, until_first = time.monotonic() - begun, _computed(process.pid)
                client.close()
            finally:
                process.terminate()
    return (
        f"serve   ready after {ready:.1f} s, of which computed {until_ready:.1f} s; "
        f"first picture after {first:.1f} s, of which computed {until_first:.1f} s"
    )


def _wait_until_ready(client: Client) -> None:
    while True:
        try:
            client.request("GET", "/readyz")
            return
        except UserError:  # not yet
            time.sleep(0.02)


def _computed(process: int) -> float:
    """Seconds of all threads of a process so far, of Linux's own count."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measures both commands twice, and prints a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for measure in (sample, serve):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("empty", "kept"):
                print(f"{state:6} {measure(options.checkpoint, Path(folder) / 'programs')}", flush=True)


if __name__ == "__main__":
    main()
