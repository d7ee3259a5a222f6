"""Files and folders of published weights, opened: `.safetensors`, what `torch.save` wrote, and indexes of several."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adastate_jax.errors import UserError, shortlist
from adastate_jax.files import is_file, what_lies_near
from adastate_jax.texts import parse_json, read_json
from adastate_jax.weights.packed import ScaledTensor, tokenizer_of, unpacked
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.tensors import StoredTensor
from adastate_jax.weights.torch_file import load_torch_file

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

# Part of a PyTorch training checkpoint to take if none is named, the first that is there.
_PARTS = ("generator_ema", "generator", "generator_lora", "ema", "model", "state_dict")

# What wrappers of PyTorch modules put into the middle of a name, and what enclosing modules put in front of all names.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_ENCLOSING = frozenset({"model", "module", "generator", "diffusion_model", "transformer", "text_encoder", "vae"})

# Key of a `.safetensors` header under which our own exports keep their configuration.
HEADER_KEY = "adastate_jax"


@dataclasses.dataclass(frozen=True)
class Source:
    """Tensors of a published checkpoint, unread.

    Attributes:
        path: what the user named.
        tensors: by the names in the file, without what wrappers and packers added.
        settings: the content of a `config.json` beside the file, {} if there is none.
        header: our configuration, {} unless this package wrote the file.
        part: the part of a file with several networks that was taken, or "".
        metadata: of a `.safetensors` file's header.
        tokenizer: the name of a tokenizer in the file, which is not among the tensors, or "".
    """

    path: Path
    tensors: Mapping[str, StoredTensor | ScaledTensor]
    settings: Mapping[str, Any]
    header: Mapping[str, Any]
    part: str = ""
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""


def open_source(path: str | Path, part: str = "", config_name: str = "config.json") -> Source:
    """Opens a `.safetensors` file, an index of several, a `.pth` or `.pt` file, or a folder that holds one checkpoint.

    Args:
        path: file or folder.
        part: of a file with several networks: key of the top-level dict of a `.pt` file, where empty takes the averaged
            generator if there is one, else the generator; or what ComfyUI calls it, where empty takes the transformer.
        config_name: settings file to look for in the same folder.

    Raises:
        UserError: nothing is there, several checkpoints are, or one cannot be read.
    """
    path = Path(path)
    file = _single_checkpoint(path) if os.path.isdir(path) else path
    if not is_file(file):
        raise UserError(f"{path}: no such file or folder{what_lies_near(path)}")
    header: Mapping[str, Any] = {}
    metadata: Mapping[str, str] = {}
    taken = ""
    if file.name.endswith(".index.json"):
        tensors = _open_shards(file)
    elif file.suffix == ".safetensors":
        opened = SafeTensors(file)
        tensors = opened.stored()
        header, metadata = _own_header(opened), opened.metadata
    elif file.suffix in TORCH_SUFFIXES:
        tensors, taken = _select_part(load_torch_file(file), part, file)
    else:
        raise _unknown_kind(path)
    tokenizer = tokenizer_of(tensors)
    tensors, packed = unpacked(tensors, "" if taken else part, path)
    taken = taken or packed
    if part and not taken:
        raise UserError(f"--part={part}: {file.name} has no parts; leave it out")
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    settings = _read_settings(file.parent / config_name)
    return Source(path, _unwrapped(tensors, path), settings, header, taken, metadata, tokenizer)


def refuse_unknown_kind(path: Path) -> None:
    """Raises UserError for a file of which its name says that `open_source` cannot open it."""
    if path.is_file() and not path.name.endswith((".index.json", ".safetensors", *TORCH_SUFFIXES)):
        raise _unknown_kind(path)


def _unknown_kind(path: Path) -> UserError:
    endings = ", ".join((".safetensors", *TORCH_SUFFIXES))
    return UserError(f"{path}: unknown kind of file; known are folders and files that end in {endings}")


def _single_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder: an index of several files, or a file that no index lists."""
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: a whole pipeline; name one of its folders: transformer, vae or text_encoder")
    try:
        content = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    indexes = [file for file in content if file.name.endswith(".index.json")]
    listed = {folder / name for index in indexes for name in _read_weight_map(index).values()}
    files = [file for file in content if file.suffix in (".safetensors", *TORCH_SUFFIXES)]
    found = [*indexes, *(file for file in files if file.is_file() and file not in listed)]
    if not found:
        raise UserError(f"{folder}: holds no weights (.safetensors, {', '.join(TORCH_SUFFIXES)})")
    if len(found) > 1:
        names = shortlist([file.name for file in found])
        raise UserError(f"{folder}: holds several checkpoints ({names}); name one of the files")
    return found[0]


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, of an index of several files."""
    values = read_json(index, "download it again")
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: not a readable index of weights (no file names); download it again")
    for name in names.values():
        if Path(name).name != name:
            raise UserError(f"{index}: lists {name!r}, which is not in the same folder; download it again")
    return names


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    names = _read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted({index.parent / name for name in names.values()}):
        if file.suffix == ".safetensors":
            shard = SafeTensors(file).stored()
        else:
            shard, _ = _select_part(load_torch_file(file), "", file)
        repeated = sorted(set(shard) & set(tensors))
        if repeated:
            raise UserError(f"{file}: holds {shortlist(repeated)}, as an earlier file does; download them again")
        tensors |= shard
    absent = [name for name in names if name not in tensors]
    if absent:
        raise UserError(f"{index}: lists tensors that no file holds: {shortlist(absent)}; download the files again")
    return tensors


def _select_part(content: Any, part: str, file: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a PyTorch file, and the name of the part that they are, if it has parts."""
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not a dict of tensors")
    parts = {key: found for key, value in content.items() if isinstance(value, dict) and (found := _tensors(value))}
    whole = _tensors(content)
    if part:
        if part not in parts:
            raise UserError(f"--part={part}: not in {file}; its parts are {', '.join(map(str, parts)) or 'none'}")
        return parts[part], part
    if whole:
        return whole, ""
    chosen = next((name for name in _PARTS if name in parts), None)
    if chosen is None and len(parts) == 1:
        chosen = next(iter(parts))
    if chosen is None:
        listed = shortlist([str(name) for name in parts]) or "none of tensors"
        raise UserError(f"{file}: which part of it? Name one with --part=NAME: {listed}")
    return parts[chosen], chosen


def _tensors(values: Mapping[Any, Any]) -> dict[str, StoredTensor]:
    return {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, StoredTensor)}


def _unwrapped(
    tensors: Mapping[str, StoredTensor | ScaledTensor], path: Path
) -> dict[str, StoredTensor | ScaledTensor]:
    """The tensors without what wrappers put into their names, and without a module name that all of them start with."""
    names = {name: [word for word in name.split(".") if word not in _WRAPPERS] for name in tensors}
    while True:
        first = {words[0] for words in names.values() if words}
        if len(first) != 1 or not first <= _ENCLOSING or any(len(words) < 2 for words in names.values()):
            break
        names = {name: words[1:] for name, words in names.items()}
    plain: dict[str, str] = {}
    for name, words in names.items():
        other = plain.setdefault(".".join(words), name)
        if other != name:
            raise UserError(f"{path}: {other} and {name} are the same tensor under two names")
    return {short: tensors[name] for short, name in plain.items()}


def _read_settings(file: Path) -> Mapping[str, Any]:
    if not is_file(file):
        return {}
    settings = read_json(file, "download it again, or remove it")
    return settings if isinstance(settings, dict) else {}


def _own_header(file: SafeTensors) -> Mapping[str, Any]:
    header = parse_json(file.metadata.get(HEADER_KEY, "{}"), f"{file.path}: its header's {HEADER_KEY}")
    return header if isinstance(header, dict) else {}
