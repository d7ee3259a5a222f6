"""What a training run leaves to generate with: read from its folder, or kept as one small file, a bundle.

A bundle is a `.safetensors` file: student, codec and text encoder in float16 under their path names; its header holds
the configuration, and a checksum of that and of all elements.
"""

import dataclasses
import functools
import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np

from adastate_jax.checkpoint import latest_step, load_tree
from adastate_jax.config.files import load_config
from adastate_jax.config.run import Config
from adastate_jax.errors import UserError, one_line, shortlist
from adastate_jax.fields import build, to_dict
from adastate_jax.files import whole_file
from adastate_jax.models.dit import DiT
from adastate_jax.texts import parse_json
from adastate_jax.training.frozen import Frozen, abstract_dit, abstract_frozen, with_shardings
from adastate_jax.weights.safetensors_file import SafeTensors, write_safetensors
from adastate_jax.weights.slots import leaf_name, leaves
from adastate_jax.weights.tensors import FLOATING

# Where a run's folder keeps the weights to generate with, the best first: (stage, part of its checkpoint, what it is).
_STUDENTS = (("distill", "student/ema", "distilled"), ("initialize", "ema", "initialised"))
_HALF = np.dtype(np.float16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves behind to generate with: the causal student, what no stage trains, and where both are from."""

    student: DiT
    frozen: Frozen
    origin: str = dataclasses.field(default="", metadata={"static": True})


def load_run(path: Path, mesh: jax.sharding.Mesh) -> tuple[Config, Trained]:
    """Configuration and student of a folder that `train` wrote; the distilled one, or before that the initialised one.

    A line on stderr says so where another student than a finished distillation's is taken.

    Raises:
        UserError: the folder is no such one or damaged, or no student has been trained yet.
    """
    config = load_config(path / "config.json")
    for stage, part, adjective in _STUDENTS:
        step = latest_step(path / stage)
        if step is None:
            continue
        if stage != "distill" and "distill" in config.stages:
            note = f"note: {path}: has no finished checkpoint of distill; the student of {stage} streams instead"
            print(one_line(note), file=sys.stderr)
        steps = getattr(config, stage).steps
        origin = f"{path}, {adjective} student at step {step}" + (f" of {steps}" if step != steps else "")
        student = load_tree(path / stage / str(step), with_shardings(abstract_dit(config), mesh), part)
        frozen = with_shardings(abstract_frozen(config), mesh)
        frozen = load_tree(path / "frozen", frozen) if jax.tree.leaves(frozen) else frozen
        return config, Trained(student, frozen, origin)
    raise UserError(f"{path}: holds no causal student yet; train the stages initialize or distill first")


def write_bundle(config: Config, trained: Trained, output: Path, replace: bool = True) -> Path:
    """Writes student, codec and text encoder as float16 under their path names, and the configuration in the header.

    Returns:
        The file's name; without `replace`, another one than `output` if something came to lie there: see `whole_file`.

    Raises:
        UserError: a weight is not finite in float16, or the file cannot be written; nothing is left under its name.
    """
    tensors = {}
    for name, leaf in leaves(trained).items():
        with np.errstate(over="ignore"):  # reported below
            tensors[name] = np.asarray(leaf).astype(_HALF)
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"{name}: holds NaN, infinity or numbers beyond float16; train with a lower rate")
    text = json.dumps(to_dict(config))
    metadata = {"config": text, "crc32": str(_checksum(text, tensors))}
    layout = {name: (_HALF, tensor.shape) for name, tensor in tensors.items()}
    names: list[Path] = []
    try:
        with whole_file(output, replace, names.append) as temporary:
            write_safetensors(temporary, layout, tensors.values(), metadata)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None
    return names[0]


def load_bundle(path: Path, mesh: jax.sharding.Mesh) -> tuple[Config, Trained]:
    """What `write_bundle` wrote, in the configuration's dtype.

    Raises:
        UserError: the file is no bundle or damaged, or a weight is not finite.
    """
    opened = SafeTensors(path)
    if "config" not in opened.metadata:
        raise UserError(f"{path}: holds no configuration; name a file that bundle wrote")
    text, stored = opened.metadata["config"], opened.stored()
    config = build(Config, parse_json(text, f"{path}: its configuration"), str(path))
    like = with_shardings(_abstract(config), mesh)
    wanted = {name: leaf.shape for name, leaf in leaves(like).items()}
    found = {name: tensor.shape for name, tensor in stored.items() if tensor.dtype in FLOATING}
    if wanted != found:
        unlike = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        raise UserError(f"{path}: its tensors are not those of its configuration: {shortlist(unlike)}; make it again")
    # Bundles of earlier versions have no checksum.
    expected = opened.metadata.get("crc32")
    if expected is not None and expected != str(_checksum(text, {name: stored[name].read() for name in wanted})):
        raise UserError(f"{path}: damaged: does not match its checksum; copy it again")

    def place(key, leaf):
        name = leaf_name(key)
        array = stored[name].read().astype(leaf.dtype)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity; make the bundle again")
        return jax.device_put(array, leaf.sharding)

    trained = jax.tree_util.tree_map_with_path(place, like)
    return config, dataclasses.replace(trained, origin=str(path))


@functools.lru_cache(maxsize=4)
def _abstract(config: Config) -> Trained:
    return Trained(abstract_dit(config), abstract_frozen(config))


def _checksum(config: str, tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 of a configuration's text and of the elements of all tensors, sorted by name."""
    checksum = zlib.crc32(config.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8), checksum)
    return checksum
