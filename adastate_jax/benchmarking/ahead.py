"""Compiles programs for chips that are not here, and says what they would hold, move, exchange and compute there."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from adastate_jax.benchmarking.program import Program, read_program, received_bytes
from adastate_jax.benchmarking.targets import Target, answering_for, find_target
from adastate_jax.benchmarking.workloads import Workload, device_bytes, make_workload, mesh_over
from adastate_jax.config.run import Config
from adastate_jax.console import progress
from adastate_jax.errors import UserError, reason
from adastate_jax.fields import to_dict
from adastate_jax.files import whole_file
from adastate_jax.models.dit import DiTConfig

_LARGE_COPY = 2**24  # bytes of a result from which on a kernel that only moves data is worth a line
_MOST_COPIES = 8

# Without a GPU to try them on, XLA finds no tile sizes for its Triton products: cuBLAS serves, as it mostly would.
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}, "cpu": {}}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What a compiler made of a program.

    Attributes:
        text: of the program, empty where it does not fit.
        memory: bytes per device by the compiler's names, empty where it does not fit.
        failure: the compiler's words where it does not fit.
        seconds: that it took.
    """

    text: str
    memory: Mapping[str, int]
    failure: str
    seconds: float


def run(
    config: Config, teacher: DiTConfig, names: Sequence[str], programs: Sequence[str], cache: Path
) -> dict[str, Any]:
    """Compiles programs for targets; returns what is written to the file.

    Args:
        teacher: sizes of distillation's teacher; critic and student have those of `config.model`.
        names: of targets, see `find_target`.
        programs: some of `sections.PROGRAMS`; `tiny` and `wan` are left out where the configuration has neither.
        cache: folder of what was compiled before.

    Raises:
        UserError: a target is none, or what compiles for it is not installed; all are asked before any is compiled.
    """
    targets = [find_target(name) for name in names]
    if config.decoder == "patch":
        # Of no others, `make_workload` says why.
        programs = [program for program in programs if program not in ("wan", "tiny")] or programs
    rows, skipped = [], []
    with progress("compile", len(targets) * len(programs), unit="program", counts_compiling=True) as bar:
        for target in targets:
            for program in programs:
                bar.set_description(f"compile: {program} for {target.name}")
                try:
                    mesh = mesh_over(config, target, program)
                    rows.append(describe(make_workload(program, config, teacher, mesh), target, cache))
                except UserError as error:  # of one program on one target: the others have their say
                    skipped.append({"target": target.name, "program": program, "reason": str(error)})
                bar.update(1)
    if not rows and skipped:
        raise UserError(skipped[0]["reason"])
    return {"programs": rows, "skipped": skipped, "config": to_dict(config), "teacher": to_dict(teacher)}


def describe(workload: Workload, target: Target, cache: Path | None) -> dict[str, Any]:
    """Compiles a program, and counts what it does. All bytes and runs are of one device."""
    compiled = compile_for(workload, target, cache)
    devices, chip = workload.mesh.size, target.chip
    floor = workload.flops.total / devices / chip.flops
    record: dict[str, Any] = {
        "target": target.name,
        "chip": chip.name,
        "program": workload.name,
        "mesh": {axis: extent for axis, extent in workload.mesh.shape.items() if extent > 1},
        "compiler": _compiler(target),
        "compile_seconds": compiled.seconds,
        "limit_bytes": int(chip.memory),
        "argument_bytes": device_bytes(workload.arguments),
        "donated_bytes": workload.donated,
        "resident_bytes": workload.resident,
        "tflop": workload.flops.total / 1e12,
        "attention_tflop": workload.flops.attention / 1e12,
        "data_sheet_ms": 1e3 * floor,
        "attention_data_sheet_ms": 1e3 * workload.flops.attention / devices / chip.flops,
    }
    if compiled.failure:
        return record | {"fits": "no", "failure": compiled.failure}
    memory = compiled.memory
    bound = memory["argument"] + memory["output"] - memory["alias"] + memory["temp"]
    needed = [workload.resident + size for size in (memory["peak"], bound)]
    fits = "yes" if max(needed) <= chip.memory else "tightly" if min(needed) <= chip.memory else "no"
    record |= {"fits": fits, "bound_bytes": bound, **{f"{name}_bytes": size for name, size in memory.items()}}
    return record | _contents(read_program(compiled.text, workload.unknown_turns), workload, chip.clock)


def _contents(program: Program, workload: Workload, clock: float | None) -> dict[str, Any]:
    """What the text of a program says."""
    cycles = program.cycles()
    return {
        "kernel_bytes": program.kernel_bytes(),
        "attention": program.attention(),
        "products": program.products(),
        "custom_kernels": program.custom_kernels(),
        "collectives": [
            dataclasses.asdict(row) | {"received_bytes": received_bytes(row, workload.mesh)}
            for row in program.collectives(workload.mesh)
        ],
        "copies": [
            {
                "operation": copy.operation,
                "shape": re.sub(r"\{.*?\}", "", copy.shape),
                "runs": runs,
                "bytes": copy.bytes,
            }
            for copy, runs in program.copies(_LARGE_COPY)[:_MOST_COPIES]
        ],
        "estimated_cycles": cycles,
        # Kernels that the compiler did not write, attention among them, and collectives have no estimate.
        "estimated_ms": 1e3 * cycles / clock if cycles and clock else None,
    }


def _compiler(target: Target) -> str:
    return f"jax {jax.__version__}, {' '.join(target.devices[0].client.platform_version.split())}"


def compile_for(workload: Workload, target: Target, cache: Path | None) -> Compilation:
    """Lowers a program and compiles it, unless `cache` has what the same compiler made of the same program.

    What does not fit is a result, too: the compiler says by how much.
    """
    platform = target.devices[0].platform
    with answering_for(target), jax.sharding.use_abstract_mesh(workload.mesh.abstract_mesh):
        lowered = workload.function.lower(*workload.arguments)
    key = hashlib.sha256()
    for part in (_compiler(target), target.name, str(_OPTIONS[platform]), without_addresses(lowered.as_text())):
        key.update(part.encode())
    stored = cache and cache / f"{workload.name}-{target.name.replace(':', '-')}-{key.hexdigest()[:24]}.json.gz"
    if stored and (kept := _kept(stored)):
        return kept
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS[platform])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result = Compilation("", {}, _why(str(error)), time.perf_counter() - start)
    else:
        seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
        sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")} | {
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.peak_memory_in_bytes,
        }
        result = Compilation(compiled.as_text(), sizes, "", seconds)
    if stored:
        try:
            stored.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(stored) as path:
                path.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(result)).encode(), 6))
        except OSError as error:  # it took minutes, and is an answer all the same
            print(f"note: {stored.parent}: what was compiled is not kept ({reason(error)})", file=sys.stderr)
    return result


def _kept(stored: Path) -> Compilation | None:
    """What was compiled before; None where there is nothing, or it is damaged or another version's."""
    try:
        return Compilation(**json.loads(gzip.decompress(stored.read_bytes())))
    except (OSError, EOFError, zlib.error, ValueError, TypeError):
        return None


def without_addresses(text: str) -> str:
    """A lowered program without what differs between processes: addresses of the functions that split cuDNN calls."""
    return re.sub(r'(@CustomSPMDPartitioning\([^\n]*?backend_config = ")\d+', r"\1", text)


def _why(message: str) -> str:
    """What a compiler says of a program that does not fit: how much it would take, and its largest arrays."""
    used = re.search(r"Used [\d.]+\w? of [\d.]+\w? \w+\.(?: Exceeded \w+ capacity by [\d.]+\w?\.)?", message)
    largest = re.findall(r"Size: ([\d.]+\w)\s.*?Shape: ([a-z0-9]+\[[\d,]*\])", message, re.DOTALL)[:3]
    words = used[0] if used else message.strip().splitlines()[0][:200]
    return " ".join(
        [words, *(["Largest:", ", ".join(f"{size} {shape}" for size, shape in largest)] if largest else [])]
    )


def cache_folder() -> Path:
    """Where programs that were compiled are kept: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "adastate_jax" / "compiled"


# --- for people -------------------------------------------------------------------------------------------------------


def table(record: Mapping[str, Any]) -> str:
    """A line per program, and below it what its attention, products, collectives and copies are."""
    lines = [
        f"{'target':12}{'program':9}{'fits':9}{'peak':>7}{'bound':>8}{'beside':>8}{'of':>8}{'aliased':>9}"
        f"{'TFLOP':>9}{'moved GB':>10}{'est. ms':>9}{'sheet ms':>10}{'compiled s':>12}"
    ]
    for row in record["programs"]:
        lines += [_line(row), *(f"{'':12}{line}" for line in _details(row))]
    lines += [f"{row['target']:12}{row['program']:9}not compiled: {row['reason']}" for row in record["skipped"]]
    return "\n".join(
        [
            *lines,
            "",
            "Per device, GiB but for what kernels move, GB. bound: arguments + outputs - aliased + temporaries.",
            "beside: what else lies there. est. ms: the compiler's estimate without attention kernels and collectives,",
            "good for comparing alone. sheet ms: all counted operations at the data sheet's rate.",
        ]
    )


def _line(row: Mapping[str, Any]) -> str:
    def gib(name: str) -> str:
        return f"{row[f'{name}_bytes'] / 2**30:.2f}" if f"{name}_bytes" in row else "-"

    moved = f"{row['kernel_bytes'] / 1e9:.1f}" if "kernel_bytes" in row else "-"
    estimate = f"{row['estimated_ms']:.0f}" if row.get("estimated_ms") else "-"
    return (
        f"{row['target']:12}{row['program']:9}{row['fits']:9}{gib('peak'):>7}{gib('bound'):>8}{gib('resident'):>8}"
        f"{gib('limit'):>8}{gib('alias'):>9}{_digits(row['tflop']):>9}{moved:>10}{estimate:>9}{_digits(row['data_sheet_ms']):>10}"
        f"{row['compile_seconds']:12.1f}"
    )


def _digits(value: float) -> str:
    """With four significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _details(row: Mapping[str, Any]) -> Iterator[str]:
    if row["mesh"]:
        yield "mesh " + ", ".join(f"{axis} {extent}" for axis, extent in row["mesh"].items())
    if "failure" in row:
        yield row["failure"]
        return
    for name in ("attention", "products"):
        if row[name]:
            yield f"{name} " + ", ".join(f"{kind} x {runs:g}" for kind, runs in row[name].items())
    for found in row["collectives"]:
        yield f"{found['kind']} along {found['axes']}: {found['bytes'] / 1e9:.3g} GB in {found['runs']:g} runs"
    for copy in row["copies"]:
        yield f"{copy['operation']} x {copy['runs']:g} of {copy['bytes'] / 1e6:.0f} MB {copy['shape']}"


_COMPARED = {
    "fits": None,
    "peak_bytes": 2**30,
    "bound_bytes": 2**30,
    "resident_bytes": 2**30,
    "alias_bytes": 2**30,
    "temp_bytes": 2**30,
    "tflop": 1,
    "kernel_bytes": 1e9,
    "estimated_ms": 1,
    "attention": None,
    "products": None,
    "compile_seconds": 1,
}


def comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What differs from an earlier run, a line per quantity of a program; copies and collectives by their sums."""

    def keyed(record: Mapping[str, Any]) -> dict[tuple, Mapping[str, Any]]:
        return {(row["target"], row["program"], *sorted(row["mesh"].items())): row for row in record["programs"]}

    old, new = keyed(before), keyed(after)
    lines = []
    for key, row in new.items():
        name = f"{row['target']} {row['program']}"
        if key not in old:
            lines.append(f"{name}: was not compiled before")
            continue
        changes = list(_changes(old[key], row))
        lines += [f"{name}: {change}" for change in changes] or [f"{name}: the same"]
    lines += [f"{key[0]} {key[1]}: is not compiled now" for key in old if key not in new]
    return "\n".join(lines)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name, unit in _COMPARED.items():
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        title = name.replace("_bytes", {2**30: " GiB", 1e9: " GB"}.get(unit, "")).replace("_", " ")
        if unit and before is not None and after is not None:
            if f"{before / unit:.4g}" != f"{after / unit:.4g}":
                share = f" ({100 * (after / before - 1):+.1f} %)" if before else ""
                yield f"{title} {before / unit:.4g} -> {after / unit:.4g}{share}"
        else:
            yield f"{title} {before} -> {after}"
    for name, weight in (("collectives", lambda row: row["bytes"]), ("copies", lambda row: row["bytes"] * row["runs"])):
        before, after = (sum(weight(row) for row in record.get(name, ())) / 1e9 for record in (old, new))
        if f"{before:.4g}" != f"{after:.4g}":
            yield f"{name} GB {before:.4g} -> {after:.4g}"
