"""The bundle command: what a finished run leaves to generate with, in one small file."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import sys
from collections.abc import Sequence
from pathlib import Path

from adastate_jax.console import CommandParser, claimed_output, output_argument, run_command, starting
from adastate_jax.errors import UserError
from adastate_jax.files import what_lies_near
from adastate_jax.interrupts import if_unwritten

_EXAMPLE = """example:
  python -m adastate_jax.bundle --run=runs/tiny --output=tiny.safetensors
  python -m adastate_jax.sample --checkpoint=tiny.safetensors --prompt="a camera pans left over green hills"
"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.bundle",
        description="Packs what a finished training run leaves to generate with (the student, the codec and "
        "the text encoder, in float16, and the configuration) into one file that --checkpoint and load take.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a folder that train wrote")
    output_argument(parser, ".safetensors file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes the file."""
    options = _parser().parse_args(arguments)
    run = options.run
    if options.output.suffix != ".safetensors":
        raise UserError(f"--output={options.output}: must end in .safetensors")
    if not run.is_dir():
        raise UserError(f"--run={run}: no such folder{what_lies_near(run) or '; name one that train wrote'}")
    with claimed_output(options) as output, if_unwritten(output):
        starting()
        from adastate_jax.checkpoint import latest_step
        from adastate_jax.config.files import load_config
        from adastate_jax.generation.trained import load_run, write_bundle
        from adastate_jax.sharding import make_mesh

        config = load_config(run / "config.json")
        stage = "distill" if "distill" in config.stages else "initialize"
        done, steps = latest_step(run / stage) or 0, getattr(config, stage).steps
        if done < steps:
            raise UserError(f"--run={run}: stage {stage} is at step {done} of {steps}; train to its end first")
        if config.data.encoded:
            raise UserError(
                f"--run={run}: was trained on embeddings, and its text encoder is no part of it; use python -m "
                f"adastate_jax.convert --source={run} --output=DIR for its student"
            )
        _, trained = load_run(run, make_mesh())
        output = write_bundle(config, trained, output, options.overwrite)
    print(f"{output.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    print(output)
    return 0


if __name__ == "__main__":
    run_command(main)
