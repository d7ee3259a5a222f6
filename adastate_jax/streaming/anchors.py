"""Anchor strategies: what a stream remembers beyond its sliding window, and where it stands in time.

What a chunk sees is, in this order and at consecutive positions: the anchor, the live state (if any), the window of the
last frames, its own content. While the stream is young the anchor holds its first frames, so that anchor and window
together are simply all of it; what a strategy does from the first frame that no longer fits is all it is about.

A strategy is a small frozen dataclass with pure methods over an explicit pytree, its `memory`: `initial` makes it,
`update` follows a finished chunk, `read` shows it as `frames` frames. Keys are stored without rotation. The rest of
`NoAnchor` (the positions, the length of the fill) is inherited by nearly all of them. A new strategy needs its class,
and a name in `ANCHORS` if configurations are to name it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.fields import Named
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.rope import MAX_POSITION, Rotation, rotate, rotation


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


def consecutive(anchor: int, state: int, window: int, content: int) -> Layout:
    """The layout of so many frames at the positions 0, 1, 2, …"""
    sizes = (anchor, state, window, content)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Layout(*(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)))


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


# --- no memory beyond the window --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoAnchor(Named):
    """A plain sliding window (Self-Forcing, Causal-Forcing), and the base of all strategies.

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
    default_kind = "adaptive"

    @classmethod
    def kinds(cls) -> Mapping[str, type]:
        return ANCHORS

    @classmethod
    def from_settings(cls, name: str, **settings: Any) -> "NoAnchor":
        return make_anchor(name, **settings)

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
        """Positions in a chunk whose content begins at `first_frame` of the stream, None in the steady state."""
        if first_frame is None:
            return consecutive(self.frames, self.state_frames, past_frames, content_frames)
        window = min(first_frame, past_frames)
        return consecutive(min(first_frame - window, self.frames), 0, window, content_frames)

    def initial(self, zeros: Callable[[int], KeyValues], past_frames: int) -> Any:
        """Memory before the first chunk; `zeros` makes so many frames of zeros."""
        return None

    def read(self, memory: Any) -> KeyValues:
        """The anchor, `frames` frames of un-rotated keys and values; a young stream shows only the first of them."""
        raise NotImplementedError("a strategy with anchor frames must show them")

    def update(self, memory: Any, commit: Commit) -> Any:
        """Memory after a chunk."""
        return None


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


# --- the first frames, for ever ---------------------------------------------------------------------------------------


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
        return _capture_first_frames(memory, commit)


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

    def read(self, memory: Receding) -> KeyValues:
        turn = rotation(memory.distance[None], 1, 1, memory.sink.key.shape[-1])
        # In float32, so that keys are rounded once, when they are rotated to where they stand.
        key = rotate(memory.sink.key.astype(jnp.float32), Rotation(turn.cos, -turn.sin))
        return KeyValues(key, memory.sink.value)

    def update(self, memory: Receding, commit: Commit) -> Receding:
        gone = 0 if commit.evicted is None else commit.evicted.num_tokens // commit.frame_tokens
        distance = jnp.minimum(memory.distance + gone, MAX_POSITION - 1)
        return Receding(_capture_first_frames(memory.sink, commit), distance)


@dataclasses.dataclass(frozen=True)
class RollingAnchor(StaticAnchor):
    """Rolling-Forcing: chunks at all noise levels are denoised together; the first frames stand beside them.

    Denoising sees the anchor and the last `working_frames` of the window. The clean pass of a finished chunk sees the
    whole window, and the anchor only as far as the window still holds it. Source: arXiv 2509.25161.
    """

    frames: int = 3
    working_frames: int = 3
    joint = True

    def layout(self, first_frame: int | None, past_frames: int, content_frames: int) -> Layout:
        return super().layout(first_frame, min(past_frames, self.working_frames), content_frames)


# --- memories that change ---------------------------------------------------------------------------------------------


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
        return _capture_first_frames(memory, commit) if commit.state is None else commit.state


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
            return _capture_first_frames(memory, commit)
        return _blend(memory, _in_float32(commit.evicted), 1.0 - self.decay)


@dataclasses.dataclass(frozen=True)
class MemoryAnchor(NoAnchor):
    """MemRoPE: the first frames, and two frames of running means of all that left the window, a slow and a fast one.

    m is the mean over all evicted tokens (over the evicted frames, token by token, if `adaptive`);
    M ← (1 − rate) M + rate m, each mean with its rate. If `adaptive`, the fast rate of a token is between 0.1 and 5
    times `short_rate`, linearly in how far m is from M there relative to the farthest token of the sample and layer
    (our reading of the norm: over all heads). The means take the places of the frames behind the sink.
    Source: arXiv 2603.12513.
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
            return _capture_first_frames(memory, commit)
        tokens = commit.frame_tokens
        sink, long, short = (memory.tokens(first * tokens, size * tokens) for first, size in self._parts)
        mean = jax.tree.map(lambda x: self._mean(x.astype(jnp.float32), tokens), commit.evicted)
        if commit.first_frame is not None:
            return concatenate(sink, mean, mean)
        short_rate = jax.tree.map(self._adapted_rate, mean, short) if self.adaptive else self.short_rate
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
        """Rate of every token [layers, B, tokens, 1, 1]."""
        gap = jnp.linalg.norm(mean - short, axis=(-2, -1), keepdims=True)
        farthest = gap.max(axis=2, keepdims=True)
        share = gap / jnp.where(farthest > 0, farthest, 1.0)
        return self.short_rate * (0.1 + (5.0 - 0.1) * share)


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
            return dataclasses.replace(memory, originals=_capture_first_frames(memory.originals, commit))
        step = commit.content.num_tokens // commit.frame_tokens
        return dataclasses.replace(memory, place=(memory.place + step) % (2 * memory.frames))


ANCHORS = {
    "none": NoAnchor,
    "static": StaticAnchor,
    "adaptive": AdaptiveAnchor,
    "absolute": AbsoluteAnchor,
    "ema": EMAAnchor,
    "memory": MemoryAnchor,
    "ping_pong": PingPongAnchor,
    "restart": RestartAnchor,
    "rolling": RollingAnchor,
}


def make_anchor(name: str, frames: int | None = None, **settings: Any) -> NoAnchor:
    """The strategy of this name.

    Args:
        frames: anchor (and, for `adaptive`, state) frames; None is the strategy's own number. A strategy whose number
            does not vary ignores it.
        settings: the strategy's other fields.

    Raises:
        ValueError: unknown name or setting, or no frames for a strategy that needs some.
    """
    if name not in ANCHORS:
        raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {name!r}")
    kind = ANCHORS[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in fields:
            raise ValueError(f"anchor {name!r} has no setting {setting!r}; known are {', '.join(fields) or 'none'}")
    if frames is not None and "frames" in fields:
        if frames < 1:
            raise ValueError(f"anchor {name!r} needs at least one frame, got {frames}")
        settings["frames"] = frames
    return kind(**settings)


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


def _in_float32(tokens: KeyValues) -> KeyValues:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tokens)


def _blend(memory: KeyValues, new: KeyValues, rate: Any) -> KeyValues:
    """(1 − rate) M + rate m; `rate` is a number, or keys' and values' own."""
    rate = rate if isinstance(rate, KeyValues) else KeyValues(rate, rate)
    return jax.tree.map(lambda old, x, by: (1.0 - by) * old + by * x, memory, new, rate)
