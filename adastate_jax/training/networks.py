"""Teacher, critic and student: where their weights lie, that they are what a run needs, and reading them into place.

Weights come from a stage of this run, of the run that it starts from or of any other, or from a folder that `convert`
wrote. Whatever the source, each device gets its own part; no host holds a whole network.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax

from adastate_jax.checkpoint import latest_step, load_tree
from adastate_jax.config.files import load_config
from adastate_jax.config.networks import TRAINED_BY, trained_sizes
from adastate_jax.config.run import Config
from adastate_jax.config.stages import RANDOM
from adastate_jax.errors import UserError, shown
from adastate_jax.models.adapters import Adapters, LoRAConfig, merge, stack
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.quantized import quantize_network
from adastate_jax.seals import SEAL
from adastate_jax.sharding import tree_shardings
from adastate_jax.texts import read_json
from adastate_jax.training.frozen import abstract_adapters, abstract_network, with_shardings
from adastate_jax.weights.converted import converted_config, is_converted, load_converted
from adastate_jax.weights.parts import differing_fields, fingerprint

# Stage → the part of its checkpoint to go on from, and which network that is.
_LEFT_BEHIND = {"pretrain": ("ema", "teacher"), "initialize": ("ema", "student"), "distill": ("student/ema", "student")}
# What a configuration says of a converted network, whatever its weights are.
_SETTINGS = ("param_dtype", "dtype", "text_length", "attention", "remat", "quantization")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights before they are read.

    Attributes:
        path: a checkpoint, or a folder that `convert` wrote; None where a stage of this run is still to make it.
        part: of the checkpoint; empty for a converted folder.
        config: of the network that lies there.
        base: where the weights lie that the part has adapters of; None where it has all weights.
        lora: of these adapters, or None.
    """

    path: Path | None
    part: str
    config: DiTConfig
    base: "Source | None" = None
    lora: LoRAConfig | None = None


def start_of(config: Config) -> tuple[Config, Path]:
    """The run that this one starts from."""
    folder = Path(config.start_from)
    return load_config(folder / "config.json"), folder


def check_networks(config: Config, workdir: Path) -> dict[str, str]:
    """Finds all weights that the stages will ask for, before anything is compiled or read.

    Returns:
        What is frozen and made by another run or by `convert`: what it is called, with a hash of its weights, as
        `teacher.weights`; as `distill.critic.weights`, say, where a stage trains adapters of them. It is read again
        whenever the run resumes, and its path alone does not tell that it changed.

    Raises:
        UserError: some are missing, or are of another network than the configuration says.
    """
    initializes, distills = ("initialize" in config.stages, "distill" in config.stages)
    frozen = {}
    if distills or (initializes and config.initialize.targets != "clips"):
        frozen["teacher.weights"] = find_weights(config, workdir, "teacher")
    if initializes and config.initialize.weights != RANDOM:
        start = find_weights(config, workdir, "student", start=True)
        if config.student.lora.rank:
            frozen[_base_name("initialize", "student")] = start
    for name in ("critic", "student") if distills else ():
        source = find_weights(config, workdir, name)
        if getattr(config, name).lora.rank:
            frozen[_base_name("distill", name)] = source
    return {
        name: _identity(source)
        for name, source in frozen.items()
        if source.path is not None and workdir.absolute() not in source.path.absolute().parents
    }


def _base_name(stage: str, name: str) -> str:
    return f"{stage}.{name}.weights"


def _identity(source: Source) -> str:
    """Kind or stage of weights, and a hash of what lists their checksums."""
    if not source.part:
        return f"transformer/{fingerprint(source.path.parent, source.path.name)[:16]}"
    digest = hashlib.sha256((source.path / SEAL).read_bytes()).hexdigest()
    own = f"{source.path.parent.name}/{source.path.name}/{digest[:16]}"
    return own if source.base is None else f"{own} on {_identity(source.base)}"


def find_weights(config: Config, workdir: Path, name: str, start: bool = False) -> Source:
    """Where the weights of a network lie.

    Args:
        name: `teacher`, `critic` or `student`.
        start: what the student is before initialisation, not what it is before distillation.

    Raises:
        UserError: they are missing, or of another network than the configuration says.
    """
    field = said = "initialize.weights" if start else f"{name}.weights"
    weights = config.initialize.weights if start else getattr(config, name).weights
    if not weights and (start or name == "critic"):
        said, weights = "teacher.weights", config.teacher.weights
    weights = weights or ("initialize" if name == "student" and not start else "pretrain")
    if weights in TRAINED_BY:
        source = _of_this_run(config, workdir, weights)
    else:
        source = _of_elsewhere(Path(weights), f"config.{said}={weights}")
    wanted = config.network(name)
    for own in differing_fields(source.config, wanted):
        where = f"config.{name}.{own}" if hasattr(getattr(config, name), own) else f"config.model.{own}"
        found, asked = getattr(source.config, own), getattr(wanted, own)
        raise UserError(
            f"{source.path or f'stage {weights}'}: its {own} is {found!r}, {where} is {asked!r}; set {where} to it, or "
            f"config.{field} to other weights"
        )
    return source


def _of_this_run(config: Config, workdir: Path, stage: str) -> Source:
    part, name = _LEFT_BEHIND[stage]
    if stage in config.stages and latest_step(workdir / stage) is None:
        return Source(None, part, config.network(name))
    folder = workdir
    while (step := latest_step(folder / stage)) is None:
        if not config.start_from:
            raise UserError(f"{workdir}: stage {stage} has not run; put it into config.stages before the later ones")
        config, folder = start_of(config)
    return left_behind(config, folder, stage, step)


def left_behind(config: Config, folder: Path, stage: str, step: int) -> Source:
    """What a stage's checkpoint has of the network to go on with.

    Raises:
        UserError: it has adapters, and the weights that they are of are missing or of another network.
    """
    part, name = _LEFT_BEHIND[stage]
    lora = getattr(config, name).lora
    base = find_weights(config, folder, name, start=stage == "initialize") if lora.rank else None
    if base is not None:
        _refuse_other_base(folder, _base_name(stage, name), base)
    return Source(folder / stage / str(step), part, config.network(name), base, lora)


def _refuse_other_base(folder: Path, name: str, base: Source) -> None:
    """Raises UserError if a run trained its adapters of other weights than lie there now, which `data.json` notes."""
    path = folder / "data.json"
    noted = read_json(path, "bring it back from a copy") if path.exists() else {}
    found = _identity(base)
    if isinstance(noted, dict) and noted.get(name, found) != found:
        raise UserError(
            f"{folder}: its adapters are of other {name} than {base.path} holds now: {shown(noted[name])} is now "
            f"{found}; bring those back"
        )


def _of_elsewhere(path: Path, said: str) -> Source:
    """A stage of another run, or a converted folder; `said` is how the configuration names it."""
    if is_converted(path):
        return Source(path, "", converted_config(path, "transformer"))
    if (path / "transformer").is_dir():
        raise UserError(f"{said}: is a folder of several networks; name one, such as {path / 'transformer'}")
    if (path / "config.json").is_file():
        raise UserError(f"{said}: is a whole run; name a stage of it, such as {path / 'pretrain'}")
    if path.name in _LEFT_BEHIND and (path.parent / "config.json").is_file():
        if (step := latest_step(path)) is None:
            raise UserError(f"{said}: that run has no finished checkpoint of stage {path.name}")
        return left_behind(load_config(path.parent / "config.json"), path.parent, path.name, step)
    raise UserError(
        f"{said}: no such network; make it with python -m adastate_jax.convert --source=FILE --output={path}, or name "
        f"a stage of this or another run ({', '.join(TRAINED_BY)})"
    )


def load_weights(
    config: Config, workdir: Path, name: str, mesh: jax.sharding.Mesh, trained: bool, start: bool = False
) -> DiT:
    """Reads a network's weights into the memory of the devices that they are split over.

    Args:
        name, start: as for `find_weights`.
        trained: reads them as they are trained, in float32, instead of as they are used frozen.

    Raises:
        UserError: as for `find_weights`, or they are damaged.
    """
    source = find_weights(config, workdir, name, start)
    network = config.network(name)
    network = trained_sizes(network) if trained else network
    if source.path is None:
        raise UserError(f"{workdir}: what the {name} starts from is not there yet; run the stages in their order")
    return load_source(source, network, mesh)


def load_source(source: Source, network: DiTConfig, mesh: jax.sharding.Mesh) -> DiT:
    """The weights of a source, in the dtypes of `network`; adapters are merged into theirs.

    Raises:
        UserError: they are damaged.
    """
    if not source.part:
        settings = {field: getattr(network, field) for field in _SETTINGS}
        return load_converted(source.path, "transformer", mesh, **settings)
    plain = dataclasses.replace(network, quantization="")
    if source.base is not None:
        loaded: Any = _merged(load_source(source.base, plain, mesh), _load_adapters(source, mesh), mesh)
    else:
        loaded = load_tree(source.path, with_shardings(abstract_network(plain), mesh), source.part)
    return quantize_network(loaded, network.quantization, mesh) if network.quantization else loaded


def _load_adapters(source: Source, mesh: jax.sharding.Mesh) -> Adapters:
    return load_tree(source.path, with_shardings(abstract_adapters(source.config, source.lora), mesh), source.part)


def _merged(base: DiT, adapters: Adapters, mesh: jax.sharding.Mesh) -> DiT:
    return jax.jit(merge, donate_argnums=0, out_shardings=tree_shardings(base, mesh))(base, adapters)


def load_all_adapters(source: Source, mesh: jax.sharding.Mesh) -> tuple[Adapters, Source]:
    """All that was trained of a network as adapters of what it was before, in this stage and in those before it.

    Returns:
        The adapters, side by side where several stages trained some, and the source of the weights that they are of.
    """
    adapters, base = _load_adapters(source, mesh), source.base
    while base.base is not None:
        adapters, base = stack(_load_adapters(base, mesh), adapters), base.base
    return adapters, base
