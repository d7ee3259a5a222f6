"""The bench command: how fast a configuration runs on this device, against what the device can do."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from adastate_jax.benchmarking.sections import PROGRAMS, SECTIONS, STREAMING
from adastate_jax.console import (
    CommandParser,
    claimed_output,
    output_argument,
    refuse_configuration,
    run_command,
    starting,
)
from adastate_jax.errors import UserError
from adastate_jax.files import what_lies_near, write_text
from adastate_jax.interrupts import if_unwritten
from adastate_jax.texts import parse_json, read_text

_CONFIG = "configs/wan_1_3b.py"
_REPEATS = 20

_EXAMPLE = """example:
  python -m adastate_jax.bench --config=configs/wan_1_3b.py --random-weights --output=bench.json
  python -m adastate_jax.bench --config=configs/wan_1_3b.py --config.model.num_layers=1 --only pass chunk
  python -m adastate_jax.bench --compile-for v5e:1 h100:1 --programs stream --output=compiled.json"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.bench",
        description="Times a configuration on this device, or compiles it for chips that are not here: prints a "
        "table, and writes all numbers as JSON.",
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"a file under configs/ (with --compile-for by default {_CONFIG})"
    )
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="unused", help="overrides a field of the configuration")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="changes nothing: weights are drawn at random with and without it, as times do not depend on them",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)} (default: all but training, whose programs take minutes to compile)",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help=f"repetitions behind each median (default {_REPEATS})")
    output_argument(parser, "JSON file", default="bench.json")
    ahead = parser.add_argument_group("compiling for chips that are not here")
    ahead.add_argument(
        "--compile-for",
        nargs="+",
        metavar="CHIP:COUNT",
        help="for example v5e:1, v6e:2x2, v5p:2x2x1 or h100:8; nothing is run, no accelerator need be here",
    )
    ahead.add_argument(
        "--programs",
        nargs="+",
        choices=PROGRAMS,
        metavar="PROGRAM",
        help=f"some of {', '.join(PROGRAMS)} (default: all; student, with its teacher, takes many minutes)",
    )
    ahead.add_argument(
        "--teacher",
        metavar="FILE",
        help="configuration whose model is distillation's teacher (default: Wan2.1 14B's sizes)",
    )
    ahead.add_argument("--against", type=Path, metavar="FILE", help="JSON of an earlier run, to compare with")
    parser.add_argument(
        "--until-ready", action="store_true", help="only gets a stream ready, and ends; how section ready is timed"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, measures, prints the table and writes the file."""
    options, rest = _parser().parse_known_args(arguments)
    if options.compile_for:
        return _compile(options, rest)
    for name in ("programs", "teacher", "against"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: goes with --compile-for")
    if options.config is None:
        raise UserError("--config is not set; name a file, for example --config=configs/tiny.py")
    repeats = _REPEATS if options.repeats is None else options.repeats
    if repeats < 1:
        raise UserError(f"--repeats={repeats}: must be at least 1")
    refuse_configuration(options.config, rest)
    if options.until_ready:
        return _get_ready(options.config, rest)
    with claimed_output(options) as output, if_unwritten(output):
        starting()
        from adastate_jax.benchmarking.report import run, table
        from adastate_jax.config.files import parse_config

        arguments = [f"--config={options.config}", *rest]
        record = run(parse_config(arguments), options.only or STREAMING, repeats, arguments)
        output = _write(output, record, options.overwrite)
    print(table(record))
    print(f"\n{output}")
    return 0


def _write(output: Path, record: dict, replace: bool) -> Path:
    """Writes the record; returns where."""
    try:
        return write_text(output, json.dumps(record, indent=2) + "\n", replace=replace)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None


def _earlier(path: Path) -> dict:
    """What an earlier run wrote."""
    record = parse_json(read_text(path), str(path))
    rows = record.get("programs") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UserError(f"--against={path}: not what bench --compile-for wrote")
    return record


def _is_row(row: object) -> bool:
    """Whether lines of a comparison can be made of it."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("target", "program")):
        return False
    if not isinstance(mesh := row.get("mesh"), dict):
        return False
    counted = [name for name in row if name.endswith(("_bytes", "_ms", "_seconds", "tflop")) and row[name] is not None]
    numbers = [*mesh.values(), *(row[name] for name in counted)]
    for name in ("collectives", "copies"):
        moved = row.get(name, [])
        if not isinstance(moved, list) or not all(isinstance(each, dict) for each in moved):
            return False
        numbers += [each.get(part) for each in moved for part in ("bytes", "runs")]
    return all(isinstance(number, int | float) and abs(number) < 1e30 for number in numbers)


def _compile(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Compiles for the chips that were named, prints the table and writes the file."""
    config = _CONFIG if options.config is None else options.config
    refuse_configuration(config, rest)
    if options.teacher is not None and not Path(options.teacher.partition(":")[0]).is_file():
        raise UserError(f"--teacher={options.teacher}: no such file{what_lies_near(options.teacher.partition(':')[0])}")
    if options.default_output:
        options.default_output = Path("compiled.json")
    for name in ("only", "repeats"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: does not go with --compile-for, which times nothing")
    if options.until_ready:
        raise UserError("--until-ready: does not go with --compile-for, which runs nothing")
    before = None if options.against is None else _earlier(options.against)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; an accelerator that is here is left alone
    with claimed_output(options) as output, if_unwritten(output):
        starting()
        from adastate_jax.benchmarking import ahead
        from adastate_jax.benchmarking.workloads import wan_14b
        from adastate_jax.config.files import parse_config

        parsed = parse_config([f"--config={config}", *rest])
        teacher = wan_14b(parsed.model)
        if options.teacher:
            try:
                teacher = parse_config([f"--config={options.teacher}"]).model
            except UserError as error:
                raise UserError(f"--teacher={options.teacher}: {str(error).partition(': ')[2] or error}") from None
        targets = list(dict.fromkeys(options.compile_for))
        programs = list(dict.fromkeys(options.programs or PROGRAMS))
        record = ahead.run(parsed, teacher, targets, programs, ahead.cache_folder())
        output = _write(output, record, options.overwrite)
    print(ahead.table(record))
    if before:
        print(f"\nagainst {options.against}:\n{ahead.comparison(before, record)}")
    print(f"\n{output}")
    return 0


def _get_ready(config: str, rest: Sequence[str]) -> int:
    """Gets a stream ready, and says how many mebibytes that took at most."""
    import jax

    from adastate_jax.benchmarking import machine, measure
    from adastate_jax.benchmarking.report import mesh_of
    from adastate_jax.config.files import parse_config

    config = parse_config([f"--config={config}", *rest])
    mesh = mesh_of(config)
    with jax.set_mesh(mesh):
        measure.until_ready(measure.prepare(config, mesh))
    print(machine.peak_mebibytes(), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
