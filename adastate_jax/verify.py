"""Compares this package's numbers with fixtures from the official code: `python -m adastate_jax.verify FOLDER`.

A fixture file is recognised by its name's stem and every case in it goes through the package's own code. What cannot be
checked is printed as such and not counted as passed.
"""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import contextlib
import dataclasses
import importlib
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adastate_jax.console import CommandParser, run_command, starting
from adastate_jax.errors import UserError
from adastate_jax.files import what_lies_near

if TYPE_CHECKING:
    from adastate_jax.verification.record import Check, Fixture, NotChecked

# Backends of models/attention.py.
ATTENTION = ("auto", "xla", "cudnn", "splash")
# Of models/quantized.py.
WEIGHTS = ("int8", "float8")

# Which function of the room `verification` checks a fixture of this stem: `module.function`.
FIXTURES = {
    "scheduler": "losses.scheduler",
    "dmd": "losses.dmd",
    "train_step": "training.train_step",
    "wan_dit": "networks.wan_dit",
    "wan_dit_nonorm": "networks.wan_dit",
    "wan_dit_diffusers": "networks.wan_dit_diffusers",
    "block_relative_rope": "streams.block_relative_rope",
    "adastate_rollout": "streams.adastate_rollout",
    "causal_rollout_chunk1": "streams.causal_rollout",
    "causal_rollout_chunk3": "streams.causal_rollout",
    "anchor_longlive": "anchors.longlive",
    "anchor_longlive_recache": "anchors.longlive_recache",
    "anchor_infinity_rope": "anchors.infinity_rope",
    "anchor_reward_forcing": "anchors.reward_forcing",
    "anchor_memrope": "anchors.memrope",
    "anchor_rolling_sink": "anchors.rolling_sink",
    "anchor_rolling_forcing": "forcing.rolling_forcing",
    "anchor_causal_forcing": "forcing.causal_forcing",
    "anchor_causvid": "forcing.causvid",
    "umt5": "networks.umt5",
    "wan_vae_encode": "videos.wan_vae_encode",
    "wan_vae_decode": "videos.wan_vae_decode",
    "taehv": "videos.taehv",
    "manifest_wan_t2v_1.3B": "names.manifest_wan",
    "manifest_wan_t2v_14B": "names.manifest_wan",
    "manifest_self_forcing_generator": "names.manifest_self_forcing",
    "manifest_umt5_xxl": "names.manifest_umt5",
    "manifest_wan_vae": "names.manifest_wan_vae",
    "manifest_taew2_1": "names.manifest_taew2_1",
}

# Numbers of diffusers and transformers; tests/peers/write_fixtures.py wrote them.
SHIPPED = Path(__file__).parent / "bundled" / "fixtures"


def _epilog() -> str:
    from adastate_jax.verification import record

    eight_bits = record.EIGHT_BIT_TOLERANCES
    return f"""\
examples:
  python -m adastate_jax.verify
  python -m adastate_jax.verify golden --only wan_dit adastate_rollout

  file              case                                max_abs_error  tolerance  result
  wan_dit           a.flow                                   1.07e-05   5.00e-05  ok
  ...
  adastate_rollout  adaptive.content                         8.11e-06   5.00e-05  ok
  ...
  21 checks passed, 0 failed, 0 not checked (float32, xla attention, cpu, 20 s)

tolerances, on the largest absolute error of a tensor:
  networks in float32    {record.NETWORK_TOLERANCE:g}
  in bfloat16            {record.BFLOAT16_TOLERANCE:g} of the largest magnitude expected in the tensor;
                         text encoder and video autoencoders {record.BFLOAT16_CODEC_TOLERANCE:g} of it
  weights in eight bits  int8 {eight_bits["int8"]:g}, float8 {eight_bits["float8"]:g} of it; the transformer's alone
  schedules and losses   {record.ARITHMETIC_TOLERANCE:g} of the largest magnitude expected; they run in float32 always
  training updates       as adastate_jax/verification/training.py states them; in float32 only
  positions and names    0
The tolerance column shows the absolute number that results.

Exits with 0 if no check failed, 1 if one did, 2 if the folder or a file cannot be read.
"""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a check: its largest error beside the error allowed there, and what is wrong, if anything is."""

    error: float
    tolerance: float
    fault: str | None = None


def judge(check: "Check") -> Verdict:
    """Compares; of several tensors, the one that uses most of its tolerance speaks for all."""
    verdicts = [_judge_pair(check, *pair) for pair in check.pairs]
    failed = [verdict for verdict in verdicts if verdict.fault is not None]
    return failed[0] if failed else max(verdicts, key=lambda verdict: verdict.error - verdict.tolerance)


def _judge_pair(check: "Check", name: str, expected: np.ndarray | None, actual) -> Verdict:
    if expected is None:
        return Verdict(np.nan, check.tolerance, f"the file has no {name}")
    expected, actual = (np.asarray(array).astype(np.float64) for array in (expected, actual))
    tolerance = check.tolerance * (np.abs(expected).max(initial=0.0) if check.relative else 1.0)
    if expected.shape != actual.shape:
        return Verdict(np.nan, tolerance, f"{name} has shape {list(expected.shape)}, ours {list(actual.shape)}")
    error = np.abs(actual - expected).max(initial=0.0)
    if np.isfinite(error) and error <= tolerance:
        return Verdict(error, tolerance)
    fault = check.note or f"in {name}"
    if not np.isfinite(expected).all():
        fault = f"NaN or infinity in the file's {name}"
    elif not np.isfinite(actual).all():
        fault = f"NaN or infinity in our {name}"
    return Verdict(error, tolerance, fault)


class Report:
    """Prints the table line by line, and counts."""

    def __init__(self, stems: Sequence[str]):
        self.counts: Counter[str] = Counter()
        self._width = max(map(len, [*stems, "file"]))
        self._line("file", "case", "max_abs_error", "tolerance", "result")

    def _line(self, stem: str, case: str, error: str, tolerance: str, result: str) -> None:
        self._clear()
        print(f"{stem:{self._width}}  {case:34}  {error:>13}  {tolerance:>9}  {result}", flush=True)

    def working_on(self, stem: str) -> None:
        """Says on a terminal what is being computed, until the next line."""
        if sys.stderr.isatty():
            print(f"\r\033[K{stem} …", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def check(self, stem: str, check: "Check") -> None:
        """The line of a check."""
        verdict = judge(check)
        if verdict.fault is not None:
            self.fail(stem, check.case, verdict.fault, verdict)
            return
        self.counts["passed"] += 1
        self._line(stem, check.case, f"{verdict.error:.2e}", f"{verdict.tolerance:.2e}", "ok")

    def fail(self, stem: str, case: str, fault: str, verdict: Verdict | None = None) -> None:
        """The line of a failure; without a verdict, nothing could be compared."""
        self.counts["failed"] += 1
        error, tolerance = ("-", "-") if verdict is None else (f"{verdict.error:.2e}", f"{verdict.tolerance:.2e}")
        self._line(stem, case, error, tolerance, f"FAIL ({fault})")

    def not_checked(self, stem: str, record: "NotChecked") -> None:
        """The line of something that cannot be checked."""
        self.counts["not checked"] += 1
        self._line(stem, record.case, "-", "-", f"not checked ({record.reason})")


def run_fixture(fixture: "Fixture", report: Report) -> None:
    """Runs one fixture's checks. Whatever goes wrong in them fails this file and lets the others run."""
    from adastate_jax.verification.record import BrokenFixtureError, NotChecked

    stem = fixture.path.stem
    module, function = FIXTURES[stem].split(".")
    check = getattr(importlib.import_module(f"adastate_jax.verification.{module}"), function)
    covered: list[str] = []
    report.working_on(stem)
    try:
        for record in check(fixture):
            if isinstance(record, NotChecked):
                covered += record.covers
                report.not_checked(stem, record)
            else:
                report.check(stem, record)
            report.working_on(stem)
    except (BrokenFixtureError, UserError) as error:
        report.fail(stem, "the rest of the file", str(error))
    except Exception as error:
        traceback.print_exc()
        report.fail(stem, "the rest of the file", f"{type(error).__name__}, see above")
    else:
        for name in sorted(set(fixture) - fixture.asked):
            if name.startswith("out.") and not name.startswith(tuple(covered)):
                report.fail(stem, name.removeprefix("out."), "no check looks at this tensor")


def find_files(folder: Path, only: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Fixture files of a folder in the order of `FIXTURES`, and files that look like one but are unknown.

    Raises:
        UserError: there is no such folder, it holds no fixture, or a fixture that was asked for is not there.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{what_lies_near(folder) or '; name one of official numbers'}")
    files = {path.stem: path for pattern in ("*.safetensors", "manifest_*.json") for path in folder.glob(pattern)}
    if not files:
        raise UserError(f"{folder}: holds no fixture, neither .safetensors nor manifest_*.json")
    for stem in only:
        if stem not in FIXTURES:
            raise UserError(f"--only {stem}: unknown fixture, known are {', '.join(FIXTURES)}")
        if stem not in files:
            raise UserError(f"--only {stem}: not in {folder}")
    known = [files[stem] for stem in FIXTURES if stem in files and (not only or stem in only)]
    unknown = [] if only else sorted(path for stem, path in files.items() if stem not in FIXTURES)
    return known, unknown


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(
        prog="python -m adastate_jax.verify",
        description="Compares this package's numbers, on this device, with those that ship with it, or a folder's.",
        epilog=_epilog,
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=SHIPPED,
        metavar="FOLDER",
        help="folder of fixture files (default: those that ship with this package, of networks of diffusers and "
        "transformers with random weights)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STEM", help="run these fixtures (file names without ending)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype of the networks"
    )
    parser.add_argument("--attention", choices=ATTENTION, default="xla", help="attention backend")
    parser.add_argument("--weights", choices=WEIGHTS, default="", help="puts the transformer's weights in eight bits")
    arguments = parser.parse_args(argv)
    needs = "--attention=cudnn needs --dtype=bfloat16 and a GPU"
    if arguments.attention == "cudnn" and arguments.dtype != "bfloat16":
        raise UserError(needs)
    known, unknown = find_files(arguments.folder, arguments.only)
    starting()
    import jax

    from adastate_jax.verification.record import Fixture, Settings

    if arguments.attention == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(needs)
    settings = Settings(arguments.dtype, arguments.attention, arguments.weights)
    fixtures = [Fixture(path, settings) for path in known]  # all before the first runs: a file cut short shows at once
    start = time.monotonic()
    report = Report([path.stem for path in known + unknown])
    for path in unknown:
        report.fail(path.stem, "everything", "unknown fixture")
    precise = jax.default_matmul_precision("float32") if settings.dtype == "float32" else contextlib.nullcontext()
    with precise:
        for fixture in fixtures:
            run_fixture(fixture, report)
    counts = report.counts
    numerics = [settings.dtype, *([f"{settings.weights} weights"] if settings.weights else [])]
    print(
        f"{counts['passed']} checks passed, {counts['failed']} failed, {counts['not checked']} not checked "
        f"({', '.join(numerics)}, {settings.attention} attention, {jax.devices()[0].device_kind}, "
        f"{time.monotonic() - start:.0f} s)"
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    run_command(main)
