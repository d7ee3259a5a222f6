"""Manifests of real checkpoints: that every tensor is mapped, in every published set of names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adastate_jax.models.dit import DiT
from adastate_jax.models.text import TextEncoder
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.verification.record import (
    Check,
    Fixture,
    Records,
    abstract,
    dit_config,
    faultless,
    text_config,
    vae_config,
)
from adastate_jax.weights.dit import dit_name_from_diffusers, dit_table
from adastate_jax.weights.entries import Entry
from adastate_jax.weights.slots import mismatches, official_slots
from adastate_jax.weights.text import text_name_from_transformers, text_table
from adastate_jax.weights.tiny_vae import tiny_vae_table
from adastate_jax.weights.vae import vae_name_from_diffusers, vae_table


def misnamed(names: Mapping[str, str], translate: Callable[[str], str]) -> list[str]:
    """Names that `translate` does not map as `names` says."""
    return [f"{name} becomes {translate(name)}" for name, official in names.items() if translate(name) != official]


def unmapped(
    network: Callable[..., Any], config: Any, table: Sequence[Entry], shapes: Mapping[str, Sequence[int]]
) -> list[str]:
    """Tensors that only one of manifest and network has, or that they have in different shapes."""
    return mismatches(official_slots(abstract(network, config), table), shapes)


def manifest_wan(fixture: Fixture) -> Records:
    """Official Wan2.1 transformers: every tensor is mapped, none is left over, and so under diffusers' names."""
    config = dit_config(fixture.header("config"))
    yield faultless("official", unmapped(DiT, config, dit_table(config), fixture.header("official")))
    names = fixture.header("diffusers_to_official")
    yield faultless("diffusers_to_official", misnamed(names, dit_name_from_diffusers))


def manifest_self_forcing(fixture: Fixture) -> Records:
    """Self-Forcing's generator: the official transformer behind a prefix."""
    config = dit_config(fixture.header("config"))
    prefix = fixture.header("prefix")
    shapes = {name.removeprefix(prefix): shape for name, shape in fixture.header("state_dict").items()}
    yield faultless("state_dict", unmapped(DiT, config, dit_table(config), shapes))


def manifest_umt5(fixture: Fixture) -> Records:
    """The official UMT5-XXL encoder, and transformers' names."""
    config = text_config(fixture.header("config"))
    yield faultless("official", unmapped(TextEncoder, config, text_table(config), fixture.header("official")))
    names = fixture.header("transformers_to_official")
    yield faultless("transformers_to_official", misnamed(names, text_name_from_transformers))


def manifest_wan_vae(fixture: Fixture) -> Records:
    """The official video autoencoder, diffusers' names, and the latents' mean and deviation."""
    statistics = {name: fixture.header(name) for name in ("latents_mean", "latents_std")}
    config = vae_config({**fixture.header("config"), **statistics})
    yield faultless("official", unmapped(VAE, config, vae_table(config), fixture.header("official")))
    names = fixture.header("diffusers_to_official")
    yield faultless(
        "diffusers_to_official",
        misnamed(names, lambda name: vae_name_from_diffusers(name, config.num_res_blocks)),
    )
    ours = VAEConfig()
    pairs = tuple((name, np.array(theirs), np.array(getattr(ours, name))) for name, theirs in statistics.items())
    yield Check("latent statistics", pairs, 0.0)


def manifest_taew2_1(fixture: Fixture) -> Records:
    """The tiny autoencoder, both halves."""
    theirs = fixture.header("config")
    config = TinyVAEConfig(
        latent_channels=theirs["latent_channels"],
        temporal_upsample=tuple(theirs["decoder_time_upscale"]),
        temporal_downsample=tuple(theirs["encoder_time_downscale"]),
    )
    yield faultless("official", unmapped(TinyVAE, config, tiny_vae_table(config), fixture.header("official")))
