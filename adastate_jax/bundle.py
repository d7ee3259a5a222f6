"""The bundle command: what a finished run leaves to generate with, in one small file."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from adastate_jax.checkpoint import latest_step
from adastate_jax.config.run import Config
from adastate_jax.console import CommandParser, run_command
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.generation.loading import Trained, load_run
from adastate_jax.sharding import make_mesh
from adastate_jax.weights.safetensors_file import write_safetensors
from adastate_jax.weights.slots import leaves

_EXAMPLE = """example:
  python -m adastate_jax.bundle --run=runs/tiny --output=tiny.safetensors
  python -m adastate_jax.sample --checkpoint=tiny.safetensors --prompt="a camera pans left over green hills"
"""


def write_bundle(config: Config, trained: Trained, output: Path) -> None:
    """Writes student, codec and text encoder as float16 under their path names, and the configuration in the header.

    Raises:
        UserError: a weight is not finite in float16, or the file cannot be written; nothing is left under its name.
    """
    tensors = {name: np.asarray(leaf) for name, leaf in leaves(trained).items()}
    half = np.dtype(np.float16)

    def rounded() -> Iterator[np.ndarray]:
        for name, tensor in tensors.items():
            with np.errstate(over="ignore"):  # reported below
                values = tensor.astype(half)
            if not np.isfinite(values).all():
                raise UserError(f"{name}: holds NaN, infinity or numbers beyond float16; train with a lower rate")
            yield values

    layout = {name: (half, tensor.shape) for name, tensor in tensors.items()}
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_safetensors(partial, layout, rounded(), {"config": json.dumps(to_dict(config))})
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.bundle",
        description="Packs what a finished training run leaves to generate with (the distilled student, the codec and "
        "the text encoder, in float16, and the configuration) into one file that --checkpoint and load take.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a folder that train wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".safetensors file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes the file."""
    options = _parser().parse_args(arguments)
    run, output = options.run, options.output
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output}: must end in .safetensors")
    config, trained = load_run(run, make_mesh())
    done, steps = latest_step(run / "distill") or 0, config.distill.steps
    if done < steps:
        raise UserError(f"--run={run}: stage distill is at step {done} of {steps}; train to its end first")
    write_bundle(config, trained, output)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
