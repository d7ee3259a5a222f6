"""What a folder of videos holds: links are followed and end, and names are the same in any Unicode form."""

import json
import unicodedata

import numpy as np
import pytest
from evaluation.clips import moving, write_video

from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.folders import list_files, read_captions, scan_folder, walk_files
from adastate_jax.data.footage import ClipConfig
from adastate_jax.data.videos import videos
from adastate_jax.evaluate import find_videos
from adastate_jax.evaluation.vbench import ExportConfig, match_files, plan_export
from adastate_jax.files import existing_name
from adastate_jax.media import read_last_frames


def names(folder):
    return [path.as_posix() for path in walk_files(folder)]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for path in (folder / "own" / "a.mp4", elsewhere / "deep" / "b.mp4", folder / ".hidden" / "c.mp4"):
        path.parent.mkdir(parents=True)
        path.touch()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "own" / "self").symlink_to(".")
    (folder / "also own").symlink_to("own")  # entered once, under its own name
    (folder / "round").symlink_to("round")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "file.mp4").symlink_to(elsewhere / "deep" / "b.mp4")
    assert names(folder) == ["dangling", "file.mp4", "linked/deep/b.mp4", "own/a.mp4", "round"]
    assert list_files(folder) == names(folder)
    found = [path.relative_to(folder).as_posix() for path, _ in find_videos([folder])]
    assert found == ["file.mp4", "own/a.mp4"]  # the linked b.mp4 is the one that was named before


def test_a_folder_whose_parts_link_to_one_another_is_walked_in_linear_time(tmp_path):
    """Twenty folders with two links each to the next: a million paths to the last."""
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        for name in ("x", "y"):
            (tmp_path / str(number) / name).symlink_to(tmp_path / str(number + 1))
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "a.mp4").touch()
    assert names(tmp_path / "0") == ["x/" * 20 + "a.mp4"]


COMPOSED, DECOMPOSED = "Angélique läuft", unicodedata.normalize("NFD", "Angélique läuft")


@pytest.mark.parametrize(("on_disk", "typed"), [(DECOMPOSED, COMPOSED), (COMPOSED, DECOMPOSED)])
def test_names_are_the_same_in_any_unicode_form(tmp_path, on_disk, typed):
    folder = tmp_path / on_disk
    folder.mkdir()
    video = write_video(folder / f"{on_disk}.mp4", moving(16, 16, 20))
    write_video(folder / f"{on_disk} 2.mp4", moving(16, 16, 20))
    (folder / f"{typed}.txt").write_text("beside")
    (folder / "captions.json").write_text(json.dumps({f"{typed} 2.mp4": "in the table"}))
    asked = tmp_path / typed
    assert existing_name(asked / f"{typed}.mp4") == video
    files = list_files(asked)
    assert files == [f"{on_disk} 2.mp4", f"{on_disk}.mp4"]
    assert list(read_captions(asked, files).values()) == ["in the table", "beside"]
    usable, skipped = scan_folder(asked, ClipConfig(8, 8, 8))
    assert [file.caption for file in usable] == ["in the table", "beside"]
    assert skipped == []
    assert len(find_videos([asked])) == 2
    assert len(read_last_frames(asked / f"{typed}.mp4", 3, 8, 8)) == 3
    source = open_source(videos(asked, ClipConfig(8, 8, 8)), tmp_path / "cache", "train")
    assert set(read_batch(source, np.arange(len(source)))["caption"]) == {"in the table", "beside"}


def test_the_exact_name_goes_before_its_like(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / name).write_text(name)
        assert existing_name(tmp_path / name).read_text() == name
    assert existing_name(tmp_path / "none") == tmp_path / "none"
    assert existing_name("none/none").as_posix() == "none/none"


def test_prompts_find_their_videos_in_any_unicode_form(tmp_path):
    for number, name in enumerate((COMPOSED, DECOMPOSED)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / f"{name}-0.mp4").touch()
        for prompt in (COMPOSED, DECOMPOSED):
            (slot,) = plan_export([prompt], ExportConfig(samples=1))
            files, unmatched = match_files(tmp_path / str(number), [slot])
            assert files == {slot: tmp_path / str(number) / f"{name}-0.mp4"}
            assert unmatched == []


def test_damaged_videos_among_good_ones_are_left_out_of_the_data_set_by_name(tmp_path, capsys):
    folder = tmp_path / "videos"
    good = write_video(folder / "good.mp4", moving(16, 16, 32))
    whole = good.read_bytes()
    for number, part in enumerate((0.1, 0.5, 0.8)):
        (folder / f"cut {number}.mp4").write_bytes(whole[: int(part * len(whole))])
    (folder / "a\x1b[31mb.mp4").write_bytes(whole)
    source = open_source(videos(folder, ClipConfig(8, 8, 8)), tmp_path / "cache", "train")
    assert len(source) == 4
    assert set(read_batch(source, np.arange(4))["source"]) == {"good.mp4"}
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped " in line]
    assert sum("skipped cut " in line for line in said) == 3
    assert sum("skipped a\\x1b[31mb.mp4: its name has characters that cannot be printed" in line for line in said) == 1
