"""What other packers put into files of weights: tokenizers, scales of float8 weights, several networks in one file.

ComfyUI's files hold them, and those of tools that write for it. Source: Comfy-Org/ComfyUI QUANTIZATION.md; the names of
earlier files (`scaled_fp8`, `scale_weight`, `scale_input`) are as published in Comfy-Org/Wan_2.1_ComfyUI_repackaged.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adastate_jax.errors import UserError, shortlist
from adastate_jax.texts import parse_json
from adastate_jax.weights.tensors import FLOAT8, FLOATING, StoredTensor

# Networks of a file that holds a whole model, by what their names start with.
_PARTS = {
    "diffusion_model": "model.diffusion_model.",
    "text_encoder": "text_encoders.umt5xxl.transformer.",
    "vae": "vae.",
    "first_stage_model": "first_stage_model.",
}
# A tokenizer beside the weights, a mark that a file's float8 weights have scales, and scales of activations, which are
# of no use to weights that are multiplied out.
_TOKENIZER = r"(?:.*\.)?spiece_model"
_IDLE = re.compile(rf"{_TOKENIZER}|(?:.*\.)?scaled_fp8|.+\.(?:scale_input|input_scale)")
_SCALE = re.compile(r"(?P<module>.+)\.(?:scale_weight|weight_scale)")
_FORMAT = re.compile(r"(?P<module>.+)\.comfy_quant")


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A float8 weight [outputs, ...] times its scale, a number or one per output, in float32, as rows are read."""

    base: StoredTensor
    scale: np.ndarray

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def __getitem__(self, rows: slice) -> "ScaledTensor":
        """Rows of the leading axis, unread."""
        return ScaledTensor(self.base[rows], self.scale if self.scale.size == 1 else self.scale[rows])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Part [stop − start, ...] of the product, float32."""
        part = self[start:stop]
        return part.base.read().astype(np.float32) * part.scale.reshape(-1, *[1] * (len(self.shape) - 1))


def tokenizer_of(tensors: Mapping[str, StoredTensor]) -> str:
    """The name under which a file holds a tokenizer beside its weights, or nothing; `unpacked` leaves it out."""
    found = (name for name, tensor in tensors.items() if re.fullmatch(_TOKENIZER, name) and tensor.dtype == np.uint8)
    return next(found, "")


def unpacked(
    tensors: Mapping[str, StoredTensor], part: str, path: Path
) -> tuple[dict[str, StoredTensor | ScaledTensor], str]:
    """The weights of one network, and the part of the file that they are, if it has parts.

    Args:
        tensors: of the file, by name.
        part: which network of a file of several; empty takes the transformer.
        path: what to name in errors.

    Raises:
        UserError: the part is not there; a float8 weight lacks its scale, or has one that it cannot have.
    """
    parts = {key: start for key, start in _PARTS.items() if any(name.startswith(start) for name in tensors)}
    taken = ""
    if len(parts) > 1:
        taken = part or next(iter(parts))
        if taken not in parts:
            raise UserError(f"--part={part}: not in {path}; its parts are {', '.join(parts)}")
        start = parts[taken]
        tensors = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return _multiplied_out(tensors, path), taken


def _multiplied_out(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor | ScaledTensor]:
    is_scaled = any(name.rpartition(".")[2] == "scaled_fp8" for name in tensors)
    weights: dict[str, StoredTensor | ScaledTensor] = {}
    scales: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if match := _SCALE.fullmatch(name):
            scales[f"{match['module']}.weight"] = tensor
        elif match := _FORMAT.fullmatch(name):
            _check_format(name, tensor)
        elif not (_IDLE.fullmatch(name) and (tensor.dtype in (*FLOATING, np.uint8))):
            weights[name] = tensor
    stray = [name for name in scales if name not in weights or weights[name].dtype not in FLOAT8]
    if stray:
        raise UserError(f"{path}: has scales, but no float8 weights, for {shortlist(stray)}; download it again")
    bare = [name for name, tensor in weights.items() if tensor.dtype in FLOAT8 and name not in scales]
    if bare and (scales or is_scaled):
        raise UserError(f"{path}: its float8 weights are scaled, but scales are missing: {shortlist(bare)}")
    return weights | {name: ScaledTensor(weights[name], _scale(name, weights[name], scales[name])) for name in scales}


def _scale(name: str, weight: StoredTensor, tensor: StoredTensor) -> np.ndarray:
    rows = weight.shape[0] if weight.shape else 1
    if tensor.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or tensor.dtype not in FLOATING:
        raise UserError(
            f"{tensor.path}: {name} has a scale of shape {list(tensor.shape)} and dtype {tensor.dtype.name}; one "
            "floating number, or one per output, can be read: take the weights in another precision"
        )
    scale = tensor.read().astype(np.float32).reshape(-1)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise UserError(f"{tensor.path}: the scale of {name} is no positive number; download it again")
    return scale


def _check_format(name: str, tensor: StoredTensor) -> None:
    """Refuses a description of quantised weights of which this package cannot know what they mean."""
    try:
        settings = parse_json(bytes(tensor.read()[:4096]).decode(), name) if tensor.dtype == np.uint8 else None
    except (UnicodeDecodeError, UserError):
        settings = None
    kind = settings.get("format") if isinstance(settings, dict) else None
    if kind not in ("float8_e4m3fn", "float8_e5m2"):
        raise UserError(
            f"{tensor.path}: {name} says that weights are quantised as {str(kind)[:40]!r}; float8_e4m3fn and "
            "float8_e5m2 can be read: take the weights in another precision"
        )
