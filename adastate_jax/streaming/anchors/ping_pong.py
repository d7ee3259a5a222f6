"""Rolling-Sink's anchor: the stream's first frames, walked over to and fro."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues
from adastate_jax.streaming.anchors.contract import Commit, NoAnchor, capture_first_frames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """The frames of the fill, how many they are, and how many frames the walk over them has gone, int32 []."""

    originals: KeyValues
    place: jax.Array
    frames: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class PingPongAnchor(NoAnchor):
    """Rolling-Sink: instead of frames that would leave, those of the fill, walked over to and fro.

    The fill's n = `frames` + W_p frames are kept. The stream's frame f is shown as the original at place f of
    0 … n − 1, n − 1 … 0, 0 …: true frames first, then back, and so on. The window is the last true frames.
    Source: arXiv 2602.07775; its context of 18 frames is 15 of the walk and the last chunk.
    """

    frames: int = 15
    whole_chunks = True

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> Walk:
        frames = self.frames + past_frames
        return Walk(zeros(frames), jnp.int32(0), frames)

    def read(self, memory: Walk) -> KeyValues:
        place = (memory.place + jnp.arange(self.frames)) % (2 * memory.frames)
        shown = jnp.where(place < memory.frames, place, 2 * memory.frames - 1 - place)

        def take(x: jax.Array) -> jax.Array:
            framed = x.reshape(*x.shape[:2], memory.frames, -1, *x.shape[3:])
            return framed[:, :, shown].reshape(*x.shape[:2], -1, *x.shape[3:])

        return jax.tree.map(take, memory.originals)

    def update(self, memory: Walk, commit: Commit) -> Walk:
        if commit.evicted is None:
            return dataclasses.replace(memory, originals=capture_first_frames(memory.originals, commit))
        step = commit.content.num_tokens // commit.frame_tokens
        return dataclasses.replace(memory, place=(memory.place + step) % (2 * memory.frames))
