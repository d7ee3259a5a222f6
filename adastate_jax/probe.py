"""The probe command: which cached frames a stream's attention goes to, as numbers and as a figure."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

from collections.abc import Sequence
from pathlib import Path

from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command, starting
from adastate_jax.errors import UserError
from adastate_jax.generation.shipped import find_model
from adastate_jax.interrupts import if_stopped
from adastate_jax.streaming.names import STREAM_NAMES

_EXAMPLE = """example:
  python -m adastate_jax.probe --checkpoint=tiny --prompt="a camera pans left over green hills with a red ball" \\
      --anchors static adaptive --past-frames 3 6 --chunks 5 20 --output=probe"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.probe",
        description="Measures which cached frames the frames being denoised attend to: per denoising step, chunk and "
        "layer, averaged over heads, and renormalised over the frames that are not the query's own.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR|tiny", help="as sample's")
    parser.add_argument("--prompt", action="append", required=True, help="what to show; may be given several times")
    parser.add_argument(
        "--anchors", nargs="+", choices=STREAM_NAMES, metavar="NAME", help="anchors (default: the model's own)"
    )
    parser.add_argument(
        "--past-frames", nargs="+", type=int, metavar="N", help="window sizes (default: the anchor's own)"
    )
    parser.add_argument(
        "--chunks", nargs="+", type=int, default=[5], metavar="K", help="numbers of the chunks to look at (default 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise of the first prompt (default 0)")
    output_argument(parser, "folder for probe.json and probe.png", default="probe", metavar="DIR")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes probe.json and probe.png."""
    options = _parser().parse_args(arguments)
    if min(options.chunks) < 0:
        raise UserError(f"--chunks {min(options.chunks)}: chunks are numbered from 0")
    if options.past_frames and min(options.past_frames) < 0:
        raise UserError(f"--past-frames {min(options.past_frames)}: must not be negative")
    if options.seed < 0:
        raise UserError(f"--seed={options.seed}: must not be negative")
    find_model(options.checkpoint)
    with claimed_output(options, folder=True) as output, if_stopped(f"{output} was not written"):
        starting()
        from adastate_jax.evaluation.attention_report import chosen_streams, probe_streams, write_report
        from adastate_jax.generation.loading import load

        model = load(options.checkpoint)
        streams = chosen_streams(model.config.stream, options.anchors, options.past_frames, options.chunks)
        with progress("probe", len(streams) * len(set(options.chunks)), unit="chunk", compiles=True) as bar:
            results = probe_streams(model, options.prompt, streams, options.chunks, options.seed, bar.update)
        try:
            write_report(output, results, options.prompt, options.seed)
        except OSError as error:
            raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None
    print(f"{output}/probe.png, {output}/probe.json")
    return 0


if __name__ == "__main__":
    run_command(main)
