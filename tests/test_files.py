"""Files that are whole or not there."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adastate_jax import files
from adastate_jax.files import claimed, numbered_name, whole_file, whole_folder, write_text
from adastate_jax.hidden_names import remove_leftovers, temporary_name


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
    for name in ("out.mp4", "out-2.mp4", "é" * 125 + ".mp4"):
        write_text(tmp_path / name, "there")
    for name, free in (("out.mp4", "out-3.mp4"), ("é" * 125 + ".mp4", "é" * 124 + "-2.mp4")):
        with claimed(tmp_path / name, numbered=True) as path:
            assert path == tmp_path / free
            write_text(path, "as long as a name can be")
    assert numbered_name(Path("a/b.c.mp4"), 1) == Path("a/b.c.mp4")


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


EXCHANGING = """
import os, sys
from pathlib import Path
from adastate_jax import files

at_once, when = files._exchange_at_once, sys.argv[2]
if when != "exchanged":
  files._exchange_at_once = lambda folder, path: False  # as on a file system that cannot
  rename = Path.rename

  def rename_and_die(path, target):
    rename(path, target)
    rename_and_die.left -= 1
    if not rename_and_die.left:
      os._exit(9)

  rename_and_die.left = int(when)
  Path.rename = rename_and_die
else:
  def exchange_and_die(folder, path):
    assert at_once(folder, path)
    os._exit(9)
  files._exchange_at_once = exchange_and_die
with files.whole_folder(sys.argv[1], lambda name: True) as temporary:
  (temporary / "new.txt").write_text("new")
"""


@pytest.mark.parametrize(
    ("when", "kept"), [("1", "old.txt"), ("2", "new.txt"), ("3", "new.txt"), ("exchanged", "new.txt")]
)
def test_a_kill_while_a_folder_takes_the_place_of_another_loses_neither(tmp_path, when, kept):
    """Between any two steps one of both is there, or is given its name back by the next writer."""
    path = tmp_path / "report"
    path.mkdir()
    (path / "old.txt").write_text("old")
    done = subprocess.run([sys.executable, "-c", EXCHANGING, str(path), when], check=False)
    assert done.returncode == 9
    assert path.exists() == (when != "1")
    with pytest.raises(OSError, match=f"it holds '{kept}', which is of another kind"), whole_folder(path):
        pytest.fail("there is a folder of another kind")
    assert os.listdir(path) == [kept]
    with whole_folder(path, lambda name: True) as temporary:
        (temporary / "newer.txt").write_text("newer")
    assert os.listdir(path) == ["newer.txt"]
    assert os.listdir(tmp_path) == ["report"]


def test_a_folder_whose_owner_lives_is_not_given_back(tmp_path, monkeypatch):
    path = tmp_path / "report"
    path.mkdir()
    (path / "old.txt").write_text("old")
    monkeypatch.setattr(files, "_exchange_at_once", lambda folder, path: False)
    rename = Path.rename

    def rename_beside_another(folder, target):
        rename(folder, target)
        if folder == path:
            files.give_back(path)
            assert not path.exists()

    monkeypatch.setattr(Path, "rename", rename_beside_another)
    with whole_folder(path, lambda name: True) as temporary:
        (temporary / "new.txt").write_text("new")
    assert os.listdir(path) == ["new.txt"]
    assert os.listdir(tmp_path) == ["report"]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_comes_into_a_folder_at_the_last_moment_is_kept(tmp_path, monkeypatch, at_once):
    path = tmp_path / "report"
    path.mkdir()
    exchange, left = files._exchange_at_once, [path / "notes.txt"]

    def exchange_late(folder, path):
        if left:
            left.pop().write_text("mine")
        return at_once and exchange(folder, path)

    monkeypatch.setattr(files, "_exchange_at_once", exchange_late)

    def fill():
        with whole_folder(path) as temporary:
            (temporary / "new.txt").write_text("new")

    with pytest.raises(OSError, match="it holds 'notes"):
        fill()
    assert os.listdir(path) == ["notes.txt"]
    assert os.listdir(tmp_path) == ["report"]


def test_a_folder_that_is_in_use_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for path, message in (
        (".", "working folder"),
        ("..", "working folder"),
        ("new/..", "working folder"),
        ("../../a", "working folder"),
        ("/", "names no file"),
        ("/proc", "is a mount point"),
    ):
        with pytest.raises(OSError, match=message), whole_folder(path, lambda name: True):
            pytest.fail("it is in use")
    for path in ("/", ".", ".."):
        with pytest.raises(OSError, match=r"names no file|Is a directory"), whole_file(path):
            pytest.fail("it is no name of a file")
        with pytest.raises(OSError, match="names no file or folder"), claimed(path):
            pytest.fail("it is no name")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_during_the_work_is_kept(tmp_path, monkeypatch, links):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", refuse)
    path, names = tmp_path / "out.mp4", []
    for _ in range(3):
        with whole_file(path, replace=False, written=names.append) as temporary:
            temporary.write_text("mine")
            if not names:
                write_text(path, "somebody else's")
    assert names == [tmp_path / f"out-{number}.mp4" for number in (2, 3, 4)]
    assert path.read_text() == "somebody else's"
    assert {name.read_text() for name in names} == {"mine"}
    assert len(os.listdir(tmp_path)) == 4
    assert write_text(path, "mine") == path
    assert path.read_text() == "mine"
    assert write_text(path, "mine again", replace=False) == tmp_path / "out-5.mp4"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    with whole_file(path) as temporary:
        assert temporary.stat().st_mode & 0o077 & ~mode == 0  # nobody reads the new one who could not read the old
        temporary.write_text("new")
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_text() == "new"


def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """Every file before the rename, every folder after its files, and the folder above when all is done."""
    synced, fsync = [], os.fsync

    def sync(descriptor):
        fsync(descriptor)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((name.name.partition(".")[0] or "temporary", path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    path = tmp_path / "a.txt"
    write_text(path, "text")
    assert synced == [("temporary", False), (tmp_path.name, True)]
    synced.clear()
    path = tmp_path / "folder"
    with whole_folder(path) as temporary:
        (temporary / "in").mkdir()
        (temporary / "in" / "b.txt").touch()
    assert synced == [("b", False), ("in", False), ("temporary", False), (tmp_path.name, True)]


def test_a_link_to_a_folder_is_written_through(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with whole_folder(tmp_path / "link") as temporary:
        (temporary / "a.txt").touch()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "target") == ["a.txt"]
