"""Wan2.1's video autoencoder: its official tensors, and what diffusers calls them."""

import re

from adastate_jax.models.vae import VAEConfig, decoder_levels, encoder_levels
from adastate_jax.weights.entries import Entry, conv, pointwise


def _vae_residual(official: str, path: str, shortcut: bool) -> list[Entry]:
    entries = [
        Entry(f"{official}.residual.0.gamma", f"{path}/norm_in/gain", "c 1 1 1 -> c"),
        *conv(f"{official}.residual.2", f"{path}/conv_in", "t h w"),
        Entry(f"{official}.residual.3.gamma", f"{path}/norm_out/gain", "c 1 1 1 -> c"),
        *conv(f"{official}.residual.6", f"{path}/conv_out", "t h w"),
    ]
    return entries + (pointwise(f"{official}.shortcut", f"{path}/shortcut", 3) if shortcut else [])


def vae_table(config: VAEConfig) -> list[Entry]:
    """The official Wan2.1 video autoencoder, both halves."""
    entries = [
        *pointwise("conv1", "encoder/to_moments", 3),
        *pointwise("conv2", "decoder/from_latents", 3),
    ]
    for half, stack, levels in (
        ("encoder", "downsamples", encoder_levels(config)),
        ("decoder", "upsamples", decoder_levels(config)),
    ):
        entries += conv(f"{half}.conv1", f"{half}/conv_in", "t h w")
        entries.append(Entry(f"{half}.head.0.gamma", f"{half}/norm_out/gain", "c 1 1 1 -> c"))
        entries += conv(f"{half}.head.2", f"{half}/conv_out", "t h w")
        for block in (0, 2):
            entries += _vae_residual(f"{half}.middle.{block}", f"{half}/middle/{block}", shortcut=False)
        entries.append(Entry(f"{half}.middle.1.norm.gamma", f"{half}/middle/1/norm/gain", "c 1 1 -> c"))
        entries += pointwise(f"{half}.middle.1.to_qkv", f"{half}/middle/1/attention_in", 2)
        entries += pointwise(f"{half}.middle.1.proj", f"{half}/middle/1/attention_out", 2)
        for block, level in enumerate(levels):
            official, path = f"{half}.{stack}.{block}", f"{half}/blocks/{block}"
            if not level.resample:
                entries += _vae_residual(official, path, shortcut=level.inputs != level.outputs)
                continue
            entries += conv(f"{official}.resample.1", f"{path}/conv", "h w")
            if level.temporal:
                entries += conv(f"{official}.time_conv", f"{path}/time_conv", "t h w")
    return entries


# diffusers' AutoencoderKLWan → official, applied in order
_VAE_FROM_DIFFUSERS = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


_VAE_BLOCK_FROM_DIFFUSERS = (
    (r"(\d)\.norm1\.", r"\1.residual.0."),
    (r"(\d)\.conv1\.", r"\1.residual.2."),
    (r"(\d)\.norm2\.", r"\1.residual.3."),
    (r"(\d)\.conv2\.", r"\1.residual.6."),
)


def vae_name_from_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """Official name of a tensor of diffusers' AutoencoderKLWan, which numbers the decoder's blocks per level."""

    def flat_index(match: re.Match) -> str:
        level, kind, block = match.groups()
        per_level = num_res_blocks + 2
        within = per_level - 1 if kind == "upsamplers" else int(block)
        return f".upsamples.{int(level) * per_level + within}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat_index, name)
    for pattern, replacement in (*_VAE_FROM_DIFFUSERS, *_VAE_BLOCK_FROM_DIFFUSERS):
        name = re.sub(pattern, replacement, name)
    return name


# official → diffusers' AutoencoderKLWan, applied in order
_VAE_TO_DIFFUSERS = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
)


def vae_name_to_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """What diffusers' AutoencoderKLWan calls an official tensor."""

    def leveled_index(match: re.Match) -> str:
        level, within = divmod(int(match[1]), num_res_blocks + 2)
        kind = "resnets" if within <= num_res_blocks else "upsamplers"
        return f".up_blocks.{level}.{kind}.{within if kind == 'resnets' else 0}."

    name = re.sub(r"\.upsamples\.(\d+)\.", leveled_index, name)
    for pattern, replacement in _VAE_TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name
