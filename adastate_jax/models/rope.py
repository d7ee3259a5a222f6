"""Three-axis rotary position embedding of Wan2.1 (frame, row, column), θ = 10000, adjacent channel pairs rotate.

Source: Wan-Video/Wan2.1 wan/modules/model.py, `rope_params` and `rope_apply`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

MAX_POSITION = 1024
THETA = 10000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Angles of T tokens as tables `cos`, `sin`, each [T, head_dim] float32.

    Of a pair's two channels both have the cosine; the first has minus the sine, the second the sine.
    """

    cos: jax.Array
    sin: jax.Array


@functools.cache
def _angles(head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angle tables of the frame, row and column axes, each [MAX_POSITION, pairs of the axis] float64."""
    spatial = 2 * (head_dim // 6)
    axes = (head_dim - 2 * spatial, spatial, spatial)
    positions = np.arange(MAX_POSITION, dtype=np.float64)
    return tuple(np.outer(positions, THETA ** (-np.arange(0, axis, 2, dtype=np.float64) / axis)) for axis in axes)


def rotation(positions, height: int, width: int, head_dim: int) -> Rotation:
    """Rotation of the tokens of F frames of height × width patches, in the order frame, row, column.

    Args:
        positions: temporal positions [F], integers in [0, 1024); an array under `jit` is clamped to that range.
        height, width: patches per column and row of a frame, at most 1024 each.
        head_dim: channels per attention head, even.

    Returns:
        Tables for T = F · height · width tokens. Angles are computed in float64 and rounded once.

    Raises:
        ValueError: a position that is known outside `jit` leaves the range, or the grid is too large.
    """
    if max(height, width) > MAX_POSITION:
        raise ValueError(f"the patch grid {height}x{width} exceeds {MAX_POSITION} rows or columns")
    frame, row, column = _angles(head_dim)
    if not isinstance(positions, jax.Array):
        positions = np.asarray(positions, np.int32)
        if positions.size and not 0 <= positions.min() <= positions.max() < MAX_POSITION:
            raise ValueError(f"temporal positions must lie in [0, {MAX_POSITION}), got {positions.tolist()}")
    spatial = np.concatenate(
        [np.repeat(row[:height], width, axis=0), np.tile(column[:width], (height, 1))], axis=-1
    )  # [height * width, row and column pairs]

    def table(function, signs):
        def paired(angles):  # [..., pairs] -> [..., 2 pairs]
            return (function(angles)[..., None] * signs).reshape(*angles.shape[:-1], -1).astype(np.float32)

        temporal = paired(frame)
        temporal = temporal[positions] if isinstance(positions, np.ndarray) else jnp.asarray(temporal)[positions]
        fixed = paired(spatial)
        frames, tokens = temporal.shape[0], fixed.shape[0]
        joined = jnp.concatenate(
            [
                jnp.broadcast_to(temporal[:, None], (frames, tokens, temporal.shape[-1])),
                jnp.broadcast_to(fixed[None], (frames, tokens, fixed.shape[-1])),
            ],
            axis=-1,
        )
        return joined.reshape(frames * tokens, head_dim)

    return Rotation(table(np.cos, np.ones(2)), table(np.sin, np.array([-1.0, 1.0])))


def rotate(tokens: jax.Array, by: Rotation) -> jax.Array:
    """Rotates the channel pairs (2i, 2i + 1) of queries or keys in float32.  tokens [..., T, heads, head_dim].

    The other channel of each pair comes by a product with a permutation, which is exact: pairs as an axis of two would
    lie across a TPU's lanes, and turn every array around them into another layout.
    """
    other = jnp.matmul(tokens, _other_of_pair(tokens.shape[-1], tokens.dtype), precision=jax.lax.Precision.HIGHEST)
    turned = tokens.astype(jnp.float32) * by.cos[:, None] + other.astype(jnp.float32) * by.sin[:, None]
    return turned.astype(tokens.dtype)


def _other_of_pair(head_dim: int, dtype) -> np.ndarray:
    """The permutation that swaps the two channels of each pair, [head_dim, head_dim]."""
    return np.eye(head_dim, dtype=dtype).reshape(-1, 2, head_dim)[:, ::-1].reshape(head_dim, head_dim)
