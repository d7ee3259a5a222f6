"""Will training fit on these chips, and what will it take: counted first, then compiled.

A plan is chosen by counting among meshes, ways to recompute and micro-batches (`counting.py`), and then compiled.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adastate_jax.benchmarking import ahead
from adastate_jax.benchmarking.counting import COUNTED_SHARE, changes, count, fitting, programs_of, spread, stage_of
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
    """What the stages of a run take on a target as it is configured, and if that does not fit, the nearest that does.

    Args:
        config: on a mesh of as many devices as the target has; one device is any mesh, see `spread`.
        name: of the target, see `find_target`; where what compiles for it is not installed, it is only counted.
        share: of the data sheet's rate that times are predicted at.
        cache: folder of what was compiled before.

    Returns:
        `asked`, the configuration's own figures, with what was `chosen` of it, and `nearest`, a variant's with its
        `changes`; None if the first fits, or none does. `missing` is what would have to be installed to compile, too;
        None if it was.

    Raises:
        UserError: the target is none, or the configured mesh has another number of devices, or does not divide the
            batch.
    """
    chip, sizes = read_target(name)
    missing = missing_compiler(name)
    devices, target = math.prod(sizes), None if missing else find_target(name)
    typed, given = config, math.prod(dataclasses.asdict(config.mesh).values())
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
        "chosen": changes(typed, config),
        "asked": asked,
        "nearest": None,
    }
    refused = [asked]
    for variant, counted in fitting(config, teacher, chip, devices) if asked["fits"] == "no" else ():
        # What holds no less than what a compiler has refused is not tried.
        if len(refused) <= _MOST_COMPILED and counted < min(figures["counted_bytes"] for figures in refused):
            figures = _figures(variant, teacher, place)
            if figures["fits"] != "no":
                return record | {"nearest": figures | {"changes": changes(typed, variant)}}
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
    """Each program of the stages, counted and compiled, and all of their runs together."""
    runs, updates = programs_of(config), {}
    for program in _watched(tuple(runs), _mesh_name(dataclasses.asdict(config.mesh)), place.target):
        counted = count(program, config, teacher)
        figures: dict[str, Any] = {
            "runs": runs[program],
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

    def device_hours(of: str) -> float:
        """Of all runs."""
        seconds = sum(figures["runs"] * figures.get(of, 0.0) for figures in updates.values())
        return seconds * place.devices / 3600

    answers = [figures["fits"] for figures in updates.values()]
    return {
        "mesh": dataclasses.asdict(config.mesh),
        "remat": config.model.remat,
        "accumulate": {stage: getattr(config, stage).accumulate for stage in map(stage_of, runs)},
        "updates": updates,
        "counted_bytes": max(figures["counted_bytes"] for figures in updates.values()),
        "fits": next(answer for answer in ("no", "tightly", "yes") if answer in answers),
        "device_hours": device_hours("seconds"),
        "exchange_device_hours": device_hours("exchange_seconds"),
    }


def _watched(programs: Sequence[str], mesh: str, target: Target | None) -> Iterator[str]:
    """Each of them, with a progress bar that says what is done with it."""
    with progress("plan", len(programs), unit="program", counts_compiling=True) as bar:
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
    if record["chosen"]:
        lines.append(f"chosen by counting: {_flags(record['chosen'])}")
    lines += _lines(record["asked"])
    if record["asked"]["fits"] != "no":
        return "\n".join(lines)
    worst = max(record["asked"]["updates"].values(), key=lambda figures: figures["counted_bytes"])
    parts = sorted(worst["parts"].items(), key=lambda part: -part[1])[:_LARGEST]
    lines += ["does not fit; the largest parts:", *(f"  {size / 2**30:8.2f} GiB  {name}" for name, size in parts)]
    if record["nearest"] is None:
        return "\n".join([*lines, "no mesh of these chips, way to recompute or accumulation fits; take more chips"])
    return "\n".join([*lines, f"what fits: {_flags(record['nearest']['changes'])}", *_lines(record["nearest"])])


def _flags(fields: Mapping[str, Any]) -> str:
    return " ".join(f"--{name}={value}" for name, value in fields.items())


def _mesh_name(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {extent}" for axis, extent in mesh.items() if extent > 1) or "one device"


def _lines(figures: Mapping[str, Any]) -> Iterator[str]:
    parts = figures["accumulate"]
    same = len({*parts.values()}) == 1
    accumulate = next(iter(parts.values())) if same else ", ".join(f"{stage} {n}" for stage, n in parts.items())
    yield f"mesh {_mesh_name(figures['mesh'])}; remat {figures['remat']}, accumulate {accumulate}"
    width = max(len(program) for program in figures["updates"])
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
        work = f"{_digits(row['tflop'])} TFLOP, {_digits(row['seconds'])} s"
        yield f"  {program:{width}} fits: {row['fits']:8} {sizes}; {work}"
        if compiled and "peak_bytes" in compiled:
            yield from (f"{'':{width + 3}}{line}" for line in _compiled_lines(row))
    hours = f"{_digits(figures['device_hours'])} device-hours"
    if figures["exchange_device_hours"]:
        hours += f", and at least {_digits(figures['exchange_device_hours'])} of exchange where nothing hides it"
    runs = (_RUNS[program].format(row["runs"]) for program, row in figures["updates"].items())
    yield f"  {', '.join(runs)}: {hours}"


_RUNS = {
    "pretrain": "{} steps of pretraining",
    "trajectories": "{} files of trajectories",
    "initialize": "{} steps of initialisation",
    "critic": "{} updates of the critic",
    "student": "{} of the student",
}


def _digits(value: float) -> str:
    """With two significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _compiled_lines(row: Mapping[str, Any]) -> Iterator[str]:
    """What a compiler says of a program that fits."""
    compiled = row["compiled"]
    sizes = {"arguments": "argument", "results that take no argument's place": None, "temporaries": "temp"}
    fresh = compiled["output_bytes"] - compiled["alias_bytes"]
    held = {title: compiled[f"{name}_bytes"] if name else fresh for title, name in sizes.items()}
    held["other networks beside it"] = compiled["resident_bytes"]
    yield "GiB: " + ", ".join(f"{title} {size / 2**30:.2f}" for title, size in held.items() if size >= 2**20)
    received = {f"{row['kind']} along {row['axes']}": row["received_bytes"] for row in compiled["collectives"]}
    largest = sorted(received.items(), key=lambda item: -item[1])[:_LARGEST]
    if largest:
        each = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in largest if size >= 1e7)
        yield f"exchange at least {row['exchange_seconds']:.2f} s, GB received: {each}"
    yield f"compiled in {compiled['compile_seconds']:.0f} s"
