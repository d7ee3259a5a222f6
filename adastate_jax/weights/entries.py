"""Rows of the tables of official tensors: which of them is which leaf of a network, and how its axes map.

A table lists, per network, the official tensor name, the path of our leaf and the einops pattern between them. A name
with `{layer}` stands for all layers, which our networks stack along a leading axis.
"""

import dataclasses

import einops
import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a table: official tensor ↔ our leaf.

    Attributes:
        official: tensor name, with `{layer}` where our leaf stacks all layers.
        path: key path of our leaf.
        pattern: einops pattern from the official axes to ours (of one layer).
        sizes: sizes of the axes that the way back cannot infer.
    """

    official: str
    path: str
    pattern: str = "d -> d"
    sizes: tuple[tuple[str, int], ...] = ()

    def from_official(self, tensor: np.ndarray) -> np.ndarray:
        """Official layout (one layer) → ours."""
        return einops.rearrange(tensor, self.pattern)

    def to_official(self, leaf: np.ndarray) -> np.ndarray:
        """Our layout (one layer) → the official one."""
        left, right = (side.strip() for side in self.pattern.split("->"))
        return einops.rearrange(leaf, f"{right} -> {left}", **dict(self.sizes))


_LINEAR = "outputs inputs -> inputs outputs"


def linear(official: str, path: str, bias: bool = True) -> list[Entry]:
    """A linear layer, whose official weight is [outputs, inputs]."""
    entries = [Entry(f"{official}.weight", f"{path}/kernel", _LINEAR)]
    return entries + ([Entry(f"{official}.bias", f"{path}/bias")] if bias else [])


def conv(official: str, path: str, axes: str, bias: bool = True) -> list[Entry]:
    """A convolution over the named axes."""
    entries = [Entry(f"{official}.weight", f"{path}/kernel", f"outputs inputs {axes} -> {axes} inputs outputs")]
    return entries + ([Entry(f"{official}.bias", f"{path}/bias")] if bias else [])


def pointwise(official: str, path: str, dimensions: int, bias: bool = True) -> list[Entry]:
    """A convolution of one pixel, which is a linear layer here."""
    ones = " 1" * dimensions
    entries = [Entry(f"{official}.weight", f"{path}/kernel", f"outputs inputs{ones} -> inputs outputs")]
    return entries + ([Entry(f"{official}.bias", f"{path}/bias")] if bias else [])
