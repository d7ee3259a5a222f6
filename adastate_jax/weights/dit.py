"""Wan2.1's transformer: its official tensors, and what diffusers calls them."""

import re

from adastate_jax.models.dit import DiTConfig
from adastate_jax.weights.entries import Entry, linear


def dit_table(config: DiTConfig) -> list[Entry]:
    """The official Wan2.1 DiT (and, after its prefix, a Self-Forcing generator)."""
    _, height, width = config.patch_size
    entries = [
        Entry(
            "patch_embedding.weight",
            "patch_embedding/kernel",
            "out c pt ph pw -> (pt ph pw c) out",
            (("pt", 1), ("ph", height), ("pw", width)),
        ),
        Entry("patch_embedding.bias", "patch_embedding/bias"),
        *linear("text_embedding.0", "text_in"),
        *linear("text_embedding.2", "text_out"),
        *linear("time_embedding.0", "time_in"),
        *linear("time_embedding.2", "time_out"),
        *linear("time_projection.1", "time_projection"),
        *linear("head.head", "head"),
        Entry("head.modulation", "head_modulation", "one n d -> (one n) d", (("one", 1),)),
        Entry("blocks.{layer}.modulation", "blocks/modulation", "one n d -> (one n) d", (("one", 1),)),
        *linear("blocks.{layer}.ffn.0", "blocks/ffn_in"),
        *linear("blocks.{layer}.ffn.2", "blocks/ffn_out"),
    ]
    for theirs, ours in (("self_attn", "self_attention"), ("cross_attn", "cross_attention")):
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            entries += linear(f"blocks.{{layer}}.{theirs}.{short}", f"blocks/{ours}/{long}")
        if config.qk_norm:
            for short, long in (("q", "query"), ("k", "key")):
                entries.append(
                    Entry(f"blocks.{{layer}}.{theirs}.norm_{short}.weight", f"blocks/{ours}/norm_{long}/scale")
                )
    if config.cross_attn_norm:
        entries.append(Entry("blocks.{layer}.norm3.weight", "blocks/norm_cross/scale"))
        entries.append(Entry("blocks.{layer}.norm3.bias", "blocks/norm_cross/bias"))
    return entries


# diffusers' WanTransformer3DModel → official, applied in order
_DIT_FROM_DIFFUSERS = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
)


def dit_name_from_diffusers(name: str) -> str:
    """Official name of a tensor of diffusers' WanTransformer3DModel."""
    for pattern, replacement in _DIT_FROM_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


# official → diffusers' WanTransformer3DModel, applied in order
_DIT_TO_DIFFUSERS = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.(self|cross)_attn\.(q|k|v)\.", r".\1_attn.to_\2."),
    (r"\.(self|cross)_attn\.o\.", r".\1_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.norm3\.", ".norm2."),
)


def dit_name_to_diffusers(name: str) -> str:
    """What diffusers' WanTransformer3DModel calls an official tensor."""
    for pattern, replacement in _DIT_TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name
