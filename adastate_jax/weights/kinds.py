"""The networks that checkpoints are published of, and the names that their tensors go by."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.text import TextConfig, TextEncoder
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.weights.dit import dit_name_from_diffusers, dit_name_to_diffusers, dit_table
from adastate_jax.weights.entries import Entry
from adastate_jax.weights.sizes import Shapes, infer_dit, infer_text, infer_tiny_vae, infer_vae
from adastate_jax.weights.slots import Slot, official_slots
from adastate_jax.weights.text import text_name_from_transformers, text_name_to_transformers, text_table
from adastate_jax.weights.tiny_vae import tiny_vae_table
from adastate_jax.weights.vae import vae_name_from_diffusers, vae_name_to_diffusers, vae_table


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
    table: Callable[[Any], list[Entry]]
    infer: Callable[["Shapes"], dict[str, Any]]
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


def _vae_names(names: Sequence[str]) -> dict[str, str]:
    """Official names of diffusers' AutoencoderKLWan; how deep its levels are shows in them."""
    found = (re.match(r"decoder\.up_blocks\.\d+\.resnets\.(\d{1,9})\.", name) for name in names)
    depth = max((int(match[1]) for match in found if match), default=2)
    return {name: vae_name_from_diffusers(name, depth) for name in names}


# Of the fields that the two transformers' settings share, our name is theirs.
_DIT_SETTINGS = {
    name: name for name in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "eps")
}


KINDS = {
    "transformer": Kind(
        "Wan2.1 transformer",
        DiT,
        DiTConfig,
        dit_table,
        infer_dit,
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
                lambda names: {name: dit_name_from_diffusers(name) for name in names},
                lambda name, _: dit_name_to_diffusers(name),
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
        text_table,
        infer_text,
        {
            "official": Naming(
                ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"), "models_t5_umt5-xxl-enc"
            ),
            "diffusers": Naming(
                ("encoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
                "model",
                lambda names: {name: text_name_from_transformers(name) for name in names},
                lambda name, _: text_name_to_transformers(name),
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
        vae_table,
        infer_vae,
        {
            "official": Naming(("encoder.downsamples.0.residual.0.gamma", "decoder.head.0.gamma"), "Wan2.1_VAE"),
            "diffusers": Naming(
                ("quant_conv.weight", "decoder.norm_out.gamma"),
                "diffusion_pytorch_model",
                _vae_names,
                lambda name, config: vae_name_to_diffusers(name, config.num_res_blocks),
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
        tiny_vae_table,
        infer_tiny_vae,
        {"official": Naming(("decoder.3.conv.0.weight", "encoder.4.conv.0.weight"), "taew2_1")},
    ),
}
