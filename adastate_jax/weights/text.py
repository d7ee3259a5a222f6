"""UMT5's encoder: its official tensors, and what transformers calls them."""

import re

from adastate_jax.models.text import TextConfig
from adastate_jax.weights.entries import Entry, linear


def text_table(config: TextConfig) -> list[Entry]:
    """The official UMT5 encoder."""
    entries = [
        Entry("token_embedding.weight", "token_embedding", "vocabulary d -> vocabulary d"),
        Entry("norm.weight", "norm_out/scale"),
        Entry("blocks.{layer}.norm1.weight", "blocks/norm_attention/scale"),
        Entry("blocks.{layer}.norm2.weight", "blocks/norm_ffn/scale"),
        Entry(
            "blocks.{layer}.pos_embedding.embedding.weight", "blocks/position_bias", "buckets heads -> buckets heads"
        ),
    ]
    for theirs, ours in (
        ("attn.q", "query"),
        ("attn.k", "key"),
        ("attn.v", "value"),
        ("attn.o", "output"),
        ("ffn.gate.0", "ffn_gate"),
        ("ffn.fc1", "ffn_in"),
        ("ffn.fc2", "ffn_out"),
    ):
        entries += linear(f"blocks.{{layer}}.{theirs}", f"blocks/{ours}", bias=False)
    return entries


# transformers' UMT5EncoderModel → official, applied in order
_TEXT_FROM_TRANSFORMERS = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)


def text_name_from_transformers(name: str) -> str:
    """Official name of a tensor of transformers' UMT5EncoderModel, whose embedding table may come under two names."""
    for pattern, replacement in _TEXT_FROM_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


# official → transformers' UMT5EncoderModel, applied in order
_TEXT_TO_TRANSFORMERS = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.", "encoder.block."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)


def text_name_to_transformers(name: str) -> str:
    """What transformers' UMT5EncoderModel calls an official tensor."""
    for pattern, replacement in _TEXT_TO_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name
