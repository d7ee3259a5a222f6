"""The convert command: published weights into folders of ours, and our weights into files that PyTorch tools read."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adastate_jax.config.run import STAGES
from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command
from adastate_jax.errors import UserError, one_line
from adastate_jax.fields import to_dict
from adastate_jax.files import whole_folder
from adastate_jax.generation.trained import load_run
from adastate_jax.interrupts import if_stopped
from adastate_jax.sharding import make_mesh
from adastate_jax.texts import parse_json
from adastate_jax.weights.converted import is_converted, open_converted, write_converted
from adastate_jax.weights.identify import Network, identify
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.lora import merge_lora
from adastate_jax.weights.safetensors_file import write_safetensors
from adastate_jax.weights.slots import leaves
from adastate_jax.weights.sources import HEADER_KEY, open_source
from adastate_jax.weights.tensors import ArrayTensor, finite_blocks

_EXAMPLE = """examples:
  python -m adastate_jax.convert --source=Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors --output=weights/teacher
  python -m adastate_jax.convert --source=self_forcing_dmd.pt --output=weights/student --dtype=bfloat16
  python -m adastate_jax.convert --source=longlive_base.pt --lora=lora.pt --lora=style.pt:0.8 --output=weights/longlive
  python -m adastate_jax.convert --source=runs/small_world --to=safetensors --names=diffusers --output=student"""


def open_run(path: Path) -> Network:
    """The student of a folder that `train` wrote, in official layout.

    Raises:
        UserError: the folder holds no student, or is damaged.
    """
    student = load_run(path, make_mesh())[1].student
    slots = KINDS["transformer"].slots(student.config)
    held = {name: np.asarray(leaf) for name, leaf in leaves(student).items()}
    tensors = {}
    for name, slot in slots.items():
        leaf = held[slot.entry.path]
        tensors[name] = ArrayTensor(path, slot.entry.to_official(leaf if slot.layer is None else leaf[slot.layer]))
    return Network("transformer", student.config, slots, tensors)


def export(network: Network, folder: Path, names: str, advance: Callable[[int], Any]) -> None:
    """Writes a network as `.safetensors` in its configuration's `param_dtype`, with a `config.json` for PyTorch tools.

    Args:
        network: where the weights are read from.
        folder: is there, and is not yet under its final name.
        names: key of the kind's `namings`: `official`, or `diffusers` (of the text encoder: transformers).
        advance: called with the number of bytes that were written since the last time.

    Raises:
        UserError: a weight is not finite.
        OSError: the disk is full.
    """
    config, naming = network.config, KINDS[network.kind].namings[names]
    dtype = np.dtype(config.param_dtype)
    layout = {naming.from_official(name, config): (dtype, slot.shape) for name, slot in network.slots.items()}

    def blocks() -> Iterator[np.ndarray]:
        for name in network.slots:
            for _, rows in finite_blocks(name, network.tensors[name], dtype):
                yield rows
                advance(rows.nbytes)

    metadata = {"format": "pt", HEADER_KEY: json.dumps({"kind": network.kind, "config": to_dict(config)})}
    write_safetensors(folder / f"{naming.stem}.safetensors", layout, blocks(), metadata)
    if settings := naming.published_config(config):
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


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


def _open(options: argparse.Namespace) -> Network:
    """The network that the options name."""
    path = options.source
    is_run = (path / "config.json").is_file() and any((path / stage).is_dir() for stage in STAGES)
    if is_converted(path) or is_run:
        if options.part or options.set:
            raise UserError("--part and --set: only for published weights, not for folders of this package")
        network = open_converted(path) if is_converted(path) else open_run(path)
    else:
        source = open_source(path, options.part)
        network = identify(source, _parse_overrides(options.set))
        if source.part:
            print(one_line(f"{path}: its part {source.part}"), file=sys.stderr)
    for text in options.lora:
        adapter, strength = _parse_adapter(text)
        try:
            network = merge_lora(network, adapter, options.lora_alpha, strength)
        except UserError as error:
            raise UserError(f"--lora={error}") from None
    dtype = options.dtype or network.config.param_dtype
    return dataclasses.replace(network, config=dataclasses.replace(network.config, param_dtype=dtype, dtype=dtype))


def _summary(network: Network) -> str:
    """One line about a network: its kind, and what of its configuration is unlike the defaults."""
    config = network.config
    fields = [field for field in dataclasses.fields(config) if field.name not in ("param_dtype", "dtype")]
    changed = [f"{f.name}={getattr(config, f.name)}" for f in fields if getattr(config, f.name) != f.default]
    return f"{network.title} ({', '.join(changed) or 'of the published size'}), {config.param_dtype}"


def _refuse_unpublishable(network: Network, names: str) -> None:
    """Refuses names under which no PyTorch network could hold these weights."""
    namings = KINDS[network.kind].namings
    if names not in namings:
        raise UserError(f"--names={names}: a {network.title} has {', '.join(namings)} names only")
    if names == "diffusers" and not getattr(network.config, "qk_norm", True):
        raise UserError("--names=diffusers: its transformer always normalises queries and keys, this one does not")
    if getattr(network.config, "prediction", "flow") != "flow":
        print("note: this network predicts clean latents, which PyTorch tools will take for a flow", file=sys.stderr)


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
        "--to", choices=("converted", "safetensors"), default="converted", help="what to write (default converted)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the weights (default: what holds the source's)"
    )
    parser.add_argument(
        "--names",
        choices=("official", "diffusers"),
        help="names to write with --to=safetensors (default official); of the text encoder, diffusers is transformers",
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
    if options.names and options.to != "safetensors":
        raise UserError(f"--names={options.names}: needs --to=safetensors")
    if options.lora_alpha is not None and not options.lora:
        raise UserError(f"--lora-alpha={options.lora_alpha}: needs --lora")
    jax.config.update("jax_platforms", "cpu")  # an accelerator has nothing to do here, and may be busy
    with claimed_output(options, folder=True) as output, if_stopped(f"{output} was not written"):
        network = _open(options)
        if options.to == "safetensors":
            _refuse_unpublishable(network, names)
        print(_summary(network), file=sys.stderr)
        elements = sum(math.prod(slot.shape) for slot in network.slots.values())
        nbytes = elements * np.dtype(network.config.param_dtype).itemsize
        with _new_folder(output, nbytes, options.overwrite) as folder, progress("convert", nbytes, unit="B") as bar:
            bar.unit_scale = True
            if options.to == "safetensors":
                export(network, folder, names, bar.update)
            else:
                write_converted(network, folder, bar.update)
    print(f"{output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
