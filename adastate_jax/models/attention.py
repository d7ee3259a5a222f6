"""Attention that a DiT block is handed: over all live tokens and a cached context, or block-causal over chunks.

No mask tensor is ever built: what a query may not see is left out of its keys. Three backends compute the rest:
`cudnn` on GPU and `splash` on TPU never write the scores to memory; `xla` does, runs everywhere, and is the exact one.
It holds no more than `MOST_SCORE_BYTES` of them at once: where there would be more, queries come in blocks.
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
from adastate_jax.models.rope import Rotation, rotate
from adastate_jax.sharding import RULES, constrain

BACKENDS = ("auto", "xla", "cudnn", "splash")

_FUSED = {"gpu": "cudnn", "tpu": "splash"}  # platform → its backend

_LANES = 128  # TPU tiles are so wide

MOST_SCORE_BYTES = 2**30  # float32 scores that `xla` may hold at once on a device

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


# (query, key, value of the live tokens, un-rotated; their rotation; the layer's context, already rotated)
# -> output, and what is kept of the layer: its keys and values, un-rotated, and whatever else is to be known of it
Attend = Callable[[jax.Array, jax.Array, jax.Array, Rotation, KeyValues | None], tuple[jax.Array, Any]]


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
        return f"head dim {head_dim} is no multiple of {_LANES}" if head_dim % _LANES else None
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


def attention(query: jax.Array, key: jax.Array, value: jax.Array, backend: str) -> jax.Array:
    """Softmax attention, every query sees every key.

    Args:
        query: [B, T, heads, head_dim].
        key, value: [B, S, heads, head_dim].
        backend: one of `BACKENDS`, resolved for `target_device` when the program is traced.

    Returns:
        [B, T, heads, head_dim] in the dtype of `query`.

    Raises:
        ValueError, UserError: as `resolve_backend`.
    """
    chosen = resolve_backend(backend, target_device(), query.dtype.name, query.shape[-1])
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    with jax.named_scope(f"attention_{chosen}"):  # by which profiles and compiled programs tell it
        if chosen == "splash":
            return splash_attention(query, key, value)
        if chosen == "cudnn":
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return _xla_attention(query, key, value)


def _xla_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention` by XLA: all queries at once where their scores fit, else block after block."""
    queries, keys = query.shape[1], key.shape[1]
    per_query = 4 * keys * _per_device("batch", query.shape[0]) * _per_device("heads", query.shape[2])
    if queries * per_query <= MOST_SCORE_BYTES:
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")
    block = max(MOST_SCORE_BYTES // per_query, 1)
    _say_blocks(queries, keys, queries * per_query, block)
    return attention_in_blocks(query, key, value, block)


def _per_device(axis: str, size: int) -> int:
    """How much of an activation's axis lies on one device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    extent = 1 if mesh.empty else math.prod(mesh.shape[name] for name in RULES[axis])
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


def attention_in_blocks(query: jax.Array, key: jax.Array, value: jax.Array, most_queries: int) -> jax.Array:
    """`attention` by XLA of at most so many queries at a time; their scores are computed again for the gradient.

    Args:
        query, key, value: as `attention`, of one dtype.
    """
    queries = query.shape[1]
    count = -(-queries // most_queries)
    size = -(-queries // count)
    padded = jnp.pad(query, ((0, 0), (0, count * size - queries), (0, 0), (0, 0)))
    blocks = einops.rearrange(padded, "b (n t) heads d -> n b t heads d", n=count)
    # In float32, so that the blocks' gradients of keys and values are summed in it.
    exact_key, exact_value = key.astype(jnp.float32), value.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # needless in the body of a scan
    def attend_block(block: jax.Array) -> jax.Array:
        key, value = exact_key.astype(block.dtype), exact_value.astype(block.dtype)
        return jax.nn.dot_product_attention(block, key, value, implementation="xla")

    outputs = jax.lax.map(attend_block, constrain(blocks, None, "batch", None, "heads"))
    return einops.rearrange(outputs, "n b t heads d -> b (n t) heads d")[:, :queries]


def splash_attention(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool = False) -> jax.Array:
    """`attention` by JAX's Pallas kernel for TPUs, on each device's samples and heads by themselves.

    Args:
        query, key, value: as `attention`, of one dtype.
        interpret: evaluates the kernel step by step instead of compiling it, on any platform; for tests.
    """
    function = functools.partial(_splash, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(query, key, value)

    def split(axis: str, size: int) -> tuple[str, ...] | None:
        return RULES[axis] if size % math.prod(mesh.shape[name] for name in RULES[axis]) == 0 else None

    # A kernel is opaque to the partitioner: without this it would be refused on more than one device.
    spec = jax.P(split("batch", query.shape[0]), None, split("heads", query.shape[2]), None)
    return jax.shard_map(function, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(query, key, value)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Mosaic is loaded only where it is used

    query_tokens, key_tokens = query.shape[1], key.shape[1]
    query_block, key_block = _block(query_tokens), _block(key_tokens)
    scaled = (query.astype(jnp.float32) / math.sqrt(query.shape[-1])).astype(query.dtype)  # the kernel does not scale
    query, key, value = _padded(scaled, query_block), _padded(key, key_block), _padded(value, key_block)
    segments = None
    if key.shape[2] != key_tokens:  # all queries are of segment 1, padding ones too: they need keys, and are cut off
        real = (jnp.arange(key.shape[2]) < key_tokens).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.ones(query.shape[2], jnp.int32), kv=real)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((query.shape[2], key.shape[2]))] * query.shape[1]),
        block_sizes=splash.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            block_q_dq=query_block,
            block_kv_dq=key_block,
        ),
        interpret=interpret,
    )
    output = jax.vmap(lambda query, key, value: kernel(query, key, value, segment_ids=segments))(query, key, value)
    return einops.rearrange(output[:, :, :query_tokens], "b heads t d -> b t heads d")


def _block(tokens: int) -> int:
    """Side of the kernel's tiles along so many tokens: one tile if it fits, else the side that pads least."""
    largest = 8 * _LANES
    if tokens <= largest:
        return -(-tokens // _LANES) * _LANES
    return min(range(largest, largest // 2 - 1, -_LANES), key=lambda block: -tokens % block)


def _padded(x: jax.Array, block: int) -> jax.Array:
    """[B, T, heads, d] → [B, heads, T rounded up to whole blocks, d], with zeros."""
    x = einops.rearrange(x, "b t heads d -> b heads t d")
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))


def attend_all(backend: str) -> Attend:
    """Live tokens see the context (if any) and each other: bidirectional without a context, streaming with one."""

    def attend(query, key, value, rotation, context):
        live = KeyValues(rotate(key, rotation), value)
        seen = live if context is None else concatenate(context, live)
        return attention(rotate(query, rotation), seen.key, seen.value, backend), KeyValues(key, value)

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
