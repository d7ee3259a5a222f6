"""Prompt schedules in effect: which prompt a stream follows when, and what becomes of its memory where it changes.

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

from adastate_jax.errors import UserError
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.cues import Cue, check_schedule
from adastate_jax.streaming.cues import read_schedule as read_schedule  # it was here: scripts of others import it
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of

_FLUSH_KEEPS = 2  # frames


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


def plan_of_change(transition: str, chunk: int, config: StreamConfig) -> Plan:
    """What chunk number `chunk` is generated with, where the prompt changes before it for the first time."""
    cues = (Cue(0, "before"), Cue(1, "after", transition))
    return Schedule(cues, (0, chunk)).plan(chunk, config)


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
