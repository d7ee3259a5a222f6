"""Whether several processes train what one trains: all stages, on meshes whose axes lie across the processes.

    python benchmarks/processes.py --processes=4 --meshes data=4 context=2,model=2

Each run is the tiny chain at its smallest, started by `launch/local_processes.py`, and its losses and gradient norms
are compared with those of one process: of one that has all of the mesh's devices, and of one that has a single device.
Exit code 1 if they differ by more than `--tolerance` of their size, which is above what another order of sums makes of
float32 in distillation, the stage where it makes most. Where an axis other than `data` and `fsdp` spans processes,
these read the same rows of a batch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from adastate_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
FIELDS = {
    "data.num_worlds": 12,
    "data.worlds.num_frames": 9,
    "codec.patch": 16,  # four tokens per frame, to be split
    "codec.channels": 8,
    "model.in_channels": 8,
    "model.out_channels": 8,
    "model.dim": 32,
    "model.ffn_dim": 32,
    "model.num_heads": 4,
    "model.num_layers": 1,
    "pretrain.steps": 4,
    "pretrain.batch_size": 4,
    "initialize.steps": 4,
    "initialize.batch_size": 4,
    "initialize.trajectories": 4,
    "initialize.ode_steps": 4,
    "distill.steps": 4,
    "distill.batch_size": 4,
    "distill.rollout_frames": 9,
    "logging.save_every": 4,
    "logging.log_every": 2,
}


def train(workdir: Path, processes: int, mesh: list[str], stages: list[str], devices: int = 1) -> list[dict]:
    """The steps that so many processes log, so many devices each."""
    command = [
        sys.executable,
        "launch/local_processes.py",
        f"--processes={processes}",
        f"--devices={devices}",
        "--",
        "-m",
        "adastate_jax.train",
    ]
    command += ["--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    command += [f"--config.mesh.{axis}" for axis in mesh] + [f"--config.stages={tuple(stages)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return read_metrics(workdir / "metrics.jsonl")


def differences(found: list[dict], reference: list[dict]) -> dict[str, float]:
    """Per stage, by how much its scalars differ at most, in parts of their own size."""
    worst: dict[str, float] = {}
    for one, other in zip(found, reference, strict=True):
        if [one.keys(), one["stage"], one["step"]] != [other.keys(), other["stage"], other["step"]]:
            sys.exit(f"logged {one}, where one process logged {other}")
        for name in one.keys() - {"stage", "step"}:
            difference = abs(one[name] - other[name]) / abs(other[name])
            worst[one["stage"]] = max(worst.get(one["stage"], 0.0), difference)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--meshes", nargs="+", default=["data=4", "context=2,model=2"], metavar="AXIS=N,…")
    parser.add_argument("--stages", nargs="+", default=["pretrain", "initialize", "distill"], help="the first ones")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(
            JAX_COMPILATION_CACHE_DIR=f"{folder}/compilations",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )
        reference = train(Path(folder) / "one", 1, [], options.stages)
        print("| mesh | compared with one process of | largest relative difference |\n|---|---|---|", flush=True)
        failed = False
        for number, mesh in enumerate(options.meshes):
            axes, path = mesh.split(","), Path(folder) / str(number)
            trained = train(path, options.processes, axes, options.stages)
            alike = train(Path(f"{path}-alike"), 1, axes, options.stages, options.processes)
            for name, other in ((f"{options.processes} devices", alike), ("one device", reference)):
                found = differences(trained, other)
                failed |= max(found.values()) > options.tolerance
                said = ", ".join(f"`{stage}` {value:.1e}" for stage, value in found.items())
                print(f"| {mesh} | {name} | {said} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
