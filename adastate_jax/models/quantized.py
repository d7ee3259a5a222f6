"""Weights of frozen networks in eight bits: an integer or a float8 per weight, one float32 scale per output.

They take half of bfloat16's memory and of what FSDP gathers. A product is computed in the layer's `dtype`: eight bits
are exact in bfloat16, and the scale multiplies the sum, so nothing of the size of the weights is multiplied. The sum
is rounded to `dtype` before it: as float32 it would be written out and read again where the kernel is a library's.
Only weights are quantised, by the largest of each output's, without any calibration data. First and last layers, norms,
biases and modulation stay as they are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.models.linear import stated_precision
from adastate_jax.sharding import path_name, tree_shardings

# Name → dtype of a weight, and the largest of its numbers.
_STORED = {"int8": (jnp.int8, 127.0), "float8": (jnp.float8_e4m3fn, 448.0)}
QUANTIZATIONS = ("", *_STORED)


class QuantizedLinear(nnx.Module):
    """A frozen linear layer whose weights are eight bits each; made by `quantize_network`, so it starts at zero."""

    def __init__(self, inputs: int, outputs: int, *, dtype: str, param_dtype: str, quantization: str):
        stored, _ = _STORED[quantization]
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), stored))
        self.scale = nnx.Param(jnp.ones((outputs,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype))
        self.dtype = dtype

    def __call__(self, inputs: jax.Array, axes: int = 1) -> jax.Array:
        """[..., inputs] → [..., outputs] in the layer's `dtype`, scaled in float32; `axes` as `Linear`'s."""
        kernel = self.kernel[...].astype(self.dtype).reshape(*inputs.shape[inputs.ndim - axes :], -1)
        product = jnp.tensordot(inputs.astype(self.dtype), kernel, axes, precision=stated_precision(self.dtype))
        scaled = product.astype(jnp.float32) * self.scale[...]
        return (scaled + self.bias[...].astype(jnp.float32)).astype(self.dtype)


def quantize(kernel: jax.Array, quantization: str) -> tuple[jax.Array, jax.Array]:
    """Weights [..., inputs, outputs] → the same in eight bits, and the scale of each output [..., outputs] float32.

    The largest of an output's weights becomes the largest of the eight-bit numbers; an output without any gets scale 1.
    """
    stored, largest = _STORED[quantization]
    kernel = kernel.astype(jnp.float32)
    extent = jnp.abs(kernel).max(axis=-2)
    scale = jnp.where(extent > 0, extent / largest, 1.0)
    scaled = jnp.clip(kernel / scale[..., None, :], -largest, largest)
    return (jnp.round(scaled) if quantization == "int8" else scaled).astype(stored), scale


def quantize_network(network: Any, quantization: str, mesh: jax.sharding.Mesh) -> Any:
    """A transformer whose blocks are quantised, each leaf split over the mesh as before.

    Args:
        network: a `DiT`, not quantised.
        quantization: `int8` or `float8`.
    """
    config = dataclasses.replace(network.config, quantization=quantization)
    like = jax.eval_shape(lambda: type(network)(config, rngs=nnx.Rngs(0)))
    function = functools.partial(_fill, like, quantization)
    return jax.jit(function, out_shardings=tree_shardings(like, mesh))(network)


def _fill(like: Any, quantization: str, network: Any) -> Any:
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(network)}
    stored, _ = _STORED[quantization]

    def fill(path, leaf):
        name = path_name(path)
        if name not in leaves:  # a scale, beside its kernel
            return quantize(leaves[name.replace("/scale", "/kernel")], quantization)[1]
        return quantize(leaves[name], quantization)[0] if leaf.dtype == stored else leaves[name]

    return jax.tree_util.tree_map_with_path(fill, like)
