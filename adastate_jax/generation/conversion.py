"""Published weights → a network of ours, and ours → files that PyTorch tools read; for the convert command."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adastate_jax.config.run import STAGES
from adastate_jax.errors import UserError, one_line
from adastate_jax.fields import to_dict
from adastate_jax.generation.trained import load_run, load_run_adapters
from adastate_jax.sharding import make_mesh
from adastate_jax.weights.converted import is_converted, open_converted, write_converted
from adastate_jax.weights.identify import Network, identify
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.lora import merge_lora, published_factors
from adastate_jax.weights.safetensors_file import write_safetensors
from adastate_jax.weights.slots import leaves
from adastate_jax.weights.sources import HEADER_KEY, open_source
from adastate_jax.weights.tensors import ArrayTensor, finite_blocks

__all__ = [
    "adapted",
    "bytes_of",
    "export",
    "export_adapters",
    "open_adapters",
    "open_network",
    "open_run",
    "refuse_unpublishable",
    "summary",
    "write_converted",
]


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


def open_adapters(path: Path, names: str, dtype: str | None) -> tuple[dict[str, np.ndarray], str]:
    """The adapters that a run trained of its student, under published names, and a line about them.

    Raises:
        UserError: the run trained none, or holds no student; or a number is not finite in `dtype`.
    """
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no folder that train wrote; adapters are taken from a run")
    adapters, config, base = load_run_adapters(path, make_mesh())
    factors = published_factors(adapters, config, names)
    with np.errstate(over="ignore"):  # reported below
        factors = {name: factor.astype(np.dtype(dtype or "float32")) for name, factor in factors.items()}
    for name, factor in factors.items():
        if not np.isfinite(factor.astype(np.float32)).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; train with a lower rate")
    return factors, f"LoRA of {len(factors) // 2} layers of {base}"


def export_adapters(factors: Mapping[str, np.ndarray], folder: Path, advance: Callable[[int], Any]) -> None:
    """Writes adapters as `pytorch_lora_weights.safetensors`, as diffusers names the file.

    Args:
        folder: is there, and is not yet under its final name.
        advance: called with the number of bytes that were written since the last time.

    Raises:
        OSError: the disk is full.
    """

    def blocks() -> Iterator[np.ndarray]:
        for factor in factors.values():
            yield factor
            advance(factor.nbytes)

    layout = {name: (factor.dtype, factor.shape) for name, factor in factors.items()}
    write_safetensors(folder / "pytorch_lora_weights.safetensors", layout, blocks(), {"format": "pt"})


def open_network(path: Path, part: str, overrides: Mapping[str, Any]) -> Network:
    """The network of published weights, of a converted folder, or of a run.

    Args:
        part: of a file with several networks; empty is the usual one.
        overrides: fields of the configuration that the shapes do not tell; of published weights alone.

    Raises:
        UserError: there is none, or it is damaged.
    """
    is_run = (path / "config.json").is_file() and any((path / stage).is_dir() for stage in STAGES)
    if is_converted(path) or is_run:
        if part or overrides:
            raise UserError("--part and --set: only for published weights, not for folders of this package")
        return open_converted(path) if is_converted(path) else open_run(path)
    source = open_source(path, part)
    network = identify(source, overrides)
    if source.part:
        print(one_line(f"{path}: its part {source.part}"), file=sys.stderr)
    if source.tokenizer and network.kind == "text_encoder":
        what = f"note: {path}: its tokenizer ({source.tokenizer}) is left out"
        print(one_line(f"{what}; sample reads google/umt5-xxl's tokenizer.json beside the networks"), file=sys.stderr)
    return network


def adapted(
    network: Network, adapters: Sequence[tuple[Path, float]], alpha: float | None, dtype: str | None
) -> Network:
    """A network with adapters (file, strength) merged into it, whose weights are to be of another dtype, or None.

    Raises:
        UserError: an adapter does not fit.
    """
    for adapter, strength in adapters:
        try:
            network = merge_lora(network, adapter, alpha, strength)
        except UserError as error:
            raise UserError(f"--lora={error}") from None
    dtype = dtype or network.config.param_dtype
    return dataclasses.replace(network, config=dataclasses.replace(network.config, param_dtype=dtype, dtype=dtype))


def bytes_of(network: Network) -> int:
    """How many bytes its weights take in its `param_dtype`."""
    elements = sum(math.prod(slot.shape) for slot in network.slots.values())
    return elements * np.dtype(network.config.param_dtype).itemsize


def summary(network: Network) -> str:
    """One line about a network: its kind, and what of its configuration is unlike the defaults."""
    config = network.config
    fields = [field for field in dataclasses.fields(config) if field.name not in ("param_dtype", "dtype")]
    changed = [f"{f.name}={getattr(config, f.name)}" for f in fields if getattr(config, f.name) != f.default]
    return f"{network.title} ({', '.join(changed) or 'of the published size'}), {config.param_dtype}"


def refuse_unpublishable(network: Network, names: str) -> None:
    """Refuses names under which no PyTorch network could hold these weights."""
    namings = KINDS[network.kind].namings
    if names not in namings:
        raise UserError(f"--names={names}: a {network.title} has {', '.join(namings)} names only")
    if names == "diffusers" and not getattr(network.config, "qk_norm", True):
        raise UserError("--names=diffusers: its transformer always normalises queries and keys, this one does not")
    if getattr(network.config, "prediction", "flow") != "flow":
        print("note: this network predicts clean latents, which PyTorch tools will take for a flow", file=sys.stderr)
