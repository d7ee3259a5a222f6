"""The stream's first frames for ever: beside the window, moving away from it, or beside chunks at all noise levels."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues
from adastate_jax.models.rope import MAX_POSITION, Rotation, rotate, rotation
from adastate_jax.streaming.anchors.contract import Commit, NoAnchor, capture_first_frames
from adastate_jax.streaming.layout import Layout


@dataclasses.dataclass(frozen=True)
class StaticAnchor(NoAnchor):
    """The first frames' clean keys and values, for ever, next to the window.

    Infinity-RoPE (arXiv 2511.20649), and the infinity variant of LongLive (arXiv 2509.22622).
    """

    frames: int = 1

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> KeyValues:
        return zeros(self.frames)

    def read(self, memory: KeyValues) -> KeyValues:
        return memory

    def update(self, memory: KeyValues, commit: Commit) -> KeyValues:
        return capture_first_frames(memory, commit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Receding:
    """A sink, and how many frames lie between it and the window, int32 []."""

    sink: KeyValues
    distance: jax.Array


@dataclasses.dataclass(frozen=True)
class AbsoluteAnchor(StaticAnchor):
    """LongLive: the first frames at their absolute positions, so that the stream moves away from them.

    Only differences of positions count: the layout stays, and the sink is turned back by the distance. The distance
    stops growing where the table of positions ends, as LongLive itself does. Source: arXiv 2509.22622.
    """

    whole_chunks = True

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> Receding:
        return Receding(zeros(self.frames), jnp.int32(0))

    def reread_layout(self, past_frames: int, content_frames: int) -> Layout:
        layout = super().reread_layout(past_frames, content_frames)
        # The distance is that to the next chunk already.
        return dataclasses.replace(layout, anchor=tuple(place + content_frames for place in layout.anchor))

    def read(self, memory: Receding) -> KeyValues:
        turn = rotation(memory.distance[None], 1, 1, memory.sink.key.shape[-1])
        # In float32, so that keys are rounded once, when they are rotated to where they stand.
        key = rotate(memory.sink.key.astype(jnp.float32), Rotation(turn.cos, -turn.sin))
        return KeyValues(key, memory.sink.value)

    def update(self, memory: Receding, commit: Commit) -> Receding:
        gone = 0 if commit.evicted is None else commit.evicted.num_tokens // commit.frame_tokens
        distance = jnp.minimum(memory.distance + gone, MAX_POSITION - 1)
        return Receding(capture_first_frames(memory.sink, commit), distance)


@dataclasses.dataclass(frozen=True)
class RollingAnchor(StaticAnchor):
    """Rolling-Forcing: chunks at all noise levels are denoised together; the first frames stand beside them.

    Denoising attends to `attended_frames` in all: the anchor, the live frames, and as much of the window as is left for
    it, so that it sees more of the past towards the video's end, where fewer chunks are live. The clean pass of a
    finished chunk sees the whole window, and the anchor only as far as the window still holds it.
    Source: arXiv 2509.25161.
    """

    frames: int = 3
    attended_frames: int = 21
    joint = True

    def layout(self, first_frame: int | None, past_frames: int, content_frames: int) -> Layout:
        left = max(self.attended_frames - self.frames - content_frames, 0)
        return super().layout(first_frame, min(past_frames, left), content_frames)
