"""Convolutions of the video autoencoder, each in the form in which the device that they are compiled for is fastest.

The forms differ in how they group the same products, not in what they compute: docs/optimisations.md has their figures.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp

from adastate_jax.models.attention import target_device
from adastate_jax.models.linear import stated_precision

MOST_CONVOLVED_BYTES = 2**25  # of images at once on a processor: malloc's own limit for what it holds ready


def _lies_in_rows() -> bool:
    """Whether an image's rows serve as the batch of a convolution: the one place where the device decides.

    A TPU's tiles are 128 wide, and Wan2.1's widest features have 96 channels and, per call, few frames: with channels
    across a tile a quarter of it is empty, and with frames as the batch the compiler first cuts images into strips.
    There are hundreds of rows. Elsewhere the frames are the batch.
    """
    return target_device().platform == "tpu"


def folds_upsampling() -> bool:
    """Whether the tiny decoder's upsamplings are folded into their convolutions: on a processor, bound by products.

    Wan2.1's are everywhere. The tiny one is narrow, and moves more than it computes on a GPU or TPU.
    """
    return target_device().platform == "cpu"


def causal_convolution(frames: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int, dtype) -> jax.Array:
    """Convolution over three frames, or as many as the kernel has, and over a window of pixels around each.

    It runs as three, each rounded to `dtype`, and adds these up in float32. On CPU one per frame of the window: two to
    three times as fast as a convolution over all three axes, and faster than one of the stacked frames. On TPU one per
    row of the window, all three in one product (`_lies_in_rows`).

    Args:
        frames: [B, F + window - stride, H, W, inputs], those before the first output's in front; F is a multiple of
            `stride`.
        kernel: [window, rows, columns, inputs, outputs]; odd numbers of rows and columns.
        bias: [outputs].
        stride: of the frames.
        dtype: of the products and of the result.

    Returns:
        [B, F / stride, H, W, outputs]; beyond the edges of an image lie zeros.
    """
    frames, kernel = frames.astype(dtype), kernel.astype(dtype)
    if _lies_in_rows():
        y, batch, rows, columns = bias.astype(jnp.float32), frames.shape[0], *kernel.shape[1:3]
        sums = _convolve(
            einops.rearrange(frames, "b f h w c -> (h b) f w c"),
            einops.rearrange(kernel, "f rows columns i o -> f columns i (rows o)"),
            strides=(stride, 1),
            padding=((0, 0), (columns // 2, columns // 2)),
        )
        for row, part in enumerate(jnp.split(sums, rows, axis=-1)):
            y = y + _shifted(part, batch * (row - rows // 2)).astype(jnp.float32)
        return einops.rearrange(y.astype(dtype), "(h b) f w c -> b f h w c", b=batch)
    window = kernel.shape[0]

    def convolve(seen: jax.Array) -> jax.Array:
        outputs = (seen.shape[1] - window) // stride + 1
        y = bias.astype(jnp.float32)
        for offset in range(window):
            part = seen[:, offset : offset + stride * (outputs - 1) + 1 : stride]
            y = y + _convolve(einops.rearrange(part, "b f h w c -> (b f) h w c"), kernel[offset]).astype(jnp.float32)
        return einops.rearrange(y.astype(dtype), "(b f) h w c -> b f h w c", b=seen.shape[0])

    size = max(frames[:, 0].size, frames[:, 0, ..., 0].size * kernel.shape[-1])
    return _in_parts(convolve, frames, window, stride, size * frames.dtype.itemsize)


def _in_parts(convolve: Callable, frames: jax.Array, window: int, stride: int, frame_bytes: int) -> jax.Array:
    """`convolve` of all frames [B, F, H, W, C], on a processor of some after others.

    frame_bytes: of a frame's inputs or outputs. XLA's convolutions keep a few times as much for themselves; what is
    more than malloc holds ready they get from the system, page by page, anew in every call.
    """
    outputs = (frames.shape[1] - window) // stride + 1
    if target_device().platform != "cpu":
        return convolve(frames)
    most = max(MOST_CONVOLVED_BYTES // frame_bytes, 1)
    size = next(size for size in range(min(most, outputs), 0, -1) if outputs % size == 0)
    if size == outputs:
        return convolve(frames)

    def part(first: jax.Array) -> jax.Array:
        return convolve(jax.lax.dynamic_slice_in_dim(frames, first, stride * (size - 1) + window, axis=1))

    parts = jax.lax.map(part, stride * jnp.arange(0, outputs, size))
    return einops.rearrange(parts, "n b f h w c -> b (n f) h w c")


def doubling_convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype) -> jax.Array:
    """Every pixel twice in height and width, and then a 3×3 convolution, without the larger image in between.

    A pixel's four copies see the same three by three pixels, or fewer: each is a 2×2 convolution of the image as it
    was, with weights that are sums of the kernel's in float32, rounded once. That is four ninths of the products.

    Args:
        x: [B, F, H, W, inputs].
        kernel: [3, 3, inputs, outputs].
        bias: [outputs], or None for none.
        dtype: of the products and of the result.

    Returns:
        [B, F, 2 H, 2 W, outputs]; beyond the edges lie zeros.
    """
    batch, _, height, width, _ = x.shape
    folded = _folded(kernel).astype(dtype)

    def convolve(x: jax.Array) -> jax.Array:
        # Windows stand at one place more than there are pixels: a pixel's first copy has the one that ends with it, its
        # second the next.
        if _lies_in_rows():
            sums = _convolve(
                einops.rearrange(x, "b f h w c -> (h b) f w c"),
                einops.rearrange(folded, "rows columns i down across o -> 1 columns i (down rows across o)"),
                padding=((0, 0), (1, 1)),
            )
            sums = einops.rearrange(
                sums, "h f w (down rows across o) -> down rows across h f w o", down=2, rows=2, across=2
            )

            def copy(down: int, across: int) -> jax.Array:
                seen = sums[down, :, across, :, :, across : across + width]
                return sum(_shifted(seen[row], batch * (down + row - 1)).astype(jnp.float32) for row in range(2))

            order = "down across (h b) f w o -> b f (h down) (w across) o"
        else:
            sums = _convolve(
                einops.rearrange(x, "b f h w c -> (b f) h w c"),
                einops.rearrange(folded, "rows columns i down across o -> rows columns i (down across o)"),
                padding=((1, 1), (1, 1)),
            )
            sums = einops.rearrange(sums, "n h w (down across o) -> down across n h w o", down=2, across=2)

            def copy(down: int, across: int) -> jax.Array:
                return sums[down, across, :, down : down + height, across : across + width]

            order = "down across (b f) h w o -> b f (h down) (w across) o"
        copies = jnp.stack([jnp.stack([copy(down, across) for across in range(2)]) for down in range(2)])
        copies = copies if bias is None else copies + bias.astype(copies.dtype)
        return einops.rearrange(copies.astype(dtype), order, b=batch)

    frame_bytes = 4 * x[:, 0, ..., 0].size * kernel.shape[-1] * jnp.dtype(dtype).itemsize
    return _in_parts(convolve, x.astype(dtype), 1, 1, frame_bytes)


def _folded(kernel: jax.Array) -> jax.Array:
    """[3, 3, inputs, outputs] → [2, 2, inputs, 2, 2, outputs] float32: window, inputs, which copy, outputs."""
    kernel = kernel.astype(jnp.float32)

    def fold(taps, axis):
        first, middle, last = (jax.lax.index_in_dim(taps, i, axis, keepdims=False) for i in range(3))
        upper = jnp.stack([first, middle + last], axis=axis)
        lower = jnp.stack([first + middle, last], axis=axis)
        return jnp.stack([upper, lower], axis=-2)

    return fold(fold(kernel, 0), 1)


def _convolve(x: jax.Array, kernel: jax.Array, strides=(1, 1), padding="SAME") -> jax.Array:
    """[N, H, W, inputs], [rows, columns, inputs, outputs] → [N, H', W', outputs], in the dtype of both."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=stated_precision(x.dtype),
    )


def _shifted(x: jax.Array, by: int) -> jax.Array:
    """Line i + `by` in place of line i along the first axis; zeros where there is none."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(-by, by, 0), *[(0, 0, 0)] * (x.ndim - 1)])
