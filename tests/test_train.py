"""The train and sample commands as processes: resuming, being killed, and what they refuse."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from adastate_jax import train
from adastate_jax.config.files import parse_config, save_config
from adastate_jax.errors import UserError
from adastate_jax.train import main
from adastate_jax.training.metrics import read_metrics, read_times

ROOT = Path(__file__).parents[1]
# A few seconds of work: everything at its smallest, all stages. Distillation goes on with a rollout of two segments,
# whose prompt changes before the second: what is carried from update to update is part of what has to be resumed.
SMALLEST = [
    "--config=configs/tiny.py",
    "--config.data.num_worlds=12",
    "--config.data.worlds.num_frames=9",
    "--config.codec.channels=8",
    "--config.model.in_channels=8",
    "--config.model.out_channels=8",
    "--config.model.dim=16",
    "--config.model.ffn_dim=16",
    "--config.model.num_heads=1",
    "--config.model.num_layers=1",
    "--config.pretrain.steps=6",
    "--config.pretrain.batch_size=4",
    "--config.initialize.steps=4",
    "--config.initialize.batch_size=4",
    "--config.initialize.trajectories=8",
    "--config.initialize.ode_steps=4",
    "--config.distill.steps=6",
    "--config.distill.batch_size=2",
    "--config.distill.rollout_frames=9",
    "--config.distill.scored_frames=6",
    "--config.distill.overlap_frames=3",
    "--config.distill.continue_rollout=true",
    "--config.distill.prompt_change=recache",
    "--config.sample.count=1",
    "--config.logging.save_every=2",
    "--config.logging.log_every=2",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and a compilation cache that the processes of this module share."""
    cache = tmp_path_factory.mktemp("compilations")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(workdir, *overrides):
    return [sys.executable, "-m", "adastate_jax.train", *SMALLEST, f"--workdir={workdir}", *overrides]


def run(environment, workdir, *overrides):
    done = subprocess.run(
        command(workdir, *overrides), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(environment, tmp_path_factory):
    """A run that nobody stopped; it is traced and says where its time went, which changes nothing of what it trains."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    start = time.monotonic()
    code, errors = run(environment, workdir, "--profile=4:5")
    assert code == 0, errors
    refuse_wrong_times(workdir, errors.splitlines(), time.monotonic() - start)
    return workdir


def refuse_wrong_times(workdir, lines, wall):
    """The spans leave out nothing of what a run took but the interpreter's start and end."""
    times = read_times(workdir / "metrics.jsonl")
    names = {name.removeprefix("seconds_") for record in times for name in record if name.startswith("seconds_")}
    assert names == {"start", "data", "compile", "step", "save", "profile", "sample"}
    total = sum(value for record in times for name, value in record.items() if name.startswith("seconds_"))
    assert 0.5 * wall < total <= wall
    assert {record["stage"] for record in times if record.get("tflops_per_second", 0) > 0} == {
        "pretrain",
        "initialize",
        "distill",
    }
    assert any(line.startswith(f"time: {total:.1f} s: ") and "compile" in line for line in lines)
    assert sum(line.startswith(("pretrain: steps at ", "distill: steps at ")) for line in lines) == 2
    assert sorted(path.name for path in (workdir / "profile").iterdir()) == [
        "distill",
        "pretrain",
    ]  # the others end at 4
    assert all(list((workdir / "profile" / stage).rglob("*.xplane.pb")) for stage in ("pretrain", "distill"))


def weights(workdir) -> dict[str, bytes]:
    """Every leaf of the last checkpoint of every stage that ran, as bytes."""
    from orbax.checkpoint.experimental import v1 as ocp

    found = {}
    for stage in ("pretrain", "initialize", "distill"):
        if not (workdir / stage).exists():
            continue
        step = max(int(path.name) for path in (workdir / stage).glob("[0-9]*") if path.name.isdigit())
        for name, leaf in ocp.load((workdir / stage / str(step)).absolute()).items():
            found[f"{stage}/{step}/{name}"] = np.asarray(leaf).tobytes()
    return found


def scalars(workdir) -> list[dict]:
    return read_metrics(workdir / "metrics.jsonl")


def test_a_run_leaves_everything_behind(uninterrupted):
    for name in (
        "config.json",
        "loss_curves.png",
        "samples/contact_sheet.png",
        "samples/00.mp4",
        "samples/static/00.mp4",
        "tensorboard",
    ):
        assert (uninterrupted / name).exists(), name
    with av.open(str(uninterrupted / "samples" / "00.mp4")) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 16
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
    assert len(frames) == 3 * 9  # three training horizons
    assert frames[0].shape[1] == 3 * 32 * 4  # three anchors side by side, enlarged
    records = scalars(uninterrupted)
    assert [(r["stage"], r["step"]) for r in records] == [
        *(("pretrain", i) for i in range(6)),
        *(("initialize", i) for i in range(4)),
        *(("distill", i) for i in range(6)),
    ]
    assert all(("loss" in r) == (r["stage"] != "distill" or r["step"] % 2 == 0) for r in records)
    assert not list(uninterrupted.rglob("*partial*"))


def saving(stage):
    """Whether a checkpoint of the stage is under way: its folder is there, its seal not yet."""

    def seen(workdir):
        folder = workdir / stage
        return folder.is_dir() and any(not (path / "seal.json").is_file() for path in folder.iterdir())

    return seen


SIGHTS = (saving("pretrain"), lambda workdir: any((workdir / "trajectories").glob("*.npy")), saving("distill"))


def test_a_killed_run_resumes_to_the_same_bits(environment, uninterrupted, tmp_path):
    """SIGKILL during a save of the first stage, behind the first trajectories, and during a save of the last."""
    workdir = tmp_path / "killed"
    for seen in SIGHTS:
        process = subprocess.Popen(command(workdir), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        while not seen(workdir):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        process.kill()
        process.communicate()
    code, errors = run(environment, workdir)
    assert code == 0, errors
    assert weights(workdir) == weights(uninterrupted)
    assert scalars(workdir) == scalars(uninterrupted)


def test_a_finished_run_does_nothing_again(environment, uninterrupted):
    """Only the videos are made again, and what that took is noted."""
    steps = read_metrics(uninterrupted / "metrics.jsonl")
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    code, errors = run(environment, uninterrupted)
    assert code == 0, errors
    changed = {path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert {path.relative_to(uninterrupted).parts[0] for path in changed} <= {
        "samples",
        "loss_curves.png",
        "config.json",
        "metrics.jsonl",
    }
    assert read_metrics(uninterrupted / "metrics.jsonl") == steps


def test_a_run_that_starts_from_another_is_what_that_one_became(environment, uninterrupted, tmp_path):
    """Distilled from the other's networks, with its seed: to the bit. Its folder stands alone."""
    start = (f"--config.start_from={uninterrupted}", "--config.stages=('distill', 'sample')")
    code, errors = run(environment, tmp_path / "run", *start)
    assert code == 0, errors
    of_other = {name: leaf for name, leaf in weights(uninterrupted).items() if name.startswith("distill")}
    assert of_other
    assert weights(tmp_path / "run") == of_other
    video = (tmp_path / "run" / "samples" / "00.mp4").read_bytes()
    assert video == (uninterrupted / "samples" / "00.mp4").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config.model.num_heads=2",), "was made with config.model.num_heads=1, now it is 2"),
        (("--config.start_from=nowhere",), "nowhere/config.json: no such file"),
    ],
)
def test_another_kind_of_run_to_start_from_is_refused(options, message, environment, uninterrupted, tmp_path):
    code, errors = run(environment, tmp_path / "run", f"--config.start_from={uninterrupted}", *options)
    assert code == 2
    assert message in errors.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_bucket_is_no_work_directory():
    """Not a folder called `gs:`, either."""
    with pytest.raises(UserError, match=r"--workdir=gs:/bucket/run: is no folder; mount the bucket \(gcsfuse"):
        main(["--config=configs/tiny.py", "--workdir=gs://bucket/run"])


def test_all_stages_run_on_a_mesh(environment, tmp_path):
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.distill.batch_size=4", "--config.sample.frames=7")
    code, errors = run({**environment, "XLA_FLAGS": flags}, tmp_path / "mesh", *mesh)
    assert code == 0, errors
    with av.open(str(tmp_path / "mesh" / "samples" / "00.mp4")) as video:
        assert len(list(video.decode(video=0))) == 7  # two chunks and a third of one


def test_changed_data_are_noticed(environment, tmp_path):
    """A prompt file that is edited between a run and its resumption."""
    prompts = tmp_path / "prompts.txt"
    options = (f"--config.data.prompts={prompts}", "--config.stages=('pretrain',)")
    prompts.write_text("hills\n")
    code, errors = run(environment, tmp_path / "run", *options)
    assert code == 0, errors
    prompts.write_text("hills\ndunes\n")
    code, errors = run(environment, tmp_path / "run", *options)
    assert code == 2
    assert "its prompts have changed since it was begun" in errors.strip().splitlines()[-1]


def test_a_batch_that_the_mesh_cannot_split_is_refused(environment, tmp_path):
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    code, errors = run({**environment, "XLA_FLAGS": flags}, tmp_path / "runs" / "new", "--config.mesh.fsdp=4")
    assert code == 2
    assert "config.distill.batch_size 2 must be a multiple of mesh.data * mesh.fsdp = 4" in errors
    assert list(tmp_path.iterdir()) == []  # nothing is left of a run that was refused


def test_sigterm_saves_and_says_that_it_stopped(environment, uninterrupted, tmp_path):
    workdir = tmp_path / "stopped"
    many = (
        "--config.pretrain.steps=100000",
        "--config.pretrain.optimizer.decay_steps=0",
        "--config.logging.save_every=50000",
    )
    process = subprocess.Popen(command(workdir, *many), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or len(scalars(workdir)) < 10:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1] == f"stopped; the same command resumes {workdir}"
    assert "SIGTERM: stopping as soon as all is saved" in errors
    assert "Traceback" not in errors
    saved = [int(path.name) for path in (workdir / "pretrain").glob("[0-9]*")]
    assert len(saved) == 1
    assert len(scalars(workdir)) == saved[0] >= 10


def test_an_interrupt_while_there_is_nothing_to_save_does_not_wait(environment, tmp_path):
    """While the first step compiles, which takes minutes at full size."""
    workdir = tmp_path / "stopped"
    slow = {**environment, "JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": ""}
    process = subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=slow,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    for line in process.stderr:
        if line.startswith("pretrain (compiling)"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"stopped; the same command resumes {workdir}"
    assert "Traceback" not in errors
    assert not list((workdir / "pretrain").glob("[0-9]*"))
    assert not list(workdir.glob(".*"))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(environment, tmp_path):
    code, errors = run(
        environment,
        tmp_path,
        "--config.pretrain.optimizer.learning_rate=1e30",
        "--config.pretrain.optimizer.warmup_steps=3",
    )
    assert code == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: pretrain: ")
    assert "is nan at step" in last or "is inf at step" in last
    kept = sorted(int(path.name) for path in (tmp_path / "pretrain").glob("[0-9]*"))
    assert kept
    assert f"checkpoint {kept[-1]} is kept" in last


def test_two_runs_do_not_share_a_folder(environment, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    code, error = run(environment, tmp_path)
    os.close(folder)
    assert code == 2
    assert error.splitlines() == [
        "starting JAX",
        f"error: --workdir={tmp_path}: another run is at work there; name another folder",
    ]
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_is_refused(environment, uninterrupted):
    code, errors = run(environment, uninterrupted, "--config.distill.horizon_alpha=4.0")
    assert code == 2
    assert "was made with config.distill.horizon_alpha=2.0, now it is 4.0" in errors.strip().splitlines()[-1]


def test_how_it_is_computed_may_change(tmp_path):
    """What turns out not to fit goes on in smaller pieces."""
    options = ["--config.pretrain.batch_size=8", "--config.distill.batch_size=8"]
    config = parse_config(["--config=configs/tiny.py", *options])
    save_config(config, tmp_path / "config.json")
    other = ["--config.pretrain.accumulate=4", "--config.distill.accumulate=2", "--config.model.remat=block"]
    train._refuse_other_configuration(tmp_path, parse_config(["--config=configs/tiny.py", *options, *other]))
    options[0] = "--config.pretrain.batch_size=4"
    with pytest.raises(UserError, match=r"was made with config\.pretrain\.batch_size=8, now it is 4"):
        train._refuse_other_configuration(tmp_path, parse_config(["--config=configs/tiny.py", *options]))


def test_a_run_may_go_on_for_more_steps(tmp_path):
    """Of a stage that no other went on from; never for fewer, and not at a rate that has decayed to zero."""
    options = ["--config=configs/tiny.py", "--config.initialize.steps=300"]
    save_config(parse_config(options), tmp_path / "config.json")

    def check(*others):
        train._refuse_other_configuration(tmp_path, parse_config([*options, *others]))

    more = "--config.pretrain.steps=1300", "--config.pretrain.optimizer.decay_steps=1200"
    with pytest.raises(UserError, match=r"pretrain\.optimizer\.decay_steps 1200 ends before"):
        check(*more)
    (tmp_path / "trajectories").mkdir()  # of the teacher as it is
    with pytest.raises(UserError, match=r"pretrain\.steps=1200, now it is 1300"):
        check(*more)
    check("--config.distill.steps=200")
    with pytest.raises(UserError, match=r"distill\.steps=100, now it is 90"):
        check("--config.distill.steps=90")
    with pytest.raises(UserError, match=r"initialize\.optimizer\.decay_steps 300 ends before the 400 updates"):
        check("--config.initialize.steps=400")
    (tmp_path / "distill").mkdir()
    with pytest.raises(UserError, match=r"initialize\.steps=300, now it is 400"):
        check("--config.initialize.steps=400")
    check("--config.distill.steps=200")


def sample(environment, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "adastate_jax.sample", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_sample_writes_a_video(environment, uninterrupted, tmp_path):
    output = tmp_path / "out.mp4"
    code, last = sample(
        environment, f"--checkpoint={uninterrupted}", "--prompt=hills", "--seconds=1", f"--output={output}"
    )
    assert code == 0, last
    with av.open(str(output)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere", "--prompt=x"], "nowhere: no such folder"),
        (["--checkpoint=RUN", "--prompt=x", "--seconds=0"], "--seconds=0.0: must be positive"),
        (["--checkpoint=RUN", "--prompt=x", "--seconds=nan"], "--seconds=nan: must be positive"),
        (["--checkpoint=RUN", "--prompt=x", "--output=x.avi"], "must end in .mp4"),
        (["--checkpoint=RUN", "--prompt=x", "--anchor=sticky"], "sticky"),
        (["--checkpoint=tests", "--prompt=x"], "config.json: no such file"),
        (["--checkpoint=RUN", "--prompt=x", "--output=/proc/x.mp4"], "/proc/x.mp4: cannot be written"),
    ],
)
def test_sample_refuses_bad_input(arguments, message, environment, uninterrupted):
    code, last = sample(environment, *(a.replace("RUN", str(uninterrupted)) for a in arguments))
    assert code == 2
    assert message in last


def test_a_truncated_checkpoint_is_refused(environment, uninterrupted, tmp_path):
    copy = shutil.copytree(uninterrupted, tmp_path / "copy")
    newest = max((copy / "distill").glob("[0-9]*"), key=lambda path: int(path.name))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    code, last = sample(environment, f"--checkpoint={copy}", "--prompt=x", f"--output={tmp_path / 'x.mp4'}")
    assert code == 2
    assert f"{largest.name}: damaged" in last
    assert not (tmp_path / "x.mp4").exists()
