"""Checkpoints load exactly what was saved, or say in one line why not."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adastate_jax import distributed
from adastate_jax.checkpoint import Checkpoints, latest_step, load_tree, save_tree
from adastate_jax.config.stages import OptimizerConfig
from adastate_jax.errors import UserError
from adastate_jax.sharding import make_mesh
from adastate_jax.training.state import create_state


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def state(student):
    return create_state(student, OptimizerConfig(), True)


def test_round_trip_and_parts(tmp_path, state):
    save_tree(tmp_path / "state", state)
    assert same(load_tree(tmp_path / "state", jax.eval_shape(lambda: state)), state)
    assert same(load_tree(tmp_path / "state", state.ema, "ema"), state.ema)


def test_loads_into_shardings(tmp_path):
    tree = {"ffn_in/kernel": jnp.arange(64.0).reshape(8, 8)}
    save_tree(tmp_path / "tree", tree)
    mesh = make_mesh(fsdp=4)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))
    like = {"ffn_in/kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
    loaded = load_tree(tmp_path / "tree", like)
    assert loaded["ffn_in/kernel"].sharding == sharding
    assert same(loaded, tree)


def test_the_newest_finished_checkpoint_counts(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest is None
        for step in (2, 4, 6):
            checkpoints.save(step, state)
        checkpoints.wait()
        assert checkpoints.latest == 6
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["4", "6"]
    (tmp_path / "6" / "seal.json").unlink()  # as if killed before the end
    assert latest_step(tmp_path) == 4
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert same(checkpoints.load(state), state)
        checkpoints.save(6, state)
    assert latest_step(tmp_path) == 6


def test_all_processes_load_what_the_first_takes_for_the_newest(tmp_path, monkeypatch):
    """One to which a network file system lists the newest late would load another state than the others."""
    tree = {"a": jnp.zeros(2)}
    for step in (2, 4):
        save_tree(tmp_path / str(step), {"a": jnp.full(2, step)})
    monkeypatch.setattr(distributed, "from_first", lambda function, channel="main": "4")
    assert same(load_tree(tmp_path / "2", tree), {"a": np.full(2, 4.0)})


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_every_damaged_file_is_named(tmp_path, damage):
    tree = {"weight": jnp.arange(1000.0), "count": jnp.int32(3)}
    save_tree(tmp_path / "tree", tree)
    files = [path for path in (tmp_path / "tree").rglob("*") if path.is_file() and path.name != "seal.json"]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        if damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            file.write_bytes(bytes([content[0] ^ 1]) + content[1:] if content else b"x")
        else:
            file.unlink()
        if file.exists() and file.read_bytes() == content:
            continue  # an empty file cannot be truncated
        with pytest.raises(UserError, match=file.name):
            load_tree(tmp_path / "tree", tree)
        file.write_bytes(content)
    assert same(load_tree(tmp_path / "tree", tree), tree)


def test_what_does_not_fit_is_named(tmp_path):
    tree = {"weight": jnp.zeros((2, 3))}
    save_tree(tmp_path / "tree", tree)
    with pytest.raises(UserError, match=r"weight has shape \[2, 3\], not \[3, 2\]"):
        load_tree(tmp_path / "tree", {"weight": jnp.zeros((3, 2))})
    with pytest.raises(UserError, match="lacks bias"):
        load_tree(tmp_path / "tree", {**tree, "bias": jnp.zeros(2)})
    with pytest.raises(UserError, match="has weight"):
        load_tree(tmp_path / "tree", {})
    with pytest.raises(UserError, match="no checkpoint here"):
        load_tree(tmp_path / "nothing", tree)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="not a finished checkpoint"):
        load_tree(tmp_path / "other", tree)


def test_an_old_checkpoint_goes_only_when_a_new_one_is_sealed(tmp_path, monkeypatch):
    """A kill before the seal leaves the old one, also where one alone is kept; what it left unsealed goes next time."""
    tree = {"a": jnp.arange(4.0)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, tree)
    with monkeypatch.context() as killed, Checkpoints(tmp_path, keep=1) as checkpoints:
        killed.setattr("adastate_jax.checkpoint.seal", lambda path, known: 1 / 0)
        checkpoints.save(4, tree)
        with pytest.raises(UserError, match="cannot save"):
            checkpoints.wait()
    assert latest_step(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "manifest.ocdbt").write_text("somebody's")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert not (tmp_path / "4").exists()
        checkpoints.save(4, tree)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "4.unfinished"]
    assert (tmp_path / "4.unfinished" / "manifest.ocdbt").read_text() == "somebody's"  # set aside, not removed
    assert same(load_tree(tmp_path / "4", tree), tree)


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_none_that_is_half_there(tmp_path, monkeypatch):
    tree = {"a": jnp.arange(4.0)}
    with monkeypatch.context() as killed, Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, tree)
        checkpoints.wait()
        remove = shutil.rmtree

        def killed_at_the_old_one(path, **arguments):
            if "pruned" in path.name:
                raise OSError("killed")
            remove(path, **arguments)

        killed.setattr("adastate_jax.checkpoint.shutil.rmtree", killed_at_the_old_one)
        checkpoints.save(4, tree)
        with pytest.raises(UserError, match="cannot save"):
            checkpoints.wait()
    assert [path.name for path in tmp_path.glob("[0-9]*")] == ["4"]
    assert same(load_tree(tmp_path / "4", tree), tree)
    with Checkpoints(tmp_path, keep=1):
        assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_a_tree_is_there_until_the_one_that_replaces_it_is_complete(tmp_path, monkeypatch):
    tree = {"a": jnp.arange(4.0)}
    save_tree(tmp_path / "tree", tree)
    with monkeypatch.context() as full:
        full.setattr("adastate_jax.checkpoint.shutil.disk_usage", lambda path: type("", (), {"free": 0}))
        with pytest.raises(UserError, match="No space left"):
            save_tree(tmp_path / "tree", {"a": jnp.zeros(4)})
    assert same(load_tree(tmp_path / "tree", tree), tree)
    save_tree(tmp_path / "tree", {"a": jnp.zeros(4)})
    assert same(load_tree(tmp_path / "tree", tree), {"a": jnp.zeros(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]
