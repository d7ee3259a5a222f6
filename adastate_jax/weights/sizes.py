"""A network's configuration from the shapes of its official tensors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adastate_jax.errors import UserError
from adastate_jax.weights.tensors import Tensor


class Shapes:
    """Looks up shapes while a configuration is inferred; what is not there or has other axes is an error by name."""

    def __init__(self, tensors: Mapping[str, Tensor], source: Path):
        self._shapes, self._source = {name: tensor.shape for name, tensor in tensors.items()}, source

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Shape of a tensor of so many axes."""
        if name not in self._shapes:
            raise UserError(f"{self._source}: {name} is missing; download the checkpoint again")
        shape = self._shapes[name]
        if len(shape) != axes or not all(shape):
            raise UserError(f"{self._source}: {name} has shape {list(shape)}, it needs {axes} axes, none of size 0")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group finds in the names."""
        numbers = [int(found[1]) for name in self._shapes if (found := re.match(pattern, name))]
        # A stray number must not make a network of a billion layers; those without tensors are reported as missing.
        return min(max(numbers, default=-1) + 1, len(self._shapes))


def infer_dit(shapes: Shapes) -> dict[str, Any]:
    """The transformer's fields that follow from the shapes of its official tensors."""
    dim, in_channels, *patch = shapes.shape("patch_embedding.weight", 5)
    head = shapes.shape("head.head.weight", 2)[0]
    return {
        "dim": dim,
        "in_channels": in_channels,
        "patch_size": tuple(patch),
        "out_channels": head // math.prod(patch),
        "ffn_dim": shapes.shape("blocks.0.ffn.0.weight", 2)[0],
        "text_dim": shapes.shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shapes.shape("time_embedding.0.weight", 2)[1],
        "num_layers": shapes.count(r"blocks\.(\d{1,9})\.self_attn\.q\.weight"),
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes,
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
    }


def infer_text(shapes: Shapes) -> dict[str, Any]:
    """The text encoder's fields that follow from the shapes of its official tensors."""
    vocab_size, dim = shapes.shape("token_embedding.weight", 2)
    num_buckets, num_heads = shapes.shape("blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "dim_attention": shapes.shape("blocks.0.attn.q.weight", 2)[0],
        "ffn_dim": shapes.shape("blocks.0.ffn.fc1.weight", 2)[0],
        "num_heads": num_heads,
        "num_buckets": num_buckets,
        "num_layers": shapes.count(r"blocks\.(\d{1,9})\.attn\.q\.weight"),
    }


def infer_vae(shapes: Shapes) -> dict[str, Any]:
    """The video autoencoder's fields that follow from the shapes of its official tensors."""
    dim = shapes.shape("encoder.conv1.weight", 5)[0]
    widths: list[list[int]] = [[]]  # of the residual blocks of each level
    temporal: list[bool] = []
    for block in range(shapes.count(r"encoder\.downsamples\.(\d{1,9})\.")):
        name = f"encoder.downsamples.{block}"
        if f"{name}.resample.1.weight" in shapes:
            temporal.append(f"{name}.time_conv.weight" in shapes)
            widths.append([])
        else:
            widths[-1].append(shapes.shape(f"{name}.residual.6.weight", 5)[0])
    return {
        "dim": dim,
        "latent_channels": shapes.shape("conv2.weight", 5)[0],
        "dim_multipliers": tuple(level[-1] // dim if level else 0 for level in widths),
        "num_res_blocks": len(widths[0]),
        "temporal_downsample": tuple(temporal),
    }


def infer_tiny_vae(shapes: Shapes) -> dict[str, Any]:
    """The tiny autoencoder's fields that follow from the shapes of its official tensors."""
    width = shapes.shape("encoder.0.weight", 4)[0]
    pools = [shapes.shape(f"encoder.{2 + 5 * level}.conv.weight", 4)[1] for level in range(3)]
    for level in range(3):
        shapes.shape(f"decoder.{7 + 6 * level}.conv.weight", 4)  # of any number of rows, see `tiny_vae_tensors`
    return {
        "latent_channels": shapes.shape("decoder.1.weight", 4)[1],
        "widths": tuple(shapes.shape(f"decoder.{3 + 6 * level}.conv.0.weight", 4)[0] for level in range(3)),
        "temporal_downsample": tuple(inputs == 2 * width for inputs in pools),
    }
