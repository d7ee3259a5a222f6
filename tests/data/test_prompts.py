"""Laws of prompt files: what is read, in which order, and how a bad file is named."""

import pytest

from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.prompts import prompts, read_prompts
from adastate_jax.errors import UserError


def test_blank_lines_and_comments_are_skipped(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# ours\n\n  a red ball  \r\nun château\n#no\n", encoding="utf-8")
    assert read_prompts(file) == ["a red ball", "un château"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_whatever_an_editor_saved_is_read(tmp_path, encoding, end):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"un château{end}a line\u2028in two{end}".encode(encoding))
    assert read_prompts(file) == ["un château", "a line\u2028in two"]


def test_json_lines_give_their_prompt_field(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "# a hash is text here", "seed": 3}\n\n{"prompt": "two"}\n', encoding="utf-8")
    assert read_prompts(file) == ["# a hash is text here", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt: cannot be read"),
        ("empty.txt", b"", r"empty\.txt: has no prompts"),
        ("comments.txt", b"# only\n\n", r"comments\.txt: has no prompts"),
        ("latin.txt", b"fine\nch\xe2teau\n", r"latin\.txt: line 2 is not UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"bad\.jsonl: line 2: is not JSON"),
        ("other.jsonl", b'{"text": "a"}\n', r'other\.jsonl: line 1 has no text under "prompt"'),
        ("list.jsonl", b'["a"]\n', r'list\.jsonl: line 1 has no text under "prompt"'),
        ("blank.jsonl", b'{"prompt": " "}\n', r'blank\.jsonl: line 1 has no text under "prompt"'),
        ("half.jsonl", b'{"prompt": "\\ud800"}\n', r'half\.jsonl: line 1 has no text under "prompt"'),
        (
            "twice.jsonl",
            b'{"prompt": "a", "prompt": "b"}\n',
            r"line 1: is not JSON \(it names 'prompt' twice",
        ),
        ("deep.jsonl", b'{"prompt": ' + b"[" * 100_000, r"deep\.jsonl: line 1: is nested too deeply"),
        ("zeros.txt", b"a\0\n", r"zeros\.txt: holds zero bytes"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_the_dataset_keeps_the_order_and_follows_the_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    source = open_source(prompts(file), tmp_path / "cache", "train")
    assert read_batch(source, [1, 0, 1]) == {"prompt": ["two", "one", "two"]}
    file.write_text("one\nthree\n", encoding="utf-8")
    source = open_source(prompts(file), tmp_path / "cache", "train")
    assert read_batch(source, [1]) == {"prompt": ["three"]}
