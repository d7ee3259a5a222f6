"""Prompts into embeddings: those of the encoder, whatever the batches, however often interrupted."""

import json
import signal

import numpy as np
import pytest
import small_wan
from small_inputs import PROMPTS, Inputs, contents, embed_arguments, run_killed

from adastate_jax import embed
from adastate_jax.config import WAN_NEGATIVE_PROMPT
from adastate_jax.data.encoded import open_embeddings, refuse_unlike
from adastate_jax.errors import UserError
from adastate_jax.generation.embeddings import StoredTextEncoder
from adastate_jax.models.text import clean_prompt

TEXT = small_wan.CONFIG.text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def embedded(inputs):
    return inputs.embed(inputs.folder / "embedded")


def opened(folder, **changed):
    return open_embeddings(
        str(folder), "config.data.embeddings", **{"text_length": TEXT.text_length, "dim": TEXT.dim, **changed}
    )


def test_embeddings_are_the_encoders(inputs, embedded):
    """Those that a stream is conditioned on: other batches and lengths of padding move the last bits at most."""
    prompts = opened(embedded)
    assert list(prompts) == list(PROMPTS)
    encoder = StoredTextEncoder(inputs.weights, TEXT, None)
    order = [3, 0, 5, 1, 2, 2]
    wanted = np.asarray(encoder([PROMPTS[number] for number in order]))
    found = prompts.embeddings(order)
    assert found.shape == (6, TEXT.text_length, TEXT.dim)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.array_equal(found == 0, wanted == 0)  # zero past each prompt
    for text in ("", WAN_NEGATIVE_PROMPT):
        np.testing.assert_allclose(prompts.guidance(text), np.asarray(encoder([text])), atol=1e-5)
    np.testing.assert_array_equal(prompts.embeddings([-1, 4])[:1], prompts.guidance(""))


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(inputs, embedded):
    arguments = embed_arguments(inputs.weights, inputs.prompts, inputs.folder / "killed")
    assert run_killed("embed", 4, arguments) == -signal.SIGKILL
    shards = len(json.loads((embedded / "manifest.json").read_text())["shards"]["train"])
    sealed = json.loads((inputs.folder / "killed.incomplete" / "seal.json").read_text())
    assert 1 <= len(sealed) < shards
    embed.main(arguments)
    assert contents(inputs.folder / "killed") == contents(embedded)


def test_the_same_command_once_more_changes_nothing(inputs, embedded, capsys):
    before = contents(embedded)
    inputs.embed(embedded)
    assert contents(embedded) == before
    said = capsys.readouterr()
    assert said.err.endswith(f"{embedded} is complete; nothing is left to do\n")
    assert said.out == f"{embedded}\n"


def test_it_says_what_it_found(inputs, capsys):
    inputs.embed(inputs.folder / "said", "--negative-prompt=snow", "--negative-prompt=a & snow")
    said = capsys.readouterr().err
    assert "note: 1 prompts are longer than 70 tokens, and are cut there" in said
    assert f"note: {inputs.prompts}: 1 prompts repeat earlier ones, and are kept" in said
    prompts = opened(inputs.folder / "said")
    assert prompts.guidance("a & snow").shape == (1, TEXT.text_length, TEXT.dim)
    with pytest.raises(UserError, match=r"no embedding of the negative prompt 'fox', but of '', 'snow', 'a & snow'"):
        prompts.guidance("fox")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\n\nb\n", "prompts.txt: line 2 is empty"),
        (b"\xef\xbb\xbfa\r\n \r\nb", "prompts.txt: line 2 is empty"),
        (b"a\n\n", "prompts.txt: line 2 is empty"),
        (b"", "prompts.txt: line 1 is empty"),
        (b"# a\n", "prompts.txt: has no prompts"),
        (b"a\n\xff\n", "prompts.txt: line 2 is not UTF-8"),
    ],
)
def test_a_prompt_file_is_refused_by_its_line(inputs, tmp_path, content, said):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        inputs.embed(tmp_path / "a", prompts=tmp_path / "prompts.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--batch-size=0", "--batch-size=0: must be at least 1"),
        ("--text-length=-1", "--text-length=-1: must be at least 1"),
        ("--devices=3", "--batch-size=2: must be a multiple of --devices=3"),
        ("--shard-megabytes=0", "--shard-megabytes=0.0: must be positive"),
        ("--shard-megabytes=nan", "--shard-megabytes=nan: must be positive"),
        ("--negative-prompt=\udcff", "--negative-prompt: is not UTF-8 text"),
        ("--checkpoint=nowhere", "--checkpoint=nowhere: no such folder"),
    ],
)
def test_options_are_refused(inputs, tmp_path, option, said):
    with pytest.raises(UserError, match=said):
        inputs.embed(tmp_path / "a", option)
    assert not list(tmp_path.iterdir())


def test_data_sets_of_another_text_are_refused(inputs, embedded):
    prompts = opened(embedded)
    encoder = prompts.data_set.manifest["encoder"], prompts.data_set.manifest["tokenizer"]
    opened(embedded, encoder=encoder)
    for changed, said in (
        ({"text_length": 71}, r"its text_length is 70, but config\.text\.text_length is 71"),
        ({"dim": 13}, r"its dim is 12, but config\.text\.dim is 13; .* config\.model\.text_dim"),
        ({"encoder": ("other", encoder[1])}, r"was made with another text encoder than config\.data\.encoders holds"),
        ({"encoder": (encoder[0], "other")}, r"was made with another tokenizer than config\.data\.encoders holds"),
    ):
        with pytest.raises(UserError, match=rf"config\.data\.embeddings=.*embedded: {said}"):
            opened(embedded, **changed)
    small_wan.write_tokenizer(inputs.weights / "tokenizer.json", [*small_wan.WORDS, "more"])
    other = opened(inputs.embed(inputs.folder / "other"))
    small_wan.write_tokenizer(inputs.weights / "tokenizer.json")
    refuse_unlike({"a": prompts, "b": prompts})
    with pytest.raises(UserError, match=r"b=.*other: was made with another tokenizer than a=.*embedded"):
        refuse_unlike({"a": prompts, "b": other})


def test_batches_on_several_devices_are_the_same(inputs, embedded):
    folder = inputs.embed(inputs.folder / "devices", "--devices=2")
    np.testing.assert_allclose(opened(folder).embeddings(range(6)), opened(embedded).embeddings(range(6)), atol=1e-5)


def test_texts_that_are_cleaned_alike_are_embedded_alike(inputs):
    """Whitespace and entities are the tokenizer's matter: the text that is kept is the file's."""
    prompts = inputs.folder / "spaced.txt"
    prompts.write_text("a  red   fox\na red fox\nsnow &amp; snow\nsnow & snow\n")
    assert clean_prompt("snow &amp; snow") == "snow & snow"
    found = opened(inputs.embed(inputs.folder / "spaced", prompts=prompts))
    assert found[0] == "a  red   fox"
    embeddings = found.embeddings(range(4))
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-5)
    np.testing.assert_allclose(embeddings[2], embeddings[3], atol=1e-5)
