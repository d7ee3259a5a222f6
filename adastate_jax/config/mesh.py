"""The devices of a run, and what they must divide: asked before anything is compiled."""

import dataclasses
from collections.abc import Mapping

from adastate_jax.checks import require_positive
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.text import TextConfig
from adastate_jax.sharding import indivisible


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis.

    Attributes:
        data, fsdp: they split the batch.
        model: splits heads and the feed-forward network's width.
        context: splits the tokens of every frame, and beside `fsdp` the weights.
    """

    data: int = 1
    fsdp: int = 1
    model: int = 1
    context: int = 1

    def __post_init__(self):
        require_positive(self, "data", "fsdp", "model", "context")


def require_divisible_network(mesh: MeshConfig, name: str, network: DiTConfig, frame_tokens: int) -> None:
    """Refuses a mesh that does not divide a transformer.

    Heads need not be divided by `context`, see `models/context_parallel.py`.

    Args:
        name: of the network in the configuration.
        frame_tokens: of a latent frame.

    Raises:
        ValueError: it names the field, and the nearest values that go together.
    """
    _refuse(mesh, f"{name}.num_heads", network.num_heads, "heads")
    _refuse(mesh, f"{name}.ffn_dim", network.ffn_dim, "mlp")
    _refuse(mesh, f"{name}.dim", network.dim, "embed")
    _refuse(mesh, "the patches of a frame,", frame_tokens, "tokens")


def require_divisible_text(mesh: MeshConfig, text: TextConfig) -> None:
    """Refuses, as `require_divisible_network`, a mesh that does not divide the text encoder."""
    _refuse(mesh, "text.dim_attention", text.dim_attention, "heads")
    _refuse(mesh, "text.ffn_dim", text.ffn_dim, "mlp")
    _refuse(mesh, "text.dim", text.dim, "embed")


def require_divisible_batches(mesh: MeshConfig, batches: Mapping[str, int]) -> None:
    """Refuses, as `require_divisible_network`, a mesh that does not divide batches, by the names of their fields."""
    for name, size in batches.items():
        _refuse(mesh, name, size, "batch")


def _refuse(mesh: MeshConfig, what: str, size: int, axis: str) -> None:
    if reason := indivisible(what, size, axis, dataclasses.asdict(mesh)):
        raise ValueError(reason)
