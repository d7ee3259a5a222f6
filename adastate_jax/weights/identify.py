"""What a published checkpoint holds: its kind, names and sizes, from the tensors alone."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from adastate_jax.errors import UserError, shortlist
from adastate_jax.fields import build, fields_of
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.weights.kinds import KINDS, Kind, Naming
from adastate_jax.weights.sizes import Shapes
from adastate_jax.weights.slots import Slot, mismatches
from adastate_jax.weights.sources import Source
from adastate_jax.weights.tensors import BFLOAT16, FLOAT8, FLOATING, StoredTensor, Tensor, row_blocks
from adastate_jax.weights.tiny_vae import tiny_vae_tensors


@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose weights can be read: nothing is missing, left over or misshapen.

    Attributes:
        kind: key of `KINDS`.
        config: its configuration; `param_dtype` is the dtype that holds all of its weights.
        slots: official name of each tensor → where it goes, in the order of our leaves and their layers.
        tensors: by official name, unread; in the shapes of `slots`.
    """

    kind: str
    config: Any
    slots: Mapping[str, Slot]
    tensors: Mapping[str, Tensor]

    @property
    def title(self) -> str:
        """What it is, for people."""
        return KINDS[self.kind].title


def identify(source: Source, overrides: Mapping[str, Any] | None = None) -> Network:
    """What a published checkpoint holds.

    Args:
        source: the tensors.
        overrides: fields of the configuration that its shapes do not tell, or tell wrongly.

    Raises:
        UserError: the kind is unknown; names are missing or left over, a shape is wrong, a tensor holds no floating
            numbers; or a field is unknown or impossible.
    """
    name, naming = _kind_of(source)
    kind = KINDS[name]
    tensors = _official_tensors(source, kind, naming)
    config = _config_of(source, name, tensors, overrides or {})
    layers = getattr(config, "num_layers", 0)
    if layers > len(tensors):
        raise UserError(f"{source.path}: num_layers {layers}: its {len(tensors)} tensors cannot be those of so many")
    if isinstance(config, TinyVAEConfig):
        tensors = tiny_vae_tensors(config, tensors)
    try:
        slots = kind.slots(config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{source.path}: no {kind.title} has such sizes ({error})") from None
    faults = mismatches(slots, {name: tensor.shape for name, tensor in tensors.items()})
    faults += [
        f"{name} has dtype {tensor.dtype.name}, it needs floating numbers"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATING
    ]
    if faults:
        raise UserError(f"{source.path}: as a {kind.title}: {shortlist(faults, 4)}")
    return Network(name, config, slots, tensors)


def _kind_of(source: Source) -> tuple[str, Naming]:
    for name, kind in KINDS.items():
        for naming in kind.namings.values():
            if any(mark in source.tensors for mark in naming.marks):
                return name, naming
    if any(".lora_" in name for name in source.tensors):
        raise UserError(f"{source.path}: a LoRA; name it with --lora, and its base with --source")
    known = ", ".join(kind.title for kind in KINDS.values())
    held = shortlist([*source.tensors])
    raise UserError(f"{source.path}: not a checkpoint of a known network ({known}); it holds {held}")


def _official_tensors(source: Source, kind: Kind, naming: Naming) -> dict[str, Tensor]:
    """The source's tensors by official name, without those of parts that the network has not."""
    tensors: dict[str, Tensor] = {}
    for name, official in naming.to_official([*source.tensors]).items():
        if re.match(kind.unused, official):
            continue
        tensor = source.tensors[name]
        if official in tensors and not _equal(tensors[official], tensor):
            raise UserError(f"{source.path}: {name} must be the same as another tensor for {official}, but differs")
        tensors[official] = tensor
    return tensors


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not one.shape:
        return False
    if isinstance(one, StoredTensor) and one == other:  # the same bytes
        return True
    return all(
        np.array_equal(one.rows(block.start, block.stop), other.rows(block.start, block.stop))
        for block in row_blocks(one)
    )


def _config_of(source: Source, name: str, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> Any:
    kind = KINDS[name]
    fields = _told_fields(source, name) | kind.infer(Shapes(tensors, source.path))
    narrow = all(tensor.dtype in (BFLOAT16, *FLOAT8) for tensor in tensors.values())
    fields["param_dtype"] = fields["dtype"] = "bfloat16" if narrow else "float32"
    fields |= fields_of(kind.config, overrides, "--set")
    if kind.config is DiTConfig and "num_heads" not in fields and isinstance(fields["dim"], int):
        if fields["dim"] % 128:
            raise UserError(
                f"{source.path}: how many heads? A width of {fields['dim']} does not tell; --set num_heads=N"
            )
        fields["num_heads"] = fields["dim"] // 128  # the head size of every published Wan model
    try:
        return build(kind.config, fields, f"{source.path}: {kind.title}")
    except UserError as error:
        raise UserError(f"{error}; --set NAME=VALUE replaces a field that the file tells wrongly") from None
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{source.path}: no {kind.title} has such sizes ({error})") from None


def _told_fields(source: Source, name: str) -> dict[str, Any]:
    """Fields of the configuration that the files say: a `config.json` of this network, and a header of ours."""
    kind, settings = KINDS[name], source.settings
    fields: dict[str, Any] = {}
    architectures = settings.get("architectures")
    class_names = [settings.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    known = {field.name for field in dataclasses.fields(kind.config)}
    for naming in kind.namings.values():
        # A file beside other weights tells nothing about these.
        if any(name in class_names for name in naming.class_names):
            fields |= {
                ours: settings[theirs]
                for theirs, ours in naming.settings.items()
                if theirs in settings and ours in known
            }
    own = source.header.get("config")
    if source.header.get("kind") == name and isinstance(own, dict):
        fields |= own
    return fields
