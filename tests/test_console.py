"""How commands behave in a terminal: where output goes, what is said, how they end."""

import os

import pytest

from adastate_jax.console import CommandParser, claimed_output, output_argument
from adastate_jax.errors import UserError


def options_of(arguments, default="out.mp4"):
    parser = CommandParser(prog="x")
    output_argument(parser, "mp4 file", default)
    return parser.parse_args(arguments)


def claim(*arguments, **settings):
    with claimed_output(options_of(arguments), **settings) as path:
        return str(path)


def test_a_default_output_is_numbered_and_a_named_one_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert claim() == "out.mp4"
    (tmp_path / "out.mp4").touch()
    assert claim() == "out-2.mp4"
    assert claim("--overwrite") == "out.mp4"
    with pytest.raises(UserError, match=r"^--output=out.mp4: exists; name another, or add --overwrite"):
        claim("--output=out.mp4")
    assert claim("--output=out.mp4", "--overwrite") == "out.mp4"
    assert claim("--output=out.mp4", number=3) == "out-3.mp4"
    with pytest.raises(UserError, match="required: --output"):
        options_of([], default=None)
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.html").touch()
    assert claim("--output=folder", folder=True) == "folder"
    for arguments, folder, message in (
        (["--output=folder"], False, "folder: is a folder; name a file"),
        (["--output=file", "--overwrite"], True, "file: is a file; name a folder"),
        (["--output=full"], True, "full: exists; name another, or add --overwrite"),
        (["--output=file/x.mp4"], False, r"file/x.mp4: cannot be written \(File exists\)"),
        (["--output=/proc/x.mp4"], False, "/proc/x.mp4: cannot be written"),
        ([f"--output={'x' * 252}.mp4"], False, r"cannot be written \(File name too long\)"),
    ):
        with pytest.raises(UserError, match=message):
            claim(*arguments, folder=folder)
    with claimed_output(options_of(["--output=new.mp4"])), pytest.raises(UserError, match="another process is writing"):
        claim("--output=new.mp4")
