"""Will distillation fit on these chips, and what will it take: counted first, then compiled.

A plan is chosen by counting among meshes, ways to recompute and micro-batches (`counting.py`), and then compiled.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adastate_jax.benchmarking import ahead
from adastate_jax.benchmarking.counting import COUNTED_SHARE, changes, count, fitting, spread
from adastate_jax.benchmarking.sections import TRAINING
from adastate_jax.benchmarking.targets import (
    Chip,
    Target,
    find_target,
    make_target_mesh,
    missing_compiler,
    read_target,
)
from adastate_jax.benchmarking.workloads import make_workload
from adastate_jax.config.run import Config
from adastate_jax.console import progress
from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiTConfig

_HOPELESS = 1.5  # of a device's memory: so much is not compiled for a quarter of an hour to hear the same
_MOST_COMPILED = 3  # variants, if compiling refuses what counting let through


def plan(config: Config, teacher: DiTConfig, name: str, share: float, cache: Path) -> dict[str, Any]:
    """What distillation takes on a target as it is configured, and if that does not fit, the nearest that does.

    Args:
        config: on a mesh of as many devices as the target has; one device is any mesh, see `spread`.
        name: of the target, see `find_target`; where what compiles for it is not installed, it is only counted.
        share: of the data sheet's rate that times are predicted at.
        cache: folder of what was compiled before.

    Returns:
        `asked`, the configuration's own figures, and `nearest`, a variant's with its `changes`; None if the first fits,
        or none does. `missing` is what would have to be installed to compile, too; None if it was.

    Raises:
        UserError: the target is none, or the configured mesh has another number of devices, or does not divide the
            batch.
    """
    chip, sizes = read_target(name)
    missing = missing_compiler(name)
    devices, target = math.prod(sizes), None if missing else find_target(name)
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
        "limit_bytes": chip.memory,
        "devices": devices,
        "share": share,
        "missing": missing,
        "left_out": [stage for stage in config.stages if stage not in ("distill", "sample")],
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
    for program in _watched(TRAINING, _mesh_name(dataclasses.asdict(config.mesh)), place.target):
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
            received = sum(row["received_bytes"] for row in figures["compiled"].get("collectives", ()))
            figures["exchange_seconds"] = received / place.chip.exchange
        updates[program] = figures
    students = -(-settings.steps // settings.critic_ratio)

    def device_hours(of: str) -> float:
        """Of all updates."""
        critic, student = (updates[program].get(of, 0.0) for program in ("critic", "student"))
        return (settings.steps * critic + students * student) * place.devices / 3600

    answers = [figures["fits"] for figures in updates.values()]
    return {
        "mesh": dataclasses.asdict(config.mesh),
        "remat": config.model.remat,
        "accumulate": config.distill.accumulate,
        "updates": updates,
        "counted_bytes": max(figures["counted_bytes"] for figures in updates.values()),
        "fits": next(answer for answer in ("no", "tightly", "yes") if answer in answers),
        "steps": settings.steps,
        "student_updates": students,
        "device_hours": device_hours("seconds"),
        "exchange_device_hours": device_hours("exchange_seconds"),
    }


def _watched(programs: Sequence[str], mesh: str, target: Target | None) -> Iterator[str]:
    """Each of them, with a progress bar that says what is done with it."""
    with progress("plan", len(programs), unit="program") as bar:
        for program in programs:
            doing = f"compile {program} for {target.name}, which takes minutes" if target else f"count {program}"
            bar.set_description(f"plan: {doing}, {mesh}")
            yield program
            bar.update(1)


# --- for people -------------------------------------------------------------------------------------------------------

_LARGEST = 6  # parts of a device's memory, and exchanges, that are worth a line


def table(record: Mapping[str, Any]) -> str:
    """The plan for people; where it does not fit, its largest parts, and what does."""
    memory = f"{record['chip']} x {record['devices']}, {record['limit_bytes'] / 2**30:.1f} GiB each"
    lines = [f"{record['target']} ({memory}), times at {100 * record['share']:.0f} % of the data sheet's rate"]
    if record["missing"]:
        lines.append(f"counted, not compiled: {record['missing']}")
    if record["left_out"]:
        lines.append(f"planned is distillation; what other stages take is not in it: {', '.join(record['left_out'])}")
    lines += _lines(record["asked"])
    if record["asked"]["fits"] != "no":
        return "\n".join(lines)
    worst = max(record["asked"]["updates"].values(), key=lambda figures: figures["counted_bytes"])
    parts = sorted(worst["parts"].items(), key=lambda part: -part[1])[:_LARGEST]
    lines += ["does not fit; the largest parts:", *(f"  {size / 2**30:8.2f} GiB  {name}" for name, size in parts)]
    if record["nearest"] is None:
        return "\n".join([*lines, "no mesh of these chips, way to recompute or accumulation fits; take more chips"])
    flags = " ".join(f"--{name}={value}" for name, value in record["nearest"]["changes"].items())
    return "\n".join([*lines, f"what fits: {flags}", *_lines(record["nearest"])])


def _mesh_name(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {extent}" for axis, extent in mesh.items() if extent > 1) or "one device"


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    yield f"mesh {_mesh_name(figures['mesh'])}; remat {figures['remat']}, accumulate {figures['accumulate']}"
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
        if compiled and "peak_bytes" in compiled:
            yield from (f"{'':11}{line}" for line in _compiled_lines(row))
    hours = f"{figures['device_hours']:.0f} device-hours"
    if figures["exchange_device_hours"]:
        hours += f", and at least {figures['exchange_device_hours']:.1f} of exchange where nothing hides it"
    yield f"  {figures['steps']} updates of the critic, {figures['student_updates']} of the student: {hours}"


def _compiled_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """What a compiler says of a program that fits."""
    compiled = row["compiled"]
    sizes = {"arguments": "argument", "results that take no argument's place": None, "temporaries": "temp"}
    fresh = compiled["output_bytes"] - compiled["alias_bytes"]
    held = {title: compiled[f"{name}_bytes"] if name else fresh for title, name in sizes.items()}
    held["other networks beside it"] = compiled["resident_bytes"]
    yield "GiB: " + ", ".join(f"{title} {size / 2**30:.2f}" for title, size in held.items() if size >= 2**20)
    largest = [found for found in compiled["collectives"] if found["bytes"] >= 1e7][:_LARGEST]
    if largest:
        each = ", ".join(f"{found['kind']} along {found['axes']} {found['bytes'] / 1e9:.3g}" for found in largest)
        yield f"exchange at least {row['exchange_seconds']:.2f} s, GB: {each}"
