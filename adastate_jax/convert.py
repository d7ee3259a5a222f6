"""The convert command: published weights into folders of ours, and our weights into files that PyTorch tools read."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command, starting
from adastate_jax.errors import UserError
from adastate_jax.files import what_lies_near, whole_folder
from adastate_jax.interrupts import if_unwritten
from adastate_jax.texts import parse_json
from adastate_jax.weights.sources import refuse_unknown_kind

_EXAMPLE = """examples:
  python -m adastate_jax.convert --source=Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors --output=weights/teacher
  python -m adastate_jax.convert --source=self_forcing_dmd.pt --output=weights/student --dtype=bfloat16
  python -m adastate_jax.convert --source=longlive_base.pt --lora=lora.pt --lora=style.pt:0.8 --output=weights/longlive
  python -m adastate_jax.convert --source=runs/small_world --to=safetensors --names=diffusers --output=student
  python -m adastate_jax.convert --source=runs/lora --to=lora --output=style"""


@contextlib.contextmanager
def _new_folder(output: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """A folder of nobody else's that takes the name `output` if all goes well, and disappears if not.

    Args:
        nbytes: that must be free there.
        overwrite: what an earlier call of this command wrote there may go; nothing else does.
    """
    try:
        with whole_folder(output, _is_ours if overwrite else lambda name: False) as folder:
            free = shutil.disk_usage(folder).free
            if free < nbytes:
                raise UserError(f"--output={output}: needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
            yield folder
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _written(output: Path, nbytes: int, overwrite: bool) -> Iterator[tuple[Path, Callable[[int], Any]]]:
    """`_new_folder`, and what to call with each number of bytes that was written to it."""
    with _new_folder(output, nbytes, overwrite) as folder, progress("convert", nbytes, unit="B") as bar:
        bar.unit_scale = True
        yield folder, bar.update


def _is_ours(name: str) -> bool:
    return name.endswith(".safetensors") or name in ("converted.json", "config.json")


def _parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    overrides = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UserError(f"--set {setting[:80]}: must be NAME=VALUE")
        try:
            overrides[name] = parse_json(value, name)
        except UserError:
            raise UserError(f"--set {setting[:80]}: the value must be a number, a list [1, 2], true or false") from None
    return overrides


def _parse_adapter(text: str) -> tuple[Path, float]:
    """File and strength of `FILE[:STRENGTH]`; a file may have a colon in its name."""
    name, colon, number = text.rpartition(":")
    if os.path.exists(text) or not colon:
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not abs(strength) < 1e9:
        raise UserError(f"--lora={text}: its strength must be a finite number")
    return Path(name), strength


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.convert",
        description="Turns published weights (Wan2.1 transformers, Self-Forcing generators, LoRAs, UMT5, video "
        "autoencoders) into folders of this package, and its weights into files that PyTorch tools read.",
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--source",
        required=True,
        type=Path,
        metavar="FILE|DIR",
        help=".safetensors, .pth or .pt file, or a folder of one checkpoint; also a folder that convert or train wrote",
    )
    output_argument(parser, "a new folder", metavar="DIR")
    parser.add_argument(
        "--to",
        choices=("converted", "safetensors", "lora"),
        default="converted",
        help="what to write (default converted); lora: the adapters that a run trained of its student, by themselves",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the weights (default: what holds the source's)"
    )
    parser.add_argument(
        "--names",
        choices=("official", "diffusers"),
        help="names to write with --to=safetensors or lora (default official); of the text encoder, diffusers is "
        "transformers",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE|DIR[:STRENGTH]",
        help="adapter to add to the weights, in float32, at this strength (default 1); may be given several times",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="NUMBER",
        help="the adapters' alpha; changes are scaled by alpha / rank (default: as each file says, else the rank)",
    )
    parser.add_argument(
        "--part",
        default="",
        metavar="NAME",
        help="part of a .pt file with several networks (default generator_ema, else generator)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="field of the network's configuration that its shapes do not tell, such as num_heads=12",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and converts."""
    options = _parser().parse_args(arguments)
    names = options.names or "official"
    if options.names and options.to == "converted":
        raise UserError(f"--names={options.names}: needs --to=safetensors or --to=lora")
    for option in ("lora", "part", "set"):
        if options.to == "lora" and getattr(options, option):
            raise UserError(f"--{option}: does not go with --to=lora, which takes what a run trained")
    if options.lora_alpha is not None and not options.lora:
        raise UserError(f"--lora-alpha={options.lora_alpha}: needs --lora")
    overrides = _parse_overrides(options.set)
    adapters = [_parse_adapter(text) for text in options.lora]
    with claimed_output(options, folder=True, replaces=_is_ours) as output, if_unwritten(output):
        for name, path in (("", options.source), *(("--lora=", path) for path, _ in adapters)):
            if not os.path.exists(path):
                raise UserError(f"{name}{path}: no such file or folder{what_lies_near(path)}")
        refuse_unknown_kind(options.source)
        starting()
        import jax

        from adastate_jax.generation import conversion

        jax.config.update("jax_platforms", "cpu")  # an accelerator has nothing to do here, and may be busy
        if options.to == "lora":
            factors, line = conversion.open_adapters(options.source, names, options.dtype)
            print(line, file=sys.stderr)
            nbytes = sum(factor.nbytes for factor in factors.values())
            with _written(output, nbytes, options.overwrite) as (folder, advance):
                conversion.export_adapters(factors, folder, advance)
            print(output)
            return 0
        network = conversion.open_network(options.source, options.part, overrides)
        network = conversion.adapted(network, adapters, options.lora_alpha, options.dtype)
        if options.to == "safetensors":
            conversion.refuse_unpublishable(network, names)
        print(conversion.summary(network), file=sys.stderr)
        nbytes = conversion.bytes_of(network)
        with _written(output, nbytes, options.overwrite) as (folder, advance):
            if options.to == "safetensors":
                conversion.export(network, folder, names, advance)
            else:
                conversion.write_converted(network, folder, advance)
    print(output)
    return 0


if __name__ == "__main__":
    run_command(main)
