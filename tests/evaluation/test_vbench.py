"""Exports as VBench's loaders see them, written here again after the rules of its build_full_info_json."""

import json
import os
from pathlib import Path

import pytest
from evaluation.clips import moving, write_motion_jpeg, write_video

from adastate_jax.errors import UserError
from adastate_jax.evaluation.measure import read_header
from adastate_jax.evaluation.vbench import (
    ExportConfig,
    check_export,
    export_files,
    export_generated,
    manifest_path,
    match_files,
    plan_export,
    prompt_file_path,
    read_prompts,
)

PROMPTS = ["a cat, close-up", "Pan left - slowly"]
CLIP = moving(32, 48, 4, pan=(1.0, 0.0))


def generate(text, seed):
    yield CLIP[:2] // 2 + seed
    yield CLIP[2:]


def export(folder, slots, config, generate=generate, **options):
    export_generated(folder, slots, config, generate, {"checkpoint": "runs/a"}, **options)


def seen_by_vbench(folder, prompts):
    """Standard mode: the suffix is the first entry's; samples 0 to 4 of each prompt, by exact name."""
    names = os.listdir(folder)
    suffix = Path(names[0]).suffix
    wanted = {prompt: [f"{prompt}-{number}{suffix}" for number in range(5)] for prompt in prompts}
    return {prompt: [name for name in files if name in names] for prompt, files in wanted.items()}


def seen_by_vbench_custom(folder, prompt_file):
    """Custom mode with --prompt_file: every video in the folder, each of which must have a prompt."""
    listed = json.loads(Path(prompt_file).read_text())
    return {name: listed[name] for name in os.listdir(folder) if Path(name).suffix.lower() in (".mp4", ".gif")}


def seen_by_vbench_long(folder, prompts, samples):
    """Long standard mode: clips are named after their video and a number, and belong to the video that their name
    starts with, up to the first underscore."""
    names = os.listdir(folder)
    suffix = Path(names[0]).suffix
    stems = [name.replace(suffix, "") for name in names]
    clips = {name.split(".mp4")[0]: f"{name.split('.mp4')[0]}_000.mp4" for name in names}
    wanted = [f"{prompt}-{number}" for prompt in prompts for number in range(samples)]
    return [stem for stem in wanted if stem in clips and clips[stem].split("_")[0] in stems]


# --- layouts ------------------------------------------------------------------------------------------------------


def test_vbench_sees_five_videos_per_prompt_and_nothing_else(tmp_path):
    config = ExportConfig()
    folder = tmp_path / "videos"
    export(folder, plan_export(PROMPTS, config), config)
    assert [len(files) for files in seen_by_vbench(folder, PROMPTS).values()] == [5, 5]
    assert len(os.listdir(folder)) == 10
    header = read_header(folder / f"{PROMPTS[0]}-4.mp4")
    assert (header.fps, header.codec, header.pixel_format, header.num_frames) == (16, "h264", "yuv420p", 4)


def test_vbench_sees_numbered_videos_with_their_prompts(tmp_path):
    for samples, first in ((1, "0000.mp4"), (2, "0000-0.mp4")):
        config = ExportConfig(samples=samples, custom=True)
        folder = tmp_path / str(samples)
        export(folder, plan_export(PROMPTS, config), config)
        seen = seen_by_vbench_custom(folder, prompt_file_path(folder))
        assert seen[first] == PROMPTS[0]
        assert sorted(seen.values()) == sorted(PROMPTS * samples)


def test_vbench_long_finds_the_clips_of_every_video(tmp_path):
    config = ExportConfig(samples=2, long=True)
    folder = tmp_path / "videos"
    export(folder, plan_export(PROMPTS, config), config)
    assert len(seen_by_vbench_long(folder, PROMPTS, 2)) == 4


@pytest.mark.parametrize("prompt", ["snake_case", "a-Scene", "the file a.mp4 plays"])
def test_names_that_vbench_long_would_cut_are_refused(tmp_path, prompt):
    """The loader's rule loses them, or takes them for a scene of another video."""
    (tmp_path / f"{prompt}-0.mp4").touch()
    assert seen_by_vbench_long(tmp_path, [prompt], 1) == [] or "-Scene" in prompt
    with pytest.raises(UserError, match="where VBench-Long splits names; use the custom layout"):
        plan_export([prompt], ExportConfig(long=True))
    assert plan_export([prompt], ExportConfig(samples=1, long=True, custom=True))[0].file == "0000.mp4"
    assert len(plan_export([prompt])) == 5


@pytest.mark.parametrize("prompt", ["left/right", ".hidden", "x" * 260])
def test_prompts_that_cannot_be_file_names_are_refused(prompt):
    with pytest.raises(UserError, match=r"prompt 2, .*use the custom layout"):
        plan_export(["fine", prompt])


def test_every_video_has_its_own_seed_and_the_extended_text():
    slots = plan_export(PROMPTS, ExportConfig(seed=100), ["A cat. " * 60, "The camera pans."])
    assert [slot.seed for slot in slots] == list(range(100, 110))
    assert slots[0].text == "A cat. " * 60
    assert slots[0].file == "a cat, close-up-0.mp4"
    with pytest.raises(UserError, match="1 extended prompts for 2 prompts"):
        plan_export(PROMPTS, ExportConfig(), ["A cat."])


def test_a_prompt_listed_twice_is_one_prompt():
    slots = plan_export(["a", "b", "a"], ExportConfig(samples=1))
    assert [(slot.file, slot.line) for slot in slots] == [("a-0.mp4", 0), ("b-0.mp4", 1)]


def test_prompts_come_from_lines_or_from_vbench_s_list(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "full.json").write_text(json.dumps([{"prompt_en": text, "dimension": []} for text in PROMPTS]))
    assert read_prompts(tmp_path / "prompts.txt") == read_prompts(tmp_path / "full.json") == PROMPTS
    (tmp_path / "other.json").write_text('{"prompts": []}')
    with pytest.raises(UserError, match=r"other\.json: is no list of"):
        read_prompts(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.json")


@pytest.mark.parametrize("fields", [{"samples": 0}, {"samples": 6}, {"seed": -1}])
def test_settings_without_sense_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        ExportConfig(**fields)
    assert ExportConfig(samples=25, long=True).samples == 25  # its loader reads as many as it is told


# --- resuming -----------------------------------------------------------------------------------------------------


def test_an_interrupted_export_goes_on_where_it_stopped(tmp_path):
    config = ExportConfig(samples=2)
    slots = plan_export(PROMPTS, config)
    folder = tmp_path / "videos"
    made = []

    def until_the_third(text, seed):
        made.append(seed)
        yield CLIP
        assert set(os.listdir(folder)) <= {slot.file for slot in slots}  # nothing unfinished
        if len(made) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(folder, slots, config, until_the_third)
    assert sorted(os.listdir(folder)) == sorted(slot.file for slot in slots[:2])
    assert len(check_export(folder, slots, config).missing) == 2
    advanced = []
    export(folder, slots, config, until_the_third, advance=lambda: advanced.append(True))
    assert made == [0, 1, 2, 2, 3]
    assert len(advanced) == 4
    check = check_export(folder, slots, config)
    assert (check.missing, check.problems) == ((), ())
    assert sorted(os.listdir(tmp_path)) == ["videos", "videos.manifest.json"]


def test_a_folder_holds_one_export(tmp_path):
    config = ExportConfig(samples=1)
    folder = tmp_path / "videos"
    export(folder, plan_export(PROMPTS, config), config)
    with pytest.raises(UserError, match="holds an export of other prompts or settings"):
        export(folder, plan_export(PROMPTS[:1], config), config)
    with pytest.raises(UserError, match="holds an export of other prompts or settings"):
        export_generated(folder, plan_export(PROMPTS, config), config, generate, {"checkpoint": "runs/b"})
    assert len(json.loads(manifest_path(folder).read_text())["videos"]) == 2


# --- from files ---------------------------------------------------------------------------------------------------


def test_files_are_found_by_prompt_by_line_and_by_caption(tmp_path):
    slots = plan_export(PROMPTS, ExportConfig(samples=2), ["long text 0", "long text 1"])
    for name in (f"{PROMPTS[0]}-1", "0001-1", "0", "take", "stray", "captioned stray"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "take.txt").write_text("long text 1")
    (tmp_path / "captioned stray.txt").write_text("another text")
    files, unmatched = match_files(tmp_path, slots)
    assert {slot.file: path.name for slot, path in files.items()} == {
        f"{PROMPTS[0]}-0.mp4": "0.mp4",
        f"{PROMPTS[0]}-1.mp4": f"{PROMPTS[0]}-1.mp4",
        f"{PROMPTS[1]}-0.mp4": "take.mp4",
        f"{PROMPTS[1]}-1.mp4": "0001-1.mp4",
    }
    assert unmatched == ["stray.mp4", "captioned stray.mp4"]
    (tmp_path / "0000-1.mp4").touch()
    with pytest.raises(UserError, match="are both sample 1 of one prompt"):
        match_files(tmp_path, slots)


def test_plain_files_are_copied_and_others_encoded_anew(tmp_path):
    source = tmp_path / "source"
    plain = write_video(source / "0.mp4", CLIP)
    write_motion_jpeg(source / "1.avi", CLIP[:, :31, :47], fps=30000 / 1001)
    config = ExportConfig(samples=1)
    slots = plan_export(PROMPTS, config)
    folder = tmp_path / "videos"
    export_files(folder, slots, config, match_files(source, slots)[0])
    assert (folder / slots[0].file).read_bytes() == plain.read_bytes()
    header = read_header(folder / slots[1].file)
    assert (header.codec, header.pixel_format, header.height, header.width) == ("h264", "yuv420p", 30, 46)
    assert float(header.fps) == pytest.approx(30000 / 1001, rel=1e-4)
    assert header.num_frames == 4


def test_broken_sources_are_named_and_leave_nothing(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "0-0.mp4").write_bytes(b"no video")
    write_video(source / "1-0.mp4", moving(32, 48, 4))
    cut = write_motion_jpeg(source / "1-1.avi", moving(32, 48, 12))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    config = ExportConfig(samples=2)
    slots = plan_export(PROMPTS, config)
    files, _ = match_files(source, slots)
    (broken, _), (cut_off, reason) = export_files(tmp_path / "videos", slots, config, files)
    assert (broken.name, cut_off.name) == ("0-0.mp4", "1-1.avi")
    assert "cut off" in reason
    assert os.listdir(tmp_path / "videos") == [slots[2].file]


# --- checking -----------------------------------------------------------------------------------------------------


def test_the_check_lists_what_is_missing_foreign_and_broken(tmp_path):
    config = ExportConfig(samples=2)
    slots = plan_export(PROMPTS, config)
    folder = tmp_path / "videos"
    export(folder, slots, config)
    (folder / slots[0].file).unlink()
    whole = (folder / slots[1].file).read_bytes()
    (folder / slots[1].file).write_bytes(whole[: len(whole) - 300])
    (folder / "notes.json").touch()
    check = check_export(folder, slots, config)
    assert check.missing == (slots[0].file,)
    assert [problem.split(":")[0] for problem in check.problems] == ["notes.json", slots[1].file]
    with pytest.raises(UserError, match="no such folder"):
        check_export(tmp_path / "none", slots, config)


def test_the_check_notes_what_changes_vbench_s_numbers(tmp_path):
    config = ExportConfig(samples=1)
    slots = plan_export(PROMPTS, config)
    write_video(tmp_path / slots[0].file, CLIP, fps=24)
    write_video(tmp_path / slots[1].file, CLIP[:3], fps=24)
    notes = " ".join(check_export(tmp_path, slots, config).notes)
    assert "1 like" in notes
    assert "24 frames per second" in notes
    assert "48 x 32 pixels" in notes


def test_the_check_of_a_custom_layout_reads_its_prompts(tmp_path):
    config = ExportConfig(samples=1, custom=True)
    slots = plan_export(PROMPTS, config)
    folder = tmp_path / "videos"
    export(folder, slots, config)
    assert check_export(folder, slots, config).problems == ()
    prompt_file_path(folder).write_text(json.dumps({"0000.mp4": PROMPTS[0]}))
    assert "does not list these videos" in check_export(folder, slots, config).problems[0]
    prompt_file_path(folder).unlink()
    assert "is not beside the folder" in check_export(folder, slots, config).problems[0]


def test_the_check_knows_vbench_long_s_own_folders(tmp_path, monkeypatch):
    config = ExportConfig(samples=1, long=True)
    slots = plan_export(PROMPTS[:1], config)
    export(tmp_path / "videos", slots, config)
    (tmp_path / "videos" / "split_clip").mkdir()
    monkeypatch.setattr(os, "listdir", lambda path: [slots[0].file, "split_clip"])
    assert check_export(tmp_path / "videos", slots, config).problems == ()
    assert len(seen_by_vbench_long(tmp_path / "videos", PROMPTS[:1], 1)) == 1
    monkeypatch.setattr(os, "listdir", lambda path: ["split_clip", slots[0].file])
    assert seen_by_vbench_long(tmp_path / "videos", PROMPTS[:1], 1) == []
    assert "is the first entry" in check_export(tmp_path / "videos", slots, config).problems[0]
