"""The bench command: how fast a configuration runs on this device, against what the device can do."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import json
from collections.abc import Sequence

from adastate_jax.benchmarking.sections import SECTIONS, STREAMING
from adastate_jax.console import (
    CommandParser,
    claimed_output,
    output_argument,
    refuse_configuration,
    run_command,
    starting,
)
from adastate_jax.errors import UserError
from adastate_jax.files import write_text
from adastate_jax.interrupts import if_unwritten

_EXAMPLE = """example:
  python -m adastate_jax.bench --config=configs/wan_1_3b.py --random-weights --output=bench.json
  python -m adastate_jax.bench --config=configs/wan_1_3b.py --config.model.num_layers=1 --only pass chunk"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.bench",
        description="Times a configuration on this device: prints a table, and writes all numbers as JSON.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a file under configs/")
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
        default=STREAMING,
        metavar="SECTION",
        help=f"some of {', '.join(SECTIONS)} (default: all but training, whose programs take minutes to compile)",
    )
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="repetitions behind each median (default 20)"
    )
    output_argument(parser, "JSON file", default="bench.json")
    parser.add_argument(
        "--until-ready", action="store_true", help="only gets a stream ready, and ends; how section ready is timed"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, measures, prints the table and writes the file."""
    options, rest = _parser().parse_known_args(arguments)
    if options.repeats < 1:
        raise UserError(f"--repeats={options.repeats}: must be at least 1")
    refuse_configuration(options.config, rest)
    if options.until_ready:
        return _get_ready(options.config, rest)
    with claimed_output(options) as output, if_unwritten(output):
        starting()
        from adastate_jax.benchmarking.report import run, table
        from adastate_jax.config.files import parse_config

        arguments = [f"--config={options.config}", *rest]
        record = run(parse_config(arguments), options.only, options.repeats, arguments)
        try:
            output = write_text(output, json.dumps(record, indent=2) + "\n", replace=options.overwrite)
        except OSError as error:
            raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None
    print(table(record))
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
