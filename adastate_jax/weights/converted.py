"""Converted folders: one network in the layout of its own leaves, read straight to where the weights will stay.

`converted.json` says which network it is and how it is configured, `weights.safetensors` holds its leaves by path. The
writer goes through the source once and holds one tensor (of one layer) at a time; a reader maps the file into memory,
checks one leaf after the other against its checksum, and takes from it the part that its devices get.
"""

import dataclasses
import json
import mmap
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adastate_jax.errors import UserError, shown
from adastate_jax.fields import build, to_dict
from adastate_jax.files import is_file
from adastate_jax.models.quantized import quantize_network
from adastate_jax.sharding import make_mesh, tree_shardings
from adastate_jax.texts import read_json
from adastate_jax.weights.identify import Network
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.safetensors_file import SafeTensors, write_safetensors
from adastate_jax.weights.slots import Slot, leaf_name, leaves
from adastate_jax.weights.tensors import StoredTensor, Tensor, finite_blocks

_DESCRIPTION = "converted.json"
_WEIGHTS = "weights.safetensors"
_FORMAT = 2


def write_converted(network: Network, folder: Path, advance: Callable[[int], Any]) -> None:
    """Writes a network into an empty folder, in its configuration's `param_dtype`.

    Args:
        network: where the weights are read from.
        folder: is there, and is not yet under its final name.
        advance: called with the number of bytes that were written since the last time.

    Raises:
        UserError: a weight is not finite.
        OSError: the disk is full.
    """
    shapes = leaves(KINDS[network.kind].abstract(network.config))
    layout = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in shapes.items()}
    checksums = dict.fromkeys(layout, 0)

    def layers() -> Iterator[np.ndarray]:
        for name, slot in network.slots.items():
            leaf = shapes[slot.entry.path]
            ours = np.empty(leaf.shape if slot.layer is None else leaf.shape[1:], leaf.dtype)
            _fill(ours, slot, name, network.tensors[name])
            checksums[slot.entry.path] = _checksum(ours, checksums[slot.entry.path])
            yield ours
            advance(ours.nbytes)

    write_safetensors(folder / _WEIGHTS, layout, layers(), {})
    description = {"format": _FORMAT, "kind": network.kind, "config": to_dict(network.config), "crc32": checksums}
    description["checksum"] = _own_checksum(description)
    (folder / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def _fill(ours: np.ndarray, slot: Slot, name: str, tensor: Tensor) -> None:
    """Copies an official tensor into a leaf (of one layer)."""
    theirs = slot.entry.to_official(ours)
    if not np.may_share_memory(theirs, ours):
        raise ValueError(f"{slot.entry.pattern}: is no view")
    for block, rows in finite_blocks(name, tensor, ours.dtype):
        theirs[block] = rows


def is_converted(path: str | Path) -> bool:
    """Whether a folder is one that `convert` wrote."""
    return is_file(Path(path) / _DESCRIPTION)


def load_converted(
    path: str | Path, kind: str, mesh: jax.sharding.Mesh | None = None, dtype: str | None = None, **fields: Any
) -> Any:
    """The network of a folder that `convert` wrote: a `DiT`, `TextEncoder`, `VAE` or `TinyVAE`.

    Each leaf is mapped from the file, and what a device gets of it is copied to there, cast on the way: of the host's
    memory it takes one device's part of one leaf at a time.

    Args:
        path: the folder.
        kind: what it must hold: transformer, text_encoder, vae or tiny_vae.
        mesh: devices that the weights are split over by `sharding.py`; None is one device.
        dtype: of weights and computation, bfloat16 or float32; None keeps what is stored.
        fields: other fields of the network's configuration, which change no weight, such as `attention` or `remat`;
            `param_dtype` here is of the weights alone. With `quantization` (of a `DiT`), they are quantised on the
            devices.

    Raises:
        UserError: the folder is not one of ours, holds another kind of network, or is damaged.
    """
    config, stored = _open_kind(Path(path), kind)
    if dtype is not None:
        fields = {"param_dtype": dtype, "dtype": dtype} | fields
    quantization = fields.pop("quantization", "")
    abstract = KINDS[kind].abstract(dataclasses.replace(config, **fields))
    mesh = make_mesh() if mesh is None else mesh

    def place(path, leaf, sharding):
        return _placed(stored[leaf_name(path)].read(), leaf.dtype, sharding)

    network = jax.tree_util.tree_map_with_path(place, abstract, tree_shardings(abstract, mesh))
    return quantize_network(network, quantization, mesh) if quantization else network


def converted_config(path: str | Path, kind: str) -> Any:
    """The configuration of a folder's network; its weights are not read, but for the list of them.

    Raises:
        UserError: as `load_converted` does, but for damage to the weights.
    """
    return _open_kind(Path(path), kind)[0]


def _open_kind(path: Path, kind: str) -> tuple[Any, dict[str, "_Leaf"]]:
    """Configuration and unread leaves of a folder of one kind."""
    found, config, stored = _open(path)
    if found != kind:
        raise UserError(f"{path}: holds a {KINDS[found].title}, not a {KINDS[kind].title}; name another folder")
    return config, stored


def _placed(whole: np.ndarray, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    """A mapped array on the devices of a sharding, in another dtype; device after device."""
    parts = []
    for device, index in sharding.addressable_devices_indices_map(whole.shape).items():
        parts.append(jax.device_put(_copied(whole[index], dtype), device))
        parts[-1].block_until_ready()  # the host's copy may go before the next one is made
    return jax.make_array_from_single_device_arrays(whole.shape, sharding, parts)


def _copied(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy in memory that starts on a page, which JAX on a CPU takes over as it is; all other it copies once more."""
    memory = mmap.mmap(-1, max(array.size * dtype.itemsize, 1))
    copy = np.frombuffer(memory, dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def open_converted(path: str | Path) -> Network:
    """The network of a folder that `convert` wrote, in official layout, checked, to be read when asked for.

    Raises:
        UserError: the folder is not one of ours, or damaged.
    """
    kind, config, stored = _open(Path(path))
    for leaf in stored.values():
        leaf.read()
    slots = KINDS[kind].slots(config)
    return Network(
        kind, config, slots, {name: _official(stored[slot.entry.path].tensor, slot) for name, slot in slots.items()}
    )


def _official(leaf: StoredTensor, slot: Slot) -> StoredTensor:
    """An official tensor as a view of a stored leaf."""
    if slot.layer is not None:
        leaf = leaf[slot.layer : slot.layer + 1]
        leaf = dataclasses.replace(leaf, shape=leaf.shape[1:], strides=leaf.strides[1:])
    # Memory of the same layout that nobody touches; an element is a byte, so that its strides count elements.
    ours = np.empty(leaf.shape, np.bool_)
    theirs = slot.entry.to_official(ours)
    if not np.may_share_memory(theirs, ours):
        raise ValueError(f"{slot.entry.pattern}: is no view")
    return dataclasses.replace(leaf, shape=theirs.shape, strides=theirs.strides)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf in the file, and the checksum of its elements."""

    tensor: StoredTensor
    checksum: int

    def read(self) -> np.ndarray:
        """The elements, read-only and mapped; what is copied from them next comes from memory."""
        whole = self.tensor.read()
        if _checksum(whole) != self.checksum:
            raise UserError(f"{self.tensor.path}: damaged; convert it again")
        return whole


def _open(path: Path) -> tuple[str, Any, dict[str, _Leaf]]:
    """Kind, configuration and leaves by path, unread."""
    description, file = path / _DESCRIPTION, path / _WEIGHTS
    if not is_converted(path):
        raise UserError(f"{path}: not a folder that convert wrote (no {_DESCRIPTION})")
    values = read_json(description, "convert it again")
    try:
        version, kind, fields, checksums = (values[name] for name in ("format", "kind", "config", "crc32"))
        own = values.get("checksum")
    except (TypeError, KeyError) as error:
        raise UserError(f"{description}: damaged ({shown(error)}); convert it again") from None
    if version != _FORMAT or kind not in [*KINDS]:
        raise UserError(
            f"{description}: of another version of this package (format {shown(version)}, kind {shown(kind)}); convert "
            "it again"
        )
    if own is not None and own != _own_checksum(values):  # folders of earlier versions have none
        raise UserError(f"{description}: damaged: does not match its checksum; convert it again")
    config = build(KINDS[kind].config, fields, str(description))
    stored = SafeTensors(file).stored()
    try:
        wanted = {name: (leaf.dtype, leaf.shape) for name, leaf in leaves(KINDS[kind].abstract(config)).items()}
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{description}: no {KINDS[kind].title} has such sizes ({error}); convert it again") from None
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    if wanted != found or not isinstance(checksums, dict) or found.keys() != checksums.keys():
        raise UserError(f"{description}: describes another network than {file.name} holds; convert it again")
    return kind, config, {name: _Leaf(tensor, checksums[name]) for name, tensor in stored.items()}


def _own_checksum(description: Mapping[str, Any]) -> int:
    """CRC-32 of all that a description says, but for that checksum itself."""
    said = {name: value for name, value in description.items() if name != "checksum"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def _checksum(array: np.ndarray, before: int = 0) -> int:
    """CRC-32 of an array's elements, after those of what came before."""
    return zlib.crc32(array.reshape(-1).view(np.uint8), before)
