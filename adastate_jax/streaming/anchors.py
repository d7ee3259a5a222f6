"""Anchor strategies: what a stream remembers beyond its sliding window, and where it stands in time.

A strategy is a small frozen dataclass with pure methods over an explicit pytree, its `memory`:

- `frames` anchor frames are visible in the steady state, `state_frames` hidden frames are denoised with every chunk;
- `layout` gives the temporal position of every visible frame;
- `initial`, `read` and `update` make, show and replace the memory. Keys are stored without rotation.

A new strategy needs those five, a name in `ANCHORS`, and nothing else.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues, concatenate


@dataclasses.dataclass(frozen=True)
class Layout:
    """Temporal positions of the frames that a chunk sees; an empty tuple is a part that is not there."""

    anchor: tuple[int, ...]
    state: tuple[int, ...]
    window: tuple[int, ...]
    content: tuple[int, ...]

    @property
    def live(self) -> tuple[int, ...]:
        """Positions of the frames that are denoised: the state, then the content."""
        return self.state + self.content

    @property
    def cached(self) -> tuple[int, ...]:
        """Positions of the frames that are read from the cache: the anchor, then the window."""
        return self.anchor + self.window


@dataclasses.dataclass(frozen=True)
class Commit:
    """What a finished chunk hands to `update`: clean keys (un-rotated) and values [layers, B, tokens, heads, head_dim].

    Attributes:
        content: of the F content frames.
        state: of the state frames; None while no state is live.
        evicted: of the frames that leave the window with this chunk; None if none do.
        first_frame: index in the stream of the first content frame during the fill; None in the steady state.
        frame_tokens: tokens per frame.
    """

    content: KeyValues
    state: KeyValues | None
    evicted: KeyValues | None
    first_frame: int | None
    frame_tokens: int


@dataclasses.dataclass(frozen=True)
class NoAnchor:
    """A plain sliding window (Self-Forcing with a local window)."""

    @property
    def frames(self) -> int:
        return 0

    @property
    def state_frames(self) -> int:
        return 0

    def layout(self, cached_frames: int, chunk_frames: int, steady: bool) -> Layout:
        """Positions with `cached_frames` in the window, in the order anchor, state, window, content.

        The anchor and the state take part in the steady state only.
        """
        sizes = (self.frames if steady else 0, self.state_frames if steady else 0, cached_frames, chunk_frames)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return Layout(*(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)))

    def initial(self, zeros: KeyValues) -> Any:
        """Memory before the first chunk; `zeros` holds `frames` frames of zeros."""
        return None

    def read(self, memory: Any) -> KeyValues | None:
        """The visible anchor, `frames` frames of un-rotated keys and values."""
        return None

    def update(self, memory: Any, commit: Commit) -> Any:
        """Memory after a chunk."""
        return None


@dataclasses.dataclass(frozen=True)
class StaticAnchor(NoAnchor):
    """The first frames' clean keys and values, for ever, next to the window (Infinity-RoPE's and LongLive's sink)."""

    anchor_frames: int = 1

    @property
    def frames(self) -> int:
        return self.anchor_frames

    def initial(self, zeros: KeyValues) -> KeyValues:
        return zeros

    def read(self, memory: KeyValues) -> KeyValues:
        return memory

    def update(self, memory: KeyValues, commit: Commit) -> KeyValues:
        return _capture_first_frames(memory, commit)


@dataclasses.dataclass(frozen=True)
class AdaptiveAnchor(StaticAnchor):
    """AdaState: hidden state frames denoised with each chunk, whose clean keys and values replace the anchor.

    Source: arXiv 2605.30349. The order of the positions behind anchor and state, and that the state is live from the
    first eviction on, are our reading of it.
    """

    @property
    def state_frames(self) -> int:
        return self.anchor_frames

    def update(self, memory: KeyValues, commit: Commit) -> KeyValues:
        return _capture_first_frames(memory, commit) if commit.state is None else commit.state


ANCHORS = {"none": NoAnchor, "static": StaticAnchor, "adaptive": AdaptiveAnchor}


def make_anchor(name: str, frames: int = 1) -> NoAnchor:
    """The strategy of this name with `frames` anchor (and, for `adaptive`, state) frames.

    Raises:
        ValueError: unknown name, or no frames for a strategy that needs some.
    """
    if name not in ANCHORS:
        raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {name!r}")
    if name == "none":
        return NoAnchor()
    if frames < 1:
        raise ValueError(f"anchor {name!r} needs at least one frame, got {frames}")
    return ANCHORS[name](frames)


def _capture_first_frames(memory: KeyValues, commit: Commit) -> KeyValues:
    """Writes the part of the stream's first frames that this chunk brings into the memory."""
    if commit.first_frame is None:
        return memory
    start = commit.first_frame * commit.frame_tokens
    size = min(commit.content.num_tokens, memory.num_tokens - start)
    if size <= 0:
        return memory
    before, after = memory.tokens(0, start), memory.tokens(start + size, memory.num_tokens - start - size)
    captured = jax.tree.map(jnp.astype, commit.content.tokens(0, size), jax.tree.map(lambda x: x.dtype, before))
    return concatenate(before, captured, after)
