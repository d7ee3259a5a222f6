"""The launch scripts, against programs that record what they are called with in place of the clouds'."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
TRAIN = ["--", "--config=configs/tiny.py", '--config.negative_prompt=it\'s "dim" & $HOME', "--workdir=/runs/a b"]
TPU = {"PROJECT": "p", "ZONE": "us-east5-a", "NAME": "run", "TYPE": "v6e-16"}
ENGINE = {**TPU, "TYPE": "tpu7x-standard-4t", "RUNTIME": "family", "IMAGE_PROJECT": "images"}
SLICE = {**ENGINE, "HOSTS": "2", "TOPOLOGY": "2x2x2"}
NAMES = ["list-instances", [["run-b7\nrun-a3", 0]]]  # of a slice's machines
GKE = {
    "NAME": "run",
    "IMAGE": "registry/adastate:1",
    "ACCELERATOR": "tpu-v6e-slice",
    "TOPOLOGY": "4x4",
    "HOSTS": "4",
    "CHIPS": "4",
    "CLAIM": "shared",
}
# Appends its arguments, and what it is handed, to a file; answers as the file `answers` beside it says, in turn.
RECORDER = f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
given = sys.stdin.read() if "-" in sys.argv or sys.argv[0].endswith("sbatch") else ""
with (folder / "calls").open("a") as file:
    file.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:], given]) + "\\n")
answers = folder / "answers"
for line in json.loads(answers.read_text()) if answers.exists() else []:
    if line[0] in " ".join(sys.argv[1:]) and line[1]:
        text, code = line[1].pop(0)
        rest = json.loads(answers.read_text())
        next(other for other in rest if other[0] == line[0])[1].pop(0)
        answers.write_text(json.dumps(rest))
        print(text)
        sys.exit(code)
"""


@pytest.fixture
def fakes(tmp_path):
    for name in ("gcloud", "kubectl", "sbatch", "scontrol", "srun"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def launch(fakes: Path, script: str, arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess:
    path = f"{fakes}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(fakes), "TMPDIR": str(fakes), "PAUSE": "0", **settings}
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def calls(fakes: Path) -> list[list[str]]:
    file = fakes / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
    done = subprocess.run(["shellcheck", ROOT / "launch" / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


DRY = [
    *(("tpu_vm.sh", [action], TPU) for action in ("create", "setup", "delete", "follow")),
    ("tpu_vm.sh", ["run", *TRAIN], TPU),
    *(("tpu_vm.sh", ["create"], {**TPU, "PROVISION": way}) for way in ("flex-start", "standard")),
    *(("tpu_vm.sh", [action], ENGINE) for action in ("create", "delete")),
    ("tpu_vm.sh", ["create"], {**SLICE, "PROVISION": "flex-start"}),
    ("tpu_vm.sh", ["delete"], SLICE),
    ("tpu_vm.sh", ["setup"], ENGINE),
    ("gke.sh", ["follow"], GKE),
    ("gke.sh", ["delete"], GKE),
]


@pytest.mark.parametrize(("script", "arguments", "settings"), DRY)
def test_a_dry_run_prints_what_would_be_called_and_calls_nothing(fakes, script, arguments, settings):
    dry = launch(fakes, script, ["--dry-run", *arguments], settings)
    assert dry.returncode == 0, dry.stderr
    assert calls(fakes) == []
    printed = [words for words in map(shlex.split, dry.stdout.splitlines()) if words[0] in ("gcloud", "kubectl")]
    done = launch(fakes, script, arguments, settings)
    assert done.returncode == 0, done.stderr
    made = [call[:-1] for call in calls(fakes) if "list-instances" not in call]
    unnamed = [[re.sub(r"adastate\.\w{6}", "ARCHIVE", word) for word in words] for words in (*printed, *made)]
    assert printed
    assert unnamed[: len(printed)] == unnamed[len(printed) :]


def remote_command(call: list[str]) -> str:
    return next(word for word in call if word.startswith("--command=")).removeprefix("--command=")


@pytest.mark.parametrize("settings", [TPU, ENGINE, SLICE], ids=["tpu", "engine", "slice"])
def test_arguments_reach_the_training_as_they_were_typed(fakes, settings):
    """The command that a machine gets, run by a shell there with a Python that records its arguments."""
    (fakes / "answers").write_text(json.dumps([["list-instances", NAMES[1] * 2]]))
    done = launch(fakes, "tpu_vm.sh", ["run", *TRAIN], settings)
    assert done.returncode == 0, done.stderr
    home = fakes / "there"
    (home / "adastate" / ".venv" / "bin").mkdir(parents=True)
    (home / "adastate" / ".venv" / "bin" / "python").write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('arguments', 'w'))\nsys.exit(75)\n"
    )
    (home / "adastate" / ".venv" / "bin" / "python").chmod(0o755)
    command = remote_command(next(call for call in calls(fakes) if {"run", "run-b7"} & {*call} and "ssh" in call))
    subprocess.run(["bash", "-c", f"{command} wait"], cwd=home, check=True)
    arguments = json.loads((home / "adastate" / "arguments").read_text())
    several = ["--coordinator=run-a3:8476", "--processes=2", "--process=1"] if settings is SLICE else []
    assert arguments == ["-u", "-m", "adastate_jax.train", *TRAIN[1:], *several]
    assert (home / "adastate" / "train.exit").read_text() == "75\n"


def test_after_a_pre_emption_the_tpu_is_made_again_and_in_the_end_deleted(fakes):
    states = ["", "ACTIVE", "SUSPENDED", "", "WAITING_FOR_RESOURCES", "ACTIVE"]
    answers = [
        [" describe ", [[state, 0] for state in states]],
        ["train.exit ]", [["", 255], ["", 0]]],  # following the log: the machine goes, then the training is done
    ]
    (fakes / "answers").write_text(json.dumps(answers))
    done = launch(fakes, "tpu_vm.sh", ["babysit", *TRAIN], TPU)
    assert done.returncode == 0, done.stderr
    actions = [word for call in calls(fakes) for word in call if word in ("create", "delete", "scp", "ssh")]
    once = ["scp", "ssh", "ssh", "ssh", "ssh"]  # copy, install, end what is left, start, follow
    assert actions == ["create", *once, "delete", "create", *once, "delete"]
    assert "ended with 255; again" in done.stderr


@pytest.mark.parametrize(("found", "starts"), [(0, 1), (137, 2)])
def test_a_connection_that_is_lost_does_not_end_what_goes_on(fakes, found, starts):
    """The machines are there: the training is followed again, and is started again if it is gone."""
    answers = [
        [" describe ", [["", 0], *[["ACTIVE", 0]] * 9]],
        ["train.exit ]", [["", 255], ["", found], ["", 0]]],
    ]
    (fakes / "answers").write_text(json.dumps(answers))
    done = launch(fakes, "tpu_vm.sh", ["babysit", *TRAIN], TPU)
    assert done.returncode == 0, done.stderr
    made = calls(fakes)
    assert sum("nohup" in " ".join(call) for call in made) == starts
    actions = [word for call in made for word in call if word in ("create", "delete")]
    assert actions == ["create", "delete"]


@pytest.mark.parametrize(("fails", "code", "starts"), [(2, 0, 1), (9, 1, 0)])
def test_machines_that_are_not_ready_yet_are_set_up_again(fakes, fails, code, starts):
    answers = [[" describe ", [["", 0], *[["ACTIVE", 0]] * 19]], [" scp ", [["", 1]] * fails]]
    (fakes / "answers").write_text(json.dumps(answers))
    done = launch(fakes, "tpu_vm.sh", ["babysit", *TRAIN], TPU)
    assert done.returncode == code, done.stderr
    assert sum("nohup" in " ".join(call) for call in calls(fakes)) == starts
    assert "delete" in calls(fakes)[-1]


def test_a_training_that_ends_by_the_same_again_and_again_is_given_up(fakes):
    answers = [[" describe ", [["", 0], *[["ACTIVE", 0]] * 9]], ["train.exit ]", [["", 75]] * 9]]
    (fakes / "answers").write_text(json.dumps(answers))
    done = launch(fakes, "tpu_vm.sh", ["babysit", *TRAIN], {**TPU, "RESTARTS": "2"})
    assert done.returncode == 75
    assert "run: ended with 75, after 2 restarts; given up" in done.stderr
    assert sum("nohup" in " ".join(call) for call in calls(fakes)) == 3
    assert "delete" in calls(fakes)[-1]


@pytest.mark.parametrize(("running", "code"), [(0, 75), (1, 137)])
def test_following_ends_with_the_training(fakes, running, code):
    """Its exit code, or that of a kill where no such process is left that could write one."""
    assert launch(fakes, "tpu_vm.sh", ["follow"], TPU).returncode == 0
    command = remote_command(calls(fakes)[0])
    (fakes / "pgrep").write_text(f"#!/bin/sh\n[ {running} = 1 ] || echo 75 > adastate/train.exit\nexit {running}\n")
    (fakes / "pgrep").chmod(0o755)
    environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=fakes, env=environment, capture_output=True, check=False)
    assert done.returncode == code


def test_machines_get_the_checkout_without_what_was_made_in_it(fakes):
    settings = {**TPU, "PREPARE": "sudo mount 10.0.0.2:/runs /runs"}
    dry = launch(fakes, "tpu_vm.sh", ["--dry-run", "setup"], settings)
    archived, _, prepared, installed = map(shlex.split, dry.stdout.splitlines())
    assert {"--exclude=.git", "--exclude=.venv", "--exclude=runs"} <= {*archived}
    assert remote_command(prepared) == settings["PREPARE"]
    assert "requirements.txt" in remote_command(installed)


def test_a_slice_that_is_not_complete_is_not_used(fakes):
    (fakes / "answers").write_text(json.dumps([["list-instances", [["run-a3", 0]]]]))
    done = launch(fakes, "tpu_vm.sh", ["run", *TRAIN], SLICE)
    assert done.returncode == 255  # as a machine that is gone
    assert "run: has 1 of 2 machines" in done.stderr


def test_bad_input_is_not_tried_again(fakes):
    answers = [[" describe ", [["", 0], ["ACTIVE", 0]]], ["train.exit ]", [["", 2]]]]
    (fakes / "answers").write_text(json.dumps(answers))
    done = launch(fakes, "tpu_vm.sh", ["babysit", *TRAIN], TPU)
    assert done.returncode == 2
    assert sum("create" in call for call in calls(fakes)) == 1


def test_the_jobset_is_filled_in(fakes):
    dry = launch(fakes, "gke.sh", ["--dry-run", "apply", *TRAIN], {**GKE, "SPOT": "1"})
    assert dry.returncode == 0, dry.stderr
    assert launch(fakes, "gke.sh", ["apply", *TRAIN], {**GKE, "SPOT": "1"}).returncode == 0
    [call] = calls(fakes)
    assert call[:-1] == ["kubectl", "apply", "-f", "-"]
    assert dry.stdout == f"kubectl apply -f - <<END\n{call[-1]}END\n"
    assert "${" not in call[-1]
    job = yaml.safe_load(call[-1])
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 100
    [rule] = job["spec"]["failurePolicy"]["rules"]  # bad input is not tried again
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    [replicated] = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    [container] = pod["containers"]
    assert container["args"] == TRAIN[1:]
    assert container["resources"]["requests"].keys() == {"cpu", "memory", "google.com/tpu"}
    plain = launch(fakes, "gke.sh", ["--dry-run", "apply", *TRAIN], GKE)  # what is paid for is not made spot
    assert "gke-spot" not in plain.stdout


def test_the_slurm_job_passes_arguments_on_and_goes_back_into_the_queue(fakes):
    settings = {"NODES": "4", "GPUS": "8", "PARTITION": "gpu"}
    dry = launch(fakes, "slurm.sh", ["--dry-run", *TRAIN], settings)
    assert launch(fakes, "slurm.sh", TRAIN, settings).returncode == 0
    [[name, *options, script]] = calls(fakes)
    assert name == "sbatch"
    assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue", "--partition=gpu"} <= {*options}
    assert any(option.startswith("--signal=TERM@") for option in options)
    first, _, rest = dry.stdout.partition("<<END\n")
    assert shlex.split(first) == [name, *options]
    assert rest == f"{script}END\n"
    often = {"SLURM_RESTART_COUNT": "100"}
    for code, more, requeued in ((0, {}, False), (2, {}, False), (75, {}, True), (137, {}, True), (143, often, False)):
        (fakes / "calls").unlink(missing_ok=True)
        (fakes / "answers").write_text(json.dumps([["adastate_jax.train", [["", code]]]]))
        path = f"{fakes}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "17", **more}
        done = subprocess.run(["bash", "-c", script], env=environment, check=False)
        assert done.returncode == code
        made = [call[:-1] for call in calls(fakes)]
        assert made[0] == [
            "srun",
            "--label",
            "--kill-on-bad-exit=0",
            "python",
            "-u",
            "-m",
            "adastate_jax.train",
            *TRAIN[1:],
        ]
        assert (["scontrol", "requeue", "17"] in made) == requeued


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "message"),
    [
        ("tpu_vm.sh", [], TPU, "name an action"),
        ("tpu_vm.sh", ["create"], {"PROJECT": "p"}, "ZONE is not set"),
        ("tpu_vm.sh", ["run"], TPU, "name what to train"),
        ("tpu_vm.sh", ["create"], {**TPU, "PROVISION": "cheap"}, "PROVISION=cheap: must be"),
        ("tpu_vm.sh", ["create"], {**ENGINE, "HOSTS": "2"}, "TOPOLOGY is not set"),
        ("tpu_vm.sh", ["create", "--dry-run"], TPU, "--dry-run: --dry-run comes first"),
        ("tpu_vm.sh", ["run", "--config=configs/tiny.py"], TPU, "what training is given behind --"),
        ("tpu_vm.sh", ["delete", "--", "--config=configs/tiny.py"], TPU, "delete trains nothing"),
        ("gke.sh", ["delete", "--dry-run"], GKE, "--dry-run: --dry-run comes first"),
        ("slurm.sh", ["--config=configs/tiny.py", "--dry-run"], {}, "what training is given behind --"),
        ("gke.sh", ["apply", *TRAIN], {**GKE, "NAME": "a" * 29}, "at most 28"),
        ("gke.sh", ["apply", *TRAIN], {**GKE, "IMAGE": ""}, "IMAGE is not set"),
        ("slurm.sh", [], {}, "name what to train"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_called(fakes, script, arguments, settings, message):
    done = launch(fakes, script, arguments, settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert calls(fakes) == []


def test_local_processes_print_their_commands():
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--dry-run", "--", "-m", "x", "--a=b c"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for index, line in enumerate(lines):
        words = shlex.split(line)
        assert f"ADASTATE_PROCESS={index}" in words
        assert words[-3:] == ["-m", "x", "--a=b c"]
    assert len(lines) == 2


@pytest.mark.parametrize(("codes", "code"), [("0 0", 0), ("0 3", 3), ("-9 0", 137)])
def test_local_processes_have_one_exit_code(codes, code):
    script = (
        "import os, sys; code = int(sys.argv[1].split()[int(os.environ['ADASTATE_PROCESS'])]); print('here');"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)"
    )
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--", "-uc", script, codes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert sorted(done.stdout.splitlines()) == ["[0] here", "[1] here"]


def test_local_processes_do_not_wait_for_one_who_reads_no_more():
    script = "import sys; print('x' * 99); sys.stdout.flush(); [print('x' * 99) for _ in range(20_000)]"
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--", "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        launcher.stdout.readline()
        launcher.stdout.close()
        assert launcher.wait(timeout=60) == 0


def test_local_processes_end_with_their_terminal():
    """SIGHUP reaches them as SIGTERM."""
    script = (
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(143)); print('here', flush=True); signal.pause()"
    )
    command = [sys.executable, "launch/local_processes.py", "--processes=2", "--", "-uc", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        assert {launcher.stdout.readline() for _ in range(2)} == {b"[0] here\n", b"[1] here\n"}
        launcher.send_signal(signal.SIGHUP)
        assert launcher.wait(timeout=60) == 143
