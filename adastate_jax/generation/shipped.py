"""Where a model lies, and what the one that ships with the package was trained on; without JAX."""

import json
from pathlib import Path
from typing import Any

from adastate_jax.console import did_you_mean
from adastate_jax.errors import UserError
from adastate_jax.files import what_lies_near

# Models that ship with the package, a file each, see `bundle`.
_BUNDLED = Path(__file__).parents[1] / "bundled"


def find_model(path: str | Path) -> Path:
    """The folder or file of this path, or else the bundle that ships with the package under this name.

    Raises:
        UserError: there is neither.
    """
    path = Path(path)
    bundle = _BUNDLED / f"{path}.safetensors"
    if len(path.parts) == 1 and bundle.is_file() and not path.exists():
        return bundle
    if not path.exists():
        near = what_lies_near(path) or did_you_mean(str(path), [file.stem for file in _BUNDLED.glob("*.safetensors")])
        raise UserError(f"{path}: no such folder{near or '; name one that train or convert wrote, or tiny'}")
    return path


def shipped_config(name: str) -> dict[str, Any]:
    """The configuration of a model that ships with the package, field by field."""
    with (_BUNDLED / f"{name}.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])


def vocabulary() -> str:
    """What the model that ships with the package was trained on."""
    from adastate_jax.data.worlds import WorldConfig, caption_pattern

    worlds = WorldConfig(**shipped_config("tiny")["data"]["worlds"])
    return f"The model tiny knows these words alone, and of a picture keeps one frame:\n  {caption_pattern(worlds)}"
