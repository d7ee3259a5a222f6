"""Attention by JAX's Pallas kernel for TPUs, and a context laid out as it reads one."""

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp

from adastate_jax.sharding import activation_axes, current_mesh

LANES, _SUBLANES = 128, 8  # TPU tiles are so wide and so high

_MOST_QUERIES = 9 * LANES  # of a tile of the kernel's forward pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadsMajor:
    """A context as the splash kernel reads it: keys and values [..., heads, T and more, head_dim], zeros at the end."""

    key: jax.Array
    value: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})  # T


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: HeadsMajor | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention` by JAX's Pallas kernel for TPUs, on each device's samples and heads by themselves.

    Args:
        query, key, value, context: as `attention`, of one dtype.
        interpret: evaluates the kernel step by step instead of compiling it, on any platform; for tests.
    """
    function = functools.partial(_splash, interpret=interpret)
    mesh = current_mesh()
    if mesh is None:
        return function(query, key, value, context)
    # A kernel is opaque to the partitioner: without this it would be refused on more than one device.
    batch, heads = (activation_axes(axis, query.shape[i], mesh) for axis, i in (("batch", 0), ("heads", 2)))
    spec, context_spec = jax.P(batch, None, heads, None), jax.P(batch, heads, None, None)
    run = jax.shard_map(function, in_specs=(spec, spec, spec, context_spec), out_specs=spec, check_vma=False)
    return run(query, key, value, context)


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, context: HeadsMajor | None, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Mosaic is loaded only where it is used

    query_tokens, key_tokens = query.shape[1], key.shape[1] + (0 if context is None else context.num_tokens)
    key_block = tile_side(key_tokens)
    scaled = (query.astype(jnp.float32) / math.sqrt(query.shape[-1])).astype(query.dtype)  # the kernel does not scale
    query = heads_major(scaled, 0)
    # The order of keys does not matter: live ones come first, so that the zeros that fill the last tile, which lie
    # behind the context, are behind all of them.
    if context is None:
        key, value = (heads_major(x, -key_tokens % key_block) for x in (key, value))
    else:
        key, value = (_joined(heads_major(key, 0), context.key), _joined(heads_major(value, 0), context.value))

    def tiled(query: jax.Array, key: jax.Array, value: jax.Array, query_block: int) -> jax.Array:
        segments = None
        if key.shape[2] != key_tokens:  # all queries are of segment 1, those that fill a tile too: they need keys
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
        return jax.vmap(functools.partial(kernel, segment_ids=segments))(query, key, value)

    def padded(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        block = tile_side(query_tokens)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, -query_tokens % block), (0, 0)))
        return tiled(query, key, value, block)[:, :, :query_tokens]

    block = _exact_side(query_tokens)
    if query_tokens % tile_side(query_tokens) == 0 or block is None:
        output = padded(query, key, value)
    else:
        # Only the gradient's kernels need sides of whole lanes: without it, queries need not be filled up.
        attend = jax.custom_vjp(functools.partial(tiled, query_block=block))
        attend.defvjp(functools.partial(jax.vjp, padded), lambda pullback, gradient: pullback(gradient))
        output = attend(query, key, value)
    return einops.rearrange(output, "b heads t d -> b t heads d")


def _joined(live: jax.Array, laid_out: jax.Array) -> jax.Array:
    """[B, heads, T, head_dim] and [B, heads, S, head_dim] → [B, heads, T + S, head_dim].

    Each is written into its place in an array of nothing: what makes the live ones can write them there itself. A TPU's
    compiler turns a concatenation into the larger of two arrays filled up with zeros, over all of both.
    """
    tokens = live.shape[2]
    whole = jax.lax.empty((*live.shape[:2], tokens + laid_out.shape[2], live.shape[3]), live.dtype)
    for part, start in ((live, 0), (laid_out, tokens)):
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=2)
    return whole


def _exact_side(queries: int) -> int | None:
    """The largest side of a tile that divides so many queries, if it is not much smaller than others; else None."""
    sides = range(_MOST_QUERIES, _MOST_QUERIES // 2 - 1, -_SUBLANES) if queries > _MOST_QUERIES else (queries,)
    return next((side for side in sides if queries % side == 0 and side % _SUBLANES == 0), None)


def tile_side(tokens: int) -> int:
    """Side of the kernel's tiles along so many tokens: one tile if it fits, else the side that pads least."""
    largest = 8 * LANES
    if tokens <= largest:
        return -(-tokens // LANES) * LANES
    return min(range(largest, largest // 2 - 1, -LANES), key=lambda block: -tokens % block)


def heads_major(x: jax.Array, padding: int) -> jax.Array:
    """[..., T, heads, head_dim] → [..., heads, T + padding, head_dim], zeros at the end."""
    x = jnp.swapaxes(x, -3, -2)
    return jnp.pad(x, (*[(0, 0)] * (x.ndim - 2), (0, padding), (0, 0))) if padding else x
