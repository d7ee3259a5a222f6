"""Saved streams that disks, strangers or other processes got at: refused in one line, or the same video."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from small_run import damage, small_config

import adastate_jax as ada
from adastate_jax.errors import one_line
from adastate_jax.generation import saved_streams
from adastate_jax.seals import seal

MUTATIONS = 100
STORY = (ada.Cue(0, "a camera pans left"), ada.Cue(0.5, "a red ball", "recache"))


@pytest.fixture(scope="module")
def model():
    return ada.load(config=small_config(), random_weights=True)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "whole"
    ada.save_stream(ada.stream(model, seconds=2, prompts=STORY, seed=5), folder)
    return folder


def contents(video) -> tuple:
    """All that decides what the stream yields."""
    state = video.video.state
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return video.video.settings, b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def test_a_damaged_stream_is_refused_or_the_same(model, whole, tmp_path, capsys):
    expected = contents(ada.load_stream(model, whole))
    rng, refused = random.Random(3), 0
    for number in range(MUTATIONS):
        folder = shutil.copytree(whole, tmp_path / "saved")
        what = damage(folder, rng)
        try:
            found = contents(ada.load_stream(model, folder))
        except ada.UserError as error:
            message = str(error)
        else:
            message = None
            assert found == expected, f"{number}: {what}: read as something else"
            if not (folder / "seal.json").is_file():  # as in a stream of a version that had none
                assert "is not checked against a seal" in capsys.readouterr().err, what
        if message is not None:
            refused += 1
            assert one_line(message) == message
            assert str(folder) in message
        shutil.rmtree(folder)
    assert refused > MUTATIONS * 0.8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "1"),
        ("seed", -1),
        ("num_frames", 10**20),
        ("anchor", 5),
        ("prompts", []),
        ("prompts", [["a"], ["b", "c"]]),
        ("cues", []),
        ("cues", [{"second": 0, "prompt": 1}]),
        ("given", 10**11),
        ("given", -1),
        ("ahead", 10**11),
        ("ahead", "2"),
        ("settings", None),
        ("model", []),
    ],
)
def test_a_description_that_was_sealed_by_a_stranger_is_checked_all_the_same(model, whole, tmp_path, field, value):
    folder = shutil.copytree(whole, tmp_path / "saved")
    description = json.loads((folder / "stream.json").read_text())
    (description if field in description else description["settings"])[field] = value
    (folder / "stream.json").write_text(json.dumps(description))
    seal(folder)
    with pytest.raises(ada.UserError, match=r"is damaged; save the stream again|was saved with another model"):
        ada.load_stream(model, folder)


def test_a_stream_of_an_earlier_version_is_read_and_said(model, whole, tmp_path, capsys):
    """It states no format; with a seal or, of the earliest, without."""
    folder = shutil.copytree(whole, tmp_path / "saved")
    description = json.loads((folder / "stream.json").read_text())
    assert description.pop("format") == 1
    (folder / "stream.json").write_text(json.dumps(description))
    (folder / "seal.json").unlink()
    assert contents(ada.load_stream(model, folder)) == contents(ada.load_stream(model, whole))
    assert capsys.readouterr().err.count("is not checked against a seal") == 1
    seal(folder)
    assert contents(ada.load_stream(model, folder)) == contents(ada.load_stream(model, whole))
    assert capsys.readouterr().err == ""


def test_a_stream_of_this_version_is_not_read_without_its_seal(model, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "saved")
    (folder / "seal.json").unlink()
    with pytest.raises(ada.UserError, match=r"seal\.json: cannot be read \(No such file .*\); save the stream"):
        ada.load_stream(model, folder)


@pytest.mark.parametrize("number", [2, 0, "1", None, [1]])
def test_a_stream_of_a_later_version_is_refused(model, whole, tmp_path, number):
    folder = shutil.copytree(whole, tmp_path / "saved")
    description = json.loads((folder / "stream.json").read_text())
    (folder / "stream.json").write_text(json.dumps(description | {"format": number}))
    seal(folder)
    with pytest.raises(ada.UserError, match=r"saved: is of format .*, this version reads 1; save the stream again"):
        ada.load_stream(model, folder)


def test_of_two_that_save_under_one_name_one_does(model, whole, tmp_path, monkeypatch):
    """The other is done while this one writes: under a name of its own, so that the other's is whole and stays.

    A link that was planted at the name of a temporary folder is not followed.
    """
    victim, target = tmp_path / "victim", tmp_path / "saved"
    victim.mkdir()
    (victim / "kept").write_text("")
    (tmp_path / ".saved.partial").symlink_to(victim)
    save_tree = saved_streams.save_tree

    def overtaken(path, tree):
        save_tree(path, tree)
        shutil.copytree(whole, target)

    video = ada.stream(model, "another prompt", seconds=1)
    monkeypatch.setattr(saved_streams, "save_tree", overtaken)
    with pytest.raises(ada.UserError, match="saved: cannot be written"):
        ada.save_stream(video, target)
    assert contents(ada.load_stream(model, target)) == contents(ada.load_stream(model, whole))
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".saved.partial", "saved", "victim"]


def test_threads_may_save_together(model, whole, tmp_path):
    def save(number):
        ada.save_stream(ada.stream(model, "a", seconds=1, seed=number), tmp_path / str(number))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(save, range(3)))
    for number in range(3):
        assert ada.load_stream(model, tmp_path / str(number)).video.settings.seed == number
