"""Two real processes on this machine: they agree, they share checkpoints with one, and they train what one trains."""

import json
import os
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


def test_two_processes_agree_and_share_checkpoints_with_one(tmp_path):
    """What one wrote loads in two, what two wrote in one, to the bit; damage to what either wrote is named."""
    mesh = make_mesh(fsdp=2)
    made = tree(mesh)
    save_tree(tmp_path / "one", made)
    done = local(2, 2, [str(ROOT / "tests" / "launch_worker.py"), str(tmp_path)], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.endswith("is done")]  # Gloo speaks on stdout, too
    assert sorted(ends) == ["[0] process 0 is done", "[1] process 1 is done"]
    for folder in (tmp_path / "two", tmp_path / "numbered" / "4"):
        assert same(load_tree(folder, made), made)
    assert [path.name for path in (tmp_path / "numbered").iterdir()] == ["4"]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "own", "numbered", "cache"}
    seal = json.loads((tmp_path / "two" / "seal.json").read_text())
    written = [name for name in seal if "/ocdbt.process_" in name and "/d/" in name]
    assert {name.split("/")[1] for name in written} == {"ocdbt.process_0", "ocdbt.process_1"}  # each wrote its own
    for name in written:
        file = tmp_path / "two" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=file.name):
            load_tree(tmp_path / "two", made)
        file.write_bytes(content)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Compilations that the runs of this module share."""
    return tmp_path_factory.mktemp("compilations")


def test_two_processes_train_what_one_trains(cache, tmp_path):
    """Losses to 1e-6; the first alone speaks."""
    two = local(2, 1, [*TRAIN, f"--workdir={tmp_path / 'two'}", "--config.mesh.fsdp=2"], cache)
    assert two.returncode == 0, two.stderr
    lines = two.stderr.splitlines()
    assert any(line.startswith("[0] pretrain") for line in lines)
    assert not any(line.startswith("[1] pretrain") or "Traceback" in line for line in lines)
    one = subprocess.run(
        [sys.executable, *TRAIN, f"--workdir={tmp_path / 'one'}"],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert one.returncode == 0, one.stderr
    found = [
        [(record["step"], record["loss"], record["gradient_norm"]) for record in map(json.loads, text.splitlines())]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    ]
    assert len(found[0]) == 4
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


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
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--", *TRAIN, *options]
    command.append(f"--workdir={tmp_path}")
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(cache), stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:
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
    assert metrics.read_bytes().count(b"\n") == saved >= 4


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


def test_loopback_is_refused_where_there_are_several_machines(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError, match=r"coordinator 127\.0\.0\.1:5: means each machine itself"):
        distributed.start("127.0.0.1:5", 2, 0)
    assert distributed.is_loopback("localhost")
    assert distributed.is_loopback("[::1]")
    assert not distributed.is_loopback("192.0.2.7")
