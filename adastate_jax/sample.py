"""The sample command: a prompt and a trained model in, an mp4 out, streamed to disk as chunks arrive."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from adastate_jax.errors import UserError, run_command
from adastate_jax.generate import load, stream
from adastate_jax.media import FPS, VideoWriter
from adastate_jax.streaming.anchors import ANCHORS
from adastate_jax.training.loop import progress

_EXAMPLE = """example:
  python -m adastate_jax.sample --checkpoint=runs/tiny --prompt="a camera pans left over green hills with a red ball" \\
      --seconds=5 --output=hills.mp4"""


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes the video."""
    parser = argparse.ArgumentParser(
        prog="python -m adastate_jax.sample",
        description="Streams a video of any length from a prompt into an mp4 file.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="a folder that train wrote")
    parser.add_argument("--prompt", required=True, help="what to show")
    parser.add_argument("--seconds", type=float, default=5.0, help=f"length at {FPS} frames per second (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--anchor", choices=tuple(ANCHORS), help="instead of the one that the model was trained with")
    parser.add_argument(
        "--output", type=Path, default=Path("out.mp4"), metavar="FILE", help="mp4 file (default out.mp4)"
    )
    options = parser.parse_args(arguments)
    if options.output.suffix != ".mp4":
        raise UserError(f"--output={options.output}: must end in .mp4")
    if not math.isfinite(options.seconds) or options.seconds <= 0:
        raise UserError(f"--seconds={options.seconds}: must be positive")
    if options.seed < 0:
        raise UserError(f"--seed={options.seed}: must not be negative")

    model = load(options.checkpoint)
    try:
        with (
            VideoWriter(options.output) as writer,
            progress("sample (compiling)", math.ceil(options.seconds * FPS), unit="frame") as bar,
        ):
            for frames in stream(model, options.prompt, options.seconds, options.seed, options.anchor):
                writer.write(frames)
                bar.set_description("sample")
                bar.update(len(frames))
    except OSError as error:
        raise UserError(f"--output={options.output}: cannot be written ({error.strerror or error})") from None
    print(f"{options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
