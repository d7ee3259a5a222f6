"""The study's command."""

from collections.abc import Sequence
from pathlib import Path

import studies.small_world
from adastate_jax.console import CommandParser, run_command
from adastate_jax.errors import UserError
from studies.small_world import RESULTS, arms
from studies.small_world.measure import measure
from studies.small_world.report import report
from studies.small_world.train import train


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, and trains, measures or reports."""
    study, further = arms()
    parser = CommandParser(prog="python -m studies.small_world", description=studies.small_world.__doc__)
    parser.add_argument("command", choices=("train", "measure", "report"))
    parser.add_argument("--folder", type=Path, default=Path("runs/small_world"), help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of rows, tables and figures")
    parser.add_argument("--arms", nargs="+", choices=study + further, metavar="ARM", help="to train; else the study's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="to train with")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs}: needs to be 1 or more")
    if options.command == "train":
        train(options.folder.resolve(), options.arms or study, options.seeds, options.jobs)
    elif options.command == "measure":
        measure(options.folder.resolve(), options.jobs, options.results)
    else:
        report(options.results)


if __name__ == "__main__":
    run_command(main)
