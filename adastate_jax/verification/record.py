"""What a fixture holds, and what comes of it: checks, and things that cannot be checked."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.quantized import quantize_network
from adastate_jax.models.text import TextConfig
from adastate_jax.models.vae import VAEConfig
from adastate_jax.sharding import make_mesh
from adastate_jax.weights.dit import dit_table
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.slots import load_official

NETWORK_TOLERANCE = 5e-5
ARITHMETIC_TOLERANCE = 1e-6  # of the largest magnitude expected
# Of the largest magnitude expected. The transformer, alone or in rollouts, reaches 0.012; the video autoencoders reach
# 0.027 and the text encoder, whose logits are not divided by √head_dim, 0.052.
BFLOAT16_TOLERANCE = 0.03
BFLOAT16_CODEC_TOLERANCE = 0.1
# The same of the transformer with weights in eight bits, and of what is decoded of it; rollouts reach 0.02 and 0.12.
EIGHT_BIT_TOLERANCES = {"int8": 0.04, "float8": 0.2}


class BrokenFixtureError(Exception):
    """A fixture lacks something that its checks need, or holds it in a wrong form: the file fails."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the networks run: compute dtype, a backend of `models/attention.py`, and the transformer's quantization."""

    dtype: str = "float32"
    attention: str = "xla"
    weights: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """Numbers of ours against a fixture's.

    Attributes:
        case: what is compared.
        pairs: tensor name, expected array (None if the file lacks it) and ours, one or several.
        tolerance: largest error allowed; with `relative`, as a share of the largest magnitude expected in its tensor.
        note: said if the check fails.
    """

    case: str
    pairs: tuple[tuple[str, np.ndarray | None, Any], ...]
    tolerance: float
    relative: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """Something in a fixture that this package cannot check: `covers` are the starts of its tensors' names."""

    case: str
    reason: str
    covers: tuple[str, ...] = ()


Records = Iterator[Check | NotChecked]


class Fixture(Mapping[str, np.ndarray]):
    """One fixture file: tensors and header of a `.safetensors`, or the content of a manifest as its header.

    It remembers what was asked for, so that a tensor which no check looks at does not pass in silence.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path, settings: Settings):
        self.path, self.settings = path, settings
        self.asked: set[str] = set()
        if path.suffix == ".json":
            self._tensors: Mapping[str, np.ndarray] = {}
            self._header = read_json(path)
        else:
            self._tensors = SafeTensors(path)
            self._header = self._tensors.metadata

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor; raises BrokenFixtureError if the file lacks it."""
        if name not in self._tensors:
            raise BrokenFixtureError(f"the file has no {name}")
        self.asked.add(name)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # asking whether it is there is not looking at it

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)

    def header(self, field: str) -> Any:
        """A field of the header; JSON objects inside a `.safetensors` header are decoded."""
        if field not in self._header:
            raise BrokenFixtureError(f"the header has no {field}")
        value = self._header[field]
        return json.loads(value) if self.path.suffix != ".json" else value

    def companion(self, name: str) -> Path:
        """Path of another file of the same folder."""
        return self.path.parent / name

    def weights(self, prefix: str = "w.") -> dict[str, np.ndarray]:
        """The weights under their official names."""
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

    def group(self, case: str, actual: Mapping[str, Any], tolerance: float, relative: bool = False) -> Check:
        """A check of several tensors; `actual` maps their names, without `out.`, to our arrays."""
        pairs = []
        for name, ours in actual.items():
            name = f"out.{name}"
            pairs.append((name, self[name] if name in self._tensors else None, ours))
        return Check(case, tuple(pairs), tolerance, relative)

    def networks(self, case: str, actual: Mapping[str, Any], bfloat16: float = BFLOAT16_TOLERANCE) -> Check:
        """A check of several tensors at the tolerance of networks in this run's dtype."""
        if self.settings.dtype == "float32":
            return self.group(case, actual, NETWORK_TOLERANCE)
        return self.group(case, actual, bfloat16, relative=True)

    def network(self, name: str, actual: Any) -> Check:
        """A check of `out.{name}`, from the transformer."""
        if self.settings.weights:
            return self.group(name, {name: actual}, EIGHT_BIT_TOLERANCES[self.settings.weights], relative=True)
        return self.networks(name, {name: actual})

    def codec(self, name: str, actual: Any) -> Check:
        """A check of `out.{name}`, from the text encoder or a video autoencoder."""
        return self.networks(name, {name: actual}, BFLOAT16_CODEC_TOLERANCE)

    def decoded(self, name: str, actual: Any) -> Check:
        """A check of `out.{name}`, that a video autoencoder makes of what the transformer generates."""
        return self.network(name, actual) if self.settings.weights else self.codec(name, actual)

    def arithmetic(self, name: str, actual: Any) -> Check:
        """A check of `out.{name}` at the tolerance of schedules and losses, which run in float32 whatever the dtype."""
        return self.group(name, {name: actual}, ARITHMETIC_TOLERANCE, relative=True)

    def exact(self, name: str, actual: Any) -> Check:
        """A check of the whole numbers `out.{name}`."""
        return self.group(name, {name: actual}, 0.0)


def faultless(case: str, faults: Sequence[str]) -> Check:
    """A check that passes if the list of faults is empty; its error is their number."""
    return Check(case, (("faults", np.zeros(()), len(faults)),), 0.0, note="; ".join(faults[:3]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, truncated or holds no object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy it again")
    return value


# The fixtures' networks are so small that compiling them is nearly all of the run time. These save five sixths of it.
_FAST_CPU_COMPILER = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    _FAST_CPU_COMPILER["xla_cpu_use_fusion_emitters"] = False  # later ones have no others


def compiled(function: Callable, **options: Any) -> Callable:
    """`jax.jit` that compiles fast on CPU."""

    @functools.cache
    def jitted():  # not before the first call: asking for the backend starts it
        on_cpu = jax.default_backend() == "cpu"
        return jax.jit(function, compiler_options=_FAST_CPU_COMPILER if on_cpu else None, **options)

    return lambda *arguments, **keywords: jitted()(*arguments, **keywords)


def dit_config(config: Mapping[str, Any], settings: Settings = Settings()) -> DiTConfig:
    """Our config of an official WanModel config."""
    return DiTConfig(
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config["text_dim"],
        text_length=config["text_len"],
        freq_dim=config["freq_dim"],
        patch_size=tuple(config["patch_size"]),
        eps=config["eps"],
        qk_norm=config["qk_norm"],
        cross_attn_norm=config["cross_attn_norm"],
        dtype=settings.dtype,
        attention=settings.attention,
        quantization=settings.weights,
    )


def text_config(config: Mapping[str, Any], settings: Settings = Settings()) -> TextConfig:
    """Our config of an official T5Encoder config."""
    if config["shared_pos"]:
        raise BrokenFixtureError("shared_pos must be false: every layer of UMT5 has a position table of its own")
    return TextConfig(
        vocab_size=config["vocab"],
        dim=config["dim"],
        dim_attention=config["dim_attn"],
        ffn_dim=config["dim_ffn"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        num_buckets=config["num_buckets"],
        dtype=settings.dtype,
    )


def vae_config(config: Mapping[str, Any], settings: Settings = Settings()) -> VAEConfig:
    """Our config of an official WanVAE_ config."""
    return VAEConfig(
        dim=config["dim"],
        latent_channels=config["z_dim"],
        dim_multipliers=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
        latents_mean=tuple(config["latents_mean"]),
        latents_std=tuple(config["latents_std"]),
        dtype=settings.dtype,
    )


def abstract(network: Callable[..., Any], config: Any, **options: Any) -> Any:
    """Shapes and dtypes of a network's leaves; `options` go to the network."""
    return jax.eval_shape(lambda key: network(config, rngs=nnx.Rngs(key), **options), jax.random.key(0))


def load_dit(config: DiTConfig, tensors: Mapping[str, np.ndarray], source: str) -> DiT:
    """The transformer with these official weights, quantised if its configuration says so."""
    plain = dataclasses.replace(config, quantization="")
    network = load_official(abstract(DiT, plain), dit_table(plain), tensors, source)
    return quantize_network(network, config.quantization, make_mesh()) if config.quantization else network


def channels_last(latents: np.ndarray, axis: int) -> np.ndarray:
    """Moves the channel axis of a fixture's latents behind the others."""
    return np.moveaxis(latents, axis, -1)


def channels_first(latents: jax.Array, axis: int) -> np.ndarray:
    """Moves our channel axis back to where the fixture has it."""
    return np.moveaxis(np.asarray(latents), -1, axis)


def padded(text: np.ndarray, length: int) -> np.ndarray:
    """Text embeddings [B, T, D] with zero rows appended up to `length`."""
    return np.pad(text, ((0, 0), (0, length - text.shape[1]), (0, 0)))
