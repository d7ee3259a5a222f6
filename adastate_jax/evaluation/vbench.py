"""Videos in the folders that VBench and VBench-Long read.

Their loaders (vbench/__init__.py and vbench2_beta_long/__init__.py, `build_full_info_json`) are particular, and mostly
silent about what they do not find:

- standard: a flat folder of `{prompt}-{i}.mp4`, i = 0 … 4, with the exact short prompt of VBench_full_info.json. The
  suffix is that of the *first directory entry*, so nothing else may lie there. A missing file is only warned about.
- custom: every .mp4 in a flat folder is judged, with its prompt from a file given as `--prompt_file`.
- Long cuts videos into clips named after them and splits those names at `_`, so names must not hold one. It takes no
  file of prompts: in its custom layout, only dimensions without a prompt mean anything.

So the list of what was exported lies beside the folder, as do the prompts and unfinished files.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import av
import numpy as np

from adastate_jax.data.decoding import Unusable, best_stream, open_video, read_header, reasons
from adastate_jax.data.folders import list_files, read_captions
from adastate_jax.data.prompts import read_prompts as read_lines
from adastate_jax.errors import UserError
from adastate_jax.evaluation.measure import upright_frames
from adastate_jax.files import temporary_folder, write_text
from adastate_jax.media import FPS, VideoWriter
from adastate_jax.texts import parse_json, read_text

STANDARD_SAMPLES = 5
STANDARD_SIZE = (480, 832)
_MAX_NAME = 255  # bytes of a file name, on every common file system
# Folders that VBench-Long makes among the videos; the last one is spelt so.
_LONG_FOLDERS = {"split_clip", "split_scene", "temporal_filtered_cilps"}
# Where VBench-Long cuts the names of its clips to find the video that they belong to.
_LONG_SEPARATORS = ("_", "-Scene", ".mp4")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The layout: standard or `custom`, for VBench or VBench-`long`, with `samples` videos per prompt.

    Sample i of prompt p has the seed `seed` + p · `samples` + i: VBench asks for another one in every video. Raises
    `UserError` naming the field when a value makes no sense.
    """

    samples: int = STANDARD_SAMPLES
    custom: bool = False
    long: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}: give at least 1")
        if self.samples > STANDARD_SAMPLES and not self.custom and not self.long:
            raise UserError(f"samples is {self.samples}: VBench reads {STANDARD_SAMPLES} per prompt, give no more")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give a non-negative integer")


@dataclasses.dataclass(frozen=True)
class Slot:
    """A video that VBench looks for: its file name, the short prompt that it is judged by, the text that it is
    generated from (the extended prompt, if there is one), its prompt's line, its number among the samples, its seed."""

    file: str
    prompt: str
    text: str
    line: int
    sample: int
    seed: int


# --- the plan -----------------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line (VBench's all_dimension.txt), or of a VBench_full_info.json.

    Raises `UserError` as `adastate_jax.data.prompts.read_prompts` does, and for JSON that is not VBench's.
    """
    path = Path(path)
    if path.suffix != ".json":
        return read_lines(path)
    listed = parse_json(read_text(path), str(path))
    try:
        return [entry["prompt_en"] for entry in listed]
    except (KeyError, TypeError):
        raise UserError(f'{path}: is no list of {{"prompt_en": ...}}; give VBench_full_info.json') from None


def plan_export(
    prompts: Sequence[str], config: ExportConfig = ExportConfig(), extended: Sequence[str] | None = None
) -> list[Slot]:
    """All videos that VBench looks for, prompt by prompt.

    `extended` are the prompts to generate from, in the order of `prompts`. A prompt that is listed twice is one prompt,
    as it is for VBench. Raises `UserError` where lists differ in length or a prompt cannot be a file name.
    """
    if extended is not None and len(extended) != len(prompts):
        raise UserError(f"{len(extended)} extended prompts for {len(prompts)} prompts: give one for each, in order")
    texts = prompts if extended is None else extended
    slots = []
    for prompt in dict.fromkeys(prompts):
        line = prompts.index(prompt)
        stem = f"{line:04d}" if config.custom else prompt
        _check_stem(stem, line, config.long)
        for sample in range(config.samples):
            numbered = config.samples > 1 or not config.custom
            file = f"{stem}-{sample}.mp4" if numbered else f"{stem}.mp4"
            slots.append(Slot(file, prompt, texts[line], line, sample, config.seed + line * config.samples + sample))
    return slots


def _check_stem(stem, line, long):
    where = f"prompt {line + 1}, {stem[:40]!r}"
    if len(f"{stem}-0.mp4".encode()) > _MAX_NAME:
        raise UserError(f"{where}…: makes a file name of over {_MAX_NAME} bytes; use the custom layout")
    if "/" in stem or "\0" in stem or stem.startswith("."):
        raise UserError(f"{where}: cannot be a file name; use the custom layout")
    forbidden = [part for part in _LONG_SEPARATORS if part in stem]
    if long and forbidden:
        raise UserError(f"{where}: holds {forbidden[0]!r}, where VBench-Long splits names; use the custom layout")


# --- writing ------------------------------------------------------------------------------------------------------


def manifest_path(folder: str | Path) -> Path:
    """Where the list of what is exported into `folder` lies: beside it."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.manifest.json")


def prompt_file_path(folder: str | Path) -> Path:
    """Where the custom layout's prompts lie, for VBench's `--prompt_file`: beside `folder`."""
    folder = Path(folder)
    return folder.with_name(f"{folder.name}.prompts.json")


def export_generated(
    folder: str | Path,
    slots: Sequence[Slot],
    config: ExportConfig,
    generate: Callable[[str, int], Iterable[np.ndarray]],
    source: Mapping[str, object],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Generates every video that is not there yet, at 16 frames per second.

    `generate` maps (text, seed) to pieces of a video, uint8 `[F, H, W, 3]` with H and W even; `source` says what it
    generates with, as JSON; `advance` is called after every slot, also one that was there. Interrupted at any point and
    started again, it goes on: files have their names only when they are complete. Raises `UserError` where the folder
    holds an export of another plan or source.
    """

    def write(slot, path):
        with VideoWriter(path, FPS) as writer:
            for frames in generate(slot.text, slot.seed):
                writer.write(frames)

    _export(Path(folder), slots, config, source, write, advance)


def export_files(
    folder: str | Path,
    slots: Sequence[Slot],
    config: ExportConfig,
    files: Mapping[Slot, Path],
    advance: Callable[[], None] = lambda: None,
) -> list[tuple[Path, str]]:
    """Copies every video that is not there yet from `files`; slots that it lacks are left out.

    An .mp4 of H.264 in yuv420p is copied byte by byte, anything else is encoded anew at its own frame rate. Resumes as
    `export_generated` does.

    Returns:
        The files that were left out because they cannot be read, and why.

    Raises:
        UserError: the folder holds an export of another plan, or one that was generated.
    """
    skipped = []

    def write(slot, path):
        source = files[slot]
        try:
            with reasons(source):
                header = read_header(source)
            if (source.suffix, header.codec, header.pixel_format) == (".mp4", "h264", "yuv420p"):
                shutil.copyfile(source, path)
            else:
                _encode_anew(source, path, header.fps)
        except Unusable as reason:
            skipped.append((source, str(reason)))

    _export(Path(folder), slots, config, {}, write, advance, lambda slot: slot in files)
    return skipped


def _export(folder, slots, config, source, write, advance, available=lambda slot: True):
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, slots, config, source)
    # Beside the folder, for VBench would take an unfinished file in it for a video.
    with temporary_folder(folder) as scratch:
        for slot in slots:
            if available(slot) and not (folder / slot.file).exists():
                unfinished = scratch / "video.mp4"
                write(slot, unfinished)
                if unfinished.exists():
                    unfinished.replace(folder / slot.file)
            advance()


def _write_manifest(folder, slots, config, source):
    content = {**dataclasses.asdict(config), "source": source, "videos": [dataclasses.asdict(slot) for slot in slots]}
    path = manifest_path(folder)
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == content
        except ValueError:
            same = False
        if not same and any(folder.iterdir()):
            raise UserError(f"{folder}: holds an export of other prompts or settings ({path.name}); name a new folder")
    _write_json(path, content)
    if config.custom:
        _write_json(prompt_file_path(folder), {slot.file: slot.prompt for slot in slots})


def _write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


def _encode_anew(source, path, fps):
    with VideoWriter(path, fps) as writer, reasons(source):
        for _, frame in upright_frames(source):
            height, width, _ = frame.shape
            writer.write(frame[None, : height // 2 * 2, : width // 2 * 2])  # H.264 in yuv420p has even sides


# --- finding the videos of a folder -------------------------------------------------------------------------------


def match_files(source: str | Path, slots: Sequence[Slot]) -> tuple[dict[Slot, Path], list[str]]:
    """Which file of a folder belongs to which slot: (files by slot, names that belong to none).

    A file's prompt, short or extended, is its caption (`captions.json` or `NAME.txt`, as for training data; such files
    become the samples that are still free, in order of name), or its name is `{prompt}-{sample}`, `{prompt}`,
    `{line}-{sample}` or `{line}`, lines counted from 0. Raises `UserError` where the folder holds nothing, or two files
    claim a slot.
    """
    source = Path(source)
    names = list_files(source)
    captions = read_captions(source, names)
    lines = {_composed(text): slot.line for slot in slots for text in (slot.text, slot.prompt)}
    by_place = {(slot.line, slot.sample): slot for slot in slots}
    files: dict[Slot, Path] = {}
    unmatched = []
    for name in sorted(names, key=lambda name: captions[name] != ""):
        if captions[name]:
            line = lines.get(_composed(captions[name]))
            sample = next(sample for sample in itertools.count() if by_place.get((line, sample)) not in files)
        else:
            line, sample = _place(_composed(Path(name).stem), lines)
        slot = by_place.get((line, sample))
        if slot is None:
            unmatched.append(name)
        elif slot in files:
            raise UserError(
                f"{source / name} and {files[slot].name} are both sample {sample} of one prompt: remove one"
            )
        else:
            files[slot] = source / name
    return files, unmatched


def _composed(text):
    """In one Unicode normal form: systems differ in that of file names."""
    return unicodedata.normalize("NFC", text)


def _place(stem, lines):
    """(line, sample) that a file's name tells, (None, 0) for nothing."""
    prompt, _, number = stem.rpartition("-")
    if prompt in lines and number.isdecimal():
        return lines[prompt], int(number)
    if stem in lines:
        return lines[stem], 0
    numbered = re.fullmatch(r"(\d+)(?:-(\d+))?", stem)
    return (int(numbered[1]), int(numbered[2] or 0)) if numbered else (None, 0)


# --- checking -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """What a check found, a line each: files that VBench would miss, problems that would falsify its result, and notes
    on what is unusual but may be meant."""

    missing: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def check_export(
    folder: str | Path, slots: Sequence[Slot], config: ExportConfig, advance: Callable[[], None] = lambda: None
) -> Check:
    """Compares a folder with what VBench looks for; reads every file, and calls `advance` after each slot.

    Raises `UserError` where the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; export into it first")
    present = os.listdir(folder)  # in the order in which VBench sees it
    expected = {slot.file for slot in slots} | (_LONG_FOLDERS if config.long else set())
    problems = [
        f"{name}: does not belong here; VBench may take its suffix for that of all videos, or judge it"
        for name in sorted(set(present) - expected)
    ]
    if present and present[0] in _LONG_FOLDERS & expected:
        problems.append(f"{present[0]}: is the first entry, whose suffix VBench-Long expects of all; remove it")
    if config.custom:
        problems += _check_prompt_file(folder, slots)
    missing = []
    shapes: dict[tuple, list[str]] = {}
    for slot in slots:
        if slot.file not in present:
            missing.append(slot.file)
        else:
            try:
                shapes.setdefault(_shape(folder / slot.file), []).append(slot.file)
            except (av.FFmpegError, OSError, ValueError) as error:
                problems.append(f"{slot.file}: cannot be read ({error}); remove it and export again")
        advance()
    return Check(tuple(missing), tuple(problems), tuple(_unusual(shapes)))


def _shape(path):
    """Height, width, frames per second and number of frames; raises `ValueError` where the file is cut short."""
    header = read_header(path)
    with open_video(path) as container:
        held = sum(packet.size > 0 and not packet.is_discard for packet in container.demux(best_stream(container)))
    if held < header.num_frames:
        raise ValueError(f"it ends after {held} of its {header.num_frames} frames")
    return header.height, header.width, round(float(header.fps), 3), header.num_frames


def _unusual(shapes):
    if not shapes:
        return
    usual = max(shapes, key=lambda shape: len(shapes[shape]))
    for shape, names in shapes.items():
        if shape != usual:
            yield f"{len(names)} like {names[0]} have {_describe(*shape)}; most have {_describe(*usual)}"
    height, width, fps, _ = usual
    if fps != FPS:
        yield f"{fps:g} frames per second; VBench's dynamic degree depends on it, and Wan has {FPS}"
    if (height, width) != STANDARD_SIZE:
        yield f"{width} x {height} pixels; Wan has {STANDARD_SIZE[1]} x {STANDARD_SIZE[0]}"


def _check_prompt_file(folder, slots):
    path = prompt_file_path(folder)
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [f"{path.name}: is not beside the folder, for --prompt_file; export again"]
    if listed != {slot.file: slot.prompt for slot in slots}:
        return [f"{path.name}: does not list these videos and prompts; export again"]
    return []


def _describe(height, width, fps, count):
    return f"{width} x {height} pixels, {count} frames, {fps:g} per second"
