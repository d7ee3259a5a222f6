"""Will distillation fit on these chips, and what will it take: counted first, then compiled.

Counting says what lies on a device by name, which is what a refusal needs; it knows nothing of what a compiler keeps
besides. So a plan is chosen by counting among meshes, ways to recompute and micro-batches, and then compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from adastate_jax.benchmarking import ahead
from adastate_jax.benchmarking.flops import Flops
from adastate_jax.benchmarking.sections import TRAINING
from adastate_jax.benchmarking.targets import (
    Chip,
    Target,
    can_compile_for,
    find_target,
    make_target_mesh,
    read_target,
)
from adastate_jax.benchmarking.workloads import device_bytes, make_workload
from adastate_jax.config.run import Config
from adastate_jax.config.stages import num_chunks
from adastate_jax.errors import UserError
from adastate_jax.models.dit import REMAT_POLICIES, DiTConfig
from adastate_jax.sharding import MESH_AXES, RULES
from adastate_jax.streaming.schedule import layout_of, phase_of

# Of a device's memory, what counting may fill: what was compiled held 10 to 40 % more than was counted of it.
COUNTED_SHARE = 0.8

_HOPELESS = 1.5  # of a device's memory: so much is not compiled for a quarter of an hour to hear the same
_MOST_COMPILED = 3  # variants, if compiling refuses what counting let through


@dataclasses.dataclass(frozen=True)
class Count:
    """What an update takes, counted.

    Attributes:
        program: `critic` or `student`.
        parts: bytes per device by name, of the moment at which they are most.
        flops: of all devices together.
    """

    program: str
    parts: Mapping[str, int]
    flops: Flops

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def count(program: str, config: Config, teacher: DiTConfig) -> Count:
    """Counts an update of distillation on the configured mesh. No compiler is asked, and no device need be described.

    Exact are weights, moments and averages. Of what a step makes, the large things are counted: the rollout's record,
    what the backward pass keeps of every block, the gradients, and what one layer holds at once.

    Raises:
        UserError: the mesh does not divide the batch.
    """
    extents = dataclasses.asdict(config.mesh)
    mesh = AbstractMesh(tuple(extents.values()), tuple(extents), axis_types=(AxisType.Auto,) * len(extents))
    workload = make_workload(program, config, teacher, mesh)
    own, _, _, *others = workload.arguments
    moments = device_bytes(own) - device_bytes(own.params)
    parts = {
        f"{program}: weights": device_bytes(own.params),
        f"{program}: moments and average": moments,
        "other networks": device_bytes(others) + workload.resident,
        "gradients": device_bytes(own.params),
    }
    return Count(program, parts | _made(program, config, teacher, extents), workload.flops)


def _made(program: str, config: Config, teacher: DiTConfig, extents: Mapping[str, int]) -> dict[str, int]:
    """Bytes per device of what a step makes, where they are most."""
    model, stream = config.model, config.stream
    width, heads = jnp.dtype(model.dtype).itemsize, extents["model"]
    samples = (
        config.distill.batch_size / config.distill.accumulate / math.prod(extents[axis] for axis in RULES["batch"])
    )
    frame = samples * model.frame_tokens(*config.latent_shape[:2]) / extents.get("context", 1)
    clip = config.distill.rollout_frames * frame
    chunks = range(num_chunks(config.distill.rollout_frames, stream))
    live = frame * sum(len(layout_of(phase_of(chunk, stream), stream).live) for chunk in chunks)
    # That one gradient passes through: the student's is taken chunk by chunk.
    tokens = live / len(chunks) if program == "student" else clip

    def layer(sizes: DiTConfig, tokens: float) -> float:  # queries, keys, values, output; a float32 norm; feed-forward
        return tokens * (width * (5 * sizes.dim + 2 * sizes.ffn_dim / heads) + 8 * sizes.dim)

    kept = {
        "none": 10 * model.dim + 2 * model.ffn_dim / heads,
        "dots": 7 * model.dim + model.ffn_dim / heads,
        "attention": 3 * model.dim,
        "block": model.dim,
    }
    backward = {
        f"kept for the backward pass (remat {model.remat})": width * model.num_layers * tokens * kept[model.remat],
        "one layer at once": layer(model, tokens),
    }
    if program == "critic":
        return {name: int(size) for name, size in backward.items()}
    keys_values = 2 * width * model.num_layers * model.dim / heads
    record = {"rollout's keys and values": live * keys_values}
    # The scores come before the backward pass; what they hold is gone then.
    scores = record | {"one layer of the teacher at once": layer(teacher, 2 * clip)}
    largest = max(scores, record | backward, key=lambda parts: sum(parts.values()))
    return {name: int(size) for name, size in largest.items()}


# --- the search -------------------------------------------------------------------------------------------------------


def variants(config: Config, devices: int) -> Iterator[Config]:
    """The configuration on every mesh of so many devices, with every way to recompute, and fewer samples at once.

    What does not divide is left out.
    """
    batch = config.distill.batch_size
    accumulations = [
        dataclasses.replace(config, distill=dataclasses.replace(config.distill, accumulate=parts))
        for parts in range(1, batch + 1)
        if batch % parts == 0
    ]
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for extents in itertools.product(sizes, repeat=len(MESH_AXES)):
        if math.prod(extents) != devices:
            continue
        for base, remat in itertools.product(accumulations, REMAT_POLICIES):
            mesh = dataclasses.replace(base.mesh, **dict(zip(MESH_AXES, extents, strict=True)))
            try:
                model = dataclasses.replace(base.model, remat=remat)
                yield dataclasses.replace(base, mesh=mesh, model=model)
            except ValueError:  # a mesh that divides no heads, for one
                continue


def changes(asked: Config, other: Config) -> dict[str, Any]:
    """The fields in which a variant differs, as they are set on a command line."""
    found = {
        f"config.mesh.{axis}": getattr(other.mesh, axis)
        for axis in MESH_AXES
        if getattr(asked.mesh, axis) != getattr(other.mesh, axis)
    }
    if asked.model.remat != other.model.remat:
        found["config.model.remat"] = other.model.remat
    if asked.distill != other.distill:
        found["config.distill.accumulate"] = other.distill.accumulate
    return found


def fitting(config: Config, teacher: DiTConfig, chip: Chip, devices: int) -> list[tuple[Config, int]]:
    """The variants that fit by counting, and the bytes counted; see `_counted_variants` for their order."""
    room = chip.memory * COUNTED_SHARE
    return [(variant, most) for variant, most in _counted_variants(config, teacher, devices) if most <= room]


def spread(config: Config, teacher: DiTConfig, chip: Chip, devices: int) -> Config:
    """A configuration of one device on the mesh of so many that suits it best; where none fits, that which holds least.

    Raises:
        UserError: no mesh of so many devices divides it.
    """
    counted = _counted_variants(config, teacher, devices)
    if not counted:
        raise UserError(f"config.mesh: no mesh of {devices} devices divides the networks and the batch; take fewer")
    fits = (variant for variant, most in counted if most <= chip.memory * COUNTED_SHARE)
    return next(fits, min(counted, key=lambda item: item[1])[0])


def _counted_variants(config: Config, teacher: DiTConfig, devices: int) -> list[tuple[Config, int]]:
    """Variants and the bytes that are counted of each; those first that change least, then the fastest.

    A mesh is no change where the configuration has one device. Among equally fast ones come first those that split
    fewer activations: less is exchanged.
    """
    found = []
    free = math.prod(dataclasses.asdict(config.mesh).values()) == 1
    for variant in variants(config, devices):
        if variant.model.num_heads % variant.mesh.model or teacher.num_heads % variant.mesh.model:
            continue
        try:
            counts = [count(program, variant, teacher) for program in TRAINING]
        except UserError:  # the batch is not divided
            continue
        most = max(each.bytes for each in counts)
        work = sum(each.flops.total for each in counts)
        changed = [field for field in changes(config, variant) if not (free and field.startswith("config.mesh."))]
        found.append((len(changed), work, variant.mesh.model * variant.mesh.context, variant, most))
    return [(variant, most) for *_, variant, most in sorted(found, key=lambda item: item[:3])]


def plan(config: Config, teacher: DiTConfig, name: str, share: float, cache: Path) -> dict[str, Any]:
    """What distillation takes on a target as it is configured, and if that does not fit, the nearest that does.

    Args:
        config: on a mesh of as many devices as the target has; one device is any mesh, see `spread`.
        name: of the target, see `find_target`; where what compiles for it is not installed, it is only counted.
        share: of the data sheet's rate that times are predicted at.
        cache: folder of what was compiled before.

    Returns:
        `asked`, the configuration's own figures, and `nearest`, a variant's with its `changes`; None if the first fits,
        or none does. `only_counted` says so.

    Raises:
        UserError: the target is none, or the configured mesh has another number of devices, or does not divide the
            batch.
    """
    chip, sizes = read_target(name)
    devices, target = math.prod(sizes), find_target(name) if can_compile_for(name) else None
    given = math.prod(dataclasses.asdict(config.mesh).values())
    if given == 1 < devices:
        config = spread(config, teacher, chip, devices)
    elif given != devices:
        raise UserError(f"config.mesh: {name} has {devices} devices; set fsdp, or another axis, to as many")
    place = _Place(chip, devices, share, target, cache)
    asked = _figures(config, teacher, place)
    record = {
        "target": name,
        "chip": chip.name,
        "devices": devices,
        "share": share,
        "only_counted": target is None,
        "asked": asked,
        "nearest": None,
    }
    refused = [asked]
    for variant, counted in fitting(config, teacher, chip, devices) if asked["fits"] == "no" else ():
        # What holds no less than what a compiler has refused is not tried.
        if len(refused) <= _MOST_COMPILED and counted < min(figures["counted_bytes"] for figures in refused):
            figures = _figures(variant, teacher, place)
            if figures["fits"] != "no":
                return record | {"nearest": figures | {"changes": changes(config, variant)}}
            refused.append(figures)
    return record


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a plan is for, and how its figures are made: see `plan`."""

    chip: Chip
    devices: int
    share: float
    target: Target | None
    cache: Path


def _figures(config: Config, teacher: DiTConfig, place: _Place) -> dict[str, Any]:
    """An update of each network, counted and compiled, and the recipe of both."""
    settings, updates = config.distill, {}
    for program in TRAINING:
        counted = count(program, config, teacher)
        figures: dict[str, Any] = {
            "parts": dict(counted.parts),
            "counted_bytes": counted.bytes,
            "tflop": counted.flops.total / 1e12,
            "seconds": counted.flops.total / (place.devices * place.chip.flops * place.share),
            "fits": "yes" if counted.bytes <= place.chip.memory * COUNTED_SHARE else "no",
        }
        if place.target is not None and counted.bytes <= _HOPELESS * place.chip.memory:
            mesh = make_target_mesh(place.target, **dataclasses.asdict(config.mesh))
            workload = make_workload(program, config, teacher, mesh)
            figures["compiled"] = ahead.describe(workload, place.target, place.cache)
            figures["fits"] = figures["compiled"]["fits"]
        updates[program] = figures
    students = -(-settings.steps // settings.critic_ratio)
    seconds = settings.steps * updates["critic"]["seconds"] + students * updates["student"]["seconds"]
    answers = [figures["fits"] for figures in updates.values()]
    return {
        "mesh": dataclasses.asdict(config.mesh),
        "remat": config.model.remat,
        "accumulate": config.distill.accumulate,
        "updates": updates,
        "counted_bytes": max(figures["counted_bytes"] for figures in updates.values()),
        "fits": next(answer for answer in ("no", "tightly", "yes") if answer in answers),
        "steps": settings.steps,
        "device_hours": seconds * place.devices / 3600,
    }


def table(record: Mapping[str, Any]) -> str:
    """The plan for people; where it does not fit, its largest parts, and what does."""
    memory = f"{record['chip']} x {record['devices']}"
    lines = [f"{record['target']} ({memory}), times at {100 * record['share']:.0f} % of the data sheet's rate"]
    if record["only_counted"]:
        lines.append('only counted: to compile, too, install the extra "compile" of this package')
    lines += _lines(record["asked"])
    if record["asked"]["fits"] != "no":
        return "\n".join(lines)
    worst = max(record["asked"]["updates"].values(), key=lambda figures: figures["counted_bytes"])
    parts = sorted(worst["parts"].items(), key=lambda part: -part[1])
    lines += ["does not fit; the largest parts:", *(f"  {size / 2**30:8.2f} GiB  {name}" for name, size in parts[:6])]
    if record["nearest"] is None:
        return "\n".join([*lines, "no mesh of these chips, way to recompute or accumulation fits; take more chips"])
    flags = " ".join(f"--{name}={value}" for name, value in record["nearest"]["changes"].items())
    return "\n".join([*lines, f"what fits: {flags}", *_lines(record["nearest"])])


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    mesh = ", ".join(f"{axis} {extent}" for axis, extent in figures["mesh"].items() if extent > 1) or "one device"
    yield f"mesh {mesh}; remat {figures['remat']}, accumulate {figures['accumulate']}"
    for program, row in figures["updates"].items():
        compiled = row.get("compiled")
        sizes = f"{row['counted_bytes'] / 2**30:.1f} GiB counted"
        if compiled and "peak_bytes" in compiled:
            peak, bound = (compiled[name] + compiled["resident_bytes"] for name in ("peak_bytes", "bound_bytes"))
            sizes += f", {peak / 2**30:.1f} compiled (at most {bound / 2**30:.1f})"
        elif compiled:
            sizes += f", compiled: {compiled['failure']}"
        else:
            sizes += ", not compiled"
        yield f"  {program:8} fits: {row['fits']:8} {sizes}; {row['tflop']:.0f} TFLOP, {row['seconds']:.1f} s"
    yield f"  {figures['steps']} iterations: {figures['device_hours']:.0f} device-hours"
