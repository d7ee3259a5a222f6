"""A linear layer that computes in one dtype, and whose weights' gradients are summed in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def stated_precision(dtype: Any) -> jax.lax.Precision | None:
    """What a product of this dtype is to say of its precision.

    Float32 is meant where it is written: unless told so, a TPU rounds factors to bfloat16, and a GPU to TF32.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


class Linear(nnx.Linear):
    """`flax.nnx.Linear` with a bias, the same numbers, and the gradient of `linear`."""

    def __call__(self, inputs: jax.Array, axes: int = 1) -> jax.Array:
        """[..., inputs] → [..., outputs] in the layer's `dtype`; the inputs may be split over the last `axes` axes."""
        return linear(inputs, self.kernel[...], self.bias[...], self.dtype, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: str, axes: int = 1) -> jax.Array:
    """x W + b in `dtype`, with gradients of W and b that are sums in float32 over all of x's leading dimensions.

    Left to itself, the gradient of a weight that is rounded to `dtype` is summed, over tokens and over devices, in
    `dtype`. Here every product enters a float32 sum, and float32 partial sums are what devices add up.

    Args:
        x: [..., inputs], or with the inputs split over its last `axes` axes: [..., heads, head_dim], say. They are
            summed over as they lie, because joining them first would cost a TPU a copy into another layout.
        kernel: [inputs, outputs].
        bias: [outputs].

    Returns:
        [..., outputs] in `dtype`.
    """
    return _product(x.astype(dtype), kernel, bias, dtype, axes)


def _product(x, kernel, bias, dtype, axes):
    split = kernel.astype(dtype).reshape(*x.shape[x.ndim - axes :], -1)
    return jnp.tensordot(x, split, axes, precision=stated_precision(dtype)) + bias.astype(dtype)


def _forward(x, kernel, bias, dtype, axes):
    # What is kept of x is what was multiplied; of its own dtype the type alone, as an array of nothing. The product is
    # not `linear`'s, in which `jax.checkpoint` would not find it.
    rounded = x.astype(dtype)
    return _product(rounded, kernel, bias, dtype, axes), (rounded, jnp.zeros(0, x.dtype), kernel, bias)


def _backward(dtype, axes, saved, gradient):
    x, like_x, kernel, bias = saved
    leading = tuple(range(x.ndim - axes))
    precision = stated_precision(dtype)
    split = kernel.astype(dtype).reshape(*x.shape[x.ndim - axes :], -1)
    to_x = jnp.tensordot(gradient, split, ((-1,), (-1,)), precision=precision)
    to_kernel = jax.lax.dot_general(
        x, gradient, ((leading, leading), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    to_bias = gradient.sum(axis=leading, dtype=jnp.float32)
    to_kernel = to_kernel.reshape(kernel.shape).astype(kernel.dtype)
    return to_x.astype(like_x.dtype), to_kernel, to_bias.astype(bias.dtype)


linear.defvjp(_forward, _backward)
