"""Exact attention on a processor: head after head, of so many queries at once that their scores stay in its cache.

All heads at once are slow there: XLA turns queries, keys and all heads' scores into another layout, and the scores go
through memory several times. One head's products are plain, and nothing but the exponential lies between them: its sum
divides what was multiplied by the values. For the gradient scores are computed again.
"""

import einops
import jax
import jax.numpy as jnp

from adastate_jax.models.linear import stated_precision

MOST_CACHED_BYTES = 2**25  # float32 scores of one head at once: a processor's last cache holds about so many


def attention_by_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention of arrays [B, T or S, heads, head_dim] of one dtype; sums are float32, also the gradients'."""
    rows = (einops.rearrange(x, "b t heads d -> (b heads) t d") for x in (query, key, value))
    output = jax.lax.map(lambda head: _attention(*head), tuple(rows))
    return einops.rearrange(output, "(b heads) t d -> b t heads d", b=query.shape[0])


@jax.custom_vjp
def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Of one head: [T, d], [S, d], [S, d] → [T, d]."""

    def attend(queries):
        scores = _scores(queries, key)
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        return (_product(weights.astype(value.dtype), value) / weights.sum(axis=1, keepdims=True)).astype(query.dtype)

    return _joined(jax.lax.map(attend, _blocks(query, key)), query)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    return _product(query, key.T) * query.shape[1] ** -0.5


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jax.lax.dot(left, right, precision=stated_precision(left.dtype), preferred_element_type=jnp.float32)


def _blocks(query: jax.Array, key: jax.Array) -> jax.Array:
    """[T, d] → [blocks, queries of a block, d], the last filled up with zeros."""
    most = max(MOST_CACHED_BYTES // (4 * key.shape[0]), 1)
    count = -(-query.shape[0] // most)
    padded = jnp.pad(query, ((0, -query.shape[0] % count), (0, 0)))
    return padded.reshape(count, -1, query.shape[1])


def _joined(blocks: jax.Array, like: jax.Array) -> jax.Array:
    return blocks.reshape(-1, like.shape[1])[: like.shape[0]]


def _forward(query, key, value):
    return _attention(query, key, value), (query, key, value)


def _backward(saved, gradient):
    query, key, value = saved
    dtype = query.dtype

    def step(sums, block):
        queries, to_output = block
        weights = jax.nn.softmax(_scores(queries, key))
        to_weights = _product(to_output, value.T)
        to_scores = weights * (to_weights - (weights * to_weights).sum(axis=1, keepdims=True))
        to_scores = (to_scores * query.shape[1] ** -0.5).astype(dtype)
        to_key = _product(to_scores.T, queries)
        to_value = _product(weights.astype(dtype).T, to_output)
        return (sums[0] + to_key, sums[1] + to_value), _product(to_scores, key).astype(dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    (to_key, to_value), blocks = jax.lax.scan(step, zeros, (_blocks(query, key), _blocks(gradient, key)))
    return _joined(blocks, query), to_key.astype(dtype), to_value.astype(dtype)


_attention.defvjp(_forward, _backward)
