"""The stream's memory as an explicit pytree: the anchor and the sliding window.

Keys are stored after QK-norm and WITHOUT rotation; `read` rotates them to the chunk's relative positions. Denoising
reads the cache, `advance` writes it once per chunk.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.context_parallel import constrain_kept
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.rope import rotate, rotation
from adastate_jax.streaming.anchors.contract import Commit, NoAnchor
from adastate_jax.streaming.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Self-attention memory of all layers.

    Attributes:
        anchor: the anchor strategy's memory.
        window: the last content frames, the newest last, [layers, B, W_p tokens, heads, head_dim]; zeros stand before
            them until it is full.
    """

    anchor: Any
    window: KeyValues


def empty(model: DiTConfig, anchor: NoAnchor, past_frames: int, batch: int, frame_tokens: int) -> Cache:
    """The cache before the first chunk."""

    def zeros(frames: int) -> KeyValues:
        shape = (model.num_layers, batch, frames * frame_tokens, model.num_heads, model.head_dim)
        return constrain_kept(KeyValues(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)))

    return Cache(anchor.initial(zeros, past_frames), zeros(past_frames))


def visible(cache: Cache, anchor: NoAnchor, layout: Layout, frame_tokens: int) -> KeyValues | None:
    """The cached frames of a layout in its order; None if there are none.

    Keys are un-rotated, and as exact as the anchor strategy shows them: float32 for some.
    """
    parts = []
    if layout.anchor:
        shown = anchor.read(cache.anchor).tokens(0, len(layout.anchor) * frame_tokens)
        parts.append(KeyValues(shown.key, shown.value.astype(cache.window.value.dtype)))
    if layout.window:
        tokens = len(layout.window) * frame_tokens
        parts.append(cache.window.tokens(cache.window.num_tokens - tokens, tokens))
    return concatenate(*parts) if parts else None


def read(cache: Cache, anchor: NoAnchor, layout: Layout, height: int, width: int, head_dim: int) -> KeyValues | None:
    """What a chunk sees of the cache, keys rotated: [layers, B, cached tokens, heads, head_dim], or None if nothing.

    height, width: patches per column and row of a frame.
    """
    seen = visible(cache, anchor, layout, height * width)
    if seen is None:
        return None
    key = rotate(seen.key, rotation(layout.cached, height, width, head_dim))
    return KeyValues(key.astype(cache.window.key.dtype), seen.value)


def advance(cache: Cache, anchor: NoAnchor, layout: Layout, fresh: KeyValues, first_frame: int | None) -> Cache:
    """The cache after a chunk: content enters the window, the oldest leave, the anchor strategy updates its memory.

    Args:
        layout: the chunk's layout.
        fresh: clean keys (un-rotated) and values of the live frames, state first.
        first_frame: index in the stream of the first content frame during the fill; None in the steady state.
    """
    frame_tokens = fresh.num_tokens // len(layout.live)
    state_tokens = len(layout.state) * frame_tokens
    fresh = jax.tree.map(lambda x, like: x.astype(like.dtype), fresh, cache.window)
    content = fresh.tokens(state_tokens, fresh.num_tokens - state_tokens)
    capacity = cache.window.num_tokens
    held = concatenate(cache.window, content)
    window = held.tokens(content.num_tokens, capacity)

    end = None if first_frame is None else first_frame * frame_tokens + content.num_tokens
    fits = end is not None and end <= capacity + anchor.frames * frame_tokens
    evicted = None if fits else held.tokens(0, content.num_tokens)
    state = fresh.tokens(0, state_tokens) if state_tokens else None
    return Cache(anchor.update(cache.anchor, Commit(content, state, evicted, first_frame, frame_tokens)), window)
