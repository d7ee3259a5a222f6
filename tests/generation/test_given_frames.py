"""Streams that start from a picture or go on where a clip ends."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_wan
from conftest import LATENT_SHAPE, SMALL

import adastate_jax as ada
from adastate_jax.errors import UserError
from adastate_jax.generation import loading as generate
from adastate_jax.models.video_coding import decode_clip, encode_clip
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.continuation import max_given_frames
from adastate_jax.streaming.cues import Cue
from adastate_jax.streaming.presets import named_stream
from adastate_jax.streaming.prompted import initial_prompted, prompted_stream
from adastate_jax.streaming.prompts import Schedule
from adastate_jax.streaming.rollout import stream
from adastate_jax.streaming.schedule import StreamConfig

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red fox runs", "snow"]


def run(student, text, given, chunks, config):
    carry = initial_carry(SMALL, config, seed_keys(0, 1), *LATENT_SHAPE[:2])
    carry = initial_prompted(carry, config, LATENT_SHAPE)
    schedule = Schedule((Cue(0, "x"),), (0,))
    generated = prompted_stream(student, carry, [text[:1]], schedule, config, LATENT_SHAPE, chunks, given)
    return np.concatenate([next(generated)[1].content for _ in range(chunks)], axis=1)


def test_a_stream_that_is_given_its_own_frames_goes_on_the_same(student, text):
    """One chunk, or both that fill the window, taken from a stream and given to another: the rest is the same."""
    config = StreamConfig()
    carry = initial_carry(SMALL, config, seed_keys(0, 1), *LATENT_SHAPE[:2])
    chunks = stream(student, carry, student.text_keys_values(text[:1]), config, LATENT_SHAPE, 4)
    expected = np.concatenate([chunk.content for _, chunk in chunks], axis=1)
    for given in (0, 3, 6):
        found = run(student, text, jnp.asarray(expected[:, :given]), 4, config)
        np.testing.assert_array_equal(found[:, :given], expected[:, :given])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_given_frames_are_kept_and_seen(student, text):
    config = StreamConfig()
    given = jax.random.normal(jax.random.key(1), (1, 4, *LATENT_SHAPE))
    one, other = (run(student, text, frames, 3, config) for frames in (given, given.at[:, 0].add(1.0)))
    np.testing.assert_array_equal(one[:, :4], given)
    assert np.all(
        np.abs(one[:, 4:] - other[:, 4:]).max(axis=(0, 2, 3, 4)) > 1e-4
    )  # every generated frame depends on it
    unrelated = run(student, text, given[:, :0], 3, config)
    assert np.all(np.abs(one[:, 4:] - unrelated[:, 4:]).max(axis=(0, 2, 3, 4)) > 1e-4)


@pytest.mark.parametrize(
    ("name", "frames"), [("adastate", 6), ("self_forcing_frame", 21), ("causvid", 18), ("rolling_forcing", 0)]
)
def test_frames_are_given_before_the_steady_state_only(name, frames):
    assert max_given_frames(named_stream(name, StreamConfig())) == frames


def test_more_frames_than_fill_the_window_are_refused(student, text):
    config = StreamConfig()
    with pytest.raises(ValueError, match="at most 6 latent frames"):
        run(student, text, jnp.zeros((1, 7, *LATENT_SHAPE)), 3, config)


def test_a_video_begins_with_the_last_of_the_frames_it_starts_from(model):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 255, (40, 16, 24, 3), np.uint8)
    assert [generate.num_given_frames(model.config, n) for n in (1, 4, 5, 20, 21, 40)] == [1, 1, 5, 17, 21, 21]
    frames = np.concatenate(list(ada.stream(model, "a fox", seconds=2, start=start)))
    assert len(frames) == 32
    network, video = model.codec.encoder, jnp.asarray(start[None, -21:]) / 127.5 - 1
    seen = decode_clip(network, encode_clip(network, video))
    np.testing.assert_allclose(frames[:21], np.round((np.clip(seen[0], -1, 1) + 1) * 127.5), rtol=0, atol=1)
    with pytest.raises(UserError, match=r"starts with 21 given frames; ask for more than 1.3125 seconds"):
        next(ada.stream(model, "a fox", seconds=1, start=start))


def test_a_stream_of_joint_chunks_starts_from_no_frames(model):
    with pytest.raises(UserError, match="anchor rolling_forcing: denoises chunks jointly"):
        next(ada.stream(model, "a fox", seconds=1, anchor="rolling_forcing", start=np.zeros((1, 16, 24, 3), np.uint8)))


def test_a_model_without_encoder_cannot_start_from_frames(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    model = ada.load(copy, small_wan.TINY_DECODER)
    with pytest.raises(UserError, match="add the network vae"):
        next(ada.stream(model, "a fox", seconds=1, start=np.zeros((1, 32, 48, 3), np.uint8)))
