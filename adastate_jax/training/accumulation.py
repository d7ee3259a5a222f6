"""Gradients of a batch as sums over its parts: in float32, each where its weights lie."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.sharding import constrain, constrain_weights


def zeros_in_float32(tree: Any) -> Any:
    """Zeros like the weights of a tree, in float32 and split as they are: what gradients are summed into."""
    return constrain_weights(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree))


def add_in_float32(total: Any, part: Any) -> Any:
    """A float32 sum, and one more part of any dtype."""
    return constrain_weights(jax.tree.map(lambda x, y: x + y.astype(jnp.float32), total, part))


def micro_batches(batch: Any, count: int, axis: int = 0) -> Any:
    """Parts of a batch, stacked in front: [..., B, ...] → [count, ..., B / count, ...].

    Part i has every `count`-th sample from i on, so that each device takes its samples from its own.

    Args:
        batch: arrays with samples along `axis`.
    """

    def split(x: jax.Array) -> jax.Array:
        size = x.shape[axis] // count
        parts = jnp.moveaxis(x.reshape(*x.shape[:axis], size, count, *x.shape[axis + 1 :]), axis + 1, 0)
        return constrain(parts, *[None] * (axis + 1), "batch")

    return jax.tree.map(split, batch)


def accumulate(
    gradients_of: Callable[[Any], Any], batch: Any, count: int, split: Callable[[Any, int], Any] = micro_batches
) -> Any:
    """The mean over micro-batches of what `gradients_of` gives for each, computed one after another.

    Args:
        gradients_of: micro-batch → any tree of arrays, such as (gradients, scalars), each a mean over samples.
        batch: of all samples; it is handed over as it is where `count` is 1.
        split: (batch, count) → its micro-batches, stacked.

    Returns:
        The tree; in float32 where it is a sum.
    """
    if count == 1:
        return gradients_of(batch)
    parts = split(batch, count)
    first = jax.eval_shape(gradients_of, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts))

    def step(total: Any, part: Any) -> tuple[Any, None]:
        return add_in_float32(total, gradients_of(part)), None

    total, _ = jax.lax.scan(step, zeros_in_float32(first), parts)
    return jax.tree.map(lambda x: x / count, total)
