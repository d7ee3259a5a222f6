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


def join_micro_batches(parts: Any, axis: int = 0) -> Any:
    """The batch that `micro_batches` split: [count, ..., B / count, ...] → [..., B, ...]."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis + 1)
        return constrain(x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), *[None] * axis, "batch")

    return jax.tree.map(join, parts)


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
    return accumulate_and_keep(lambda part: (gradients_of(part), None), batch, count, split, lambda kept: kept)[0]


def accumulate_and_keep(
    gradients_of: Callable[[Any], tuple[Any, Any]],
    batch: Any,
    count: int,
    split: Callable[[Any, int], Any],
    join: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """`accumulate`, and what else is made of each micro-batch, which belongs to its samples.

    Args:
        gradients_of: micro-batch → (what is averaged, what is kept).
        join: kept of the micro-batches, stacked → of all samples.

    Returns:
        The mean, and what was kept.
    """
    if count == 1:
        return gradients_of(batch)
    parts = split(batch, count)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    averaged, _ = jax.eval_shape(gradients_of, one)

    def step(total: Any, part: Any) -> tuple[Any, Any]:
        new, kept = gradients_of(part)
        return add_in_float32(total, new), kept

    total, kept = jax.lax.scan(step, zeros_in_float32(averaged), parts)
    return jax.tree.map(lambda x: x / count, total), join(kept)
