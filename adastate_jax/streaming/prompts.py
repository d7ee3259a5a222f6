"""Prompt schedules: which prompt a stream follows when, and what becomes of its memory where the prompt changes.

Transitions:

- `switch`: the new text, and nothing else; anchor and window still speak of the old prompt, which gives it inertia.
- `keep_state`: the same, and says that the adaptive state goes on.
- `recache` (LongLive, arXiv 2509.22622, as released): frames are read again, clean, under the new text. A stream no
  longer than anchor, window and chunk together is read whole, its frames seeing each other, and the memory made anew
  from them, the anchor too. In a longer one, the last frames of a window and a chunk see the anchor, where it stood for
  the chunk before, and each other; their keys and values replace the window's, and the anchor keeps what it holds.
- `renew` (LongLive's `global_sink: false`): the stream begins anew from its last frames, as many as anchor, window and
  chunk have together; they are read as those of a young stream by `recache`, and the first of them become the anchor.
- `flush` (Infinity-RoPE, arXiv 2511.20649): all of the window but its last two frames is forgotten. In a window of two
  frames, as its release has it, that is a switch.
- `cut` (Infinity-RoPE, where its documentation says, at the start of the entry): the first chunk of the new prompt
  stands far in time from all that it sees.
- `blend`: the embeddings go from the old prompt's to the new one's in equal steps over a number of chunks.
- `reset_state`: the adaptive state begins again from the newest frames, as it began from the stream's first.

All that a schedule will run is compiled before its first chunk is handed out; from then on, no prompt and no transition
compiles anything.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adastate_jax.checks import MOST_SECONDS, is_number, is_whole
from adastate_jax.errors import UserError, shown
from adastate_jax.streaming.memories import AdaptiveAnchor
from adastate_jax.streaming.names import TRANSITIONS
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of
from adastate_jax.texts import is_text, parse_json, read_text

_FLUSH_KEEPS = 2  # frames
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
            if isinstance(value, np.number):  # as Python's, which JSON can hold
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


def chunk_of(second: float, config: StreamConfig, time_factor: int, fps: int) -> int:
    """The first chunk that begins at or after a second of the video.

    time_factor: video frames per latent frame; a video's first latent frame is one video frame.
    """
    frame = math.ceil(second * fps - 1e-6)
    latent = math.ceil((frame - 1) / time_factor) + 1 if frame else 0
    return -(-latent // config.chunk_frames)


@dataclasses.dataclass(frozen=True)
class Reread:
    """How a stream's last frames are read again under a new prompt.

    Attributes:
        frames: how many.
        anew: whether the whole memory is made from them, as if they were the stream's first; else they take the places
            of the window's frames.
        sees_anchor: whether they see the anchor beside each other, where it stood for the chunk before.
    """

    frames: int
    anew: bool
    sees_anchor: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chunk is generated with; a function of its number, so that a stream may be resumed anywhere.

    Attributes:
        cue: index of the cue that it follows.
        blend: weight of the cue's prompt against the one before, in (0, 1].
        transition: what happens to the memory before it; None where the cue began earlier, or leaves it alone.
        phase: of the chunk.
        reread: what is read again before it; None but by `recache` and `renew`.
    """

    cue: int
    blend: float
    transition: str | None
    phase: Phase
    reread: Reread | None = None


def num_recent(config: StreamConfig) -> int:
    """Frames that may be read again. LongLive's are its whole buffer: sink, window and chunk."""
    return config.anchor.frames + config.past_frames + config.chunk_frames


def _chunks_made_anew(config: StreamConfig) -> int:
    """The most chunks from which a whole memory can be made: of `num_recent` frames, and without a hidden state."""
    chunks = num_recent(config) // config.chunk_frames
    return min(chunks, config.num_fill_chunks) if config.anchor.state_frames else chunks


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cues, and the chunks at which they take effect (ascending, the first 0)."""

    cues: tuple[Cue, ...]
    starts: tuple[int, ...]

    def plan(self, chunk: int, config: StreamConfig, remaining: int | None = None, given_chunks: int = 0) -> Plan:
        """What chunk number `chunk` is generated with; `remaining` and `given_chunks` as in `phase_of`."""
        index = bisect.bisect_right(self.starts, chunk) - 1
        cue, since = self.cues[index], chunk - self.starts[index]
        transition = cue.transition if index else "switch"
        blend = min((since + 1) / cue.chunks, 1.0) if transition == "blend" else 1.0
        phase = phase_of(chunk, config, transition == "cut" and since == 0, remaining, given_chunks)
        known = self._known_frames(index, chunk, config)
        if known < len(layout_of(phase, config).window):
            phase = dataclasses.replace(phase, window_frames=known)
        if since or transition not in ("recache", "renew", "reset_state"):
            return Plan(index, blend, None, phase)
        if transition == "reset_state":
            return Plan(index, blend, transition, phase)
        chunks = min(chunk, _chunks_made_anew(config))
        if transition == "renew" or known == chunks * config.chunk_frames:
            reread = Reread(chunks * config.chunk_frames, anew=True, sees_anchor=False)
        else:
            frames = min(config.past_frames + config.chunk_frames, known)
            reread = Reread(frames, anew=False, sees_anchor=phase.steady and config.anchor.frames > 0)
        return Plan(index, blend, transition, phase, reread)

    def _known_frames(self, index: int, chunk: int, config: StreamConfig) -> int:
        """How many frames before a chunk are not forgotten, the cues up to and with `index` in effect."""
        kept, at = 0, 0  # so many were known at this chunk; later ones are
        for cue, start in zip(self.cues[1 : index + 1], self.starts[1 : index + 1], strict=True):
            if cue.transition == "flush":
                kept, at = min(kept + (start - at) * config.chunk_frames, _FLUSH_KEEPS), start
            elif cue.transition == "renew":
                kept, at = min(start, _chunks_made_anew(config)) * config.chunk_frames, start
        return kept + (chunk - at) * config.chunk_frames


def schedule(cues: Sequence[Cue], config: StreamConfig, time_factor: int, fps: int, name: str = "prompts") -> Schedule:
    """The chunks at which the cues take effect.

    Raises:
        UserError: as `check_schedule`; the stream cannot do a transition; or two cues fall on the same chunk.
    """
    check_schedule(cues, name)
    for number, cue in enumerate(cues[1:], 2):
        if reason := obstacle(cue.transition, config):
            raise UserError(f"{name}: entry {number}: {cue.transition} {reason}")
    starts = tuple(chunk_of(cue.second, config, time_factor, fps) for cue in cues)
    for number, (one, other) in enumerate(itertools.pairwise(starts), 2):
        if one == other:
            raise UserError(f"{name}: entry {number} begins in the same chunk as the one before it: move them apart")
    return Schedule(tuple(cues), starts)


def obstacle(transition: str, config: StreamConfig) -> str | None:
    """Why a stream cannot do a transition."""
    anchor = config.anchor
    if transition in ("keep_state", "reset_state") and not isinstance(anchor, AdaptiveAnchor):
        return "needs an adaptive anchor"
    if transition == "reset_state" and config.past_frames < anchor.frames:
        return f"needs a window of {anchor.frames} frames, this one has {config.past_frames}"
    if transition in ("recache", "renew", "flush", "cut") and (anchor.joint or anchor.restarts):
        return f"does not go with {type(anchor).__name__}"
    if transition == "cut":
        try:
            layout_of(phase_of(config.num_fill_chunks, config, cut=True), config)
        except ValueError as error:
            return f"cannot be: {error}"
    return None
