"""The video autoencoder against the official numbers, its names, and the laws of streaming."""

import dataclasses
import json
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adastate_jax import weights
from adastate_jax.models import vae
from adastate_jax.models.vae import VAE, VAEConfig

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")

TINY = VAEConfig(dim=4, dim_multipliers=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True))

decode = jax.jit(vae.decode, static_argnames="first")
encode_moments = jax.jit(vae.encode_moments, static_argnames="first")


def channels_last(x):
    return einops.rearrange(x, "b c f h w -> b f h w c")


def channels_first(x):
    return einops.rearrange(np.asarray(x), "b f h w c -> b c f h w")


def load(golden, part):
    sizes = json.loads(golden.metadata["config"])
    config = VAEConfig(
        dim=sizes["dim"],
        latent_channels=sizes["z_dim"],
        dim_multipliers=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        temporal_downsample=tuple(sizes["temperal_downsample"]),
        latents_mean=tuple(sizes["latents_mean"]),
        latents_std=tuple(sizes["latents_std"]),
    )
    tensors = {name.removeprefix("w."): golden[name] for name in golden if name.startswith("w.")}
    abstract = jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0), parts=[part]))
    return weights.load(abstract, weights.vae_table(config), tensors, str(golden.path))


@pytest.fixture(scope="module")
def decoding():
    """The fixture with the decoder, and the decoder."""
    golden = weights.SafeTensors(GOLDEN / "wan_vae_decode.safetensors")
    return golden, load(golden, "decoder")


@pytest.fixture(scope="module")
def encoding():
    """The fixture with the encoder, and the encoder."""
    golden = weights.SafeTensors(GOLDEN / "wan_vae_encode.safetensors")
    return golden, load(golden, "encoder")


@pytest.fixture(scope="module")
def tiny():
    return VAE(TINY, rngs=nnx.Rngs(0))


@needs_golden
def test_decoding_a_clip_equals_the_official_decoder(decoding):
    golden, model = decoding
    latents = channels_last(golden["in.latent"])
    video, _ = decode(model, latents, vae.decoder_cache(model, 1, 4, 4), first=True)
    np.testing.assert_allclose(channels_first(video), golden["out.decode.whole"], rtol=0, atol=5e-5)


@needs_golden
def test_decoding_a_stream_equals_the_official_decoder_and_its_cache(decoding):
    golden, model = decoding
    latents = channels_last(np.concatenate([golden["in.latent"], golden["in.latent_extra"]], axis=2))
    cache = vae.decoder_cache(model, 1, 4, 4)
    for index in range(4):
        video, cache = decode(model, latents[:, index : index + 1], cache, first=index == 0)
        np.testing.assert_allclose(channels_first(video), golden[f"out.decode.stream{index}"], rtol=0, atol=5e-5)
    used = golden["out.decode.cache_frames"] > 0
    assert [x.shape[1] for x in cache.frames] == golden["out.decode.cache_frames"][used].tolist()
    means = [x.mean() for x in cache.frames]
    np.testing.assert_allclose(means, golden["out.decode.cache_mean"][used], rtol=0, atol=1e-5)


@needs_golden
def test_encoding_equals_the_official_encoder(encoding):
    golden, model = encoding
    video = channels_last(golden["in.video"])
    mean, log_variance, _ = encode_moments(model, video, vae.encoder_cache(model, 1, 4, 4), first=True)
    np.testing.assert_allclose(channels_first(mean), golden["out.encode.mu"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(channels_first(log_variance), golden["out.encode.log_var_raw"], rtol=0, atol=5e-5)
    raw = channels_first(mean * np.array(model.config.latents_std) + np.array(model.config.latents_mean))
    np.testing.assert_allclose(raw, golden["out.encode.mu_raw"], rtol=0, atol=5e-5)
    first_frame = vae.encode_clip(model, video[:, :1])
    np.testing.assert_allclose(channels_first(first_frame), golden["out.encode.first_frame_mu"], rtol=0, atol=5e-5)


@needs_golden
def test_every_official_and_diffusers_name_is_mapped():
    manifest = json.loads((GOLDEN / "manifest_wan_vae.json").read_text())
    abstract = jax.eval_shape(lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0)))
    leaves = {
        weights.path_name(path).removesuffix("/value"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    table = weights.vae_table(VAEConfig())
    # a broadcast scalar has the shape and costs no memory
    shapes = {
        entry.official: list(entry.to_official(np.broadcast_to(np.int8(0), leaves.pop(entry.path))).shape)
        for entry in table
    }
    assert not leaves
    assert shapes == manifest["official"]

    names = manifest["diffusers_to_official"]
    assert {name: weights.vae_name_from_diffusers(name) for name in names} == names
    names = json.loads((GOLDEN / "wan_vae_names.json").read_text())
    assert {name: weights.vae_name_from_diffusers(name, num_res_blocks=1) for name in names} == names


def test_the_default_statistics_are_the_official_ones():
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden fixtures at {GOLDEN}")
    manifest = json.loads((GOLDEN / "manifest_wan_vae.json").read_text())
    assert VAEConfig().latents_mean == tuple(manifest["latents_mean"])
    assert VAEConfig().latents_std == tuple(manifest["latents_std"])


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1, 1, 1], [3, 3, 1], [1, 6], [2, 5]])
def test_a_stream_decodes_to_the_clip(tiny, chunks):
    latents = jax.random.normal(jax.random.key(1), (2, 7, 3, 2, 16))
    whole, whole_cache = decode(tiny, latents, vae.decoder_cache(tiny, 2, 3, 2), first=True)
    assert whole.shape == (2, 25, 12, 8, 3)
    cache, parts, start = vae.decoder_cache(tiny, 2, 3, 2), [], 0
    for size in chunks:
        part, cache = decode(tiny, latents[:, start : start + size], cache, first=start == 0)
        parts.append(part)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), cache, whole_cache)


@pytest.mark.parametrize("chunks", [[1, 4, 4, 4], [5, 8]])
def test_a_stream_encodes_to_the_clip(tiny, chunks):
    video = jax.random.uniform(jax.random.key(2), (1, 13, 8, 12, 3), minval=-1, maxval=1)
    whole, *_ = encode_moments(tiny, video, vae.encoder_cache(tiny, 1, 2, 3), first=True)
    assert whole.shape == (1, 4, 2, 3, 16)
    cache, parts, start = vae.encoder_cache(tiny, 1, 2, 3), [], 0
    for size in chunks:
        part, _, cache = encode_moments(tiny, video[:, start : start + size], cache, first=start == 0)
        parts.append(part)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_one_pass_over_many_latents_equals_one_pass_each(tiny):
    """The step itself takes any number of latents: the scan is there for memory, not for correctness."""
    latents = jax.random.normal(jax.random.key(3), (1, 4, 2, 2, 16))
    _, cache = decode(tiny, latents[:, :1], vae.decoder_cache(tiny, 1, 2, 2), first=True)
    at_once, _ = jax.jit(VAE.decode_step, static_argnames="first")(tiny, latents[:, 1:], cache, first=False)
    each, _ = decode(tiny, latents[:, 1:], cache, first=False)
    np.testing.assert_allclose(at_once, each, rtol=0, atol=1e-5)


def test_a_stream_needs_two_compilations(tiny):
    decode = jax.jit(vae.decode, static_argnames="first", donate_argnames="cache")
    cache = vae.decoder_cache(tiny, 1, 2, 2)
    for index in range(4):
        latents = jax.random.normal(jax.random.key(index), (1, 3, 2, 2, 16))
        before = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
        _, cache = decode(tiny, latents, cache, first=index == 0)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == before
    assert decode._cache_size() == 2


def test_later_latents_change_no_earlier_frame(tiny):
    latents = jax.random.normal(jax.random.key(4), (1, 3, 2, 2, 16))
    cache = vae.decoder_cache(tiny, 1, 2, 2)
    video, _ = decode(tiny, latents, cache, first=True)
    changed, _ = decode(tiny, latents.at[:, 2].add(1.0), cache, first=True)
    np.testing.assert_array_equal(video[:, :5], changed[:, :5])
    assert not np.allclose(video[:, 5:], changed[:, 5:])


def test_half_precision_stays_close_and_gives_float32_frames(tiny):
    half = VAE(dataclasses.replace(TINY, dtype="bfloat16"), rngs=nnx.Rngs(0))
    latents = jax.random.normal(jax.random.key(5), (1, 2, 2, 2, 16))
    cache = vae.decoder_cache(half, 1, 2, 2)
    assert all(x.dtype == jnp.bfloat16 for x in cache.frames)
    video, _ = decode(half, latents, cache, first=True)
    exact, _ = decode(tiny, latents, vae.decoder_cache(tiny, 1, 2, 2), first=True)
    assert video.dtype == jnp.float32
    np.testing.assert_allclose(video, exact, rtol=0, atol=0.1)


def test_one_tile_is_exact_and_many_cover_the_stream(tiny):
    latents = jax.random.normal(jax.random.key(6), (1, 3, 4, 6, 16))
    whole, _ = decode(tiny, latents, vae.decoder_cache(tiny, 1, 4, 6), first=True)
    tiled_decode = jax.jit(vae.tiled_decode, static_argnames=("first", "tile", "overlap"))
    cache = vae.tiled_decoder_cache(tiny, 1, 4, 6, tile=8, overlap=2)
    video, _ = tiled_decode(tiny, latents, cache, first=True, tile=8, overlap=2)
    np.testing.assert_allclose(video, whole, rtol=0, atol=1e-5)

    cache = vae.tiled_decoder_cache(tiny, 1, 4, 6, tile=3, overlap=1)
    start, cache = tiled_decode(tiny, latents[:, :1], cache, first=True, tile=3, overlap=1)
    rest, cache = tiled_decode(tiny, latents[:, 1:], cache, first=False, tile=3, overlap=1)
    video = np.concatenate([start, rest], axis=1)
    assert video.shape == whole.shape
    # approximate by design: it resembles the exact video, far more than another video would
    assert np.corrcoef(video.ravel(), whole.ravel())[0, 1] > 0.9


def test_tiles_of_a_constant_video_blend_to_that_constant():
    ones = vae.FeatureCache(())

    class Flat:
        config = TINY

        @staticmethod
        def decode_step(latents, cache, first):
            return jnp.full((1, 1, 4 * latents.shape[2], 4 * latents.shape[3], 3), 0.7), cache

    video, _ = vae.tiled_decode(Flat, jnp.zeros((1, 1, 7, 10, 16)), ones, first=True, tile=4, overlap=2)
    np.testing.assert_allclose(video, np.full((1, 1, 28, 40, 3), 0.7), rtol=1e-6)


def test_misuse_is_refused(tiny):
    cache = vae.decoder_cache(tiny, 1, 2, 2)
    with pytest.raises(ValueError, match="at least one frame"):
        vae.decode(tiny, jnp.zeros((1, 0, 2, 2, 16)), cache, first=True)
    with pytest.raises(ValueError, match="16"):
        vae.decode(tiny, jnp.zeros((1, 1, 2, 2, 8)), cache, first=True)
    cache = vae.encoder_cache(tiny, 1, 2, 2)
    with pytest.raises(ValueError, match="1 \\+ 4 k frames"):
        vae.encode(tiny, jnp.zeros((1, 4, 8, 8, 3)), cache, first=True)
    with pytest.raises(ValueError, match="4 k frames"):
        vae.encode(tiny, jnp.zeros((1, 5, 8, 8, 3)), cache, first=False)
    with pytest.raises(ValueError, match="tiled"):
        vae.encode_clip(tiny, jnp.zeros((1, 5, 8, 9, 3)))
    with pytest.raises(ValueError, match="overlap"):
        vae.tiled_decoder_cache(tiny, 1, 8, 8, tile=4, overlap=4)
    with pytest.raises(ValueError, match="parts"):
        VAE(TINY, rngs=nnx.Rngs(0), parts=["decode"])
    with pytest.raises(ValueError, match="temporal_downsample"):
        VAEConfig(temporal_downsample=(True,))
