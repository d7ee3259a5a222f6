"""Fixtures of single networks: the transformer, one attention layer of a relative-position stream, the text encoder."""

import jax.numpy as jnp
import numpy as np

from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.text import TextEncoder, relative_buckets
from adastate_jax.verification.names import misnamed
from adastate_jax.verification.record import (
    Fixture,
    Records,
    abstract,
    channels_first,
    channels_last,
    compiled,
    dit_config,
    faultless,
    load_dit,
    padded,
    read_json,
    text_config,
)
from adastate_jax.weights.dit import dit_name_from_diffusers
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.text import text_name_from_transformers, text_table

# --- the transformer, bidirectional -----------------------------------------------------------------------------------


@compiled
def _flow(model: DiT, latents, timestep, text):
    timesteps = jnp.broadcast_to(timestep[:, None], latents.shape[:2])
    return model(latents, timesteps, model.text_keys_values(text), np.arange(latents.shape[1]))[0]


def wan_dit(fixture: Fixture) -> Records:
    """The official WanModel on two independent inputs."""
    config = dit_config(fixture.header("config"), fixture.settings)
    yield from _two_inputs(fixture, load_dit(config, fixture.weights(), str(fixture.path)))


def wan_dit_diffusers(fixture: Fixture) -> Records:
    """The same network under the names of diffusers' WanTransformer3DModel."""
    theirs = fixture.header("config")
    tensors = fixture.weights()
    names = read_json(fixture.companion("wan_dit_names.json"))
    yield faultless("names", misnamed(names, dit_name_from_diffusers) + sorted(set(names) ^ set(tensors)))
    config = DiTConfig(
        dim=theirs["num_attention_heads"] * theirs["attention_head_dim"],
        ffn_dim=theirs["ffn_dim"],
        num_heads=theirs["num_attention_heads"],
        num_layers=theirs["num_layers"],
        in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"],
        text_dim=theirs["text_dim"],
        text_length=fixture["in.a.context"].shape[1],
        freq_dim=theirs["freq_dim"],
        patch_size=tuple(theirs["patch_size"]),
        eps=theirs["eps"],
        qk_norm=theirs["qk_norm"] is not None,
        cross_attn_norm=theirs["cross_attn_norm"],
        dtype=fixture.settings.dtype,
        attention=fixture.settings.attention,
        quantization=fixture.settings.weights,
    )
    official = {dit_name_from_diffusers(name): tensor for name, tensor in tensors.items()}
    yield from _two_inputs(fixture, load_dit(config, official, str(fixture.path)))


def _two_inputs(fixture: Fixture, model: DiT) -> Records:
    for case in ("a", "b"):
        latents = channels_last(fixture[f"in.{case}.latent"], 1)
        text = padded(fixture[f"in.{case}.context"], model.config.text_length)
        flow = _flow(model, latents, fixture[f"in.{case}.timestep"], text)
        yield fixture.network(f"{case}.flow", channels_first(flow, 1))


# --- the text encoder -------------------------------------------------------------------------------------------------


@compiled
def _embeddings(encoder: TextEncoder, ids, mask):
    return encoder(ids, mask), encoder.encode(ids, mask)


def umt5(fixture: Fixture) -> Records:
    """The text encoder on padded and on long text, its buckets of distances, and the names of transformers."""
    config = text_config(fixture.header("config")["official"], fixture.settings)
    distance = (fixture["out.relative_bucket"].size - 1) // 2
    buckets = relative_buckets(distance + 1, config.num_buckets, config.max_distance)
    yield fixture.exact("relative_bucket", np.concatenate([buckets[-1], buckets[0, 1:]]))
    tensors = fixture.weights()
    names = read_json(fixture.companion("umt5_names.json"))
    faults = misnamed(names, text_name_from_transformers) + sorted(set(names.values()) ^ set(tensors))
    yield faultless("names", faults)
    encoder = load_official(abstract(TextEncoder, config), text_table(config), tensors, str(fixture.path))
    for case in ("padded", "long"):
        ids, mask = fixture[f"in.{case}.ids"], fixture[f"in.{case}.mask"]
        embeddings, zeroed = _embeddings(encoder, ids.astype(np.int32), mask.astype(np.bool_))
        yield fixture.codec(f"{case}.embeddings", embeddings)
        yield fixture.codec(f"{case}.zeroed", zeroed)
