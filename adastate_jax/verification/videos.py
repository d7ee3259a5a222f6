"""Fixtures of the video autoencoders: whole clips, and streams latent by latent."""

import dataclasses
from typing import Any

import numpy as np

from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE
from adastate_jax.models.video_coding import decode, decoder_cache, encode_clip, encode_moments, encoder_cache
from adastate_jax.models.video_layers import Memory
from adastate_jax.verification.names import misnamed
from adastate_jax.verification.record import (
    Check,
    Fixture,
    Records,
    abstract,
    channels_first,
    channels_last,
    compiled,
    faultless,
    read_json,
    vae_config,
)
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.tiny_vae import tiny_vae_table, tiny_vae_tensors
from adastate_jax.weights.vae import vae_name_from_diffusers, vae_table

_decode = compiled(decode, static_argnames="first")
_encode_moments = compiled(encode_moments, static_argnames="first")
_encode_clip = compiled(encode_clip)


def _load_vae(fixture: Fixture, part: str) -> VAE:
    config = vae_config(fixture.header("config"), fixture.settings)
    shapes = abstract(VAE, config, parts=(part,))
    return load_official(shapes, vae_table(config), fixture.weights(), str(fixture.path))


def _diffusers_names(fixture: Fixture) -> Check:
    """The names of diffusers' AutoencoderKLWan, for the half of the network that this file holds."""
    tensors, blocks = fixture.weights(), fixture.header("config")["num_res_blocks"]
    names = read_json(fixture.companion("wan_vae_names.json"))
    faults = misnamed(names, lambda name: vae_name_from_diffusers(name, blocks))
    return faultless("names", faults + sorted(set(tensors) - set(names.values())))


def wan_vae_encode(fixture: Fixture) -> Records:
    """The official encoder."""
    yield _diffusers_names(fixture)
    model = _load_vae(fixture, "encoder")
    video = channels_last(fixture["in.video"], 1)
    batch, space = video.shape[0], model.config.space_factor
    cache = encoder_cache(model, batch, video.shape[2] // space, video.shape[3] // space)
    mean, log_variance, _ = _encode_moments(model, video, cache, first=True)
    raw = np.asarray(mean) * np.array(model.config.latents_std) + np.array(model.config.latents_mean)
    yield fixture.codec("encode.mu", channels_first(mean, 1))
    yield fixture.codec("encode.mu_raw", channels_first(raw, 1))
    yield fixture.codec("encode.log_var_raw", channels_first(log_variance, 1))
    yield fixture.codec("encode.first_frame_mu", channels_first(_encode_clip(model, video[:, :1]), 1))


def wan_vae_decode(fixture: Fixture) -> Records:
    """The official decoder: a whole clip, and a stream with its cache."""
    yield _diffusers_names(fixture)
    model = _load_vae(fixture, "decoder")
    latents = channels_last(fixture["in.latent"], 1)
    start = decoder_cache(model, latents.shape[0], *latents.shape[2:4])
    video, _ = _decode(model, latents, start, first=True)
    yield fixture.codec("decode.whole", channels_first(video, 1))

    stream = np.concatenate([latents, channels_last(fixture["in.latent_extra"], 1)], axis=1)
    cache = start
    for index in range(stream.shape[1]):
        video, cache = _decode(model, stream[:, index : index + 1], cache, first=index == 0)
        yield fixture.codec(f"decode.stream{index}", channels_first(video, 1))

    frames, means = fixture["out.decode.cache_frames"], fixture["out.decode.cache_mean"]
    used = frames > 0  # the reference has slots for layers that never look back
    lengths = np.array([x.shape[1] for x in cache.frames])
    yield Check("decode.cache_frames", (("out.decode.cache_frames", frames[used], lengths),), 0.0)
    ours = np.array([x.mean(dtype=np.float32) for x in cache.frames])
    yield dataclasses.replace(
        fixture.codec("decode.cache_mean", ours), pairs=(("out.decode.cache_mean", means[used], ours),)
    )


@compiled
def _raw_frames(model: TinyVAE, latents: Any):
    """All frames of the decoder in 0..1, those before the first of a clip among them."""
    return model.decoder(latents.astype(model.config.dtype), Memory(None))


def taehv(fixture: Fixture) -> Records:
    """The tiny decoder: a whole clip, and a stream."""
    theirs = fixture.header("config")
    config = TinyVAEConfig(
        latent_channels=theirs["latent_channels"],
        widths=tuple(theirs["widths"][width] for width in ("256", "128", "64")),
        dtype=fixture.settings.dtype,
    )
    tensors = tiny_vae_tensors(config, fixture.weights())
    shapes = abstract(TinyVAE, config, parts=("decoder",))
    model = load_official(shapes, tiny_vae_table(config), tensors, str(fixture.path))

    def official(video: Any) -> np.ndarray:  # ours has no limits and is nominally in −1..1
        return channels_first(np.clip((np.asarray(video) + 1) / 2, 0, 1), 2)

    latents = channels_last(fixture["in.latent"], 2)
    yield fixture.codec("raw_sequential", channels_first(_raw_frames(model, latents), 2))
    start = decoder_cache(model, latents.shape[0], *latents.shape[2:4])
    video, _ = _decode(model, latents, start, first=True)
    yield fixture.codec("video", official(video))
    cache = start
    for index in range(latents.shape[1]):
        video, cache = _decode(model, latents[:, index : index + 1], cache, first=index == 0)
        yield fixture.codec(f"stream{index}", official(video))
