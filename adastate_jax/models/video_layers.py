"""What the video autoencoders are built of: layers, and the memory of past frames that travels from call to call."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adastate_jax.models.linear import stated_precision

PARTS = ("encoder", "decoder")


def check_tile(tile: int) -> None:
    """Raises ValueError unless `tile` is a side that `tiled_decode` can be asked for, or 0."""
    if tile < 0:
        raise ValueError(f"tile must be a number of latents, or 0 for whole frames, got {tile}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """What a network remembers of the frames before a call.

    Attributes:
        frames: the newest input frames of each layer that looks back, in calling order, each [B, 1 or 2, h, w, c].
    """

    frames: tuple[jax.Array, ...]


class Memory:
    """Hands the layers of one pass their past frames, in calling order, and collects what the next pass will need.

    Without a cache every past is zeros, in the shape that the layer asks for.

    Attributes:
        empty: whether the past is zeros, known when the program is traced: that of a stream's first call.
    """

    def __init__(self, cache: FeatureCache | None, empty: bool = False):
        self.empty = empty or cache is None
        self._past = None if cache is None else iter(cache.frames)
        self._newest: list[jax.Array] = []

    def _next(self, x: jax.Array, frames: int) -> jax.Array:
        if self._past is None:
            return jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
        return next(self._past)

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """The layer's input [B, F, h, w, c] with the `frames` before it in front: [B, frames + F, h, w, c]."""
        joined = jnp.concatenate([self._next(x, frames), x], axis=1)
        self._newest.append(joined[:, -frames:])
        return joined

    def keep(self, x: jax.Array, frames: int) -> None:
        """Leaves the past of a layer, which would see x, as it is: the layer does not run in this pass."""
        self._newest.append(self._next(x, frames))

    def cache(self) -> FeatureCache:
        """What was collected."""
        return FeatureCache(tuple(self._newest))


class Blocks(nnx.Module):
    """Modules one after the other, under the names 0, 1, …"""

    def __init__(self, modules: Sequence[nnx.Module]):
        self.size = len(modules)
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def __iter__(self) -> Iterator[nnx.Module]:
        return (getattr(self, str(index)) for index in range(self.size))


def kernel_init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Uniform weights of variance one over the number of inputs, all axes but the last.

    Drawn flat: compiling a draw of a five-dimensional array takes the CPU backend ten times as long.
    """
    bound = math.sqrt(3 / math.prod(shape[:-1]))
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


def spatial_conv(inputs: int, outputs: int, config: Any, *, rngs: nnx.Rngs, **options) -> nnx.Conv:
    """3×3 convolution of every frame by itself."""
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        kernel_init=kernel_init,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        precision=stated_precision(config.dtype),
        rngs=rngs,
        **options,
    )


def pointwise(inputs: int, outputs: int, config: Any, *, rngs: nnx.Rngs, dtype=None, **options) -> nnx.Linear:
    """1×1×1 convolution."""
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=kernel_init,
        dtype=dtype or config.dtype,
        param_dtype=config.param_dtype,
        precision=stated_precision(dtype or config.dtype),
        rngs=rngs,
        **options,
    )
