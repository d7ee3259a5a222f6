"""A folder of converted networks that make one model: `transformer`, `text_encoder`, `vae`, `tiny_vae`, as `convert`
names them, and the text encoder's `tokenizer.json` between them.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax

from adastate_jax.errors import UserError
from adastate_jax.weights.converted import converted_config, is_converted, load_converted

# Kind of network → its field of the configuration, and the published file that it comes from.
_PARTS = {
    "transformer": ("model", "self_forcing_dmd.pt"),
    "text_encoder": ("text", "models_t5_umt5-xxl-enc-bf16.pth"),
    "vae": ("vae", "Wan2.1_VAE.pth"),
    "tiny_vae": ("tiny_vae", "taew2_1.pth"),
}
# Fields that a configuration sets freely, whatever the weights are.
_FREE_FIELDS = (
    "param_dtype",
    "dtype",
    "text_length",
    "attention",
    "remat",
    "quantization",
    "tile",
    "latents_per_call",
)


def has_part(folder: Path, kind: str) -> bool:
    """Whether the folder holds a network of this kind."""
    return is_converted(folder / kind)


def load_part(folder: Path, kind: str, config: Any, mesh: jax.sharding.Mesh | None, sizes: bool = True) -> Any:
    """One network of the folder, with its weights split over the devices of a mesh.

    Args:
        folder: the folder of all.
        kind: `transformer`, `text_encoder`, `vae` or `tiny_vae`.
        config: dtypes and other settings to load it with.
        mesh: None is one device.
        sizes: whether the network must have the configuration's sizes too, or brings its own.

    Raises:
        UserError: it is missing or damaged, or it has other sizes.
    """
    path = _part_folder(folder, kind)
    network = load_converted(path, kind, mesh, **_settings(config))
    if sizes:
        _refuse_unlike(path, kind, network.config, config)
    return network


def part_config(folder: Path, kind: str, config: Any = None) -> Any:
    """The configuration of a network of the folder, whose weights stay unread; raises UserError if it is missing.

    config: dtypes and other settings that it would be loaded with; None is as it was converted.
    """
    found = converted_config(_part_folder(folder, kind), kind)
    return found if config is None else dataclasses.replace(found, **_settings(config))


def _settings(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _FREE_FIELDS if hasattr(config, name)}


def refuse_other_sizes(folder: Path, kind: str, config: Any) -> None:
    """Raises UserError if a network of the folder is missing or has other sizes than a configuration."""
    _refuse_unlike(folder / kind, kind, part_config(folder, kind), config)


def _refuse_unlike(path: Path, kind: str, config: Any, asked: Any) -> None:
    for name in differing_fields(config, asked):
        found, wanted = getattr(config, name), getattr(asked, name)
        raise UserError(f"{path}: its {name} is {found!r}, config.{_PARTS[kind][0]}.{name} is {wanted!r}")


def differing_fields(found: Any, wanted: Any) -> list[str]:
    """The fields, but for the free ones, in which two configurations of a network differ."""
    names = [field.name for field in dataclasses.fields(wanted) if field.name not in _FREE_FIELDS]
    return [name for name in names if getattr(found, name) != getattr(wanted, name)]


def fingerprint(folder: Path, kind: str) -> str:
    """Stands for a network's weights: the hash of its description, in which their checksum is.

    Raises:
        UserError: it is missing.
    """
    return hashlib.sha256((_part_folder(folder, kind) / "converted.json").read_bytes()).hexdigest()


def _part_folder(folder: Path, kind: str) -> Path:
    path = folder / kind
    if not has_part(folder, kind):
        raise UserError(
            f"{path}: no such network; make it with python -m adastate_jax.convert --source={_PARTS[kind][1]} "
            f"--output={path}"
        )
    return path
