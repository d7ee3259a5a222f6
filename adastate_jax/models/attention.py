"""Attention that a DiT block is handed: over all live tokens and a cached context, or block-causal over chunks.

No mask tensor is ever built: what a query may not see is left out of its keys. Three backends compute the rest:
`cudnn` on GPU and `splash` on TPU never write the scores to memory; `xla` does, runs everywhere, and is the exact one.
It holds no more than `MOST_SCORE_BYTES` of them at once: where there would be more, queries come in blocks. On a
processor heads come one after another (`by_head.py`).
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice

from adastate_jax.errors import UserError
from adastate_jax.models.by_head import attention_by_head
from adastate_jax.models.rope import Rotation, rotate
from adastate_jax.models.splash import LANES, HeadsMajor, heads_major, splash_attention, tile_side
from adastate_jax.sharding import RULES, constrain, current_mesh

BACKENDS = ("auto", "xla", "cudnn", "splash")

_FUSED = {"gpu": "cudnn", "tpu": "splash"}  # platform → its backend

MOST_SCORE_BYTES = 2**30  # float32 scores that `xla` may hold at once on a device
_FEWEST_BY_HEAD = 2**14  # scores of a head from which on a processor has it by itself

_log = logging.getLogger(__name__)


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


Context = KeyValues | HeadsMajor

# (query, key, value of the live tokens, un-rotated; their rotation; the layer's context, already rotated)
# -> output, and what is kept of the layer: its keys and values, un-rotated, and whatever else is to be known of it
Attend = Callable[[jax.Array, jax.Array, jax.Array, Rotation, Context | None], tuple[jax.Array, Any]]


def target_device() -> jax.Device | AbstractDevice:
    """The device that the program being traced is for: of the current mesh's kind, else the default one."""
    wanted, here = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    if wanted is None or (wanted.platform, wanted.device_kind) == (here.platform, here.device_kind):
        return here
    return wanted


def shortcoming(backend: str, device: jax.Device | AbstractDevice, dtype: str, head_dim: int) -> str | None:
    """Why a backend cannot serve heads of this dtype and size on a device; None if it can."""
    if backend == "xla":
        return None
    if _FUSED.get(device.platform) != backend:
        return f"it does not run on {device.platform}"
    if backend == "splash":
        if dtype != "bfloat16":
            return f"it is for bfloat16, not for {dtype}"
        return f"head dim {head_dim} is no multiple of {LANES}" if head_dim % LANES else None
    absent = isinstance(device, AbstractDevice)  # JAX knows but its name; what programs can be compiled for is Hopper
    if not absent and "cuda" not in device.client.platform_version:
        return "it needs CUDA"
    if dtype not in ("bfloat16", "float16"):
        return f"it is for bfloat16 and float16, not for {dtype}"
    capability = 9.0 if absent else float(device.compute_capability)
    if capability < 8:
        return f"it needs compute capability 8.0, not {capability}"
    largest = 256 if capability >= 9 else 128
    return f"head dim {head_dim} is no multiple of 8 up to {largest}" if head_dim % 8 or head_dim > largest else None


@functools.cache  # so that each program's choice is in the log once, not once per trace
def resolve_backend(name: str, device: jax.Device | AbstractDevice, dtype: str, head_dim: int) -> str:
    """The backend that serves: the named one, or for `auto` the device's fused one where it can, else XLA's.

    Args:
        name: one of `BACKENDS`.
        device: where the program runs.
        dtype, head_dim: of the queries.

    Returns:
        `xla`, `cudnn` or `splash`. The log says which, and why where that is the slow one.

    Raises:
        ValueError: an unknown name.
        UserError: the named one cannot serve.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    wanted = _FUSED.get(device.platform, "xla") if name == "auto" else name
    reason = shortcoming(wanted, device, dtype, head_dim)
    if reason and name != "auto":
        raise UserError(f"attention {name}: {reason}; choose auto or xla")
    if reason:
        _log.warning("attention: xla, slow, because %s cannot serve: %s", wanted, reason)
    else:
        _log.info("attention: %s (%s, head dim %d, on %s)", wanted, dtype, head_dim, device.device_kind)
    return "xla" if reason else wanted


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, backend: str, context: Context | None = None
) -> jax.Array:
    """Softmax attention, every query sees every key.

    Args:
        query: [B, T, heads, head_dim].
        key, value: [B, S, heads, head_dim].
        backend: one of `BACKENDS`, resolved for `target_device` when the program is traced.
        context: keys and values that are seen beside them, plain or from `lay_out` for S further tokens.

    Returns:
        [B, T, heads, head_dim] in the dtype of `query`.

    Raises:
        ValueError, UserError: as `resolve_backend`.
    """
    chosen = _serving(backend, query.dtype.name, query.shape[-1])
    if isinstance(context, KeyValues):
        seen = concatenate(context, KeyValues(key, value))
        key, value, context = seen.key, seen.value, None
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    with jax.named_scope(f"attention_{chosen}"):  # by which profiles and compiled programs tell it
        if chosen == "splash":
            return splash_attention(query, key, value, context)
        if chosen == "cudnn":
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return _xla_attention(query, key, value)


def _serving(backend: str, dtype: str, head_dim: int) -> str:
    return resolve_backend(backend, target_device(), dtype, head_dim)


def lay_out(context: KeyValues | None, live_tokens: int, backend: str, dtype: str) -> Context | None:
    """A context as the backend reads it, so that no pass and no layer has to turn it again.

    Args:
        context: rotated keys and values [..., T, heads, head_dim].
        live_tokens: how many others will be seen beside it.
        backend, dtype: of the attention that will read it.

    Returns:
        For `splash` heads-major, with the zeros behind it that fill its and the live tokens' last tile; else unchanged.
    """
    if context is None or _serving(backend, dtype, context.key.shape[-1]) != "splash":
        return context
    if jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1:  # tokens are exchanged for heads first
        return context
    total = context.num_tokens + live_tokens
    return HeadsMajor(
        *(heads_major(x.astype(dtype), -total % tile_side(total)) for x in (context.key, context.value)),
        num_tokens=context.num_tokens,
    )


def _xla_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention` by XLA: all queries at once where their scores fit, else block after block, or head after head."""
    queries, keys = query.shape[1], key.shape[1]
    if _by_head(queries, keys):
        return attention_by_head(query, key, value)
    per_query = 4 * keys * _per_device("batch", query.shape[0]) * _per_device("heads", query.shape[2])
    if queries * per_query <= MOST_SCORE_BYTES:
        return _exact_attention(query, key, value)
    block = max(MOST_SCORE_BYTES // per_query, 1)
    _say_blocks(queries, keys, queries * per_query, block)
    return attention_in_blocks(query, key, value, block)


def _by_head(queries: int, keys: int) -> bool:
    """Whether heads come one after another: on a processor, but for a few tokens, which a loop would hold up."""
    mesh = current_mesh()
    whole = mesh is None or mesh.size == 1  # heads that lie on several devices would be gathered one by one
    return target_device().platform == "cpu" and whole and queries * keys >= _FEWEST_BY_HEAD


def _exact_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    stated = "highest" if query.dtype == jnp.float32 else None  # as `linear.stated_precision`
    with jax.default_matmul_precision(stated):
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def _per_device(axis: str, size: int) -> int:
    """How much of an activation's axis lies on one device of the current mesh."""
    mesh = current_mesh()
    extent = 1 if mesh is None else math.prod(mesh.shape[name] for name in RULES[axis])
    return size // extent if size % extent == 0 else size


@functools.cache  # once per shape, not once per trace
def _say_blocks(queries: int, keys: int, score_bytes: int, block: int) -> None:
    _log.info(
        "attention: xla, %d queries at a time: the scores of %d queries and %d keys would take %.1f GB",
        block,
        queries,
        keys,
        score_bytes / 1e9,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention_in_blocks(query: jax.Array, key: jax.Array, value: jax.Array, most_queries: int) -> jax.Array:
    """`attention` by XLA of at most so many queries at a time; their scores are computed again for the gradient.

    The blocks' gradients of keys and values are summed in float32.

    Args:
        query, key, value: as `attention`, of one dtype.
    """
    outputs = jax.lax.map(lambda block: _exact_attention(block, key, value), _query_blocks(query, most_queries))
    return _joined_blocks(outputs, query.shape[1])


def _query_blocks(query: jax.Array, most_queries: int) -> jax.Array:
    """[B, T, heads, d] → [blocks, B, queries of a block, heads, d], the last filled up with zeros."""
    queries = query.shape[1]
    count = -(-queries // most_queries)
    padded = jnp.pad(query, ((0, 0), (0, -queries % count), (0, 0), (0, 0)))
    blocks = einops.rearrange(padded, "b (n t) heads d -> n b t heads d", n=count)
    return constrain(blocks, None, "batch", None, "heads")


def _joined_blocks(blocks: jax.Array, queries: int) -> jax.Array:
    return einops.rearrange(blocks, "n b t heads d -> b (n t) heads d")[:, :queries]


def _blocks_forward(query, key, value, most_queries):
    return attention_in_blocks(query, key, value, most_queries), (query, key, value)


def _blocks_backward(most_queries: int, saved, gradient: jax.Array):
    query, key, value = saved

    def step(total, inputs):
        block, to_output = inputs
        to_block, *to_context = jax.vjp(_exact_attention, block, key, value)[1](to_output)
        return tuple(x + part for x, part in zip(total, to_context, strict=True)), to_block

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    blocks = _query_blocks(query, most_queries), _query_blocks(gradient, most_queries)
    (to_key, to_value), to_blocks = jax.lax.scan(step, zeros, blocks)
    to_query = _joined_blocks(to_blocks, query.shape[1])
    return to_query, to_key.astype(key.dtype), to_value.astype(value.dtype)


attention_in_blocks.defvjp(_blocks_forward, _blocks_backward)


def attend_all(backend: str) -> Attend:
    """Live tokens see the context (if any) and each other: bidirectional without a context, streaming with one."""

    def attend(query, key, value, rotation, context):
        live = KeyValues(rotate(key, rotation), value)
        output = attention(rotate(query, rotation), live.key, live.value, backend, context)
        return output, KeyValues(key, value)

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
        return jnp.concatenate(outputs, axis=1), KeyValues(key, value)

    return attend
