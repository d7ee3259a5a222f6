"""Along which mesh axes a collective of a compiled program goes, from the groups of devices that it names."""

import itertools
import math
import re
from collections.abc import Sequence

import jax
import numpy as np

_PART = "part of "


def axes_along(line: str, mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which the groups of a collective lie, joined by `+`.

    `part of a+b` where the groups are smaller than those of the axes: of tokens split 8 ways, 2 and 4 may be rows and
    columns of a frame. `?` where the collective names no groups.
    """
    groups = _groups(line, mesh.size)
    if groups is None:
        return "?"
    found = {frozenset(group) for group in groups}
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    parts = "?"
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, size):
            last = [mesh.axis_names.index(name) for name in chosen]
            moved = np.moveaxis(places, last, range(-len(last), 0))
            extent = math.prod(mesh.shape[name] for name in chosen)
            along = {frozenset(group) for group in moved.reshape(-1, extent).tolist()}
            if found <= along:
                return "+".join(chosen)
            if parts == "?" and all(any(group <= whole for whole in along) for group in found):
                parts = _PART + "+".join(chosen)
    return parts


def extent_of(axes: str, mesh: jax.sharding.Mesh) -> int:
    """Devices in a group along axes as `axes_along` names them, at most; where these are unknown, all."""
    names = axes.removeprefix(_PART).split("+")
    return mesh.size if axes == "?" else math.prod(mesh.shape[name] for name in names)


def _groups(line: str, devices: int) -> list[list[int]] | None:
    """The groups of devices of a collective, by their places in the program."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line):
        return _joined([[int(x) for x in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        groups = [[int(x) for x in group.split(",") if x] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return groups or [list(range(devices))]
    meshed = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", line
    )
    if meshed:
        axes, sizes, order, along = meshed.groups()
        return _groups_of_mesh(axes, _turned(devices, sizes, order), along)
    # [groups, size]<=[sizes]T(order): the places 0, 1, … laid out, turned, and cut into groups.
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _turned(devices, short[3], short[4]).reshape(int(short[1]), int(short[2])).tolist()
    return None


def _turned(devices: int, sizes: str | None, order: str | None) -> np.ndarray:
    """The places 0, 1, … laid out in these sizes, their axes in another order, one after another."""
    places = np.arange(devices)
    if sizes:
        places = places.reshape([int(x) for x in sizes.split(",")])
    return (places.transpose([int(x) for x in order.split(",")]) if order else places).ravel()


def _groups_of_mesh(axes: str, places: np.ndarray, along: str) -> list[list[int]]:
    """Groups as `mesh['a'=2,'b'=4] {'a','b':(2)2}`: along a, and along the part of b behind 2, of size 2."""
    extents, exchanged = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
    for name, extent in re.findall(r"'(\w+)'=(\d+)", axes):
        before, size = 1, 1  # an axis along which nothing is exchanged
        if name in parts:
            before, size = (int(part) for part in parts[name]) if parts[name][0] else (1, int(extent))
        extents += [before, size, int(extent) // (before * size)]
        exchanged.append(len(extents) - 2)
    places = np.moveaxis(places.reshape(extents), exchanged, range(-len(exchanged), 0))
    return places.reshape(-1, math.prod(extents[axis] for axis in exchanged)).tolist()


def _joined(pairs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rings of devices from the pairs of neighbours in them."""
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched] + [set(pair).union(*touched)]
    return [sorted(group) for group in groups]
