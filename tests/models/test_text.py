"""The UMT5 encoder against the official numbers, its names, and the laws of the byte tokenizer."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_wan
from flax import nnx

from adastate_jax.errors import UserError
from adastate_jax.models.text import (
    END,
    PAD,
    ByteTokenizer,
    PieceTokenizer,
    TextConfig,
    TextEncoder,
    clean_prompt,
    relative_buckets,
)
from adastate_jax.sharding import path_name
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.text import text_name_from_transformers, text_table

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")

TINY = TextConfig(vocab_size=259, dim=32, dim_attention=24, ffn_dim=48, num_heads=3, num_layers=2, text_length=16)


# These networks run in milliseconds: optimising them would take longer than all the tests.
QUICK = {"xla_backend_optimization_level": 0}
embed = jax.jit(TextEncoder.__call__, compiler_options=QUICK)
encode = jax.jit(TextEncoder.encode, compiler_options=QUICK)


def random_network(build, seed=0):
    """The network that `build` makes, with every weight random, biases and gains too; without compiling draws."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return jnp.asarray(generator.normal(size=leaf.shape) * scale + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(build))


@pytest.fixture(scope="module")
def golden():
    return SafeTensors(GOLDEN / "umt5.safetensors")


@pytest.fixture(scope="module")
def official(golden):
    """The fixture's encoder."""
    sizes = json.loads(golden.metadata["config"])["official"]
    config = TextConfig(
        vocab_size=sizes["vocab"],
        dim=sizes["dim"],
        dim_attention=sizes["dim_attn"],
        ffn_dim=sizes["dim_ffn"],
        num_heads=sizes["num_heads"],
        num_layers=sizes["num_layers"],
        num_buckets=sizes["num_buckets"],
    )
    tensors = {name.removeprefix("w."): golden[name] for name in golden if name.startswith("w.")}
    abstract = jax.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))
    return load_official(abstract, text_table(config), tensors, "umt5.safetensors")


@pytest.fixture(scope="module")
def tiny():
    return random_network(lambda: TextEncoder(TINY, rngs=nnx.Rngs(0)))


@needs_golden
@pytest.mark.parametrize("case", ["padded", "long"])
def test_embeddings_equal_the_official_encoder(golden, official, case):
    token_ids, mask = golden[f"in.{case}.ids"].astype(np.int32), golden[f"in.{case}.mask"]
    embeddings, zeroed = embed(official, token_ids, mask), encode(official, token_ids, mask)
    np.testing.assert_allclose(embeddings, golden[f"out.{case}.embeddings"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(zeroed, golden[f"out.{case}.zeroed"], rtol=0, atol=5e-5)


@needs_golden
def test_relative_buckets_equal_the_official_ones_exactly(golden):
    expected = golden["out.relative_bucket"]  # of key − query = −200 … 200
    buckets = relative_buckets(201, 32, 128)
    np.testing.assert_array_equal(np.concatenate([buckets[200], buckets[0, 1:]]), expected)


def test_relative_buckets_depend_on_the_offset_alone_and_saturate():
    buckets = relative_buckets(300, 32, 128)
    for offset in (-299, -128, -7, 0, 7, 128):
        assert len(set(np.diagonal(buckets, offset))) == 1
    assert buckets[0, 128] == buckets[0, 299] == 31
    assert buckets[128, 0] == buckets[299, 0] == 15


@needs_golden
def test_every_official_and_transformers_name_is_mapped():
    manifest = json.loads((GOLDEN / "manifest_umt5_xxl.json").read_text())
    abstract = jax.eval_shape(lambda: TextEncoder(TextConfig(), rngs=nnx.Rngs(0)))
    leaves = {
        path_name(path).removesuffix("/value"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    shapes = {}
    for entry in text_table(TextConfig()):
        shape = leaves.pop(entry.path)
        stacked = "{layer}" in entry.official
        layer_shape = shape[1:] if stacked else shape
        # a broadcast scalar has the shape and costs no memory
        official_shape = entry.to_official(np.broadcast_to(np.int8(0), layer_shape)).shape
        for layer in range(shape[0]) if stacked else [0]:
            shapes[entry.official.format(layer=layer)] = list(official_shape)
    assert not leaves
    assert shapes == manifest["official"]

    for names in (manifest["transformers_to_official"], json.loads((GOLDEN / "umt5_names.json").read_text())):
        assert {name: text_name_from_transformers(name) for name in names} == names


def test_a_text_does_not_see_its_padding(tiny):
    token_ids, mask = ByteTokenizer(16).tokenize(["wind", "a fox"])
    garbage = np.where(mask, token_ids, 77)
    full = encode(tiny, token_ids, mask)
    np.testing.assert_allclose(encode(tiny, token_ids[:, :6], mask[:, :6]), full[:, :6], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(encode(tiny, garbage, mask), full)
    assert not np.any(full[0, 5:])
    assert np.all(np.any(full[0, :5] != 0, axis=-1))


def test_half_precision_stays_close_and_keeps_its_type(tiny):
    token_ids, mask = ByteTokenizer(16).tokenize(["a fox runs"])
    half = random_network(lambda: TextEncoder(dataclasses.replace(TINY, dtype="bfloat16"), rngs=nnx.Rngs(0)))
    embeddings, exact = (encode(model, token_ids, mask) for model in (half, tiny))
    assert embeddings.dtype == "bfloat16"
    assert np.std(embeddings.astype(np.float32) - exact) < 0.02 * np.std(exact)


def test_bytes_survive_tokenization():
    tokenizer = ByteTokenizer(32)
    texts = ["", "a fox", "雪の森 — été"]
    token_ids, mask = tokenizer.tokenize(texts)
    assert token_ids.dtype == np.int32
    assert token_ids.shape == mask.shape == (3, 32)
    for text, row, row_mask in zip(texts, token_ids, mask, strict=True):
        length = row_mask.sum()
        assert row_mask[:length].all()
        assert bytes((row[: length - 1] - 3).tolist()).decode() == text
        assert row[length - 1] == END
        assert np.all(row[length:] == PAD)
    assert token_ids.max() < tokenizer.vocab_size == 259


def test_a_long_text_is_cut_but_keeps_its_end():
    token_ids, mask = ByteTokenizer(4).tokenize(["abcdef"])
    assert token_ids.tolist() == [[ord("a") + 3, ord("b") + 3, ord("c") + 3, END]]
    assert mask.all()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a red\t fox\n\n runs ", "a red fox runs"),
        ("fox &amp;amp; snow", "fox & snow"),  # escaped twice
        ("a\u3000caf\u00c3\u00a9", "a café"),  # UTF-8 read as Latin-1; an ideographic space
        ("a “red” fox", 'a "red" fox'),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_cleans_them(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_pieces_are_those_of_the_file(tmp_path):
    tokenizer = PieceTokenizer(small_wan.write_tokenizer(tmp_path / "tokenizer.json"), 6)
    token_ids, mask = tokenizer.tokenize(["a  red fox", "", "fox " * 9, "a dog"])
    words = {word: 3 + index for index, word in enumerate(small_wan.WORDS)}
    assert token_ids.dtype == np.int32
    assert token_ids[0].tolist() == [words["a"], words["red"], words["fox"], END, PAD, PAD]
    assert mask[0].tolist() == [True] * 4 + [False] * 2
    assert token_ids[1].tolist() == [END] + [PAD] * 5
    assert token_ids[2].tolist() == [words["fox"]] * 5 + [END]
    assert mask[2].all()
    assert 2 in token_ids[3]  # the unknown token
    assert tokenizer.tokenize([])[0].shape == (0, 6)
    assert tokenizer.vocab_size == 3 + len(small_wan.WORDS) + 1


def test_what_is_no_such_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json: cannot be read \(No such file"):
        PieceTokenizer(tmp_path / "nothing.json", 6)
    path = small_wan.write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TypeError, match="one string"):
        PieceTokenizer(path, 6).tokenize("a fox")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "post_processor": None}))
    with pytest.raises(UserError, match=r"tokenizer\.json: does not pad with <pad> = 0 and end with </s> = 1"):
        PieceTokenizer(path, 6)
    path.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        PieceTokenizer(path, 6)


def test_an_unencodable_character_does_not_stop_a_stream():
    token_ids, _ = ByteTokenizer(4).tokenize(["\ud800"])
    assert token_ids[0, :2].tolist() == [ord("?") + 3, END]
    assert clean_prompt("\ud800 fox") == "\ufffd fox"


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="one string"):
        ByteTokenizer(4).tokenize("a fox")
    with pytest.raises(ValueError, match="text_length"):
        ByteTokenizer(0)
    with pytest.raises(ValueError, match="num_heads"):
        TextConfig(num_heads=3)
