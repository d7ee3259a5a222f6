"""TAEW2.1, the fast video autoencoder: its official tensors."""

from collections.abc import Mapping
from typing import Any

from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.weights.entries import Entry, conv, pointwise


def tiny_vae_table(config: TinyVAEConfig) -> list[Entry]:
    """TAEW2.1, both halves; layers are numbered as in the official sequence, which counts activations too."""

    def memory_blocks(official_half: str, first: int, path: str) -> list[Entry]:
        return [
            entry
            for block in range(3)
            for theirs, ours in ((0, "conv_in"), (2, "conv_middle"), (4, "conv_out"))
            for entry in conv(f"{official_half}.{first + block}.conv.{theirs}", f"{path}/blocks/{block}/{ours}", "h w")
        ]

    entries = [
        *conv("encoder.0", "encoder/conv_in", "h w"),
        *conv("encoder.17", "encoder/conv_out", "h w"),
        *conv("decoder.1", "decoder/conv_in", "h w"),
        *conv("decoder.22", "decoder/conv_out", "h w"),
    ]
    for level in range(len(config.widths)):
        first, path = 2 + 5 * level, f"encoder/levels/{level}"
        entries += pointwise(f"encoder.{first}.conv", f"{path}/pool", 2, bias=False)
        entries += conv(f"encoder.{first + 1}", f"{path}/conv", "h w", bias=False)
        entries += memory_blocks("encoder", first + 2, path)
        first, path = 3 + 6 * level, f"decoder/levels/{level}"
        entries += memory_blocks("decoder", first, path)
        entries += pointwise(f"decoder.{first + 4}.conv", f"{path}/grow", 2, bias=False)
        entries += conv(f"decoder.{first + 5}", f"{path}/conv", "h w", bias=False)
    return entries


def tiny_vae_tensors(config: TinyVAEConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A TAEHV checkpoint with its frame-growing layers cut to this network.

    Checkpoints may hold such a layer for more frames than the network grows; the newest frame's rows, the last, count.
    """
    rows = {
        f"decoder.{7 + 6 * level}.conv.weight": width * (1 + temporal)
        for level, (width, temporal) in enumerate(zip(config.widths, config.temporal_upsample, strict=True))
    }
    return {name: tensors[name][-rows[name] :] if name in rows else tensors[name] for name in tensors}
