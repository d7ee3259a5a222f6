"""Adapters in files: finds what one changes, under the names of every tool, and adds it to the weights it belongs to;
and writes one that these tools read.

A change is a pair of factors (LoRA), or a whole difference of a weight, a bias, a norm's gain or a modulation, as
adapters have that were extracted from a distilled model (`.diff`, `.diff_b`, `.diff_m`).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adastate_jax.errors import UserError, shortlist, shown
from adastate_jax.models.adapters import Adapters
from adastate_jax.models.dit import DiTConfig
from adastate_jax.texts import parse_json
from adastate_jax.weights.identify import Network
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.sources import Source, open_source
from adastate_jax.weights.tensors import FLOATING, Tensor

# The factor at the input is called `lora_A.weight` (peft, with or without the adapter's name), `lora_down.weight`
# (kohya) or `lora.down.weight` (diffusers); a bias goes with the one at the output.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora(?:_(?P<peft>A|B)(?:\.[^.]+)?|[_.](?P<kohya>down|up))\.(?P<leaf>weight|bias)"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# A whole difference, and which parameter of the module it is of; LyCORIS says `w_norm` and `b_norm`.
_DIFFERENCE = re.compile(r"(?P<module>.+)\.(?P<leaf>diff|diff_b|diff_m|w_norm|b_norm)")
_LEAVES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias", "diff_m": "modulation"}
# What changes weights in other ways than by addition.
_OTHER = re.compile(r".+\.(?:lora_mid\.|dora_scale|lora_magnitude_vector|hada_|lokr_|oft_|set_weight|reshape_weight).*")
# What tools put in front of a module's name; those that end in an underscore have underscores for all dots.
_PREFIXES = (
    *("base_model.", "model.", "diffusion_model.", "transformer.", "generator.", "unet.", "pipe.", "dit."),
    *("lora_unet__", "lora_unet_", "lora_transformer_"),
)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Factors of a weight's change: scale · up [outputs, rank, 1…] · down [rank, inputs…]."""

    down: Tensor
    up: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> np.ndarray:
        up, down = self.up.rows(start, stop), self.down.rows(0, self.down.shape[0])
        rank = down.shape[0]
        change = up.astype(np.float32).reshape(-1, rank) @ down.astype(np.float32).reshape(rank, -1)
        return np.float32(self.scale) * change.reshape(stop - start, *down.shape[1:])


@dataclasses.dataclass(frozen=True)
class _Difference:
    """A whole change: scale · difference, of the weight's shape."""

    difference: Tensor
    scale: float

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.float32(self.scale) * self.difference.rows(start, stop).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A weight [outputs, ...] with its changes added, in float32, as rows are read."""

    base: Tensor
    changes: tuple[_Pair | _Difference, ...]

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Part [stop − start, ...] of the sum, float32."""
        total = self.base.rows(start, stop).astype(np.float32)
        for change in self.changes:
            total = total + change.rows(start, stop).reshape(total.shape)
        return total


def merge_lora(network: Network, path: str | Path, alpha: float | None = None, strength: float = 1.0) -> Network:
    """A network with an adapter's changes added to its weights, in float32, when they are read.

    Args:
        network: the base; it may be merged already.
        path: adapter file or folder: pairs of factors, `lora_A`/`lora_B`, `lora_down`/`lora_up` or
            `lora.down`/`lora.up`, and differences `diff`, `diff_b`, `diff_m`; under official or diffusers' names.
        alpha: the change of a pair is scaled by alpha / rank. None takes the file's `.alpha` tensors, its header or
            the `adapter_config.json` beside it; where there are none, alpha is the rank.
        strength: all changes are scaled by it.

    Raises:
        UserError: the adapter cannot be read, has a factor without its partner or of a wrong shape, a number that is
            not finite, a tensor that is no change of this kind, or one for a weight that the base has not.
    """
    source = open_source(path, config_name="adapter_config.json")
    factors: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, Tensor] = {}
    differences: list[tuple[str, str, Tensor]] = []
    unknown = []
    for name, tensor in source.tensors.items():
        if _OTHER.fullmatch(name):
            raise UserError(f"{path}: {name} is not of a plain LoRA; merge it with the tool that made it")
        if match := _FACTOR.fullmatch(name):
            side = "down" if match["peft"] == "A" or match["kohya"] == "down" else "up"
            side = side if match["leaf"] == "weight" else f"{side} bias"
            if side in factors.setdefault(match["module"], {}):
                raise UserError(f"{path}: changes {match['module']} twice, the second time as {name}")
            factors[match["module"]][side] = tensor
        elif match := _DIFFERENCE.fullmatch(name):
            differences.append((match["module"], _LEAVES[match["leaf"]], tensor))
        elif match := _ALPHA.fullmatch(name):
            scalars[match["module"]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors are no changes of an adapter: {shortlist(unknown)}")
    stray = [module for module in scalars if module not in factors]
    if stray and factors:
        raise UserError(f"{path}: has an alpha, but no factors, for {shortlist(stray)}; download it again")

    names = _base_names(network)
    changes: dict[str, list[_Pair | _Difference]] = {}
    origins: dict[tuple[str, type], str] = {}

    def add(target: str, module: str, change: _Pair | _Difference) -> None:
        if origins.setdefault((target, type(change)), module) != module:
            raise UserError(f"{path}: changes {target} twice, the second time as {module}")
        changes.setdefault(target, []).append(change)

    for module, found in factors.items():
        if not found.keys() >= {"down", "up"} or "down bias" in found:
            raise UserError(f"{path}: {module} has one factor without the other; download it again")
        scale = strength * _scale(source, module, found["down"], alpha, scalars)
        target = _target(path, module, "weight", names, network)
        pair = _Pair(found["down"], found["up"], scale)
        _check_pair(path, module, pair, network.tensors[target].shape)
        add(target, module, pair)
        if "up bias" in found:
            target = _target(path, module, "bias", names, network)
            add(target, module, _difference(path, f"{module}'s bias", found["up bias"], scale, network.tensors[target]))
    for module, leaf, tensor in differences:
        target = _target(path, module, leaf, names, network)
        add(target, module, _difference(path, f"{module}'s {leaf}", tensor, strength, network.tensors[target]))
    merged = {target: MergedTensor(network.tensors[target], tuple(found)) for target, found in changes.items()}
    return dataclasses.replace(network, tensors={**network.tensors, **merged})


# What tools that read a set of names want in front of each.
_PUBLISHED_PREFIX = {"official": "diffusion_model", "diffusers": "transformer"}


def published_factors(adapters: Adapters, config: DiTConfig, names: str) -> dict[str, np.ndarray]:
    """A transformer's adapters under published names: `….lora_A.weight` and `….lora_B.weight` of every layer, float32.

    The scale is in the second factor, so that alpha is the rank, for which no file needs to say anything.

    Args:
        names: `official` (as ComfyUI reads them) or `diffusers`.
    """
    kind, found = KINDS["transformer"], {}
    for official, slot in kind.slots(config).items():
        adapter = adapters.get(slot.entry.path.removesuffix("/kernel")) if slot.entry.path.endswith("/kernel") else None
        if adapter is None:
            continue
        down, up = (np.asarray(x if slot.layer is None else x[slot.layer]) for x in (adapter.down, adapter.up))
        module = kind.namings[names].from_official(official, config).removesuffix(".weight")
        first = np.ascontiguousarray(slot.entry.to_official(down))
        second = np.float32(adapter.scale) * up.T
        found[f"{_PUBLISHED_PREFIX[names]}.{module}.lora_A.weight"] = first
        found[f"{_PUBLISHED_PREFIX[names]}.{module}.lora_B.weight"] = second.reshape(
            *second.shape, *(1,) * (first.ndim - 2)
        )
    return found


def _base_names(network: Network) -> dict[str, str]:
    """Every tensor's name, in every known set of names and also with underscores for dots, → its official name."""
    found = {}
    for naming in KINDS[network.kind].namings.values():
        for official in network.slots:
            name = naming.from_official(official, network.config)
            module, _, leaf = name.rpartition(".")
            found[name] = found[f"{module.replace('.', '_')}.{leaf}"] = official
            if leaf == "scale_shift_table":  # a parameter of a block, which official names call its modulation
                found[f"{module}.modulation"] = found[f"{module.replace('.', '_')}.modulation"] = official
    return found


def _target(path: str | Path, module: str, leaf: str, names: Mapping[str, str], network: Network) -> str:
    """Official name of the tensor that a change is of: a leaf of a module, or what the module's name says itself."""
    name = module
    while f"{name}.{leaf}" not in names and not (leaf == "weight" and name in names):
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            raise UserError(
                f"{path}: {module} has a change of its {leaf}, but is no part of the base, a {network.title}; is it "
                "made for another network, from pictures say?"
            )
        name = name.removeprefix(prefix)
    return names.get(f"{name}.{leaf}") or names[name]


def _difference(path: str | Path, what: str, tensor: Tensor, scale: float, base: Tensor) -> _Difference:
    if tensor.shape != base.shape:
        raise UserError(f"{path}: the change of {what} has shape {list(tensor.shape)}, the base {list(base.shape)}")
    _check_numbers(path, what, tensor)
    return _Difference(tensor, scale)


def _check_pair(path: str | Path, module: str, pair: _Pair, shape: tuple[int, ...]) -> None:
    down, up = pair.down, pair.up
    fits = len(up.shape) >= 2 <= len(down.shape) and down.shape[0] == up.shape[1] > 0
    if not fits or (up.shape[0], *down.shape[1:]) != shape or any(size != 1 for size in up.shape[2:]):
        raise UserError(
            f"{path}: the factors of {module} have shapes {list(up.shape)} and {list(down.shape)}, the weight has "
            f"{list(shape)}"
        )
    for tensor in (down, up):
        _check_numbers(path, f"a factor of {module}", tensor)


def _check_numbers(path: str | Path, what: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise UserError(f"{path}: {what} has dtype {tensor.dtype.name}; it needs floating numbers")
    if not np.isfinite(tensor.rows(0, tensor.shape[0]).astype(np.float32)).all():
        raise UserError(f"{path}: {what} holds NaN or infinity; download it again")


def _scale(source: Source, module: str, down: Tensor, alpha: float | None, scalars: Mapping[str, Tensor]) -> float:
    """What a pair's product is scaled by."""
    rank, settings = down.shape[0] if down.shape else 0, _settings(source)
    root = False
    if alpha is None and module in scalars:
        scalar = scalars[module]
        if scalar.shape not in ((), (1,)):
            raise UserError(f"{source.path}: {module}.alpha has shape {list(scalar.shape)}, it must be one number")
        alpha = float(scalar.read().reshape(()))
    if alpha is None and "lora_alpha" in settings:
        alpha, root = settings["lora_alpha"], bool(settings.get("use_rslora"))
        if any(settings.get(name) for name in ("use_dora", "alpha_pattern", "fan_in_fan_out", "modules_to_save")):
            raise UserError(f"{source.path}: its adapter_config.json is not of a plain LoRA: {shown(settings, 200)}")
    if alpha is None:
        alpha = rank
    if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
        raise UserError(f"{source.path}: alpha must be a number, got {shown(alpha)}")
    return alpha / (math.sqrt(max(rank, 1)) if root else max(rank, 1))


def _settings(source: Source) -> Mapping[str, Any]:
    """What peft says of the adapter: the file beside it, or the header in which diffusers keeps that."""
    if "lora_adapter_metadata" not in source.metadata:
        return source.settings
    values = parse_json(source.metadata["lora_adapter_metadata"], f"{source.path}: its lora_adapter_metadata")
    if not isinstance(values, dict):
        raise UserError(f"{source.path}: its lora_adapter_metadata is no group of fields")
    return {name.removeprefix("transformer."): value for name, value in values.items()}
