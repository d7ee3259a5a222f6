"""Files that are whole or not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adastate_jax.files import (
    claimed,
    free_name,
    remove_leftovers,
    temporary_name,
    whole_file,
    whole_folder,
    write_text,
)


def test_a_file_is_there_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    with whole_file(path) as temporary:
        temporary.write_text("all of it")
        assert temporary.parent == path.parent
        assert temporary.suffix == ".mp4"  # so that libraries which go by the ending write the right thing
        assert not path.exists()
    assert path.read_text() == "all of it"

    def break_off() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half of i")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert path.read_text() == "all of it"
    assert os.listdir(path.parent) == ["a.mp4"]


def test_two_writers_of_one_name_share_nothing(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as one:
        one.write_text("one")
        with whole_file(path) as other:
            assert one != other
            other.write_text("other")
        assert path.read_text() == "other"
        assert one.read_text() == "one"  # the second took nothing of the first, which lives, for a leftover
    assert path.read_text() == "one"


def test_what_a_dead_process_left_is_removed_and_what_others_named_alike_stays(tmp_path):
    path = tmp_path / "a.mp4"
    code = (
        "import os, sys; from adastate_jax.files import whole_file\n"
        "with whole_file(sys.argv[1]) as temporary:\n  temporary.write_text('half'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    near = temporary_name(tmp_path / "a.b.mp4")
    near.write_text("of another file")
    remove_leftovers(path)
    assert os.listdir(tmp_path) == [near.name]


def test_a_link_is_written_through_and_a_planted_one_is_not_followed(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("old")
    (tmp_path / "link.txt").symlink_to(target)
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("name", ["x" * 251 + ".mp4", "é" * 125 + ".mp4", "x" * 255])
def test_any_name_that_the_file_system_takes_is_written(tmp_path, name):
    write_text(tmp_path / name, "long")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "long"


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "a"):
        pytest.fail("there is no file to write")


def test_a_name_that_is_taken_is_numbered(tmp_path):
    path = tmp_path / "out.mp4"
    assert free_name(path) == path
    for name in ("out.mp4", "out-2.mp4"):
        write_text(tmp_path / name, "there")
    assert free_name(path) == tmp_path / "out-3.mp4"
    write_text(tmp_path / ("é" * 125 + ".mp4"), "there")
    write_text(free_name(tmp_path / ("é" * 125 + ".mp4")), "as long as a name can be")


def test_nobody_claims_a_name_that_another_has_claimed(tmp_path):
    path = tmp_path / "new" / "out.mp4"
    with claimed(path) as mine, claimed(path, numbered=True) as other, claimed(path, numbered=True) as third:
        assert [mine.name, other.name, third.name] == ["out.mp4", "out-2.mp4", "out-3.mp4"]
        assert not mine.exists()
        with pytest.raises(BlockingIOError), claimed(path):
            pytest.fail("it is claimed")
        write_text(other, "written")
    assert os.listdir(path.parent) == ["out-2.mp4"]
    other.unlink()
    with claimed(path, numbered=True) as free:
        assert free == path
    with claimed(tmp_path / "newer" / "still" / "out.mp4"):
        pass
    assert os.listdir(tmp_path) == ["new"]  # nothing came into the newer one


def test_what_cannot_be_written_cannot_be_claimed(tmp_path):
    write_text(tmp_path / "file", "no folder")
    for path in (tmp_path / "file" / "out.mp4", tmp_path / ("x" * 256), Path("/proc/out.mp4")):
        with pytest.raises(OSError, match=r"directory|name too long|exists"), claimed(path):
            pytest.fail("it cannot be written")


def test_a_folder_is_there_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "report"
    with whole_folder(path) as temporary:
        (temporary / "a.txt").write_text("all of it")
        assert not path.exists()
    assert os.listdir(path.parent) == ["report"]

    def break_off() -> None:
        with whole_folder(path, lambda name: name == "a.txt") as temporary:
            (temporary / "a.txt").write_text("half of i")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert (path / "a.txt").read_text() == "all of it"
    with whole_folder(path, lambda name: name == "a.txt") as temporary:
        (temporary / "b.txt").write_text("other")
    assert os.listdir(path) == ["b.txt"]
    assert os.listdir(path.parent) == ["report"]


def test_a_folder_takes_the_place_of_its_like_and_of_nothing_else(tmp_path):
    path = tmp_path / "report"
    (path / "mine").mkdir(parents=True)
    for replaces in (lambda name: False, lambda name: True):  # a folder in it is never of the same kind
        with pytest.raises(OSError, match="it holds 'mine', which is of another kind"), whole_folder(path, replaces):
            pytest.fail("it must be refused before any work")
    (path / "mine").rmdir()

    def fill_meanwhile() -> None:
        with whole_folder(path) as temporary:
            (temporary / "a.txt").write_text("a report")
            (path / "notes.txt").write_text("mine")

    with pytest.raises(OSError, match=r"it holds 'notes\.txt'"):
        fill_meanwhile()
    assert os.listdir(tmp_path) == ["report"]
    assert os.listdir(path) == ["notes.txt"]
    with pytest.raises(NotADirectoryError), whole_folder(path / "notes.txt"):
        pytest.fail("there is a file")


def test_a_folder_of_a_dead_process_is_removed_and_a_living_one_stays(tmp_path):
    path = tmp_path / "report"
    code = (
        "import os, sys; from adastate_jax.files import whole_folder\n"
        "with whole_folder(sys.argv[1]) as temporary:\n  (temporary / 'a').mkdir(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with whole_folder(path) as one:
        with whole_folder(path) as other:
            assert one != other
            assert sorted(os.listdir(tmp_path)) == sorted([one.name, other.name])
        assert one.is_dir()
    assert os.listdir(tmp_path) == ["report"]


def test_a_link_to_a_folder_is_written_through(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with whole_folder(tmp_path / "link") as temporary:
        (temporary / "a.txt").touch()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "target") == ["a.txt"]
