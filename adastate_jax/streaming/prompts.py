"""Prompt schedules: which prompt a stream follows when, and what becomes of its memory where the prompt changes.

Transitions:

- `switch`: the new text, and nothing else; anchor and window still speak of the old prompt, which gives it inertia.
- `keep_state`: the same, and says that the adaptive state goes on.
- `recache` (LongLive, arXiv 2509.22622): the stream's last frames, as many as anchor, window and chunk have together,
  are read again, clean, under the new text, all of them seeing each other; of those in the window, the new keys and
  values replace the old. The anchor keeps what it holds, and while the stream fills, its frames in the window stay too.
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
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.errors import UserError
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.anchors import AdaptiveAnchor, consecutive
from adastate_jax.streaming.continuation import given_step, max_given_frames
from adastate_jax.streaming.rollout import Chunk, Reencode, RolloutCarry, denoise, stream_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of

TRANSITIONS = ("switch", "recache", "flush", "cut", "blend", "keep_state", "reset_state")
_FLUSH_KEEPS = 2  # frames
_MOST_SECONDS = 10**9


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
        if not _is_number(cue.second) or not abs(cue.second) < _MOST_SECONDS:  # neither NaN nor infinity is less
            raise UserError(f"{entry} has second {cue.second!r:.40}; give a number below {_MOST_SECONDS:,}")
        if number == 1 and cue.second != 0:
            raise UserError(f"{entry} is at second {cue.second:g}; the first one must be at second 0")
        if number > 1 and cue.second <= cues[number - 2].second:
            raise UserError(f"{entry} is at second {cue.second:g}, not after {cues[number - 2].second:g}: sort them")
        if not isinstance(cue.prompt, str) or not cue.prompt.strip():
            raise UserError(f"{entry} has no prompt")
        if cue.transition not in TRANSITIONS:
            raise UserError(f"{entry} has transition {cue.transition!r}; use one of {', '.join(TRANSITIONS)}")
        if type(cue.chunks) is not int or cue.chunks < 1:  # True is an int, too
            raise UserError(f"{entry} blends over {cue.chunks!r} chunks; give a whole number of at least 1")


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
        reread: how many of the stream's last frames are read again before it; none but by a `recache`.
    """

    cue: int
    blend: float
    transition: str | None
    phase: Phase
    reread: int = 0


def _num_recent(config: StreamConfig) -> int:
    """Frames that `recache` reads again. LongLive's are its whole buffer: sink, window and chunk."""
    return config.anchor.frames + config.past_frames + config.chunk_frames


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
        known = chunk * config.chunk_frames  # frames that are not forgotten
        for entry, start in zip(self.cues[1 : index + 1], self.starts[1 : index + 1], strict=True):
            if entry.transition == "flush":
                known = min(known, _FLUSH_KEEPS + (chunk - start) * config.chunk_frames)
        if known < len(layout_of(phase, config).window):
            phase = dataclasses.replace(phase, window_frames=known)
        change = transition if transition in ("recache", "reset_state") and since == 0 else None
        return Plan(index, blend, change, phase, min(_num_recent(config), known) if change == "recache" else 0)


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
        recent: clean latents of the stream's last frames, the newest last, [B, F_s + W_p + F, H, W, C], zeros before
            the first; what `recache` reads again.
    """

    stream: RolloutCarry
    recent: jax.Array


def initial_prompted(stream: RolloutCarry, config: StreamConfig, latent_shape: tuple[int, int, int]) -> PromptedCarry:
    """The carry before the first chunk; latent_shape is (H, W, C)."""
    return PromptedCarry(stream, jnp.zeros((stream.keys.shape[0], _num_recent(config), *latent_shape)))


@jax.jit
def _text_between(model: DiT, before: jax.Array, after: jax.Array, weight) -> KeyValues:
    """Text keys and values of embeddings [B, T, text_dim] between two prompts."""
    between = (1.0 - weight) * before.astype(jnp.float32) + weight * after.astype(jnp.float32)
    return model.text_keys_values(between.astype(after.dtype))


@functools.partial(jax.jit, static_argnames=("config", "phase", "reread"), donate_argnames="carry")
def _recache(
    model: DiT,
    carry: RolloutCarry,
    recent: jax.Array,
    text: KeyValues,
    config: StreamConfig,
    phase: Phase,
    reread: int,
) -> RolloutCarry:
    """Reads the last `reread` frames again, clean, under a new text, for those that the next chunk sees in the window.

    While the stream fills, the window may show frames that are the anchor's: those keep the text that they had.
    """
    renewed = len(layout_of(phase, config).window)
    if not phase.steady:
        renewed = min(renewed, phase.first_frame - config.anchor.frames)
    if renewed <= 0:
        return carry
    _, fresh = denoise(model, recent[:, -reread:], 0.0, text, consecutive(0, 0, 0, reread), None)
    window, tokens = carry.cache.window, renewed * fresh.num_tokens // reread
    fresh = fresh.tokens(fresh.num_tokens - tokens, tokens)
    fresh = jax.tree.map(lambda x, like: x.astype(like.dtype), fresh, window)
    window = concatenate(window.tokens(0, window.num_tokens - tokens), fresh)
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


def _call(function: Callable, *arguments) -> Any:
    return function(*arguments)


def _compile(function: Callable, *arguments) -> Any:
    """Compiles a jitted function for these arguments, so that a call need not.

    Returns:
        The shapes of its result, which stand for the result as arguments of the next function.
    """

    def shape(x):
        # Without a mesh arrays are bound to no device; the device that is named here would make them other arguments.
        sharding = None if isinstance(x.sharding, jax.sharding.SingleDeviceSharding) else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, function.lower(*arguments).compile().out_info)


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

    Every program that the chunks need is compiled before the first of them is generated.

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
    first_chunk = int(carry.stream.chunk)
    last_chunk = None if num_chunks is None else first_chunk + num_chunks
    starts = range(0, 0 if given is None else given.shape[1], config.chunk_frames)
    parts = [given[:, start : start + config.chunk_frames] for start in starts]

    def plan_of(chunk: int) -> Plan:
        return schedule.plan(chunk, config, None if last_chunk is None else last_chunk - chunk)

    def text_of(plan: Plan) -> KeyValues:
        before, after = embeddings[max(plan.cue - 1, 0)], embeddings[plan.cue]
        return _text_between(model, before, after, jnp.float32(plan.blend))

    def step(run: Callable, carry: PromptedCarry, chunk: int, plan: Plan, text: KeyValues):
        state = carry.stream
        if plan.transition == "recache":
            state = run(_recache, model, state, carry.recent, text, config, plan.phase, plan.reread)
        elif plan.transition == "reset_state":
            state = run(_reset_state, state, config)
        if chunk < len(parts):
            state, generated = run(given_step, model, state, text, parts[chunk], config, plan.phase)
        else:
            state, generated = run(stream_step, model, state, text, config, latent_shape, plan.phase, reencode)
        return PromptedCarry(state, run(_remember, carry.recent, generated.content)), generated

    settled = max(first_chunk, schedule.starts[-1]) + config.num_fill_chunks + len(config.cycle)
    end = settled if last_chunk is None else last_chunk
    ahead = [*range(first_chunk, min(settled, end)), *range(max(first_chunk, end - config.live_chunks), end)]
    text, shapes, compiled = text_of(plan_of(first_chunk)), carry, set()
    for chunk in ahead:
        plan = plan_of(chunk)
        # The carry to begin with may be laid over the devices otherwise than those that chunks return.
        program = plan.phase, plan.transition, plan.reread, min(chunk, len(parts)), chunk == first_chunk
        if program not in compiled:
            shapes, _ = step(_compile, shapes, chunk, plan, text)
            compiled.add(program)

    said = None
    for chunk in itertools.count(first_chunk) if last_chunk is None else range(first_chunk, last_chunk):
        plan = plan_of(chunk)
        if said != (plan.cue, plan.blend):
            text, said = text_of(plan), (plan.cue, plan.blend)
        carry, generated = step(_call, carry, chunk, plan, text)
        yield carry, generated
