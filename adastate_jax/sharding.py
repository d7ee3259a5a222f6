"""Where every array lives: path → logical axes → mesh axes, for parameters, EMA and optimizer state alike.

Optimizer moments and EMA weights carry the parameter's path as a suffix, so one table serves them all.
"""

import functools
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from adastate_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "model")  # neighbours on the last are nearest to each other

# Logical axis → mesh axes. A dimension that they do not divide is refused, but for those of `MAY_STAY_WHOLE`.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),  # of every frame, so that each device has a part of all frames
    "embed": ("fsdp", "context"),
    "heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "rank": ("fsdp", "context"),
}

# Where these are not divided, every device holds them whole.
#     vocab: the 259 rows of the byte tokenizer's table, a prime times 7; UMT5's 256,384 are divided by all meshes.
#     rank: of small adapters.
MAY_STAY_WHOLE = ("vocab", "rank")

_log = logging.getLogger(__name__)

# First match wins; axes are those of the trailing dimensions, so a stacked layer axis in front stays whole.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(query|key|value)/kernel", ("embed", "heads")),
    (r"(query|key|value)/bias", ("heads",)),
    (r"output/kernel", ("heads", "embed")),
    (r"(ffn_in|ffn_gate)/kernel", ("embed", "mlp")),
    (r"(ffn_in|ffn_gate)/bias", ("mlp",)),
    (r"ffn_out/kernel", ("mlp", "embed")),
    (r"token_embedding", ("vocab", "embed")),
    (r"(patch_embedding|text_in|text_out|time_in|time_out)/kernel", (None, "embed")),
    (r"time_projection/kernel", ("embed", "mlp")),
    (r"head/kernel", ("embed", None)),
    (r"modulation", (None, "embed")),
    # LoRA's factors, beside the kernels that they change.
    (r"(query|key|value|ffn_in|time_projection|head)/down", ("embed", None)),
    (r"output/down", ("heads", "rank")),
    (r"ffn_out/down", ("mlp", "rank")),
    (r"(patch_embedding|text_in|text_out|time_in|time_out)/down", (None, "rank")),
    (r"(query|key|value)/up", ("rank", "heads")),
    (r"(ffn_in|time_projection)/up", ("rank", "mlp")),
    (r"(output|ffn_out|patch_embedding|text_in|text_out|time_in|time_out)/up", (None, "embed")),
    (r"head/up", ("rank", None)),
)


def all_devices() -> list[jax.Device]:
    """All of this run's devices.

    Raises:
        UserError: the platform that JAX_PLATFORMS names is not on this machine.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform's plugin is there
        platforms = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "JAX has no such plugin"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: no such device here ({reason}); unset it, or name one that is, such as cpu"
        ) from None


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1, context: int = 1, devices=None) -> jax.sharding.Mesh:
    """Mesh of so many devices along each axis (the first so many of `devices`, by default all of this run's).

    Devices of several slices (of which a TPU's or GPU's runtime says that a fast network joins each) are arranged so
    that `data` alone crosses from one to another; where it is no multiple of their number, `fsdp` crosses, too, and a
    warning says so. `context` and `model` never do.

    Raises:
        ValueError: there are too few devices, several processes would leave some of theirs out, or slices and axes do
            not go together.
        UserError: there are none of the platform that JAX_PLATFORMS names.
    """
    devices = all_devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "context": context, "model": model}
    size = math.prod(sizes.values())
    if size > len(devices) or (jax.process_count() > 1 and size != len(devices)):
        shape = " x ".join(f"{name} {extent}" for name, extent in sizes.items() if extent > 1)
        raise ValueError(f"mesh {shape} needs {size} devices, {len(devices)} are here")
    types = (AxisType.Auto,) * len(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices[:size]})
    if slices == 1:
        shape = tuple(sizes.values())
        try:
            return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices[:size])
        except NotImplementedError:  # the sides of a TPU's torus are no products of these: axes take parts of sides
            arranged = mesh_utils.create_device_mesh(shape, devices[:size], allow_split_physical_axes=True)
            return jax.sharding.Mesh(arranged, MESH_AXES, axis_types=types)
    across = {"data": math.gcd(data, slices)}
    across["fsdp"] = slices // across["data"]
    if fsdp % across["fsdp"]:
        raise ValueError(
            f"{slices} slices need data, or data times fsdp, that is a multiple of {slices}: data is {data}, "
            f"fsdp {fsdp}"
        )
    if across["fsdp"] > 1:
        _log.warning("mesh.data %d is no multiple of the %d slices: fsdp crosses the slow network, too", data, slices)
    inside = [sizes[name] // across.get(name, 1) for name in MESH_AXES]
    outside = [across.get(name, 1) for name in MESH_AXES]
    arranged = mesh_utils.create_hybrid_device_mesh(inside, outside, devices[:size], allow_split_physical_axes=True)
    return jax.sharding.Mesh(arranged, MESH_AXES, axis_types=types)


def path_name(path) -> str:
    """A key path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of the trailing dimensions of the leaf with this path; () if no rule names it."""
    return next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, name)), ())


def indivisible(what: str, size: int, axis: str, mesh: Mapping[str, int]) -> str | None:
    """Why a dimension cannot be split along a logical axis; None if it can.

    Args:
        what: the dimension's name, of a configuration's field or of a weight.
        size: of the dimension.
        axis: of `RULES`.
        mesh: devices per mesh axis.

    Returns:
        One line with the nearest sizes, and the nearest numbers of devices, that go together.
    """
    extent = math.prod(mesh[name] for name in RULES[axis])
    if size % extent == 0:
        return None
    split = " * ".join(f"mesh.{name}" for name in RULES[axis])
    sizes = [str(multiple) for multiple in (size // extent * extent, -(-size // extent) * extent) if multiple]
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    fewer = max(number for number in divisors if number < extent)
    more = [number for number in divisors if number > extent][:1]
    extents = " or ".join(map(str, [fewer, *more]))
    return (
        f"{what} {size} must be a multiple of {split} = {extent}: choose {' or '.join(sizes)}, or {split} = {extents}"
    )


def tree_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes, by its path.

    Raises:
        UserError: the mesh does not divide a leaf.
    """

    def leaf_sharding(path, leaf):
        name = path_name(path)
        axes = logical_axes(name)[-leaf.ndim :] if leaf.ndim else ()
        axes = (None,) * (leaf.ndim - len(axes)) + axes

        def split(axis: str | None, size: int) -> tuple[str, ...] | None:
            reason = axis and indivisible(f"{name}: its {axis} of", size, axis, mesh.shape)
            if reason and axis not in MAY_STAY_WHOLE:
                raise UserError(reason)
            return None if axis is None or reason else RULES[axis]

        return NamedSharding(mesh, PartitionSpec(*map(split, axes, leaf.shape)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading dimension split over the batch axes, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def refuse_too_large(tree: Any, mesh: jax.sharding.Mesh) -> None:
    """Counts the bytes of a tree of shapes, split over a mesh, before any of them is allocated.

    Raises:
        UserError: a device would have to hold more than its memory.
    """
    shardings = jax.tree.leaves(tree_shardings(tree, mesh))
    leaves = jax.tree.leaves(tree)
    held = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, shardings, strict=True)
    )
    memory = _device_memory(mesh.devices.flat[0])
    if held > memory:
        raise UserError(
            f"the network would take {held / 1e9:.3g} GB on every device, which has {memory / 1e9:.3g}; make the sizes "
            "of its configuration smaller, or split it over more devices (config.mesh.fsdp)"
        )


def _device_memory(device: jax.Device) -> float:
    """Bytes that a device has in all: what it says, else those of the host."""
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.process_index == jax.process_index() else None
    if limit is None and device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return limit or math.inf


def init_sharded(function: Callable[..., Any], mesh: jax.sharding.Mesh, *arguments: Any) -> Any:
    """Runs an initialiser under `jit` so that each leaf comes out in its place; the tree is whole on no device.

    Leaves of one layer may be, for a while: `draw_normal` draws flat, and not every axis can be split through that.
    Raises UserError where they would not fit, see `refuse_too_large`.
    """
    abstract = jax.eval_shape(function, *arguments)
    refuse_too_large(abstract, mesh)
    shardings = tree_shardings(abstract, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=shardings)(*arguments)


def current_mesh() -> AbstractMesh | None:
    """The mesh that arrays are laid out on; None without one, and in `shard_map`, where each device sees its part."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def activation_axes(axis: str | None, size: int, mesh: AbstractMesh) -> tuple[str, ...] | None:
    """The mesh axes along which an activation's dimension lies; where they do not divide it, it is whole, and said so.

    Training refuses such sizes before (`config/mesh.py`). A few streams, on a mesh whose `fsdp` splits the weights, are
    computed by all of its devices.
    """
    if axis is None or size == 1:  # what is one for all, such as a negative prompt, is on every device
        return None
    if reason := indivisible(f"a {axis} of", size, axis, mesh.shape):
        _say_whole(reason)
        return None
    return RULES[axis]


@functools.cache  # once per size, not once per trace
def _say_whole(reason: str) -> None:
    _log.warning("whole on every device: %s", reason)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the leading dimensions of an activation to logical axes under the current mesh; without one, nothing."""
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = [activation_axes(axis, size, mesh) for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_weights(tree: Any) -> Any:
    """Pins a tree of weights, or of as many gradients, to where `tree_shardings` puts them; without a mesh, nothing."""
    mesh = current_mesh()
    if mesh is None:
        return tree
    shardings = tree_shardings(tree, mesh)
    return jax.tree.map(lambda x, sharding: jax.lax.with_sharding_constraint(x, sharding.spec), tree, shardings)


def fetch(array: jax.Array) -> np.ndarray:
    """All of a global array, on every process; all of them call it."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def local_rows(batch_size: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, ascending; several processes may hold the same."""
    blocks = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[block] for block in blocks]))


def shard_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Global arrays from this process's rows (`local_rows`), split over the batch axes: [B_local, ...] → [B, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
