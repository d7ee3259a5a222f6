"""Run folders that disks, people or strangers damaged: refused in one line, or read as they were, and nothing else."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import TRAJECTORIES_PER_FILE, TRAJECTORY_SHAPE, damage, write_run

from adastate_jax.checkpoint import Checkpoints, latest_step, load_tree, save_tree
from adastate_jax.config.files import load_config
from adastate_jax.errors import UserError, one_line
from adastate_jax.generation.trained import load_run
from adastate_jax.sharding import make_mesh
from adastate_jax.texts import read_json
from adastate_jax.train import _refuse_other_data
from adastate_jax.training.frozen import abstract_dit, abstract_frozen, with_shardings
from adastate_jax.training.metrics import Metrics, read_metrics
from adastate_jax.training.stages.trajectories import read_trajectories

MUTATIONS = 320


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    write_run(folder)
    return folder


def contents(tree) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def readers(whole):
    """What reads each part of a run's folder: functions of the folder → bytes that say all that was read."""
    config = load_config(whole / "config.json")
    mesh = make_mesh()
    frozen, student = (with_shardings(f(config), mesh) for f in (abstract_frozen, abstract_dit))

    def trajectories(folder):
        read = read_trajectories(folder / "trajectories", TRAJECTORIES_PER_FILE, TRAJECTORY_SHAPE)
        return read(np.arange(4)).tobytes()

    def newest(folder):
        step = latest_step(folder / "distill")
        return contents(load_tree(folder / "distill" / str(step), student, "student/ema"))

    return {
        "config.json": lambda folder: repr(load_config(folder / "config.json")).encode(),
        "data.json": lambda folder: repr(read_json(folder / "data.json", "remove it")).encode(),
        "metrics.jsonl": lambda folder: repr(read_metrics(folder / "metrics.jsonl")).encode(),
        "trajectories": trajectories,
        "frozen": lambda folder: contents(load_tree(folder / "frozen", frozen)),
        "distill": newest,
    }


def outcome(read, folder):
    """What was read, or the line of refusal; anything else is raised."""
    try:
        return read(folder)
    except UserError as error:
        refusal = str(error)
    assert one_line(refusal) == refusal
    return None


# No seal covers them: what is in them may change, and they are then another configuration, or other records.
OPEN = ("config.json", "metrics.jsonl", "data.json")


def test_a_damaged_run_is_refused_or_the_same(whole, readers, tmp_path, capsys):
    expected = {part: read(whole) for part, read in readers.items()}
    shutil.copytree(whole / "distill" / "2", tmp_path / "older" / "distill" / "2")
    older = readers["distill"](tmp_path / "older")
    rng, refused, folder = random.Random(15), 0, tmp_path / "run"
    shutil.copytree(whole, folder)
    for number in range(MUTATIONS):
        what = damage(folder, rng)
        part = what.partition(" ")[2].split("/")[0]
        capsys.readouterr()
        found = outcome(readers[part], folder)
        refused += found is None
        if found not in (None, expected[part]) and part not in OPEN:
            # The newest checkpoint lost its seal: the one before is taken, and it is said.
            assert found == older, f"{number}: {what}: read as something else"
            assert "4 was cut short: 2 is used instead" in capsys.readouterr().err, what
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
        (folder / f"{part}.copy").unlink(missing_ok=True)
        (shutil.copytree if (whole / part).is_dir() else shutil.copy)(whole / part, folder / part)
    assert refused > MUTATIONS // 2


def test_the_commands_reader_refuses_too(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = contents(load_run(folder, make_mesh())[1])
    for part in ("frozen/seal.json", "distill/4/seal.json"):
        text = (folder / part).read_text()
        (folder / part).write_text("{}")
        with pytest.raises(UserError, match="lists nothing"):
            load_run(folder, make_mesh())
        (folder / part).write_text(text)
    assert contents(load_run(folder, make_mesh())[1]) == before


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"a": 1}', '{"a": [1]}', "{", "[" * 100_000])
def test_a_seal_that_says_nothing_is_refused(whole, tmp_path, content):
    folder = shutil.copytree(whole / "distill" / "4", tmp_path / "4")
    (folder / "seal.json").write_text(content)
    with pytest.raises(UserError, match=r"seal\.json: damaged"):
        load_tree(folder, {})


def test_what_a_seal_does_not_list_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole / "distill" / "4", tmp_path / "4")
    content = json.loads((folder / "seal.json").read_text())
    name = sorted(content)[-1]
    del content[name]
    (folder / "seal.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not belong here"):
        load_tree(folder, {})


def test_a_fall_back_is_said(tmp_path, capsys):
    tree = {"a": jnp.arange(4.0)}
    save_tree(tmp_path / "2", tree)
    (tmp_path / "4").mkdir()
    load_tree(tmp_path / str(latest_step(tmp_path)), tree)
    assert capsys.readouterr().err == f"note: {tmp_path / '4'} was cut short: 2 is used instead\n"
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert (
            capsys.readouterr().err
            == f"note: {tmp_path / '4'}: has no seal.json, and is set aside as 4.unfinished; training goes on from 2\n"
        )
        checkpoints.load(tree)
        assert capsys.readouterr().err == ""


def test_a_file_where_a_checkpoint_should_be_is_named(tmp_path):
    (tmp_path / "4").write_text("")
    with pytest.raises(UserError, match="4: is a file where a checkpoint's folder should be; remove it"):
        Checkpoints(tmp_path, keep=2)
    (tmp_path / "stage").write_text("")
    with pytest.raises(UserError, match=r"stage: cannot be written \(File exists\)"):
        Checkpoints(tmp_path / "stage", keep=2)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"clips": "worlds/a"}', "[" * 100_000, "\ufffe"])
def test_damaged_names_of_the_data_are_refused(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match=r"data\.json: is damaged; remove it"):
        _refuse_other_data(tmp_path, {})


def test_metrics_lose_their_unreadable_end_alone(tmp_path):
    path, line = tmp_path / "metrics.jsonl", b'{"stage": "a", "step": 0, "loss": 2.0}\n'
    for end in (b'{"stage": "a", "st', b"\0" * 40, b"5\n[]\n\xff\n"):
        path.write_bytes(line + end)
        assert [record["step"] for record in read_metrics(path)] == [0]
        path.write_bytes(line + end + b"\n" + line)
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged; remove the file"):
            Metrics(tmp_path).rewind("a", 1)
