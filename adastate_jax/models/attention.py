"""Attention that a DiT block is handed: over all live tokens and a cached context, or block-causal over chunks.

No mask tensor is ever built: what a query may not see is left out of its keys.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adastate_jax.models.rope import Rotation, rotate

BACKENDS = ("xla", "cudnn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys (after QK-norm) and values of T tokens, each [..., T, heads, head_dim]."""

    key: jax.Array
    value: jax.Array

    @property
    def num_tokens(self) -> int:
        return self.key.shape[-3]

    def tokens(self, start, size: int) -> "KeyValues":
        """The `size` tokens from `start` on; `start` is an int, or an array under `jit`."""
        if isinstance(start, int):
            return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, start + size, axis=x.ndim - 3), self)
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 3), self)


def concatenate(*parts: KeyValues) -> KeyValues:
    """Joins keys and values along the token axis, in the given order."""
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-3), *parts)


# (query, key, value of the live tokens, un-rotated; their rotation; the layer's context, already rotated) -> output
Attend = Callable[[jax.Array, jax.Array, jax.Array, Rotation, KeyValues | None], jax.Array]


def resolve_backend(name: str, platform: str) -> str:
    """The attention backend for a platform: `auto` is cuDNN on `gpu`, XLA elsewhere.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return "cudnn" if platform in ("gpu", "cuda") else "xla"
    if name not in BACKENDS:
        raise ValueError(f"attention must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def attention(query: jax.Array, key: jax.Array, value: jax.Array, backend: str) -> jax.Array:
    """Softmax attention, every query sees every key.

    Args:
        query: [B, T, heads, head_dim].
        key, value: [B, S, heads, head_dim].
        backend: one of `BACKENDS`; cuDNN takes 16-bit floats only, so float32 checks run on XLA.

    Returns:
        [B, T, heads, head_dim] in the dtype of `query`.
    """
    return jax.nn.dot_product_attention(
        query, key.astype(query.dtype), value.astype(query.dtype), implementation=backend
    )


def attend_all(backend: str) -> Attend:
    """Live tokens see the context (if any) and each other: bidirectional without a context, streaming with one."""

    def attend(query, key, value, rotation, context):
        live = KeyValues(rotate(key, rotation), value)
        seen = live if context is None else concatenate(context, live)
        return attention(rotate(query, rotation), seen.key, seen.value, backend)

    return attend


def attend_block_causal(
    backend: str, chunk_tokens: int, past_tokens: int | None = None, clean_copy: bool = False
) -> Attend:
    """All chunks of a clip in one pass, each seeing its own tokens and at most `past_tokens` before its first.

    With `clean_copy` the tokens are [clean clip | noisy clip]: clean chunks see the clean past and themselves, noisy
    chunks the clean past and themselves. This is what a stream sees, chunk by chunk, without an anchor
    (Self-Forcing's block-causal mask, and its teacher-forcing mask when `clean_copy`).

    Args:
        chunk_tokens: tokens per chunk; divides the tokens of the clip.
        past_tokens: how far back a chunk sees; None is everything.
    """
    attend_chunk = functools.partial(attention, backend=backend)

    def attend(query, key, value, rotation, context):
        if context is not None:
            raise ValueError("block-causal attention takes no cached context")
        query, live = rotate(query, rotation), KeyValues(rotate(key, rotation), value)
        clip_tokens = live.num_tokens // (2 if clean_copy else 1)
        if clip_tokens % chunk_tokens:
            raise ValueError(f"a clip of {clip_tokens} tokens is no whole number of chunks of {chunk_tokens}")
        outputs = []
        for first in range(0, live.num_tokens, chunk_tokens):
            start = first % clip_tokens  # place in the clip, whichever copy the chunk is of
            past = start if past_tokens is None else min(start, past_tokens)
            seen = concatenate(live.tokens(start - past, past), live.tokens(first, chunk_tokens))
            outputs.append(attend_chunk(query[:, first : first + chunk_tokens], seen.key, seen.value))
        return jnp.concatenate(outputs, axis=1)

    return attend
