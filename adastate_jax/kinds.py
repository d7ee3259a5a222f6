"""The networks that checkpoints are published of: their tensors' names, and what a set of names and shapes is."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adastate_jax import weights
from adastate_jax.config import build
from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.text import TextConfig, TextEncoder
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.sources import Source
from adastate_jax.tensors import BFLOAT16, FLOATING, StoredTensor, Tensor, row_blocks
from adastate_jax.weights import Slot, mismatches, official_slots, shortlist


@dataclasses.dataclass(frozen=True)
class Naming:
    """A published set of names.

    Attributes:
        marks: tensors of which it has at least one, and no other set has any.
        stem: what a file of such tensors is called, without `.safetensors`.
        to_official: (names in the file) → official name of each.
        from_official: (official name, configuration) → name.
        class_names: what a `config.json` beside the file may call the network.
        settings: fields of that `config.json`: their name → attribute of our configuration.
        others: configuration → what else it says; with neither there is no such file.
    """

    marks: tuple[str, ...]
    stem: str
    to_official: Callable[[Sequence[str]], dict[str, str]] = lambda names: {name: name for name in names}
    from_official: Callable[[str, Any], str] = lambda name, _: name
    class_names: tuple[str, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: Callable[[Any], dict[str, Any]] = lambda config: {}

    def published_config(self, config: Any) -> dict[str, Any]:
        """Content of the `config.json` that a PyTorch network of these names is built from; {} where it has none."""
        return self.others(config) | {theirs: getattr(config, ours) for theirs, ours in self.settings.items()}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network that checkpoints are published of.

    Attributes:
        title: for people.
        network, config, table: its class, its configuration's and its table of official tensors.
        infer: official shapes → fields of the configuration that follow from them.
        namings: sets of names by what `--names` calls them.
        unused: official names that a larger checkpoint has besides.
    """

    title: str
    network: Callable[..., Any]
    config: type
    table: Callable[[Any], list[weights.Entry]]
    infer: Callable[["_Shapes"], dict[str, Any]]
    namings: Mapping[str, Naming]
    unused: str = "(?!)"

    def abstract(self, config: Any) -> Any:
        """Shapes and dtypes of the network's leaves."""
        return _abstract(self.network, config)

    def slots(self, config: Any) -> dict[str, Slot]:
        """The official tensors that the network's leaves are made of."""
        return official_slots(self.abstract(config), self.table(config))


@functools.lru_cache(maxsize=8)
def _abstract(network: Callable[..., Any], config: Any) -> Any:
    # Tracing the constructors of the video autoencoders takes seconds.
    return jax.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))


# --- sizes from shapes ------------------------------------------------------------------------------------------------


class _Shapes:
    """Looks up shapes while a configuration is inferred; what is not there or has other axes is an error by name."""

    def __init__(self, tensors: Mapping[str, Tensor], source: Path):
        self._shapes, self._source = {name: tensor.shape for name, tensor in tensors.items()}, source

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Shape of a tensor of so many axes."""
        if name not in self._shapes:
            raise UserError(f"{self._source}: {name} is missing; download the checkpoint again")
        shape = self._shapes[name]
        if len(shape) != axes or not all(shape):
            raise UserError(f"{self._source}: {name} has shape {list(shape)}, it needs {axes} axes, none of size 0")
        return shape

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern's group finds in the names."""
        numbers = [int(found[1]) for name in self._shapes if (found := re.match(pattern, name))]
        # A stray number must not make a network of a billion layers; those without tensors are reported as missing.
        return min(max(numbers, default=-1) + 1, len(self._shapes))


def _infer_dit(shapes: _Shapes) -> dict[str, Any]:
    dim, in_channels, *patch = shapes.shape("patch_embedding.weight", 5)
    head = shapes.shape("head.head.weight", 2)[0]
    return {
        "dim": dim,
        "in_channels": in_channels,
        "patch_size": tuple(patch),
        "out_channels": head // int(np.prod(patch)),
        "ffn_dim": shapes.shape("blocks.0.ffn.0.weight", 2)[0],
        "text_dim": shapes.shape("text_embedding.0.weight", 2)[1],
        "freq_dim": shapes.shape("time_embedding.0.weight", 2)[1],
        "num_layers": shapes.count(r"blocks\.(\d{1,9})\.self_attn\.q\.weight"),
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes,
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
    }


def _infer_text(shapes: _Shapes) -> dict[str, Any]:
    vocab_size, dim = shapes.shape("token_embedding.weight", 2)
    num_buckets, num_heads = shapes.shape("blocks.0.pos_embedding.embedding.weight", 2)
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "dim_attention": shapes.shape("blocks.0.attn.q.weight", 2)[0],
        "ffn_dim": shapes.shape("blocks.0.ffn.fc1.weight", 2)[0],
        "num_heads": num_heads,
        "num_buckets": num_buckets,
        "num_layers": shapes.count(r"blocks\.(\d{1,9})\.attn\.q\.weight"),
    }


def _infer_vae(shapes: _Shapes) -> dict[str, Any]:
    dim = shapes.shape("encoder.conv1.weight", 5)[0]
    widths: list[list[int]] = [[]]  # of the residual blocks of each level
    temporal: list[bool] = []
    for block in range(shapes.count(r"encoder\.downsamples\.(\d{1,9})\.")):
        name = f"encoder.downsamples.{block}"
        if f"{name}.resample.1.weight" in shapes:
            temporal.append(f"{name}.time_conv.weight" in shapes)
            widths.append([])
        else:
            widths[-1].append(shapes.shape(f"{name}.residual.6.weight", 5)[0])
    return {
        "dim": dim,
        "latent_channels": shapes.shape("conv2.weight", 5)[0],
        "dim_multipliers": tuple(level[-1] // dim if level else 0 for level in widths),
        "num_res_blocks": len(widths[0]),
        "temporal_downsample": tuple(temporal),
    }


def _infer_tiny_vae(shapes: _Shapes) -> dict[str, Any]:
    width = shapes.shape("encoder.0.weight", 4)[0]
    pools = [shapes.shape(f"encoder.{2 + 5 * level}.conv.weight", 4)[1] for level in range(3)]
    for level in range(3):
        shapes.shape(f"decoder.{7 + 6 * level}.conv.weight", 4)  # of any number of rows, see `tiny_vae_tensors`
    return {
        "latent_channels": shapes.shape("decoder.1.weight", 4)[1],
        "widths": tuple(shapes.shape(f"decoder.{3 + 6 * level}.conv.0.weight", 4)[0] for level in range(3)),
        "temporal_downsample": tuple(inputs == 2 * width for inputs in pools),
    }


# --- the kinds --------------------------------------------------------------------------------------------------------


def _vae_names(names: Sequence[str]) -> dict[str, str]:
    """Official names of diffusers' AutoencoderKLWan; how deep its levels are shows in them."""
    found = (re.match(r"decoder\.up_blocks\.\d+\.resnets\.(\d{1,9})\.", name) for name in names)
    depth = max((int(match[1]) for match in found if match), default=2)
    return {name: weights.vae_name_from_diffusers(name, depth) for name in names}


# Of the fields that the two transformers' settings share, our name is theirs.
_DIT_SETTINGS = {
    name: name for name in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
}

KINDS = {
    "transformer": Kind(
        "Wan2.1 transformer",
        DiT,
        DiTConfig,
        weights.dit_table,
        _infer_dit,
        {
            "official": Naming(
                ("blocks.0.self_attn.q.weight", "head.head.weight"),
                "diffusion_pytorch_model",
                class_names=("WanModel", "CausalWanModel"),
                settings=_DIT_SETTINGS
                | {
                    "in_dim": "in_channels",
                    "out_dim": "out_channels",
                    "dim": "dim",
                    "num_heads": "num_heads",
                    "text_len": "text_length",
                    "qk_norm": "qk_norm",
                },
                others=lambda _: {"_class_name": "WanModel", "model_type": "t2v"},
            ),
            "diffusers": Naming(
                ("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"),
                "diffusion_pytorch_model",
                lambda names: {name: weights.dit_name_from_diffusers(name) for name in names},
                lambda name, _: weights.dit_name_to_diffusers(name),
                ("WanTransformer3DModel",),
                settings=_DIT_SETTINGS
                | {
                    "in_channels": "in_channels",
                    "out_channels": "out_channels",
                    "num_attention_heads": "num_heads",
                    "attention_head_dim": "head_dim",
                },
                others=lambda _: {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads"},
            ),
        },
    ),
    "text_encoder": Kind(
        "UMT5 text encoder",
        TextEncoder,
        TextConfig,
        weights.text_table,
        _infer_text,
        {
            "official": Naming(
                ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"), "models_t5_umt5-xxl-enc"
            ),
            "diffusers": Naming(
                ("encoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
                "model",
                lambda names: {name: weights.text_name_from_transformers(name) for name in names},
                lambda name, _: weights.text_name_to_transformers(name),
                ("UMT5EncoderModel", "UMT5Model", "UMT5ForConditionalGeneration"),
                settings={
                    "vocab_size": "vocab_size",
                    "d_model": "dim",
                    "d_ff": "ffn_dim",
                    "num_layers": "num_layers",
                    "num_heads": "num_heads",
                    "relative_attention_num_buckets": "num_buckets",
                    "relative_attention_max_distance": "max_distance",
                    "layer_norm_epsilon": "eps",
                    "dtype": "param_dtype",
                },
                others=lambda config: {
                    "architectures": ["UMT5EncoderModel"],
                    "d_kv": config.dim_attention // config.num_heads,
                    "model_type": "umt5",
                    "feed_forward_proj": "gated-gelu",
                    "is_encoder_decoder": True,
                },
            ),
        },
        unused=r"decoder\.|lm_head\.",
    ),
    "vae": Kind(
        "Wan2.1 video autoencoder",
        VAE,
        VAEConfig,
        weights.vae_table,
        _infer_vae,
        {
            "official": Naming(("encoder.downsamples.0.residual.0.gamma", "decoder.head.0.gamma"), "Wan2.1_VAE"),
            "diffusers": Naming(
                ("quant_conv.weight", "decoder.norm_out.gamma"),
                "diffusion_pytorch_model",
                _vae_names,
                lambda name, config: weights.vae_name_to_diffusers(name, config.num_res_blocks),
                ("AutoencoderKLWan",),
                settings={
                    "base_dim": "dim",
                    "z_dim": "latent_channels",
                    "dim_mult": "dim_multipliers",
                    "num_res_blocks": "num_res_blocks",
                    "temperal_downsample": "temporal_downsample",
                    "latents_mean": "latents_mean",
                    "latents_std": "latents_std",
                },
                others=lambda _: {"_class_name": "AutoencoderKLWan"},
            ),
        },
    ),
    "tiny_vae": Kind(
        "TAEW2.1 tiny video autoencoder",
        TinyVAE,
        TinyVAEConfig,
        weights.tiny_vae_table,
        _infer_tiny_vae,
        {"official": Naming(("decoder.3.conv.0.weight", "encoder.4.conv.0.weight"), "taew2_1")},
    ),
}


# --- identification ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Network:
    """A network whose weights can be read: nothing is missing, left over or misshapen.

    Attributes:
        kind: key of `KINDS`.
        config: its configuration; `param_dtype` is the dtype that holds all of its weights.
        slots: official name of each tensor → where it goes, in the order of our leaves and their layers.
        tensors: by official name, unread; in the shapes of `slots`.
    """

    kind: str
    config: Any
    slots: Mapping[str, Slot]
    tensors: Mapping[str, Tensor]

    @property
    def title(self) -> str:
        """What it is, for people."""
        return KINDS[self.kind].title


def identify(source: Source, overrides: Mapping[str, Any] | None = None) -> Network:
    """What a published checkpoint holds.

    Args:
        source: the tensors.
        overrides: fields of the configuration that its shapes do not tell, or tell wrongly.

    Raises:
        UserError: the kind is unknown; names are missing or left over, a shape is wrong, a tensor holds no floating
            numbers; or a field is unknown or impossible.
    """
    name, naming = _kind_of(source)
    kind = KINDS[name]
    tensors = _official_tensors(source, kind, naming)
    config = _config_of(source, name, tensors, overrides or {})
    if isinstance(config, TinyVAEConfig):
        tensors = weights.tiny_vae_tensors(config, tensors)
    try:
        slots = kind.slots(config)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{source.path}: no {kind.title} has such sizes ({error})") from None
    faults = mismatches(slots, {name: tensor.shape for name, tensor in tensors.items()})
    faults += [
        f"{name} has dtype {tensor.dtype.name}, it needs floating numbers of 16 bits or more"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATING
    ]
    if faults:
        raise UserError(f"{source.path}: as a {kind.title}: {shortlist(faults, 4)}")
    return Network(name, config, slots, tensors)


def _kind_of(source: Source) -> tuple[str, Naming]:
    for name, kind in KINDS.items():
        for naming in kind.namings.values():
            if any(mark in source.tensors for mark in naming.marks):
                return name, naming
    if any(".lora_" in name for name in source.tensors):
        raise UserError(f"{source.path}: a LoRA; name it with --lora, and its base with --source")
    known = ", ".join(kind.title for kind in KINDS.values())
    held = shortlist([*source.tensors])
    raise UserError(f"{source.path}: not a checkpoint of a known network ({known}); it holds {held}")


def _official_tensors(source: Source, kind: Kind, naming: Naming) -> dict[str, StoredTensor]:
    """The source's tensors by official name, without those of parts that the network has not."""
    tensors: dict[str, StoredTensor] = {}
    for name, official in naming.to_official([*source.tensors]).items():
        if re.match(kind.unused, official):
            continue
        tensor = source.tensors[name]
        if official in tensors and not _equal(tensors[official], tensor):
            raise UserError(f"{source.path}: {name} must be the same as another tensor for {official}, but differs")
        tensors[official] = tensor
    return tensors


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not one.shape:
        return False
    return one == other or all(np.array_equal(one[block].read(), other[block].read()) for block in row_blocks(one))


def _config_of(source: Source, name: str, tensors: Mapping[str, StoredTensor], overrides: Mapping[str, Any]) -> Any:
    kind = KINDS[name]
    fields = _told_fields(source, name) | kind.infer(_Shapes(tensors, source.path))
    narrow = all(tensor.dtype == BFLOAT16 for tensor in tensors.values())
    fields["param_dtype"] = fields["dtype"] = "bfloat16" if narrow else "float32"
    fields |= overrides
    if kind.config is DiTConfig and "num_heads" not in fields and isinstance(fields["dim"], int):
        if fields["dim"] % 128:
            raise UserError(
                f"{source.path}: how many heads? A width of {fields['dim']} does not tell; --set num_heads=N"
            )
        fields["num_heads"] = fields["dim"] // 128  # the head size of every published Wan model
    try:
        return build(kind.config, fields, f"{source.path}: {kind.title}")
    except UserError as error:
        raise UserError(f"{error}; --set NAME=VALUE replaces a field that the file tells wrongly") from None
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{source.path}: no {kind.title} has such sizes ({error})") from None


def _told_fields(source: Source, name: str) -> dict[str, Any]:
    """Fields of the configuration that the files say: a `config.json` of this network, and a header of ours."""
    kind, settings = KINDS[name], source.settings
    fields: dict[str, Any] = {}
    architectures = settings.get("architectures")
    class_names = [settings.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    known = {field.name for field in dataclasses.fields(kind.config)}
    for naming in kind.namings.values():
        # A file beside other weights tells nothing about these.
        if any(name in class_names for name in naming.class_names):
            fields |= {
                ours: settings[theirs]
                for theirs, ours in naming.settings.items()
                if theirs in settings and ours in known
            }
    own = source.header.get("config")
    if source.header.get("kind") == name and isinstance(own, dict):
        fields |= own
    return fields
