"""Folders of videos: their files, their captions, and which clips they hold.

Captions come from `captions.json` in the folder ({"file name": "caption"}), or from `NAME.txt` beside the video
`NAME.mp4`. Names are the same in any Unicode normal form: macOS decomposes letters with accents, other systems do not.
"""

import dataclasses
import json
import os
import pathlib
import sys
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from adastate_jax.console import progress
from adastate_jax.data.decoding import Unusable, reasons
from adastate_jax.data.footage import ClipConfig, clip_frames, scan_footage
from adastate_jax.errors import UserError, one_line
from adastate_jax.files import existing_name


@dataclasses.dataclass(frozen=True)
class FileClips:
    """The clips of one file: its name within the folder, its caption, start times `[C]` in seconds and the numbers of
    the frames that make each clip, int64 `[C, F]`."""

    name: str
    caption: str
    starts: np.ndarray
    frames: np.ndarray


def walk_files(folder: str | os.PathLike) -> list[pathlib.PurePath]:
    """All files in a folder and its subfolders, relative to it and sorted; hidden names are left out.

    Links to folders are followed. Each folder is entered once, under its own name if it has one in there, so that links
    may go in circles.
    """
    found, entered = [], set()
    waiting, links = [pathlib.Path(folder)], []
    while waiting or links:
        inside = (waiting or links).pop(0)
        try:
            place = inside.stat()
            if (place.st_dev, place.st_ino) in entered:
                continue
            entered.add((place.st_dev, place.st_ino))
            entries = sorted(os.scandir(inside), key=lambda entry: entry.name)
        except OSError:  # it went, or is nobody's to read: nothing in there can be used
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = inside / entry.name
            if not _is_folder(entry):
                found.append(path.relative_to(folder))
            elif entry.is_symlink():
                links.append(path)
            else:
                waiting.append(path)
    return sorted(found)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in circles
        return False


def list_files(folder: str | os.PathLike) -> list[str]:
    """The names of the files that may be videos, relative to `folder`, sorted; hidden files and captions left out.

    Links to folders are followed. Raises `UserError` if the folder is missing or holds no such file.
    """
    folder = existing_name(folder)
    if not folder.is_dir():
        raise UserError(f"video folder {folder} does not exist or is no folder: give a folder of video files")
    names = walk_files(folder)
    videos = [name for name in names if name.suffix != ".txt" and name.as_posix() != "captions.json"]
    if not videos:
        raise UserError(f"video folder {folder} holds no video files: put some there, or give another folder")
    return [name.as_posix() for name in videos]


def read_captions(folder: str | os.PathLike, names: Sequence[str]) -> dict[str, str]:
    """Captions by file name, "" for a file without; `captions.json` goes before `NAME.txt`.

    Raises `UserError` for a caption file that is not UTF-8, or a `captions.json` that is not {"file": "caption"} or
    names a file that is not there.
    """
    folder = existing_name(folder)
    captions = dict.fromkeys(names, "")
    texts = {_composed(path.as_posix()): path for path in walk_files(folder) if path.suffix == ".txt"}
    for name in names:
        beside = texts.get(_composed(pathlib.PurePath(name).with_suffix(".txt").as_posix()))
        if beside is not None and (folder / beside).is_file():
            captions[name] = " ".join(_read_text(folder / beside).split())
    table = folder / "captions.json"
    if table.is_file():
        try:
            listed = json.loads(_read_text(table))
        except json.JSONDecodeError as error:
            raise UserError(
                f'{table}, line {error.lineno} is not JSON ({error.msg}): write {{"file": "caption"}}'
            ) from error
        except RecursionError:
            raise UserError(f'{table} is nested too deeply: write {{"file": "caption"}}') from None
        if not isinstance(listed, dict) or not all(isinstance(caption, str) for caption in listed.values()):
            raise UserError(f'{table} is not an object of texts: write {{"file": "caption"}}')
        composed = {_composed(name): name for name in names}
        for named, caption in listed.items():
            name = named if named in captions else composed.get(_composed(named))
            if name is None:
                raise UserError(f"{table} captions {named!r}, which is not in the folder: correct or remove the entry")
            captions[name] = " ".join(caption.split())
    return captions


def _composed(name):
    return unicodedata.normalize("NFC", name)


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"caption file {path} is not UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"caption file {path} cannot be read ({error.strerror})") from error


def scan_folder(folder: str | os.PathLike, config: ClipConfig) -> tuple[list[FileClips], list[str]]:
    """Finds all clips of a folder: (files with at least one clip, in order of name; one line per skipped file).

    A skipped file's line names it and says why: unreadable, damaged, without video, too short. Shows a progress bar on
    stderr. Raises `UserError` as `list_files` and `read_captions` do, or if no file is usable.
    """
    folder = existing_name(folder)
    names = list_files(folder)
    captions = read_captions(folder, names)
    usable, skipped = [], []
    with progress("scanning videos", len(names), unit="file") as bar:
        for name in names:

            def report(seconds, name=name):
                bar.set_postfix_str(f"{one_line(name)} {seconds:.0f} s")

            try:
                starts, frames = find_clips(folder / name, config, report)
            except Unusable as reason:
                skipped.append(f"skipped {one_line(name)}: {reason}")
                bar.write(skipped[-1], file=sys.stderr)
            else:
                usable.append(FileClips(name, captions[name], starts, frames))
            bar.update()
    if not usable:
        raise UserError(
            f"video folder {folder} has no usable video ({skipped[0]}"
            f"{f'; {len(skipped) - 1} more' if len(skipped) > 1 else ''}): add others or shorten the clips"
        )
    return usable, skipped


def find_clips(
    path: pathlib.Path, config: ClipConfig, report: Callable[[float], None] = lambda seconds: None
) -> tuple[np.ndarray, np.ndarray]:
    """The clips of a file, as `clip_frames` gives them; raises `Unusable` where there are none, with the reason."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path.name):
        raise Unusable("its name has characters that cannot be printed; rename it")
    with reasons(path):
        footage = scan_footage(path, report)
    starts, frames = clip_frames(footage, config)
    if not len(starts):
        edges = np.array([0.0, *footage.timestamps[list(footage.cuts)], footage.end])
        raise Unusable(
            f"it is too short, its longest shot lasts {np.diff(edges).max():.2f} s "
            f"and a clip {config.num_frames / config.fps:.2f} s"
        )
    return starts, frames
