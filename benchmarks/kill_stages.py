"""Every way to train on encoded data, killed again and again, ends with the bits of a run that nobody killed.

    python -m benchmarks.kill_stages --folder=runs/mixed_sizes               # which benchmarks.mixed_sizes has made
    python -m benchmarks.kill_stages --folder=runs/mixed_sizes --way=consistency --kills=5

The data sets are those of that folder: latents, captions and prompts. A run's files of trajectories and steps are
divided into as many parts as it is killed; in each a place is drawn, and SIGKILL comes within half a second from there.
Prints per way at which checkpoint it was killed each time, and whether weights, moments, averages, a rollout that goes
on and the scalars of all steps are equal to the bit. A way that differs ends the command with 1.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
_INITIALIZE = {"stages": ("initialize",), "initialize.steps": 24, "logging.save_every": 3, "logging.log_every": 1}
_CLIPS = {"initialize.targets": "clips", "initialize.context": "clean", "data.embeddings": ""}
_DISTILL = {"stages": ("distill",), "distill.steps": 24, "logging.save_every": 3, "logging.log_every": 1}
_LORA = {f"{name}.lora.rank": 2 for name in ("student", "critic")}
_AS_MODEL = {f"teacher.{name}": 0 for name in ("dim", "ffn_dim", "num_heads", "num_layers")}

# Each by the fields that it sets on configs/mixed_sizes.py; RUNS is the folder of the uninterrupted runs.
WAYS: dict[str, dict] = {
    "trajectories": _INITIALIZE | {"initialize.trajectories": 32},
    "clips": _INITIALIZE | _CLIPS,
    "consistency": _INITIALIZE
    | _CLIPS
    | _AS_MODEL
    | {"initialize.targets": "consistency", "initialize.weights": "", "teacher.weights": "RUNS/clips/initialize"},
    "windows": _DISTILL
    | {"student.weights": "RUNS/clips/initialize", "distill.rollout_frames": 12, "distill.scored_frames": 6},
    "segments": _DISTILL
    | _LORA
    | {"student.weights": "RUNS/clips/initialize", "distill.rollout_frames": 12, "distill.scored_frames": 6}
    | {"distill.overlap_frames": 3, "distill.continue_rollout": True, "distill.prompt_change": "renew"},
}


def command(folder: Path, way: str, runs: Path, workdir: Path) -> list[str]:
    """The train command of a way."""
    fields = (f"--config.{name}={str(value).replace('RUNS', str(runs))}" for name, value in WAYS[way].items())
    config = f"--config=configs/mixed_sizes.py:{folder}"
    return [sys.executable, "-m", "adastate_jax.train", config, f"--workdir={workdir}", *fields]


def run(arguments: list[str], workdir: Path, kill_at: int | None = None, wait: float = 0.0) -> bool:
    """Runs a command to its end, or kills it.

    Args:
        kill_at: where this call's run has added to `progress_of` and that is so far, it is killed.
        wait: seconds from then.

    Returns:
        Whether it was killed.
    """
    before, errors = progress_of(workdir), workdir.with_suffix(".errors")
    with errors.open("w") as file:
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=file, stdout=subprocess.DEVNULL)
    begun = False
    while process.poll() is None:
        progress = progress_of(workdir)
        begun = begun or progress != before
        if kill_at is not None and begun and progress >= kill_at:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            process.wait()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.01)
    if process.returncode:
        sys.exit(errors.read_text())
    return False


def progress_of(workdir: Path) -> int:
    """Files of trajectories and steps of a run."""
    metrics = workdir / "metrics.jsonl"
    steps = metrics.read_bytes().count(b'"step":') if metrics.exists() else 0
    return len(list((workdir / "trajectories").glob("*.npy"))) + steps


def newest(workdir: Path, stage: str) -> int:
    """The last finished checkpoint of a stage."""
    return max((int(seal.parent.name) for seal in (workdir / stage).glob("[0-9]*/seal.json")), default=0)


def result_of(workdir: Path, stage: str) -> tuple[dict[str, bytes], list[dict]]:
    """Leaves of the last checkpoint, and the scalars of all steps."""
    from orbax.checkpoint.experimental import v1 as ocp

    from adastate_jax.training.metrics import read_metrics

    leaves = ocp.load((workdir / stage / str(newest(workdir, stage))).absolute())
    return {name: np.asarray(x).tobytes() for name, x in leaves.items()}, read_metrics(workdir / "metrics.jsonl")


def trial(folder: Path, way: str, runs: Path, kills: int, rng: random.Random) -> bool:
    """Whether a way ends alike, killed and not."""
    stage, whole, cut = WAYS[way]["stages"][0], runs / way, runs / f"{way}_killed"
    run(command(folder, way, runs, whole), whole)
    total, reached = progress_of(whole), []
    for part in range(kills):
        place = int(total * (part + rng.random()) / kills)
        if run(command(folder, way, runs, cut), cut, place, rng.uniform(0.0, 0.5)):
            files = len(list((cut / "trajectories").glob("*.npy")))
            reached.append(f"{newest(cut, stage)}" + (f" ({files} files)" if files else ""))
    run(command(folder, way, runs, cut), cut)
    (weights, scalars), (other_weights, other_scalars) = result_of(whole, stage), result_of(cut, stage)
    same = weights == other_weights and scalars == other_scalars
    said = "equal to the bit" if same else "DIFFERENT"
    end = f"{len(weights)} arrays, {len(scalars)} steps: {said}"
    print(f"| {way} | {len(reached)} | {', '.join(reached)} | {end} |", flush=True)
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of benchmarks.mixed_sizes")
    parser.add_argument("--way", choices=WAYS, action="append", help="may be repeated; by default all")
    parser.add_argument("--kills", type=int, default=3, help="of each way")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, folder = random.Random(options.seed), options.folder.absolute()
    with tempfile.TemporaryDirectory() as made:
        os.environ.update(JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=f"{made}/compilations")
        os.environ.update(
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1"
        )
        runs = Path(made)
        ways = options.way or list(WAYS)
        if "clips" not in ways and {"consistency", "windows", "segments"} & {*ways}:
            run(command(folder, "clips", runs, runs / "clips"), runs / "clips")  # which they start from
        print("| way | killed | at checkpoint | end |")
        print("|---|---|---|---|")
        equal = [trial(folder, way, runs, options.kills, rng) for way in ways]  # all of them, whatever one says
        return int(not all(equal))


if __name__ == "__main__":
    sys.exit(main())
