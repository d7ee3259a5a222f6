"""Clips into latents: those of the autoencoder, with their captions, however often interrupted."""

import json
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_wan
from small_inputs import CAPTIONS, Inputs, contents, encode_arguments, run_killed

from adastate_jax import encode
from adastate_jax.data.batches import open_source, read_batch, read_examples
from adastate_jax.data.encoded import open_embeddings, open_latents, refuse_other_captions
from adastate_jax.data.prompts import read_prompts
from adastate_jax.data.videos import videos
from adastate_jax.errors import UserError
from adastate_jax.models.video_coding import encode_clip
from adastate_jax.weights.converted import load_converted

SHAPE = (3, 4, 6, 16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def encoded(inputs):
    return inputs.encode(inputs.folder / "encoded", "--dtype=float32")


def test_latents_are_the_autoencoders(inputs, encoded, tmp_path):
    """Of the very clips that training on videos cuts, with their captions."""
    clips = open_source(videos(inputs.videos, small_wan.CONFIG.data.clips), tmp_path, "train")
    latents = open_latents(str(encoded), SHAPE)
    assert len(latents) == len(clips) == 12
    order = [7, 0, 11, 4, 5]
    wanted = read_batch(clips, order)
    found = read_examples(latents.data_set.splits["train"], order)
    for name in ("caption", "source"):
        assert [example[name].decode() for example in found] == wanted[name]
    np.testing.assert_allclose([example["start"] for example in found], wanted["start"])
    vae = load_converted(inputs.weights / "vae", "vae")
    expected = jax.jit(encode_clip)(vae, wanted["video"].astype(jnp.float32) / 127.5 - 1.0)
    values, captions = latents.read(order)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-4)
    distinct = read_prompts(encoded / "captions.jsonl")
    assert distinct == [CAPTIONS[0], CAPTIONS[1]]
    assert [distinct[n] if n >= 0 else "" for n in captions] == wanted["caption"]


def test_bfloat16_is_the_default(inputs, encoded):
    half = open_latents(str(inputs.encode(inputs.folder / "half")), SHAPE).read(range(12))[0]
    assert half.dtype == ml_dtypes.bfloat16
    whole = open_latents(str(encoded), SHAPE).read(range(12))[0]
    np.testing.assert_array_equal(half, whole.astype(ml_dtypes.bfloat16))


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(inputs, encoded):
    arguments = encode_arguments(inputs.weights, inputs.videos, inputs.folder / "killed", "--dtype=float32")
    assert run_killed("encode", 7, arguments) == -signal.SIGKILL
    sealed = json.loads((inputs.folder / "killed.incomplete" / "seal.json").read_text())
    assert 1 <= len(sealed) < len(json.loads((encoded / "manifest.json").read_text())["shards"]["train"])
    encode.main(arguments)
    assert contents(inputs.folder / "killed") == contents(encoded)


def test_captions_become_prompts(inputs, encoded):
    captions, others = inputs.folder / "captions", inputs.folder / "others"
    inputs.embed(captions, prompts=encoded / "captions.jsonl")
    inputs.embed(others)
    clips, text = open_latents(str(encoded), SHAPE), small_wan.CONFIG.text
    found, other = (open_embeddings(str(f), "captions", text.text_length, text.dim) for f in (captions, others))
    refuse_other_captions(found, clips)
    with pytest.raises(UserError, match=rf"holds other prompts than the captions of .*--prompts={encoded}/captions"):
        refuse_other_captions(other, clips)


def test_latents_of_another_run_are_refused(inputs, encoded):
    codec = open_latents(str(encoded), SHAPE).data_set.manifest["codec"]
    open_latents(str(encoded), SHAPE, codec)
    with pytest.raises(
        UserError, match=r"latents=.*: its latents are \[3, 4, 6, 16\] .* configuration's \[5, 4, 6, 16"
    ):
        open_latents(str(encoded), (5, *SHAPE[1:]))
    with pytest.raises(UserError, match=r"made with another autoencoder than config\.data\.encoders holds"):
        open_latents(str(encoded), SHAPE, "another")
    caption = inputs.videos / "3.txt"
    caption.write_text("a caption")
    try:
        with pytest.raises(UserError, match=r"encoded: was made with other input \(videos is "):
            inputs.encode(encoded, "--dtype=float32")
    finally:
        caption.unlink()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--height=18", "--height=18: must be a multiple of 4"),
        ("--frames=8", r"--frames=8: must be 1 \+ 4 k"),
        ("--frames=0", "--frames=0: must be at least 1"),
        ("--stride=-1", "--stride=-1: must not be negative"),
        ("--frames=81", "has no usable video"),
        ("--videos=nowhere", "--videos=nowhere: no such folder"),
        ("--checkpoint=nowhere", "--checkpoint=nowhere: no such folder"),
        ("--devices=3", "must be a multiple of --devices=3"),
    ],
)
def test_options_are_refused(inputs, tmp_path, option, said):
    with pytest.raises(UserError, match=said):
        inputs.encode(tmp_path / "a", option)
    assert not list(tmp_path.iterdir())
