"""Classifier-free guidance of a bidirectional network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def guided(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """cond + w (cond − uncond); w is the conventional guidance scale minus one."""
    return conditional + scale * (conditional - unconditional)


def guided_pass(function: Callable[[Any], jax.Array], text: Any, null_text: Any, scale: float) -> jax.Array:
    """`guided` of what a network says with the prompts and with the negative one: two turns of one loop.

    Not one batch of twice the samples: joined along the axis that is split over devices, latents would travel between
    these, and both passes' intermediate results would be there at once. The price is that weights are gathered twice.

    Args:
        function: text keys and values of a batch → array.
        text, null_text: those of B prompts, and of one for all of them.
    """
    both = jax.tree.map(lambda x, null: jnp.stack([x, jnp.broadcast_to(null, x.shape)]), text, null_text)
    _, (conditional, unconditional) = jax.lax.scan(lambda _, one: (None, function(one)), None, both, length=2)
    return guided(conditional, unconditional, scale)
