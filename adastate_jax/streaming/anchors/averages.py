"""Running means of what leaves the window: Reward-Forcing's, and MemRoPE's slow and fast one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.streaming.anchors.contract import Commit, NoAnchor, capture_first_frames
from adastate_jax.streaming.anchors.static import StaticAnchor


@dataclasses.dataclass(frozen=True)
class EMAAnchor(StaticAnchor):
    """Reward-Forcing: the first frames, into which the frames that leave the window are averaged, token by token.

    S ← a S + (1 − a) E for keys and values, frame by frame. Held in float32: 1 − a is below bfloat16's resolution.
    Source: arXiv 2512.04678.
    """

    frames: int = 3
    decay: float = 0.999
    whole_chunks = True

    def check(self, chunk_frames: int, past_frames: int) -> None:
        if self.frames != chunk_frames:
            raise ValueError(
                f"EMAAnchor pairs its frames with those that leave: it needs {chunk_frames}, not {self.frames}: "
                f"set anchor.frames={chunk_frames}"
            )
        super().check(chunk_frames, past_frames)

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> KeyValues:
        return _in_float32(zeros(self.frames))

    def update(self, memory: KeyValues, commit: Commit) -> KeyValues:
        if commit.evicted is None:
            return capture_first_frames(memory, commit)
        return _blend(memory, _in_float32(commit.evicted), 1.0 - self.decay)


@dataclasses.dataclass(frozen=True)
class MemoryAnchor(NoAnchor):
    """MemRoPE: the first frames, and two frames of running means of all that left the window, a slow and a fast one.

    m is the mean over all evicted tokens (over the evicted frames, token by token, if `adaptive`);
    M ← (1 − rate) M + rate m, each mean with its rate. If `adaptive`, the fast rate of a token is between 0.1 and 5
    times `short_rate`, linearly in how far the keys' m is from their M there, relative to the farthest token of the
    sample and layer; the distance is a norm per head, averaged over the heads. That one rate blends keys and values.
    The means take the places of the frames behind the sink. Source: arXiv 2603.12513, and its release's option
    `ema_adaptive`.
    """

    sink_frames: int = 3
    long_rate: float = 0.01
    short_rate: float = 0.1
    adaptive: bool = False
    whole_chunks = True

    @property
    def frames(self) -> int:
        return self.sink_frames + 2

    def fill_frames(self, past_frames: int) -> int:
        return past_frames + self.frames + 1  # the first chunk that evicts starts the means instead of moving them

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> KeyValues:
        return _in_float32(zeros(self.frames))

    def read(self, memory: KeyValues) -> KeyValues:
        return memory

    def update(self, memory: KeyValues, commit: Commit) -> KeyValues:
        if commit.evicted is None:
            return capture_first_frames(memory, commit)
        tokens = commit.frame_tokens
        sink, long, short = (memory.tokens(first * tokens, size * tokens) for first, size in self._parts)
        mean = jax.tree.map(lambda x: self._mean(x.astype(jnp.float32), tokens), commit.evicted)
        if commit.first_frame is not None:
            return concatenate(sink, mean, mean)
        short_rate = self._adapted_rate(mean.key, short.key) if self.adaptive else self.short_rate
        return concatenate(sink, _blend(long, mean, self.long_rate), _blend(short, mean, short_rate))

    @property
    def _parts(self) -> tuple[tuple[int, int], ...]:
        """First frame and number of frames of the sink and the two means."""
        return (0, self.sink_frames), (self.sink_frames, 1), (self.sink_frames + 1, 1)

    def _mean(self, evicted: jax.Array, frame_tokens: int) -> jax.Array:
        """[layers, B, F tokens, heads, head_dim] → one frame of the same."""
        frames = evicted.reshape(*evicted.shape[:2], -1, frame_tokens, *evicted.shape[3:])
        mean = frames.mean(axis=2 if self.adaptive else (2, 3), keepdims=not self.adaptive)
        return mean if self.adaptive else jnp.broadcast_to(mean[:, :, 0], frames[:, :, 0].shape)

    def _adapted_rate(self, mean: jax.Array, short: jax.Array) -> jax.Array:
        """Rate of every token [layers, B, tokens, 1, 1], from keys [layers, B, tokens, heads, head_dim]."""
        gap = jnp.linalg.norm(mean - short, axis=-1, keepdims=True).mean(axis=-2, keepdims=True)
        share = gap / (gap.max(axis=2, keepdims=True) + 1e-8)
        return self.short_rate * (0.1 + (5.0 - 0.1) * share)


def _in_float32(tokens: KeyValues) -> KeyValues:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tokens)


def _blend(memory: KeyValues, new: KeyValues, rate: float | jax.Array) -> KeyValues:
    """(1 − rate) M + rate m; `rate` is one number, or one of each token, [layers, B, tokens, 1, 1]."""
    return jax.tree.map(lambda old, x: (1.0 - rate) * old + rate * x, memory, new)
