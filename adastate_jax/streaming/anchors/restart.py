"""CausVid's way without an anchor: a new rollout from the last chunk."""

import dataclasses

from adastate_jax.streaming.anchors.contract import NoAnchor


@dataclasses.dataclass(frozen=True)
class RestartAnchor(NoAnchor):
    """CausVid: when the window is full, a new rollout starts from the last chunk, read alone in a clean pass.

    Source: arXiv 2412.07772, long videos by overlapping rollouts of W_p + F frames; the overlap is one chunk.
    """

    restarts = True

    def check(self, chunk_frames: int, past_frames: int) -> None:
        if past_frames < chunk_frames:
            raise ValueError(
                f"restarts need a window of at least a chunk of {chunk_frames} frames, not {past_frames}: "
                f"set past_frames={chunk_frames}"
            )
