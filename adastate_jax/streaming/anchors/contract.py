"""The contract of an anchor strategy: what a stream remembers beyond its sliding window, and where it stands in time.

What a chunk sees is, in this order and at consecutive positions: the anchor, the live state (if any), the window of the
last frames, its own content. While the stream is young the anchor holds its first frames, so that anchor and window
together are simply all of it; what a strategy does from the first frame that no longer fits is all it is about.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.streaming.layout import Layout, consecutive


@dataclasses.dataclass(frozen=True)
class Commit:
    """What a finished chunk hands to `update`: clean keys (un-rotated) and values [layers, B, tokens, heads, head_dim].

    Attributes:
        content: of the F content frames.
        state: of the state frames; None while no state is live.
        evicted: of the F frames that leave the window; None while anchor and window together still hold all frames.
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
    """A plain sliding window (Self-Forcing, Causal-Forcing), and the base of all strategies: their contract.

    A strategy is a frozen dataclass: its fields are settings, it is hashable, and programs are compiled for it. All
    that changes while a stream runs is in its `memory`, a pytree of its own making whose structure, shapes and dtypes
    never change, so that one program serves every chunk of the steady state. What the stream calls, and when:

        memory = anchor.initial(zeros, past_frames)   before the first chunk, and where a stream begins anew
        anchor.layout(first_frame, past, content)     while a chunk's program is traced: how many frames of the anchor
                                                      the chunk sees, and where everything stands
        anchor.read(memory)                           before every chunk that sees the anchor, traced: what it sees
        memory = anchor.update(memory, commit)        after every chunk, traced: what a finished chunk changes

    Sizes that depend on the phase of the stream alone (`first_frame`, whether something was evicted) are static, and
    may decide what is computed; everything that depends on the chunk's number or its content is an array. The methods
    are pure, and run under `jit`, `scan`, donation and sharding; a gradient may flow through `read` and `update`. Keys
    are handed over and shown after QK-norm and without rotation. Tokens lie frame by frame, `frame_tokens` of each.

    Attributes:
        frames: anchor frames visible in the steady state.
        state_frames: hidden frames denoised with every steady chunk.
        whole_chunks: whether anchor and window together must be a whole number of chunks.
        restarts: whether the stream starts afresh whenever the window is full, see `RestartAnchor`.
        joint: whether several chunks are denoised together, see `RollingAnchor`.
    """

    # Facts of a class, not fields: a strategy's fields are its settings.
    frames = 0
    state_frames = 0
    whole_chunks = False
    restarts = False
    joint = False

    # What is static.

    def check(self, chunk_frames: int, past_frames: int) -> None:
        """Raises ValueError if the strategy cannot work with chunks and a window of so many frames."""
        held = self.frames + past_frames
        if self.whole_chunks and held % chunk_frames:
            raise ValueError(
                f"{type(self).__name__} needs anchor and window to be a whole number of chunks of {chunk_frames} "
                f"frames, not {self.frames} + {past_frames}: set past_frames={past_frames + -held % chunk_frames}"
            )

    def fill_frames(self, past_frames: int) -> int:
        """Length of the fill: a chunk is in the steady state from this many frames before it on."""
        return past_frames + max(self.frames, 1)

    def layout(self, first_frame: int | None, past_frames: int, content_frames: int) -> Layout:
        """Positions in a chunk whose content begins at `first_frame` of the stream, None in the steady state.

        `content_frames` are all live ones: those of a chunk, or of several that are denoised together.
        """
        if first_frame is None:
            return consecutive(self.frames, self.state_frames, past_frames, content_frames)
        window = min(first_frame, past_frames)
        return consecutive(min(first_frame - window, self.frames), 0, window, content_frames)

    def reread_layout(self, past_frames: int, content_frames: int) -> Layout:
        """Positions at which window and content of a steady chunk are read again, beside the anchor (`recache`).

        They are those of the chunk itself, before whose successor `update` has been called already.
        """
        return self.layout(None, past_frames, content_frames)

    # What is traced.

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> Any:
        """The memory before the first chunk.

        Args:
            zeros: makes so many frames of zeros, [layers, B, frames · tokens, heads, head_dim] in the model's dtype.
            past_frames: of the window.

        Returns:
            Any pytree of arrays, or None: nothing is remembered.
        """
        return None

    def read(self, memory: Any) -> KeyValues:
        """What a chunk sees of the memory; called for chunks whose layout has an anchor, and by no others.

        Returns:
            Un-rotated keys and values of `frames` frames, [layers, B, frames · tokens, heads, head_dim]; a young stream
            shows only the first of them. In the model's dtype, or in float32, to be rounded once where they stand.
        """
        raise NotImplementedError("a strategy with anchor frames must show them")

    def update(self, memory: Any, commit: Commit) -> Any:
        """The memory after a chunk, of the same structure, shapes and dtypes; it is what the next chunk sees.

        Until `commit.evicted` is there for the first time, anchor and window together show the whole stream: then a
        memory holds the stream's first frames, see `capture_first_frames`.
        """
        return None


def capture_first_frames(memory: KeyValues, commit: Commit) -> KeyValues:
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
