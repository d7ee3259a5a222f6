"""AdaState's anchor: a hidden state that is denoised with every chunk."""

import dataclasses

from adastate_jax.models.attention import KeyValues
from adastate_jax.streaming.anchors.contract import Commit, capture_first_frames
from adastate_jax.streaming.anchors.static import StaticAnchor


@dataclasses.dataclass(frozen=True)
class AdaptiveAnchor(StaticAnchor):
    """AdaState: hidden state frames denoised with each chunk, whose clean keys and values replace the anchor.

    Source: arXiv 2605.30349. The order of the positions behind anchor and state, and that the state is live from the
    first eviction on, are our reading of it.
    """

    @property
    def state_frames(self) -> int:
        return self.frames

    def fill_frames(self, past_frames: int) -> int:
        return past_frames + 1

    def update(self, memory: KeyValues, commit: Commit) -> KeyValues:
        return capture_first_frames(memory, commit) if commit.state is None else commit.state
