"""What a video says of itself: all that it takes to make it again, as texts in the file's metadata."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adastate_jax import __version__
from adastate_jax.errors import UserError
from adastate_jax.streaming.cues import Cue

# Options of the sample command, under the names that they have there and as keys.
_TEXTS = ("prompt", "anchor", "checkpoint", "config", "decoder", "weights", "image", "video")
_FILES = ("checkpoint", "image", "video", "config")
_NUMBERS = {"seed": int, "seconds": float, "scale": int}


def named_from_anywhere(path: str | Path) -> str:
    """A file's or folder's path from the root on, so that it is found from another folder, too; what is none stays."""
    return str(Path(path).absolute() if Path(path).exists() else path)


def made_with() -> str:
    """What a video's frames depend on beside the model: versions and device."""
    return f"adastate_jax {__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}"


def digest(frames: np.ndarray | None) -> str:
    """Tells frames to start from [n, height, width, 3] apart; empty for none."""
    return "" if frames is None else hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()[:16]


def describe(
    options: Mapping[str, Any],
    overrides: Sequence[str],
    cues: Sequence[Cue] | None,
    model: str,
    start: str,
    command: Sequence[str],
) -> dict[str, str]:
    """The metadata of a video.

    Args:
        options: of the sample command, by name; None is not kept.
        overrides: of configuration fields.
        cues: the schedule that it follows, if it is no single prompt.
        model: fingerprint.
        start: `digest` of the frames that it starts from.
        command: its arguments, for people.
    """
    kept = {name: str(options[name]) for name in (*_TEXTS, *_NUMBERS) if options.get(name) is not None}
    if options.get("random_weights"):
        kept["random_weights"] = "true"
    if overrides:
        kept["overrides"] = json.dumps(list(overrides))
    if cues:
        kept["schedule"] = json.dumps([dataclasses.asdict(cue) for cue in cues])
    if start:
        kept["start"] = start
    kept |= {name: named_from_anywhere(kept[name]) for name in _FILES if name in kept}
    return {**kept, "model": model, "made_with": made_with(), "command": shlex.join(command)}


def describe_takes(
    head: Mapping[str, Any], command: Sequence[str], takes: Sequence[Mapping[str, Any]] = (), **options: object
) -> dict[str, str]:
    """The metadata of a session's video, from what a session's file says of the model and of its takes.

    Args:
        command: as in `describe`.
        takes: none of a video that is not complete yet.
        options: of the sample command that replays it, beside.
    """
    kept = {name: str(value) for name, value in {**head, **options}.items() if value is not None}
    if takes:
        kept["takes"] = json.dumps(list(takes))
    return {**kept, "command": shlex.join(command)}


def recall(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options that `describe` put into metadata, with `overrides`, `schedule` (JSON), `model` and `start`.

    Of a session's video it is `takes` (JSON) instead of a prompt or a schedule, and `format`.

    Raises:
        UserError: the metadata are of no video of this package, or damaged.
    """
    said = {"prompt", "schedule", "takes"} & metadata.keys()
    if "model" not in metadata or "made_with" not in metadata or not said:
        raise UserError(
            f"{path}: does not say how it was made; name a video that the sample command wrote, or of a session its "
            "session.json with --session"
        )
    found: dict[str, Any] = {name: metadata[name] for name in _TEXTS if name in metadata}
    try:
        found |= {name: kind(metadata[name]) for name, kind in _NUMBERS.items() if name in metadata}
        overrides = json.loads(metadata.get("overrides", "[]"))
        if not all(isinstance(one, str) and one.startswith("--config.") for one in overrides):
            raise ValueError("overrides")
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: what it says of how it was made is damaged; name another video") from None
    found |= {name: Path(found[name]) for name in ("checkpoint", "image", "video") if name in found}
    found["random_weights"] = metadata.get("random_weights") == "true"
    others = {name: metadata.get(name, "") for name in ("schedule", "model", "start", "made_with", "takes", "format")}
    return {**found, **others, "overrides": overrides}
