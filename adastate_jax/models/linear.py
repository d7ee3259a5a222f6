"""A linear layer that computes in one dtype, and whose weights' gradients are summed in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Linear):
    """`flax.nnx.Linear` with a bias, the same numbers, and the gradient of `linear`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., inputs] → [..., outputs] in the layer's `dtype`."""
        return linear(inputs, self.kernel[...], self.bias[...], self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: str) -> jax.Array:
    """x W + b in `dtype`, with gradients of W and b that are sums in float32 over all of x's leading dimensions.

    Left to itself, the gradient of a weight that is rounded to `dtype` is summed, over tokens and over devices, in
    `dtype`. Here every product enters a float32 sum, and float32 partial sums are what devices add up.

    Args:
        x: [..., inputs].
        kernel: [inputs, outputs].
        bias: [outputs].

    Returns:
        [..., outputs] in `dtype`.
    """
    return _product(x.astype(dtype), kernel, bias, dtype)


def _product(x, kernel, bias, dtype):
    return jnp.dot(x, kernel.astype(dtype)) + bias.astype(dtype)


def _forward(x, kernel, bias, dtype):
    # What is kept of x is what was multiplied; of its own dtype the type alone, as an array of nothing. The product is
    # not `linear`'s, in which `jax.checkpoint` would not find it.
    rounded = x.astype(dtype)
    return _product(rounded, kernel, bias, dtype), (rounded, jnp.zeros(0, x.dtype), kernel, bias)


def _backward(dtype, saved, gradient):
    x, like_x, kernel, bias = saved
    leading = tuple(range(x.ndim - 1))
    to_x = jnp.dot(gradient, kernel.astype(dtype).T)
    to_kernel = jax.lax.dot_general(x, gradient, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)
    to_bias = gradient.sum(axis=leading, dtype=jnp.float32)
    return to_x.astype(like_x.dtype), to_kernel.astype(kernel.dtype), to_bias.astype(bias.dtype)


linear.defvjp(_forward, _backward)
