"""Where every array lives: path → logical axes → mesh axes, for parameters, EMA and optimizer state alike.

Optimizer moments and EMA weights carry the parameter's path as a suffix, so one table serves them all.
"""

import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adastate_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "model")

# Logical axis → mesh axes. An axis that a dimension's size does not divide is left out.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
}

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


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1, devices=None) -> jax.sharding.Mesh:
    """Mesh of `data` × `fsdp` × `model` devices (the first so many of `devices`, by default all of this run's).

    Raises:
        ValueError: there are too few devices, or several processes would leave some of theirs out.
        UserError: there are none of the platform that JAX_PLATFORMS names.
    """
    devices = all_devices() if devices is None else devices
    size = data * fsdp * model
    if size > len(devices) or (jax.process_count() > 1 and size != len(devices)):
        raise ValueError(f"mesh {data}x{fsdp}x{model} needs {size} devices, {len(devices)} are here")
    return jax.make_mesh((data, fsdp, model), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def path_name(path) -> str:
    """A key path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of the trailing dimensions of the leaf with this path; () if no rule names it."""
    return next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, name)), ())


def tree_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes, by its path."""

    def leaf_sharding(path, leaf):
        axes = logical_axes(path_name(path))[-leaf.ndim :] if leaf.ndim else ()
        axes = (None,) * (leaf.ndim - len(axes)) + axes
        return NamedSharding(mesh, PartitionSpec(*map(lambda axis, size: _fit(axis, size, mesh), axes, leaf.shape)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def _fit(axis: str | None, size: int, mesh: jax.sharding.Mesh) -> tuple[str, ...] | None:
    mesh_axes = RULES.get(axis, ()) if axis else ()
    extent = int(np.prod([mesh.shape[name] for name in mesh_axes]))
    return mesh_axes if mesh_axes and size % extent == 0 else None


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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the leading dimensions of an activation to logical axes under the current mesh; without one, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = [_fit(axis, size, mesh) for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


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
