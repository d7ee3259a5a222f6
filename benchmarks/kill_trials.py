"""What several processes do when one of them dies, stops or is told to stop, and whether the run goes on as if not.

    python benchmarks/kill_trials.py --trials=20 --processes=2

Each trial starts `launch/local_processes.py` on the work directory that the one before left, waits a random while
behind the first step, and sends a random signal to a random process. Then the run is finished, once by as many
processes and once, from a copy, by one on a mesh of one device; weights and losses are compared with those of a run
that nobody stopped: to the bit, and up to the order of sums. About a minute per trial; exit code 1 if any law fails.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SAVE_EVERY = 20
TOLERANCE = 1e-3  # of a loss: one process adds up in another order, which thousands of steps magnify
TRAIN = [
    "-m",
    "adastate_jax.train",
    "--config=configs/tiny.py",
    "--config.data.num_worlds=8",
    "--config.data.worlds.num_frames=3",
    *(f"--config.{name}=8" for name in ("codec.channels", "model.in_channels", "model.out_channels", "model.dim")),
    "--config.model.ffn_dim=8",
    "--config.model.num_heads=1",
    "--config.model.num_layers=1",
    "--config.stages=('pretrain',)",
    "--config.pretrain.batch_size=4",
    "--config.pretrain.optimizer.decay_steps=0",
    f"--config.logging.save_every={SAVE_EVERY}",
    "--config.logging.log_every=10",
]
# The launcher's exit code is that of the process which ended first: the victim's, but for one that is stopped, which
# the script kills once the others have left, as soon as it sees that.
EXPECTED = {signal.SIGTERM: (143,), signal.SIGKILL: (137,), signal.SIGSTOP: (75, 137)}


def processes_of(launcher: int) -> list[int]:
    """The process of each number that a launcher has started."""
    found = {}
    for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found[int(dict(v.partition("=")[::2] for v in variables)["ADASTATE_PROCESS"])] = child
    return [found[index] for index in sorted(found)]


def lines_of(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def newest(workdir: Path) -> int:
    steps = [
        int(path.parent.name) for path in (workdir / "pretrain").glob("*/seal.json") if path.parent.name.isdecimal()
    ]
    return max(steps, default=0)


def trial(workdir: Path, processes: int, rng: random.Random, number: signal.Signals) -> dict:
    """Starts the run, sends a signal to one process, and says how it ended."""
    before, command = newest(workdir), [sys.executable, "launch/local_processes.py", f"--processes={processes}", "--"]
    command += [*TRAIN, f"--workdir={workdir}", f"--config.mesh.data={processes}"]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    errors: list[str] = []
    logged = lines_of(workdir)
    os.set_blocking(launcher.stderr.fileno(), False)
    seen = False
    while launcher.poll() is None and not seen:
        errors += launcher.stderr.readlines()
        seen = lines_of(workdir) not in (0, logged) and any("pretrain:" in line for line in errors)
        time.sleep(0.05)
    time.sleep(rng.uniform(0.0, 2.0))
    victim = rng.randrange(processes)
    reached, pids, start = lines_of(workdir), processes_of(launcher.pid), time.monotonic()
    os.kill(pids[victim], number)
    while launcher.poll() is None:
        errors += launcher.stderr.readlines()
        if number == signal.SIGSTOP and all(state_of(pid) in "TZ" for pid in pids):
            seconds = time.monotonic() - start
            os.kill(pids[victim], signal.SIGKILL)
            launcher.wait()
            break
        time.sleep(0.1)
    else:
        seconds = time.monotonic() - start
    errors += launcher.stderr.readlines()
    named = [line for line in errors if f"error: process {victim}" in line]
    return {
        "signal": number.name,
        "to": victim,
        "code": launcher.returncode,
        "seconds": round(seconds, 1),
        "named": bool(named),
        "lost": max(reached - newest(workdir), 0),
        "from": before,
        "saved": newest(workdir),
    }


def state_of(pid: int) -> str:
    """The system's letter for what a process does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def result_of(workdir: Path) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Weights and scalars of a finished run."""
    from adastate_jax.checkpoint import flatten, load_tree
    from adastate_jax.config.files import load_config
    from adastate_jax.sharding import make_mesh
    from adastate_jax.training.frozen import with_shardings
    from adastate_jax.training.metrics import read_metrics
    from adastate_jax.training.stages.run import abstract_states

    like = with_shardings(abstract_states(load_config(workdir / "config.json"))["pretrain"], make_mesh())
    state = load_tree(workdir / "pretrain" / str(newest(workdir)), like)
    records = read_metrics(workdir / "metrics.jsonl")
    return {name: np.asarray(leaf) for name, leaf in flatten(state).items()}, records


def finish(workdir: Path, processes: int) -> None:
    """Runs to the end, on so many processes."""
    command = [sys.executable, "launch/local_processes.py", f"--processes={processes}", "--", *TRAIN]
    command += [f"--workdir={workdir}", f"--config.mesh.data={processes}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000, help="of the run; it should outlast the trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["SIGKILL", "SIGTERM", "SIGSTOP"])
    options = parser.parse_args()
    TRAIN.append(f"--config.pretrain.steps={options.steps}")
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        os.environ.update(JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=f"{folder}/compilations")
        os.environ.update(
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1"
        )
        finish(whole, options.processes)
        failures = 0
        print("| signal | to process | exit code | seconds | named | steps lost | newest checkpoint |")
        print("|---|---|---|---|---|---|---|")
        for _ in range(options.trials):
            number = signal.Signals[rng.choice(options.signals)]
            found = trial(cut, options.processes, rng, number)
            limit = 0 if number == signal.SIGTERM else SAVE_EVERY + 10
            good = found["code"] in EXPECTED[number] and found["seconds"] < 120 and found["lost"] <= limit
            good = good and (found["named"] or number == signal.SIGTERM)
            failures += not good
            row = [found[name] for name in ("signal", "to", "code", "seconds", "named", "lost", "saved")]
            print("| " + " | ".join(map(str, row)) + " |" + ("" if good else "  FAILED"), flush=True)
            if found["saved"] >= options.steps:
                break
        one = Path(folder) / "one"
        shutil.copytree(cut, one)
        rest = options.steps - newest(cut)
        finish(cut, options.processes)
        (weights, records), (other_weights, other_records) = result_of(whole), result_of(cut)
        same = weights.keys() == other_weights.keys() and all(
            np.array_equal(weights[name], other_weights[name]) for name in weights
        )
        print(f"\nweights {'equal' if same else 'DIFFER FROM'} those of the run that nobody stopped, to the bit")
        print(f"losses of all {len(records)} steps {'equal' if records == other_records else 'DIFFER'}")
        finish(one, 1)
        far = max(
            abs(record["loss"] - other["loss"]) / abs(record["loss"])
            for record, other in zip(records, result_of(one)[1], strict=True)
        )
        print(f"the last {rest} steps by one process instead: losses differ by at most {far:.1e} of their value")
        return int(bool(failures) or not same or records != other_records or far > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
