"""The study's command."""

from collections.abc import Sequence
from pathlib import Path

import studies.changing_world
from adastate_jax.console import CommandParser, run_command
from adastate_jax.errors import UserError
from studies.changing_world import RESULTS, SCREENING_SEED, STARTS
from studies.changing_world.measure import measure
from studies.changing_world.plan import SCREENING
from studies.changing_world.report import report
from studies.changing_world.train import decide, final_runs, is_screened, train, train_runs


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, and trains, measures or reports."""
    parser = CommandParser(prog="python -m studies.changing_world", description=studies.changing_world.__doc__)
    parser.add_argument("command", choices=("train", "measure", "report"))
    parser.add_argument("--folder", type=Path, default=Path("runs/changing_world"), help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of rows, tables and figures")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="to train, with --seeds; else all of the plan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[SCREENING_SEED], help="to train --arms with")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs}: needs to be 1 or more")
    folder = options.folder.resolve()
    if options.command == "report":
        report(options.results)
    elif options.command == "measure":
        starts = [(start, 0) for start in STARTS]
        final = [*starts, *final_runs(decide(folder, options.jobs))] if is_screened(folder) else []
        screening = [*starts, *((arm, SCREENING_SEED) for arm in SCREENING)]
        measure(folder, options.jobs, options.results, screening, final)
    elif options.arms:
        train_runs(folder, [(arm, seed) for seed in options.seeds for arm in options.arms], options.jobs)
    else:
        train(folder, options.jobs)


if __name__ == "__main__":
    run_command(main)
