"""Wrong calls of the Python surface: `UserError` in one line, before anything is generated; and what is not finite."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

import adastate_jax as ada
from adastate_jax.generation.video_stream import stream_batch

HUGE = 10**399
PICTURE = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    return ada.load(config=small_config(), random_weights=True)


def refusal(call) -> str:
    """The one short line by which a call is refused."""
    with pytest.raises(ada.UserError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either a prompt or a schedule"),
        ({"prompt": "a", "prompts": [ada.Cue(0, "a")]}, "give either a prompt or a schedule"),
        ({"prompt": 5}, "prompt must be a text that says something, got 5"),
        ({"prompt": b"a"}, "prompt must be a text"),
        ({"prompt": ["a"]}, "prompt must be a text"),
        ({"prompt": " "}, "prompt must be a text that says something"),
        ({"prompt": "half \ud800"}, "prompt must be a text"),
        ({"prompt": "a", "seconds": "1"}, "seconds must be a number, or None, got '1'"),
        ({"prompt": "a", "seconds": True}, "seconds must be a number, or None, got True"),
        ({"prompt": "a", "seconds": 1j}, "seconds must be a number"),
        ({"prompt": "a", "seconds": 0}, "seconds must be positive"),
        ({"prompt": "a", "seconds": -1.5}, "seconds must be positive"),
        ({"prompt": "a", "seconds": float("nan")}, "seconds must be positive"),
        ({"prompt": "a", "seconds": float("inf")}, "seconds must be positive and below 1,000,000,000"),
        ({"prompt": "a", "seconds": 1e308}, "seconds must be positive and below 1,000,000,000"),
        ({"prompt": "a", "seconds": HUGE}, "seconds must be positive and below 1,000,000,000"),
        ({"prompt": "a", "seed": 1.0}, "seed must be a whole number, got 1.0"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number, got True"),
        ({"prompt": "a", "seed": "1"}, "seed must be a whole number, got '1'"),
        ({"prompt": "a", "seed": None}, "seed must be a whole number, got None"),
        ({"prompt": "a", "seed": -1}, "seed must lie in 0 … 4294967295, got -1"),
        ({"prompt": "a", "seed": HUGE}, "seed must lie in 0 … 4294967295, got 1000"),
        ({"prompt": "a", "anchor": 3}, "anchor must be a name, or None, got 3"),
        ({"prompt": "a", "anchor": "sticky"}, "sticky"),
        ({"prompt": "a", "start": "fox.jpg"}, r"start must be frames uint8 \[n, 32, 32, 3\], got str"),
        ({"prompt": "a", "start": PICTURE.tolist()}, "start must be frames .* got list"),
        ({"prompt": "a", "start": PICTURE[0]}, r"start must be frames .* got uint8 \[32, 32, 3\]"),
        ({"prompt": "a", "start": PICTURE[:0]}, r"start must be frames .* got uint8 \[0, 32, 32, 3\]"),
        ({"prompt": "a", "start": PICTURE[:, :16]}, r"start must be frames .* got uint8 \[1, 16, 32, 3\]"),
        ({"prompt": "a", "start": PICTURE[..., :1]}, r"start must be frames .* got uint8 \[1, 32, 32, 1\]"),
        ({"prompt": "a", "start": PICTURE * np.nan}, "start must be frames .* got float64"),
        ({"prompts": []}, "has no entries"),
        ({"prompts": {}}, "prompts must be a schedule"),
        ({"prompts": 5}, "prompts must be a schedule"),
        ({"prompts": ["a"]}, "entry 1 must be a Cue, got 'a'"),
        ({"prompts": [(0, "a")]}, "entry 1 must be a Cue"),
        ({"prompts": b"ab"}, "entry 1 must be a Cue"),
        ({"prompts": [ada.Cue("0", "a")]}, "entry 1 has second '0'"),
        ({"prompts": [ada.Cue(0, "a"), ada.Cue(HUGE, "b")]}, "entry 2 has second 1000"),
        ({"prompts": [ada.Cue(0, None)]}, "entry 1 has no prompt"),
        ({"prompts": [ada.Cue(0, "\udfff")]}, "half a character"),
        ({"prompts": [ada.Cue(0, "a", np.zeros(2))]}, "entry 1 has transition array"),
        ({"prompts": [ada.Cue(0, "a", "blend", HUGE)]}, "entry 1 blends over 1000"),
        ({"prompts": "nowhere.txt"}, r"nowhere\.txt: cannot be read \(No such file"),
        ({"prompts": "tests"}, r"tests: cannot be read \(Is a directory\)"),
        ({"prompts": "a\0b"}, "cannot be read"),
    ],
)
def test_a_wrong_call_of_stream(model, arguments, message):
    assert re.search(message, refusal(lambda: ada.stream(model, **arguments)))


@pytest.mark.parametrize(
    ("prompts", "num_frames", "message"),
    [
        ([], 9, "give at least one text"),
        ("fox", 9, "prompts must be a list of texts, got 'fox'"),
        (None, 9, "prompts must be a list of texts"),
        (["a", 5], 9, "prompt: must be a text, got 5"),
        (["a"], 0, "num_frames must lie in 1 …"),
        (["a"], 2.5, "num_frames must be a whole number, got 2.5"),
        (["a"], HUGE, "num_frames must lie in 1 …"),
    ],
)
def test_a_wrong_call_of_stream_batch(model, prompts, num_frames, message):
    assert re.search(message, refusal(lambda: stream_batch(model, prompts, 0, num_frames)))


def test_other_wrong_calls(model, tmp_path):
    video = ada.stream(model, "a", seconds=1)
    file = tmp_path / "file"
    file.write_text("")
    calls = [
        (lambda: ada.stream("tiny", "a"), "model must be what load returns, got 'tiny'"),
        (lambda: stream_batch(None, ["a"], 0, 9), "model must be what load returns"),
        (lambda: ada.load_stream(model.config, tmp_path), "model must be what load returns"),
        (lambda: ada.make_sampler(model), "config must be a configuration"),
        (lambda: ada.save_stream([1], tmp_path / "a"), "video must be what stream or load_stream returns"),
        (lambda: ada.save_stream(video, file), "file: exists; name a new folder"),
        (lambda: ada.save_stream(video, file / "a"), "a: cannot be written (Not a directory)"),
        (lambda: ada.load_stream(model, file), "stream.json: cannot be read (Not a directory)"),
        (lambda: ada.load_stream(model, tmp_path / "none"), "stream.json: cannot be read (No such file"),
    ]
    for path in (None, 5, b"a", ""):
        calls.append((lambda path=path: ada.save_stream(video, path), "path must name a folder"))
        calls.append((lambda path=path: ada.load_stream(model, path), "path must name a folder"))
    for call, message in calls:
        assert message in refusal(call)


@pytest.mark.parametrize("num_chunks", [0, -1, 1.0, True, "2"])
def test_a_wrong_number_of_chunks(model, num_chunks):
    text = model.student.text_keys_values(model.embed(["a"]))
    keys = jax.random.split(jax.random.key(0), 1)
    assert re.search(
        "num_chunks must be a whole",
        refusal(lambda: ada.make_sampler(model.config)(model.student, text, keys, num_chunks)),
    )


def test_numbers_of_numpy_are_numbers(model):
    video = ada.stream(model, "a", seconds=np.float32(0.5), seed=np.int64(3)).video
    assert (video.settings.seed, video.settings.num_frames) == (3, 8)
    assert type(video.settings.seed) is int
    cues = [ada.Cue(0, "a"), ada.Cue(np.float32(0.25), "b", "blend", np.int64(3))]
    assert dataclasses.astuple(cues[1]) == (0.25, "b", "blend", 3)
    assert [type(value) for value in (cues[1].second, cues[1].chunks)] == [float, int]
    assert re.search(
        "blends over", refusal(lambda: ada.stream(model, prompts=[cues[0], ada.Cue(1, "b", "blend", np.float32(2))]))
    )


def test_a_cue_behind_the_end_is_said(model, capsys):
    """A chunk of tiny's takes three frames: the last of two seconds begins with frame 30."""
    cues = [ada.Cue(0, "a"), ada.Cue(1.8, "b"), ada.Cue(1.95, "c"), ada.Cue(1e6, "d")]
    video = ada.stream(model, seconds=2, prompts=cues)
    assert [start * 3 for start in (10, 11)] == [30, 33]
    assert re.findall(r"entry (\d) at second (\S+) comes behind", capsys.readouterr().err) == [
        ("3", "1.95"),
        ("4", "1e+06"),
    ]
    assert video.video.unseen == [3, 4]
    ada.stream(model, prompts=cues)
    assert capsys.readouterr().err == ""


# --- what is not finite -----------------------------------------------------------------------------------------------


def spoiled(tree, value):
    """A tree one number of which is another."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[-1] = jnp.asarray(leaves[-1]).at[(0,) * leaves[-1].ndim].set(value)
    return jax.tree.unflatten(structure, leaves)


def test_frames_that_are_not_finite_are_not_shown(model, tmp_path):
    def damaged(**parts):
        return ada.stream(dataclasses.replace(model, **parts), "a", seconds=0.5)

    for parts in (
        {"student": spoiled(model.student, jnp.nan)},
        {"codec": spoiled(model.codec, jnp.nan)},
        {"codec": spoiled(model.codec, jnp.inf)},  # which would be cut to white
        {"embed": lambda texts: model.embed(texts) * jnp.nan},
    ):
        video = damaged(**parts)
        assert re.search(
            "frames are not finite: its weights, its text embeddings", refusal(lambda video=video: next(video))
        )
        assert next(video, None) is None
    assert len(list(ada.stream(model, "a", seconds=0.5))) == 3

    video = ada.stream(model, "a", seconds=1)
    next(video)
    state = video.video.state
    video.video.state = dataclasses.replace(state, carry=jax.tree.map(_not_a_number, state.carry))
    ada.save_stream(video, tmp_path / "saved")
    video = ada.load_stream(model, tmp_path / "saved")
    assert re.search("the stream that it goes on with", refusal(lambda: list(video)))


def _not_a_number(leaf):
    return leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
