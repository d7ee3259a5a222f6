"""Sizes and inputs of the cases, which both sides make for themselves from the same seeds.

A case's `Steps` of a side are a generator. PyTorch's draws weights, and yields None; ours converts them, may leave
inputs for the other, and yields the function that is timed; then PyTorch's goes on, and yields its own.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TEXT_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both sides are told.

    Attributes:
        folder: for weights and inputs, of this case and size alone.
        size: of the case: see `SIZES`.
        dtype: of weights and computation, float32 or bfloat16.
        device: of PyTorch, cpu or cuda.
        compiled: whether PyTorch's side goes through `torch.compile`.
    """

    folder: Path
    size: str
    dtype: str
    device: str = "cpu"
    compiled: bool = False

    @property
    def trial(self) -> bool:
        return self.size == "trial"


Steps = Callable[[Setting], Iterator[Callable[[], Any] | None]]

# Latents' height and width: `large` is 480×832 pixels, `small` and `medium` a quarter and half of its sides.
SIDES = {"trial": (4, 6), "small": (16, 26), "medium": (30, 52), "large": (60, 104)}
DECODED = {"trial": (2, 4), "small": (8, 12), "medium": (16, 26), "large": (30, 52)}
PRODUCTS = {"trial": 64, "small": 1024, "medium": 2048, "large": 4096}
TOKENS = {"trial": 8, "small": 64, "medium": 256, "large": 512}
SIZES = tuple(SIDES)

LIVE_FRAMES, CACHED_FRAMES = 3, 9
TRANSFORMER = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 2}
NARROW = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2, "text_dim": 24}
TIMESTEP = 937.5
ATTENDED_FRAMES = 4, 8  # of a steady AdaState chunk: live ones, and all that they see


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers float32 of a shape."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def attended(size: str) -> tuple[int, int]:
    """Queries and keys of the attention that is compared."""
    height, width = SIDES[size]
    live, seen = (frames * height * width // 4 for frames in ATTENDED_FRAMES)
    return live, seen


def attention_inputs(size: str) -> list[np.ndarray]:
    """Queries, keys and values [1, T or S, heads, head_dim] of Wan2.1 1.3B's width."""
    queries, keys = attended(size)
    heads = TRANSFORMER["num_attention_heads"], TRANSFORMER["attention_head_dim"]
    return [normal(seed, 1, tokens, *heads) for seed, tokens in ((1, queries), (2, keys), (3, keys))]
