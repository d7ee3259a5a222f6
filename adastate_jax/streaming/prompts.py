"""Prompt schedules: which prompt a stream follows when, and what becomes of its memory where the prompt changes.

Transitions:

- `switch`: the new text, and nothing else; anchor and window still speak of the old prompt, which gives it inertia.
- `keep_state`: the same, and says that the adaptive state goes on.
- `recache` (LongLive, arXiv 2509.22622): the window's frames are read again, clean, under the new text, all of them
  seeing each other; their new keys and values replace the old. The anchor keeps what it holds.
- `flush` (Infinity-RoPE, arXiv 2511.20649): all of the window but its last two frames is forgotten. In a window of two
  frames, as its release has it, that is a switch.
- `cut` (Infinity-RoPE, where its documentation says, at the start of the entry): the first chunk of the new prompt
  stands far in time from all that it sees.
- `blend`: the embeddings go from the old prompt's to the new one's in equal steps over a number of chunks.
- `reset_state`: the adaptive state begins again from the newest frames, as it began from the stream's first.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.errors import UserError
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.anchors import AdaptiveAnchor, Layout
from adastate_jax.streaming.continuation import given_step, max_given_frames
from adastate_jax.streaming.rollout import Chunk, Reencode, RolloutCarry, denoise, stream_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of

TRANSITIONS = ("switch", "recache", "flush", "cut", "blend", "keep_state", "reset_state")
_FLUSH_KEEPS = 2  # frames


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


def parse_schedule(text: str, name: str) -> tuple[Cue, ...]:
    """Reads a schedule.

    Args:
        text: JSON, a list of objects with the fields of `Cue`; or lines `SECOND [TRANSITION] | PROMPT`, where `blend:6`
            blends over six chunks, empty lines and those that begin with # are nothing.
        name: of the file, for messages.

    Raises:
        UserError: an entry cannot be read, or `check_schedule` refuses it; the message names the entry.
    """
    entries = _json_entries(text, name) if text.lstrip().startswith("[") else _line_entries(text, name)
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
    try:
        return parse_schedule(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _json_entries(text: str, name: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not JSON ({error})") from None
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise UserError(f'{name}: entry {number} must be an object like {{"second": 0, "prompt": "..."}}')
    return entries


def _line_entries(text: str, name: str) -> list[dict[str, Any]]:
    entries = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        head, bar, prompt = line.partition("|")
        second, *words = head.split() or [""]
        try:
            entry: dict[str, Any] = {"second": float(second), "prompt": prompt.strip()}
        except ValueError:
            bar = ""
        if not bar or len(words) > 1:
            raise UserError(f"{name}: entry {len(entries) + 1} must be SECOND [TRANSITION] | PROMPT, got {line!r}")
        if words:
            entry["transition"], colon, chunks = words[0].partition(":")
            if colon:
                if not chunks.isdecimal():
                    raise UserError(f"{name}: entry {len(entries) + 1} blends over {chunks!r} chunks; give a number")
                entry["chunks"] = int(chunks)
        entries.append(entry)
    return entries


def check_schedule(cues: Sequence[Cue], name: str = "prompts") -> None:
    """Raises UserError, naming the entry, for a schedule that makes no sense: before anything is generated."""
    if not cues:
        raise UserError(f"{name}: has no entries; begin with one at second 0")
    for number, cue in enumerate(cues, 1):
        entry = f"{name}: entry {number}"
        if not _is_number(cue.second) or not math.isfinite(cue.second):
            raise UserError(f"{entry} has second {cue.second!r}, which is no number")
        if number == 1 and cue.second != 0:
            raise UserError(f"{entry} is at second {cue.second:g}; the first one must be at second 0")
        if number > 1 and cue.second <= cues[number - 2].second:
            raise UserError(f"{entry} is at second {cue.second:g}, not after {cues[number - 2].second:g}: sort them")
        if not isinstance(cue.prompt, str) or not cue.prompt.strip():
            raise UserError(f"{entry} has no prompt")
        if cue.transition not in TRANSITIONS:
            raise UserError(f"{entry} has transition {cue.transition!r}; use one of {', '.join(TRANSITIONS)}")
        if not isinstance(cue.chunks, int) or cue.chunks < 1:
            raise UserError(f"{entry} blends over {cue.chunks!r} chunks; give at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def chunk_of(second: float, config: StreamConfig, time_factor: int, fps: int) -> int:
    """The first chunk that begins at or after a second of the video.

    time_factor: video frames per latent frame; a video's first latent frame is one video frame.
    """
    frame = math.ceil(second * fps - 1e-6)
    latent = math.ceil((frame - 1) / time_factor) + 1 if frame else 0
    return -(-latent // config.chunk_frames)


# --- what happens when ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a chunk is generated with; a function of its number, so that a stream may be resumed anywhere.

    Attributes:
        cue: index of the cue that it follows.
        blend: weight of the cue's prompt against the one before, in (0, 1].
        transition: what happens to the memory before it; None where the cue began earlier, or leaves it alone.
        phase: of the chunk.
    """

    cue: int
    blend: float
    transition: str | None
    phase: Phase


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cues, and the chunks at which they take effect (ascending, the first 0)."""

    cues: tuple[Cue, ...]
    starts: tuple[int, ...]

    def plan(self, chunk: int, config: StreamConfig, remaining: int | None = None) -> Plan:
        """What chunk number `chunk` is generated with; `remaining` as in `phase_of`."""
        index = bisect.bisect_right(self.starts, chunk) - 1
        cue, since = self.cues[index], chunk - self.starts[index]
        transition = cue.transition if index else "switch"
        blend = min((since + 1) / cue.chunks, 1.0) if transition == "blend" else 1.0
        phase = phase_of(chunk, config, cut=transition == "cut" and since == 0, remaining=remaining)
        if transition == "flush":
            kept = _FLUSH_KEEPS + since * config.chunk_frames
            if kept < len(layout_of(phase, config).window):
                phase = dataclasses.replace(phase, window_frames=kept)
        changes_memory = transition in ("recache", "reset_state") and since == 0
        return Plan(index, blend, transition if changes_memory else None, phase)


def schedule(cues: Sequence[Cue], config: StreamConfig, time_factor: int, fps: int, name: str = "prompts") -> Schedule:
    """The chunks at which the cues take effect.

    Raises:
        UserError: as `check_schedule`; the stream cannot do a transition; or two cues fall on the same chunk.
    """
    check_schedule(cues, name)
    for number, cue in enumerate(cues[1:], 2):
        if reason := _obstacle(cue.transition, config):
            raise UserError(f"{name}: entry {number}: {cue.transition} {reason}")
    starts = tuple(chunk_of(cue.second, config, time_factor, fps) for cue in cues)
    for number, (one, other) in enumerate(itertools.pairwise(starts), 2):
        if one == other:
            raise UserError(f"{name}: entry {number} begins in the same chunk as the one before it: move them apart")
    return Schedule(tuple(cues), starts)


def _obstacle(transition: str, config: StreamConfig) -> str | None:
    """Why a stream cannot do a transition."""
    anchor = config.anchor
    if transition in ("keep_state", "reset_state") and not isinstance(anchor, AdaptiveAnchor):
        return "needs an adaptive anchor"
    if transition == "reset_state" and config.past_frames < anchor.frames:
        return f"needs a window of {anchor.frames} frames, this one has {config.past_frames}"
    if transition in ("recache", "flush", "cut") and (anchor.joint or anchor.restarts):
        return f"does not go with {type(anchor).__name__}"
    if transition == "cut":
        try:
            layout_of(phase_of(config.num_fill_chunks, config, cut=True), config)
        except ValueError as error:
            return f"cannot be: {error}"
    return None


# --- generating -------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptedCarry:
    """A stream that follows a schedule.

    Attributes:
        stream: the carry of the stream.
        recent: clean latents of the window's frames, the newest last, [B, W_p, H, W, C]; what `recache` reads again.
    """

    stream: RolloutCarry
    recent: jax.Array


def initial_prompted(stream: RolloutCarry, config: StreamConfig, latent_shape: tuple[int, int, int]) -> PromptedCarry:
    """The carry before the first chunk; latent_shape is (H, W, C)."""
    return PromptedCarry(stream, jnp.zeros((stream.keys.shape[0], config.past_frames, *latent_shape)))


@jax.jit
def _text_between(model: DiT, before: jax.Array, after: jax.Array, weight) -> KeyValues:
    """Text keys and values of embeddings [B, T, text_dim] between two prompts."""
    between = (1.0 - weight) * before.astype(jnp.float32) + weight * after.astype(jnp.float32)
    return model.text_keys_values(between.astype(after.dtype))


@functools.partial(jax.jit, static_argnames=("config", "phase"), donate_argnames="carry")
def _recache(
    model: DiT, carry: RolloutCarry, recent: jax.Array, text: KeyValues, config: StreamConfig, phase: Phase
) -> RolloutCarry:
    """Reads the frames of the window that the next chunk sees again, clean, under a new text."""
    layout = layout_of(phase, config)
    frames = len(layout.window)
    if not frames:
        return carry
    alone = Layout(anchor=(), state=(), window=(), content=layout.window)
    _, fresh = denoise(model, recent[:, -frames:], 0.0, text, alone, None)
    window = carry.cache.window
    fresh = jax.tree.map(lambda x, like: x.astype(like.dtype), fresh, window)
    window = concatenate(window.tokens(0, window.num_tokens - fresh.num_tokens), fresh)
    return dataclasses.replace(carry, cache=dataclasses.replace(carry.cache, window=window))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="carry")
def _reset_state(carry: RolloutCarry, config: StreamConfig) -> RolloutCarry:
    """Makes the newest frames of the window the adaptive state."""
    window = carry.cache.window
    tokens = carry.cache.anchor.num_tokens
    state = window.tokens(window.num_tokens - tokens, tokens)
    return dataclasses.replace(carry, cache=dataclasses.replace(carry.cache, anchor=state))


@jax.jit
def _remember(recent: jax.Array, content: jax.Array) -> jax.Array:
    return jnp.concatenate([recent, content], axis=1)[:, content.shape[1] :]


def prompted_stream(
    model: DiT,
    carry: PromptedCarry,
    embeddings: Sequence[jax.Array],
    schedule: Schedule,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    num_chunks: int | None = None,
    given: jax.Array | None = None,
    reencode: Reencode | None = None,
) -> Iterator[tuple[PromptedCarry, Chunk]]:
    """`stream` along a schedule of prompts; with one cue and nothing given, the same bits.

    Args:
        model, config, latent_shape, num_chunks, reencode: as `stream`.
        carry: it is donated when the next chunk is asked for.
        embeddings: of each cue's prompt, [B, T, text_dim].
        given: clean latents that take the place of the stream's first frames, [B, n, H, W, C], n ≤ `max_given_frames`.

    Yields:
        The carry after the chunk, and the chunk.

    Raises:
        ValueError: too many frames are given.
    """
    if given is not None and given.shape[1] > max_given_frames(config):
        raise ValueError(f"at most {max_given_frames(config)} latent frames can be given, got {given.shape[1]}")
    chunk = int(carry.stream.chunk)
    last_chunk = None if num_chunks is None else chunk + num_chunks
    text, text_of = None, None
    while last_chunk is None or chunk < last_chunk:
        plan = schedule.plan(chunk, config, None if last_chunk is None else last_chunk - chunk)
        if text_of != (plan.cue, plan.blend):
            before = embeddings[max(plan.cue - 1, 0)]
            text = _text_between(model, before, embeddings[plan.cue], jnp.float32(plan.blend))
            text_of = plan.cue, plan.blend
        state = carry.stream
        if plan.transition == "recache":
            state = _recache(model, state, carry.recent, text, config, plan.phase)
        elif plan.transition == "reset_state":
            state = _reset_state(state, config)
        first = chunk * config.chunk_frames
        if given is not None and first < given.shape[1]:
            part = given[:, first : first + config.chunk_frames]
            state, generated = given_step(model, state, text, part, config, plan.phase)
        else:
            state, generated = stream_step(model, state, text, config, latent_shape, plan.phase, reencode)
        carry = PromptedCarry(state, _remember(carry.recent, generated.content))
        chunk += 1
        yield carry, generated
