"""The study's command."""

import argparse
from pathlib import Path

import studies.small_world
from studies.small_world import RESULTS, arms
from studies.small_world.measure import measure
from studies.small_world.report import report
from studies.small_world.train import train


def main() -> None:
    study, further = arms()
    parser = argparse.ArgumentParser(
        prog="python -m studies.small_world",
        description=studies.small_world.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("train", "measure", "report"))
    parser.add_argument("--folder", type=Path, default=Path("runs/small_world"), help="of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of rows, tables and figures")
    parser.add_argument("--arms", nargs="+", choices=study + further, metavar="ARM", help="default: those of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    if options.command == "train":
        options.folder.mkdir(parents=True, exist_ok=True)
        train(options.folder.resolve(), options.arms or study, options.seeds, options.jobs)
    elif options.command == "measure":
        measure(options.folder.resolve(), options.arms or study + further, options.seeds, options.jobs, options.results)
    else:
        report(options.results)


if __name__ == "__main__":
    main()
