"""Which official tensor fills which leaf of a network, and filling it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.errors import UserError, shortlist
from adastate_jax.sharding import path_name
from adastate_jax.weights.entries import Entry


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an official tensor goes: a leaf of ours, or one layer of it.

    Attributes:
        entry: the row of the table.
        layer: index along the leaf's leading axis; None for the whole leaf.
        shape: of the official tensor.
    """

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]


def leaf_name(path) -> str:
    """Key path of a network's leaf, `a/b/c`, as tables name it."""
    return path_name(path).removesuffix("/value")


def leaves(network: Any) -> dict[str, Any]:
    """A network's leaves by path, `a/b/c`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(network)}


def official_slots(abstract: Any, table: Sequence[Entry]) -> dict[str, Slot]:
    """The official tensors that a network's leaves are made of, by name.

    Args:
        abstract: the network as `jax.eval_shape` (or a live one) gives it.
        table: the network's table.
    """
    entries = {entry.path: entry for entry in table}
    slots = {}
    for name, leaf in leaves(abstract).items():
        entry = entries[name]
        stacked = "{layer}" in entry.official
        # One byte behind all elements: the largest of these tensors have 10^9 of them.
        ours = np.broadcast_to(np.zeros((), np.bool_), leaf.shape[1:] if stacked else leaf.shape)
        shape = entry.to_official(ours).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            slots[entry.official.format(layer=layer)] = Slot(entry, layer, shape)
    return slots


def mismatches(slots: Mapping[str, Slot], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps tensors of these shapes from filling a network exactly, one phrase each; none if they do."""
    missing = [name for name in slots if name not in shapes]
    surplus = [name for name in shapes if name not in slots]
    faults = [f"{len(missing)} tensors are missing: {shortlist(missing)}"] if missing else []
    faults += [f"{len(surplus)} tensors belong to no known part: {shortlist(surplus)}"] if surplus else []
    return faults + [
        f"{name} has shape {list(shapes[name])}, this network needs {list(slot.shape)}"
        for name, slot in slots.items()
        if name in shapes and tuple(shapes[name]) != slot.shape
    ]


def load_official(abstract: Any, table: Sequence[Entry], tensors: Mapping[str, np.ndarray], source: str) -> Any:
    """Fills a network's leaves from official tensors in memory.

    Args:
        abstract: the network as `jax.eval_shape` (or a live one) gives it; leaves keep its dtypes, and its shardings
            where it has them.
        table: the network's table.
        tensors: official name → tensor.
        source: file or folder to name in errors.

    Returns:
        The network with the same structure and the checkpoint's weights.

    Raises:
        UserError: names are missing, left over, or of a wrong shape.
    """
    faults = mismatches(official_slots(abstract, table), {name: tensors[name].shape for name in tensors})
    if faults:
        raise UserError(f"{source}: {shortlist(faults, 4)}")
    entries = {entry.path: entry for entry in table}

    def fill(path, leaf):
        entry = entries[leaf_name(path)]
        if "{layer}" in entry.official:
            names = [entry.official.format(layer=layer) for layer in range(leaf.shape[0])]
            value = np.stack([entry.from_official(tensors[name]) for name in names])
        else:
            value = entry.from_official(tensors[entry.official])
        return jax.device_put(jnp.asarray(value, leaf.dtype), getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(fill, abstract)
