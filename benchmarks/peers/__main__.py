"""Our networks beside PyTorch's: the same weights, inputs, dtype and cores, taking turns; ratios with their spread.

python -m benchmarks.peers --output=peers.json                 # requirements-dev.txt; about half an hour on two cores
python -m benchmarks.peers --sizes trial                       # narrow networks: shows only that all of it runs
python -m benchmarks.peers --dtype=bfloat16 --compile          # a GPU: PyTorch plain, and through torch.compile

Each side is a process of its own, so that neither's threads or memory are in the other's way; one computes while the
others wait for a message. The first two results are compared before anything is timed. A ratio is PyTorch's seconds
over ours in one turn: above 1, ours is faster. Beside it stands the same of the seconds that all of a side's threads
computed, and how much of the processor others took meanwhile: where that is more than a few percent, neither says much,
as PyTorch's threads wait for one another in turning, and ours in sleep.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from adastate_jax.files import write_text
from benchmarks.peers.cases import CASES
from benchmarks.peers.settings import SIZES, Setting
from benchmarks.peers.sides import Side

# Of the largest value. bfloat16 rounds at other places: what is compared then is that both are the same network.
TOLERANCE = {"float32": 5e-4, "bfloat16": 0.08}
_REST = 0.4  # seconds before a turn: threads of the side before it that still spin have gone to sleep


def _busy() -> float:
    """Seconds that all processors of this machine have worked since its start."""
    user, nice, system, _, _, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def _compare(results: dict[str, list[list[np.ndarray]]], tolerance: float) -> float:
    """The largest difference between ours and any other side, relative to the largest value."""
    worst = 0.0
    for name, theirs in results.items():
        for turn, arrays in enumerate(theirs):
            for ours, other in zip(results["ours"][turn], arrays, strict=True):
                if ours.shape != other.shape:
                    sys.exit(f"{name}: made {list(other.shape)}, ours {list(ours.shape)}")
                error = float(np.abs(ours - other).max() / np.abs(other).max())
                if not error <= tolerance:
                    sys.exit(f"{name}: differs from ours by {error:.2e} of the largest value (tolerance {tolerance:g})")
                worst = max(worst, error)
    return worst


def measure(case: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case at one size."""
    with tempfile.TemporaryDirectory(prefix="adastate-peers-") as folder:
        setting = Setting(Path(folder), size, options.dtype, options.device)
        plain = Side("pytorch", case, setting, options.cores)
        plain.hear()  # the weights are there
        sides = [Side("ours", case, setting, options.cores)]
        results = {"ours": [sides[0].hear(), sides[0].hear()]}
        plain.tell(True)
        sides.append(plain)
        results["pytorch"] = [plain.hear(), plain.hear()]
        if options.compile:
            compiled = Side("compiled", case, dataclasses.replace(setting, compiled=True), options.cores)
            compiled.hear()
            compiled.tell(True)
            results["compiled"] = [compiled.hear(), compiled.hear()]
            sides.append(compiled)
        error = _compare(results, TOLERANCE[options.dtype])
        taken = elapsed = own = 0.0
        for turn in range(options.turns):
            for side in sides if turn % 2 else sides[::-1]:
                time.sleep(_REST)
                before, start = _busy(), time.perf_counter()
                side.tell(True)
                seconds, processor = side.hear()
                side.seconds.append(seconds)
                side.processor.append(processor)
                taken, own, elapsed = taken + _busy() - before, own + processor, elapsed + time.perf_counter() - start
        for side in sides:
            side.end()
    seconds, computed = ({side.name: getattr(side, of) for side in sides} for of in ("seconds", "processor"))
    others = max(0.0, taken - own) / (elapsed * os.cpu_count())
    found = {"case": case, "size": size, "error": error, "others": others}
    found |= {"seconds": seconds, "processor": computed}
    if CASES[case].flops and size != "trial":
        found["flops"] = CASES[case].flops(size)
    return found


def ratios(found: dict[str, Any], name: str, of: str = "seconds") -> list[float]:
    """Of each turn, another side's seconds over ours: of the clock, or of the `processor`."""
    return [other / ours for ours, other in zip(found[of]["ours"], found[of][name], strict=True)]


def row(found: dict[str, Any]) -> str:
    """A case as a line of the table."""
    cells = [found["case"], found["size"]]
    cells += [f"{1000 * statistics.median(seconds):.1f}" for seconds in found["seconds"].values()]
    for name in list(found["seconds"])[1:]:
        every = ratios(found, name)
        cells.append(f"**{statistics.median(every):.2f}** ({min(every):.2f} … {max(every):.2f})")
        cells.append(f"{statistics.median(ratios(found, name, 'processor')):.2f}")
    rate = found.get("flops", 0) / statistics.median(found["seconds"]["ours"]) / 1e9
    cells.append(f"{rate:.0f}" if rate else "")
    return "| " + " | ".join([*cells, f"{found['error']:.0e}", f"{100 * found['others']:.0f} %"]) + " |"


def head(options: argparse.Namespace) -> str:
    """The table's first two lines."""
    others = ["PyTorch", *(["torch.compile"] if options.compile else [])]
    cells = ["case", "size", *(f"{name}, ms" for name in ("ours", *others))]
    cells += [f"ratio to {name} | computed" for name in others]
    cells += ["ours, GFLOP/s", "difference", "others' share"]
    first = "| " + " | ".join(cells) + " |"
    return f"{first}\n|" + "---|" * (first.count("|") - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES[1:]), help="default: all but trial")
    parser.add_argument("--turns", type=int, default=7, help="of each side; medians are of these (default 7)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="of the processor, for each")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="PyTorch's; ours is JAX's default")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--output", type=Path, help="JSON file with every number")
    options = parser.parse_args()
    if options.turns < 1 or options.cores < 1:
        parser.error("--turns and --cores must be at least 1")
    names = ("jax", "torch", "diffusers", "transformers")
    about = {
        "versions": {name: metadata.version(name) for name in names},
        "host": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
        **{name: getattr(options, name) for name in ("cores", "dtype", "device", "turns")},
    }
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()), f"on {about['host']}")
    print(f"{options.cores} cores, {options.dtype}, {options.turns} turns\n\n{head(options)}", flush=True)
    found = []
    for case in options.only:
        for size in options.sizes:
            found.append(measure(case, size, options))
            print(row(found[-1]), flush=True)
            if options.output:  # after every case: hours may be lost else
                write_text(options.output, json.dumps(about | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
