"""Prompt schedules as they are written: their entries, the files of them, and what is refused of them; without JAX."""

import dataclasses
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adastate_jax.checks import MOST_SECONDS, is_number, is_whole
from adastate_jax.errors import UserError, shown
from adastate_jax.streaming.names import TRANSITIONS
from adastate_jax.texts import is_text, parse_json, read_text

_MOST_CHUNKS = 10**6


@dataclasses.dataclass(frozen=True)
class Cue:
    """One entry of a schedule.

    Attributes:
        second: of video time; it takes effect with the first chunk that begins then or later.
        prompt: what to show from there on.
        transition: one of `TRANSITIONS`; of no meaning for the first entry.
        chunks: how many chunks a `blend` takes.
    """

    second: float
    prompt: str
    transition: str = "switch"
    chunks: int = 4

    def __post_init__(self):
        for field in ("second", "chunks"):
            value = getattr(self, field)
            if isinstance(value, numbers.Number) and hasattr(
                value, "item"
            ):  # NumPy's; as Python's, which JSON can hold
                object.__setattr__(self, field, value.item())


def parse_schedule(text: str, name: str) -> tuple[Cue, ...]:
    """Reads a schedule.

    Args:
        text: JSON, a list of objects with the fields of `Cue`; or lines `SECOND [TRANSITION] | PROMPT`, where `blend:6`
            blends over six chunks, empty lines and those that begin with # are nothing.
        name: of the file, for messages.

    Raises:
        UserError: an entry cannot be read, or `check_schedule` refuses it; the message names the entry.
    """
    entries = _json_entries(text, name) if text.lstrip()[:1] in ("[", "{") else _line_entries(text, name)
    cues = []
    for number, entry in enumerate(entries, 1):
        try:
            cues.append(Cue(**entry))
        except TypeError:
            known = ", ".join(field.name for field in dataclasses.fields(Cue))
            raise UserError(f"{name}: entry {number} must have second and prompt, and no fields but {known}") from None
    check_schedule(cues, name)
    return tuple(cues)


def read_schedule(path: Path) -> tuple[Cue, ...]:
    """`parse_schedule` of a file; raises UserError also if it cannot be read."""
    return parse_schedule(read_text(path), str(path))


def _json_entries(text: str, name: str) -> list[dict[str, Any]]:
    entries = parse_json(text, name)
    if not isinstance(entries, list):
        raise UserError(f"{name}: must be a list of entries, [{{...}}, {{...}}]")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise UserError(f'{name}: entry {number} must be an object like {{"second": 0, "prompt": "..."}}')
    return entries


def _line_entries(text: str, name: str) -> list[dict[str, Any]]:
    entries = []
    for line in text.split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        head, bar, prompt = line.partition("|")
        second, *words = head.split() or [""]
        try:
            entry: dict[str, Any] = {"second": float(second), "prompt": prompt.strip()}
        except ValueError:
            bar = ""
        if not bar or len(words) > 1:
            where = f"{name}: entry {len(entries) + 1}"
            raise UserError(f"{where} must be SECOND [TRANSITION] | PROMPT, got {shown(line)}")
        if words:
            entry["transition"], colon, chunks = words[0].partition(":")
            if colon:
                if not chunks.isdecimal() or len(chunks) > len(str(_MOST_CHUNKS)):
                    where = f"{name}: entry {len(entries) + 1}"
                    raise UserError(f"{where} blends over {shown(chunks)} chunks; give a number to {_MOST_CHUNKS:,}")
                entry["chunks"] = int(chunks)
        entries.append(entry)
    return entries


def check_schedule(cues: Sequence[Cue], name: str = "prompts") -> None:
    """Raises UserError, naming the entry, for a schedule that makes no sense: before anything is generated."""
    if not cues:
        raise UserError(f"{name}: has no entries; begin with one at second 0")
    for number, cue in enumerate(cues, 1):
        entry = f"{name}: entry {number}"
        if not isinstance(cue, Cue):
            raise UserError(f"{entry} must be a Cue, got {shown(cue)}")
        if not is_number(cue.second) or not abs(cue.second) < MOST_SECONDS:  # neither NaN nor infinity is less
            raise UserError(f"{entry} has second {shown(cue.second)}; give a number below {MOST_SECONDS:,}")
        if number == 1 and cue.second != 0:
            raise UserError(f"{entry} is at second {cue.second:g}; the first one must be at second 0")
        if number > 1 and cue.second <= cues[number - 2].second:
            raise UserError(f"{entry} is at second {cue.second:g}, not after {cues[number - 2].second:g}: sort them")
        if not isinstance(cue.prompt, str) or not cue.prompt.strip():
            raise UserError(f"{entry} has no prompt")
        if not is_text(cue.prompt):
            raise UserError(f"{entry} has a prompt with half a character in it: {shown(cue.prompt)}")
        if not isinstance(cue.transition, str) or cue.transition not in TRANSITIONS:
            raise UserError(f"{entry} has transition {shown(cue.transition)}; use one of {', '.join(TRANSITIONS)}")
        if not is_whole(cue.chunks) or not 1 <= cue.chunks <= _MOST_CHUNKS:
            raise UserError(f"{entry} blends over {shown(cue.chunks)} chunks; give 1 to {_MOST_CHUNKS:,}")
