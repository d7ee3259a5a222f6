"""Embeddings that are kept on disk: encoded once, with all that they depend on in their key; damaged ones anew."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_wan
from safetensors.numpy import load_file, save_file

from adastate_jax.generation.embeddings import StoredTextEncoder, random_embed
from adastate_jax.sharding import make_mesh
from adastate_jax.weights.parts import load_part

PROMPT = "a red fox runs through snow"


@pytest.fixture
def embed(folder, tmp_path):
    """A fresh encoder, as another process would have it, and how often it had to encode."""

    def embed(prompt=PROMPT):
        encoder = StoredTextEncoder(folder, small_wan.CONFIG.text, tmp_path / "cache")
        encoded = []
        encode = encoder._encode
        encoder._encode = lambda prompt: (encoded.append(prompt), encode(prompt))[1]
        return np.asarray(encoder([prompt])), len(encoded)

    return embed


def test_a_kept_embedding_is_the_computed_one(embed, tmp_path, capsys):
    first, encoded = embed()
    assert encoded == 1
    again, encoded = embed()
    assert encoded == 0
    assert np.array_equal(first, again)
    assert capsys.readouterr().err == ""
    assert len(list((tmp_path / "cache").iterdir())) == 1
    _, encoded = embed("half a character \udcff")
    assert encoded == 1
    assert embed("half a character \udcff")[1] == 0


def damage_file(change):
    def damage(path):
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content) or content)

    return damage


def rewrite(change):
    def damage(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_file(lambda content: content.__setitem__(-3, content[-3] ^ 1)),
        damage_file(lambda content: content[:-1]),
        damage_file(lambda content: content[:5]),
        damage_file(lambda content: b"\0"),
        rewrite(lambda tensors: tensors["embedding"].__setitem__((0, 0), np.nan)),
        rewrite(lambda tensors: tensors.update(embedding=tensors["embedding"][:, :3].copy())),
        rewrite(lambda tensors: tensors.update(embedding=np.zeros((400, 12), np.float32))),
        rewrite(lambda tensors: tensors.update(embedding=tensors["embedding"].astype(np.float64))),
        rewrite(lambda tensors: tensors.update(other=tensors.pop("embedding"))),
        rewrite(lambda tensors: None),  # as earlier versions kept it, without a checksum
    ],
)
def test_a_damaged_embedding_is_computed_again(embed, tmp_path, capsys, damage):
    first, _ = embed()
    (path,) = (tmp_path / "cache").iterdir()
    damage(path)
    again, encoded = embed()
    assert encoded == 1
    assert np.array_equal(first, again)
    error = capsys.readouterr().err
    assert error.startswith(f"note: {path}: ")
    assert error.endswith("; encoding the prompt again\n")
    assert error.count("\n") == 1
    assert embed()[1] == 0


def test_a_cache_that_cannot_be_written_stops_nothing(embed, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert embed()[1] == 1
    assert "embeddings are not kept" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
PROMPTS = ["a red fox runs", "snow"]


@pytest.fixture
def encodings(monkeypatch):
    """Counts the prompts that are encoded."""
    count = []
    encode = StoredTextEncoder._encode
    monkeypatch.setattr(StoredTextEncoder, "_encode", lambda *arguments: count.append(1) or encode(*arguments))
    return count


def test_a_prompt_is_encoded_once_and_for_all(folder, tmp_path, encodings):
    first = StoredTextEncoder(folder, small_wan.CONFIG.text, tmp_path / "cache")
    expected = first([*PROMPTS, "  a&nbsp;red fox \n runs"])
    assert expected.shape == (3, 70, 12)
    assert len(encodings) == 2  # the third is the first, cleaned
    np.testing.assert_array_equal(expected[0], expected[2])
    assert not np.any(expected[0, 5:])
    assert np.all(np.any(expected[0, :5] != 0, axis=-1))
    np.testing.assert_array_equal(
        StoredTextEncoder(folder, small_wan.CONFIG.text, tmp_path / "cache")(PROMPTS), expected[:2]
    )
    assert len(encodings) == 2


def test_everything_that_an_embedding_depends_on_is_in_its_key(folder, tmp_path, encodings):
    def encode(folder, **fields):
        StoredTextEncoder(folder, dataclasses.replace(small_wan.CONFIG.text, **fields), tmp_path / "cache")(["snow"])
        return len(encodings)

    assert encode(folder) == 1
    assert encode(folder, dtype="bfloat16") == 2
    assert encode(folder, text_length=64) == 3
    copy = tmp_path / "copy"
    shutil.copytree(folder / "text_encoder", copy / "text_encoder")
    shutil.copy(folder / "tokenizer.json", copy)
    assert encode(copy) == 3
    small_wan.write_tokenizer(copy / "tokenizer.json", small_wan.WORDS[::-1])
    assert encode(copy) == 4
    description = copy / "text_encoder" / "converted.json"
    description.write_text(description.read_text() + "\n")
    assert encode(copy) == 5


def test_half_precision_survives_the_disk(folder, tmp_path):
    half = dataclasses.replace(small_wan.CONFIG.text, param_dtype="bfloat16", dtype="bfloat16")
    one, two = (StoredTextEncoder(folder, half, tmp_path)(PROMPTS) for _ in range(2))
    assert one.dtype == two.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one, two)


def test_a_damaged_or_unwritable_cache_stops_nothing(folder, tmp_path, encodings, capsys):
    cache = tmp_path / "cache"
    expected = StoredTextEncoder(folder, small_wan.CONFIG.text, cache)(["snow"])
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-5])
    np.testing.assert_array_equal(StoredTextEncoder(folder, small_wan.CONFIG.text, cache)(["snow"]), expected)
    np.testing.assert_array_equal(StoredTextEncoder(folder, small_wan.CONFIG.text, cache)(["snow"]), expected)
    assert len(encodings) == 2
    np.testing.assert_array_equal(
        StoredTextEncoder(folder, small_wan.CONFIG.text, entry / "no folder")(["snow"]), expected
    )
    assert "embeddings are not kept" in capsys.readouterr().err


def test_an_encoder_split_over_devices_gives_the_same(folder):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    one, split = (StoredTextEncoder(folder, small_wan.CONFIG.text, None, m)(PROMPTS) for m in (None, mesh))
    np.testing.assert_allclose(one, split, rtol=0, atol=1e-5)
    assert (
        len(load_part(folder, "text_encoder", small_wan.CONFIG.text, mesh).token_embedding[...].sharding.device_set)
        == 8
    )


def test_a_prompt_as_long_as_the_encoder_takes(folder):
    long = " ".join(["fox"] * 100)
    embedding = StoredTextEncoder(folder, small_wan.CONFIG.text, None)([long])
    assert np.all(np.any(embedding[0] != 0, axis=-1))


def test_random_embeddings_are_a_prompts_own():
    embed = random_embed(small_wan.CONFIG.text)
    one, two = embed(["fox", "snow"]), embed(["snow"])
    np.testing.assert_array_equal(one[1], two[0])
    assert np.any(one[0] != one[1])
    assert not np.any(one[0, 4:])
    assert np.all(one[0, :4] != 0)
