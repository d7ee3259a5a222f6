"""Embeddings that are kept on disk: the same as computed ones, or computed again."""

import numpy as np
import pytest
import small_wan
from safetensors.numpy import load_file, save_file

from adastate_jax.generation.embeddings import StoredTextEncoder

PROMPT = "a red fox runs through snow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_wan.write_model(tmp_path_factory.mktemp("model") / "weights")


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
