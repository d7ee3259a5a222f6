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
    return jnp.dot(x.astype(dtype), kernel.astype(dtype)) + bias.astype(dtype)


def _forward(x, kernel, bias, dtype):
    return linear(x, kernel, bias, dtype), (x, kernel, bias)


def _backward(dtype, saved, gradient):
    x, kernel, bias = saved
    leading = tuple(range(x.ndim - 1))
    to_x = jnp.dot(gradient, kernel.astype(dtype).T)
    to_kernel = jax.lax.dot_general(
        x.astype(dtype), gradient, ((leading, leading), ((), ())), preferred_element_type=jnp.float32
    )
    to_bias = gradient.sum(axis=leading, dtype=jnp.float32)
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype), to_bias.astype(bias.dtype)


linear.defvjp(_forward, _backward)
