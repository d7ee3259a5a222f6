"""Laws of the linear layer: flax's numbers, and gradients of weights that are summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adastate_jax.models.linear import Linear


def layers(dtype):
    """Ours and flax's, of the same random weights."""
    arguments = {"dtype": dtype, "bias_init": nnx.initializers.normal(1.0)}
    return tuple(kind(24, 8, rngs=nnx.Rngs(0), **arguments) for kind in (Linear, nnx.Linear))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_are_flaxs(dtype):
    ours, flaxs = layers(dtype)
    x = jax.random.normal(jax.random.key(1), (3, 5, 24))
    assert ours(x).dtype == dtype
    np.testing.assert_array_equal(ours(x), flaxs(x))


def gradients(layer, x, weights):
    def loss(layer, x):
        return (weights * layer(x).astype(jnp.float32)).sum()

    return jax.grad(loss, argnums=(0, 1))(layer, x)


def test_gradients_in_float32_are_flaxs():
    x, weights = (jax.random.normal(jax.random.key(i), (3, 5, size)) for i, size in ((1, 24), (2, 8)))
    found = [jax.tree.leaves(gradients(layer, x, weights)) for layer in layers("float32")]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_weights_are_sums_in_float32():
    """Of 16-bit products over many tokens; flax rounds the sums themselves to 16 bits."""
    x, weights = (jax.random.normal(jax.random.key(i), (4, 500, size)) for i, size in ((1, 24), (2, 8)))
    x = x.astype(jnp.bfloat16)

    def error(layer):
        (layer, to_x) = gradients(layer, x, weights)
        assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
        assert to_x.dtype == jnp.bfloat16
        rounded = np.asarray(weights.astype(jnp.bfloat16), np.float64)
        kernel = np.einsum("bti,bto->io", np.asarray(x, np.float64), rounded)
        bias = rounded.sum(axis=(0, 1))
        return max(
            np.abs(layer.kernel[...] - kernel).max() / np.abs(kernel).max(),
            np.abs(layer.bias[...] - bias).max() / np.abs(bias).max(),
        )

    ours, flaxs = layers("bfloat16")
    assert error(ours) < 1e-5
    assert error(flaxs) > 1e-3
