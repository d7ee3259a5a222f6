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
from adastate_jax.models.adapters import Adapters
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.texts import parse_json
from adastate_jax.training.frozen import Frozen, abstract_dit, abstract_frozen, student_sizes, with_shardings
from adastate_jax.training.networks import Source, left_behind, load_all_adapters, load_source
from adastate_jax.weights.safetensors_file import SafeTensors, write_safetensors
from adastate_jax.weights.slots import leaf_name, leaves
from adastate_jax.weights.tensors import FLOATING

# Which stages of a run leave weights to generate with, the best first, and what they are.
_STUDENTS = (("distill", "distilled"), ("initialize", "initialised"))
_HALF = np.dtype(np.float16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run leaves behind to generate with: the causal student, what no stage trains, and where both are from."""

    student: DiT
    frozen: Frozen
    origin: str = dataclasses.field(default="", metadata={"static": True})


def trained_config(path: Path) -> Config:
    """The configuration of a folder that `train` wrote, or of a bundle; raises UserError if it is neither."""
    return _bundled_config(SafeTensors(path), path) if path.is_file() else load_config(path / "config.json")


def load_run(path: Path, mesh: jax.sharding.Mesh) -> tuple[Config, Trained]:
    """Configuration and student of a folder that `train` wrote; the distilled one, or before that the initialised one.

    A line on stderr says so where another student than a finished distillation's is taken.

    Raises:
        UserError: the folder is no such one or damaged, or no student has been trained yet.
    """
    config = load_config(path / "config.json")
    source, origin = _student_of(path, config)
    student = load_source(source, student_sizes(config), mesh)
    frozen = with_shardings(abstract_frozen(config), mesh)
    frozen = load_tree(path / "frozen", frozen) if jax.tree.leaves(frozen) else frozen
    return config, Trained(student, frozen, origin)


def _student_of(path: Path, config: Config) -> tuple[Source, str]:
    """Where a run's folder keeps the student to generate with, and what that is."""
    for stage, adjective in _STUDENTS:
        step = latest_step(path / stage)
        if step is None:
            continue
        if stage != "distill" and "distill" in config.stages:
            note = f"note: {path}: has no finished checkpoint of distill; the student of {stage} streams instead"
            print(one_line(note), file=sys.stderr)
        steps = getattr(config, stage).steps
        origin = f"{path}, {adjective} student at step {step}" + (f" of {steps}" if step != steps else "")
        return left_behind(config, path, stage, step), origin
    raise UserError(f"{path}: holds no causal student yet; train the stages initialize or distill first")


def load_run_adapters(path: Path, mesh: jax.sharding.Mesh) -> tuple[Adapters, DiTConfig, Path]:
    """All that a run, and the runs that it goes on from, trained of its student as adapters.

    Returns:
        The adapters; the sizes of the network, and where the weights lie that they are of.

    Raises:
        UserError: as `load_run`; or the student was trained whole.
    """
    source, _ = _student_of(path, load_config(path / "config.json"))
    if source.base is None:
        raise UserError(f"{path}: its student was trained whole, not as adapters; take it with --to=safetensors")
    adapters, base = load_all_adapters(source, mesh)
    return adapters, source.config, base.path


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
    config = _bundled_config(opened, path)
    text, stored = opened.metadata["config"], opened.stored()
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


def _bundled_config(opened: SafeTensors, path: Path) -> Config:
    if "config" not in opened.metadata:
        raise UserError(f"{path}: holds no configuration; name a file that bundle wrote")
    return build(Config, parse_json(opened.metadata["config"], f"{path}: its configuration"), str(path))


@functools.lru_cache(maxsize=4)
def _abstract(config: Config) -> Trained:
    return Trained(abstract_dit(config), abstract_frozen(config))


def _checksum(config: str, tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 of a configuration's text and of the elements of all tensors, sorted by name."""
    checksum = zlib.crc32(config.encode())
    for name in sorted(tensors):
        checksum = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8), checksum)
    return checksum
