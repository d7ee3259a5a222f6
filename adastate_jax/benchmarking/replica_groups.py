"""Along which mesh axes a collective of a compiled program goes, from the groups of devices that it names."""

import itertools
import math
import re
from collections.abc import Sequence

import jax
import numpy as np


def axes_along(line: str, mesh: jax.sharding.Mesh) -> str:
    """The mesh axes along which the groups of a collective lie."""
    groups = _groups(line, mesh.size)
    if groups is None:
        return "?"
    found = {frozenset(group) for group in groups}
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, size):
            last = [mesh.axis_names.index(name) for name in chosen]
            moved = np.moveaxis(places, last, range(-len(last), 0))
            extent = math.prod(mesh.shape[name] for name in chosen)
            if found <= {frozenset(group) for group in moved.reshape(-1, extent).tolist()}:
                return "+".join(chosen)
    return "?"


def _groups(line: str, devices: int) -> list[list[int]] | None:
    """The groups of devices of a collective, by their places in the program."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line):
        return _joined([[int(x) for x in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        groups = [[int(x) for x in group.split(",") if x] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return groups or [list(range(devices))]
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        return _groups_of_mesh(*meshed.groups())
    # [groups, size]<=[sizes]T(order): the places 0, 1, … laid out, turned, and cut into groups.
    if short := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        places = np.arange(devices).reshape([int(x) for x in short[3].split(",")])
        if short[4]:
            places = places.transpose([int(x) for x in short[4].split(",")])
        return places.reshape(int(short[1]), int(short[2])).tolist()
    return None


def _groups_of_mesh(axes: str, along: str) -> list[list[int]]:
    """Groups as `mesh['a'=2,'b'=4] {'a','b':(2)2}`: along a, and along the part of b behind 2, of size 2."""
    extents, exchanged = [], []
    parts = {name: (before, size) for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)}
    for name, extent in re.findall(r"'(\w+)'=(\d+)", axes):
        before, size = 1, 1  # an axis along which nothing is exchanged
        if name in parts:
            before, size = (int(part) for part in parts[name]) if parts[name][0] else (1, int(extent))
        extents += [before, size, int(extent) // (before * size)]
        exchanged.append(len(extents) - 2)
    places = np.moveaxis(np.arange(math.prod(extents)).reshape(extents), exchanged, range(-len(exchanged), 0))
    return places.reshape(-1, math.prod(extents[axis] for axis in exchanged)).tolist()


def _joined(pairs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rings of devices from the pairs of neighbours in them."""
    groups: list[set[int]] = []
    for pair in pairs:
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched] + [set(pair).union(*touched)]
    return [sorted(group) for group in groups]
