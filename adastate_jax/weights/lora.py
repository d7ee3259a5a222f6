"""Low-rank adapters: finds the pairs of factors in a file and adds their products to the weights they belong to."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adastate_jax.errors import UserError, shortlist
from adastate_jax.weights.identify import Network
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.sources import open_source
from adastate_jax.weights.tensors import FLOATING, StoredTensor, Tensor

# The factor at the input is `.lora_A.weight` (peft, with or without the adapter's name) or `.lora_down.weight` (kohya).
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|down|up)(?:\.[^.]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# What tools put in front of a module's name; the last one comes with underscores in the place of all dots.
_PREFIXES = ("base_model.", "model.", "diffusion_model.", "transformer.", "generator.", "lora_unet_")


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Factors of one weight's change: scale · up [outputs, rank] · down [rank, inputs]."""

    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A weight [outputs, inputs] with its change added, in float32, as rows are read."""

    base: Tensor
    pair: _Pair

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
        """Part [stop − start, inputs] of the sum, float32."""
        up, down = self.pair.up.rows(start, stop), self.pair.down.read()
        change = up.astype(np.float32) @ down.astype(np.float32)
        return self.base.rows(start, stop).astype(np.float32) + np.float32(self.pair.scale) * change


def merge_lora(network: Network, path: str | Path, alpha: float | None = None) -> Network:
    """A network with an adapter's changes added to its weights, in float32, when they are read.

    Args:
        network: the base.
        path: adapter file or folder: `lora_A`/`lora_B` or `lora_down`/`lora_up`, under official or diffusers' names.
        alpha: a change is scaled by alpha / rank. None takes the file's `.alpha` tensors or the `adapter_config.json`
            beside it; where there are none, alpha is the rank.

    Raises:
        UserError: the adapter cannot be read, has a factor without its partner or of a wrong shape, a tensor that is
            no factor, or one for a weight that the base has not.
    """
    source = open_source(path, config_name="adapter_config.json")
    factors: dict[str, dict[str, StoredTensor]] = {}
    scalars: dict[str, StoredTensor] = {}
    unknown = []
    for name, tensor in source.tensors.items():
        if match := _FACTOR.fullmatch(name):
            side = "down" if match["factor"] in ("A", "down") else "up"
            factors.setdefault(match["module"], {})[side] = tensor
        elif match := _ALPHA.fullmatch(name):
            scalars[match["module"]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors are no factors of a LoRA: {shortlist(unknown)}")

    by_module = _base_names(network)
    merged: dict[str, MergedTensor] = {}
    for module, pair in factors.items():
        target = _target(module, by_module)
        if target is None:
            raise UserError(f"{path}: {module} is no weight of the base, a {network.title}")
        if target in merged:
            raise UserError(f"{path}: changes {target} twice, the second time as {module}")
        if set(pair) != {"down", "up"}:
            raise UserError(f"{path}: {module} has one factor without the other; download it again")
        base = network.tensors[target]
        merged[target] = MergedTensor(
            base, _checked_pair(path, module, pair, base.shape, alpha, scalars, source.settings)
        )
    return dataclasses.replace(network, tensors={**network.tensors, **merged})


def _base_names(network: Network) -> dict[str, str]:
    """Module name, in every known set of names and also with underscores for dots, → official name of its weight."""
    found = {}
    for naming in KINDS[network.kind].namings.values():
        for official in network.slots:
            if official.endswith(".weight"):
                module = naming.from_official(official, network.config).removesuffix(".weight")
                found[module] = found[module.replace(".", "_")] = official
    return found


def _target(module: str, by_module: Mapping[str, str]) -> str | None:
    while module not in by_module:
        prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None)
        if prefix is None:
            return None
        module = module.removeprefix(prefix)
    return by_module[module]


def _checked_pair(
    path: str | Path,
    module: str,
    factors: Mapping[str, StoredTensor],
    shape: tuple[int, ...],
    alpha: float | None,
    scalars: Mapping[str, StoredTensor],
    settings: Mapping[str, Any],
) -> _Pair:
    down, up = factors["down"], factors["up"]
    fits = len(shape) == len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1] > 0
    if not fits or (up.shape[0], down.shape[1]) != shape:
        raise UserError(
            f"{path}: the factors of {module} have shapes {list(up.shape)} and {list(down.shape)}, the weight has "
            f"{list(shape)}"
        )
    if down.dtype not in FLOATING or up.dtype not in FLOATING:
        raise UserError(f"{path}: the factors of {module} have dtypes {up.dtype.name} and {down.dtype.name}")
    rank = down.shape[0]
    if alpha is None and module in scalars:
        if scalars[module].shape not in ((), (1,)):
            raise UserError(f"{path}: {module}.alpha has shape {list(scalars[module].shape)}, it must be one number")
        alpha = float(scalars[module].read().reshape(()))
    if alpha is None and "lora_alpha" in settings:
        alpha = settings["lora_alpha"]
        if settings.get("use_rslora") or settings.get("use_dora") or settings.get("alpha_pattern"):
            raise UserError(f"{path}: its adapter_config.json is not of a plain LoRA: {json.dumps(settings)[:200]}")
    if alpha is None:
        alpha = rank
    if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
        raise UserError(f"{path}: alpha must be a number, got {alpha!r}")
    return _Pair(down, up, alpha / rank)
