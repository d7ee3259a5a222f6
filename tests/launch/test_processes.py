"""Two and four real processes on this machine: they agree, share checkpoints with one, and train what one trains."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launch_worker import same, tree

from adastate_jax import distributed
from adastate_jax.checkpoint import load_tree, save_tree
from adastate_jax.errors import UserError
from adastate_jax.sharding import make_mesh
from adastate_jax.training.metrics import read_metrics, read_times

ROOT = Path(__file__).parents[2]
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
    "--config.pretrain.steps=4",
    "--config.pretrain.batch_size=4",
    "--config.logging.save_every=2",
    "--config.logging.log_every=2",
]


def environment(cache: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("XLA_FLAGS")},
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def local(processes: int, devices: int, command: list[str], cache: Path) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "launch/local_processes.py", f"--processes={processes}", f"--devices={devices}", "--"]
    command = [*launcher, *command]
    return subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, check=False)


def test_several_processes_agree_and_share_checkpoints(tmp_path):
    """What one wrote loads in four, what these wrote in two, and all of it in one, to the bit; damage is named."""
    mesh = make_mesh(fsdp=2)
    made = tree(mesh)
    trees = tmp_path / "trees"
    trees.mkdir()
    save_tree(trees / "one", made)
    for processes, name in ((4, "four"), (2, "two")):
        worker = [str(ROOT / "tests" / "launch_worker.py"), str(trees), name]
        done = local(processes, 4 // processes, worker, tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        for index in range(processes):  # Gloo speaks on stdout, too, perhaps on the same line
            assert done.stdout.count(f"process {index} is done") == 1, done.stdout + done.stderr
        assert same(load_tree(trees / name, made), made)
    assert {path.name for path in trees.iterdir()} == {"one", "two", "four"}
    seal = json.loads((trees / "two" / "seal.json").read_text())
    written = [name for name in seal if "/ocdbt.process_" in name and "/d/" in name]
    assert {name.split("/")[1] for name in written} == {"ocdbt.process_0", "ocdbt.process_1"}  # each wrote its own
    for name in written:
        file = trees / "two" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=file.name):
            load_tree(trees / "two", made)
        file.write_bytes(content)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Compilations that the runs of this module share."""
    return tmp_path_factory.mktemp("compilations")


def test_two_processes_train_what_one_trains_and_one_goes_on_with_it(cache, tmp_path):
    """Losses to 1e-6; the first alone speaks. What was cut behind its second step goes on as one process the same."""
    two = local(2, 1, [*TRAIN, f"--workdir={tmp_path / 'two'}", "--config.mesh.fsdp=2"], cache)
    assert two.returncode == 0, two.stderr
    lines = two.stderr.splitlines()
    assert any(line.startswith("[0] pretrain") for line in lines)
    assert not any(line.startswith(("[1] pretrain", "[1] time")) or "Traceback" in line for line in lines)
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "pretrain" / "4")
    found = [losses(tmp_path / "two")]
    for name in ("one", "resumed"):
        one = subprocess.run(
            [sys.executable, *TRAIN, f"--workdir={tmp_path / name}"],
            cwd=ROOT,
            env=environment(cache),
            capture_output=True,
            text=True,
            check=False,
        )
        assert one.returncode == 0, one.stderr
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)
    times = read_times(tmp_path / "resumed" / "metrics.jsonl")
    assert sum(record.get("seconds_repeated", 0.0) for record in times) > 0


def losses(workdir: Path) -> list[tuple[int, float, float]]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in records]


WATCHED = """
import sys, time
from adastate_jax import distributed, lockstep
from adastate_jax.console import run_command
def main(arguments):
    distributed.start(timeout=int(arguments[0]))
    with lockstep.watched():
        print("ready", flush=True)
        time.sleep(300)
run_command(main)
"""


def test_the_first_is_killed_and_the_others_name_it(cache):
    """JAX would abort them; a line of ours comes first, with our exit code."""
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--", "-c", WATCHED, "100"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment(cache), text=True, **pipes) as launcher:
        ready = [launcher.stdout.readline() for _ in range(2)]
        assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
        time.sleep(3)
        start = time.monotonic()
        os.kill(processes_of(launcher.pid)[0], signal.SIGKILL)
        _, errors = launcher.communicate(timeout=100)
    assert time.monotonic() - start < 60
    lines = [line for line in errors.splitlines() if line.startswith("[1] error: ")]
    assert len(lines) == 1, errors
    assert "error: process 0 on " in lines[0]
    assert "is dead: nobody listens where it held the coordination service; the same command goes on" in lines[0]
    assert launcher.returncode == 137
    assert "[0] ended with 137" in errors


def test_a_process_whose_partner_never_comes_says_so(cache):
    alone = {"ADASTATE_COORDINATOR": "127.0.0.1:1", "ADASTATE_PROCESSES": "2", "ADASTATE_PROCESS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "2"],
        cwd=ROOT,
        env={**environment(cache), **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "process 1 of 2 at 127.0.0.1:1: did not find each other within 2 s" in line
    assert "--start-timeout" in line


def processes_of(launcher: int) -> list[int]:
    """The process of each number that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found[dict(v.partition("=")[::2] for v in variables)["ADASTATE_PROCESS"]] = child
    return [found[name] for name in sorted(found)]


def test_sigterm_to_one_saves_the_same_step_in_all(cache, tmp_path):
    """The second alone is told; both end with 143, and the one checkpoint is of the last step that was logged."""
    options = ["--config.pretrain.steps=100000", "--config.logging.save_every=100000", "--config.mesh.fsdp=2"]
    options.append("--config.pretrain.optimizer.decay_steps=0")
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--", *TRAIN, *options]
    command.append(f"--workdir={tmp_path}")
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(cache), stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or len(read_metrics(metrics)) < 4:
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(processes_of(launcher.pid)[1], signal.SIGTERM)
    _, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 143, errors
    for name in "01":
        assert f"[{name}] SIGTERM: stopping as soon as all is saved" in errors
        assert f"[{name}] stopped; the same command resumes {tmp_path}" in errors
    assert "Traceback" not in errors
    [saved] = (int(path.name) for path in (tmp_path / "pretrain").iterdir())
    assert len(read_metrics(metrics)) == saved >= 4


@pytest.mark.parametrize(
    ("environment", "platform"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_a_platform_is_known_by_its_variables(environment, platform):
    assert distributed.several_by_platform(environment) == platform


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "--process is missing"),
        (("host", 2, 0), "--coordinator=host: is no HOST:PORT"),
        (("host:70000", 2, 0), "is no HOST:PORT"),
        (("host:1", 2, 2), r"--process=2: must lie in 0 … --processes - 1 = 1"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


def test_a_job_of_slurm_without_srun_is_told_of_it(monkeypatch):
    """Its script has the variables of one process of many, and would wait for the others."""
    for name in ("SLURM_STEP_NODELIST", "ADASTATE_COORDINATOR", "ADASTATE_PROCESSES", "ADASTATE_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(UserError, match=r"SLURM_NTASKS=8, but srun did not start this process: put srun before"):
        distributed.start()


def test_loopback_is_refused_where_there_are_several_machines(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError, match=r"coordinator 127\.0\.0\.1:5: means each machine itself"):
        distributed.start("127.0.0.1:5", 2, 0)
    assert distributed.is_loopback("localhost")
    assert distributed.is_loopback("[::1]")
    assert not distributed.is_loopback("192.0.2.7")
