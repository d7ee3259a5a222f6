"""The video autoencoder against the official numbers, its names, and the laws of streaming."""

import dataclasses
import functools
import json
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adastate_jax.models import video_coding
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.models.video_coding import (
    decode,
    decoder_cache,
    encode,
    encode_clip,
    encode_moments,
    encoder_cache,
    tiled_decode,
    tiled_decoder_cache,
)
from adastate_jax.models.video_layers import FeatureCache, kernel_init
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import path_name
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.vae import vae_name_from_diffusers, vae_table

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")

TINY = VAEConfig(dim=4, dim_multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,))

# These networks run in milliseconds: optimising them would take longer than all the tests.
QUICK = {"xla_backend_optimization_level": 0}
decode = jax.jit(decode, static_argnames="first", compiler_options=QUICK)
encode_moments = jax.jit(encode_moments, static_argnames="first", compiler_options=QUICK)


def random_network(build, seed=0):
    """The network that `build` makes, with every weight random, biases and gains too; without compiling draws."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return jnp.asarray(generator.normal(size=leaf.shape) * scale + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(build))


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
    return load_official(abstract, vae_table(config), tensors, str(golden.path))


@pytest.fixture(scope="module")
def decoding():
    """The fixture with the decoder, and the decoder."""
    golden = SafeTensors(GOLDEN / "wan_vae_decode.safetensors")
    return golden, load(golden, "decoder")


@pytest.fixture(scope="module")
def encoding():
    """The fixture with the encoder, and the encoder."""
    golden = SafeTensors(GOLDEN / "wan_vae_encode.safetensors")
    return golden, load(golden, "encoder")


@pytest.fixture(scope="module")
def tiny():
    return random_network(lambda: VAE(TINY, rngs=nnx.Rngs(0)))


@needs_golden
def test_decoding_equals_the_official_decoder_and_its_cache(decoding):
    golden, model = decoding
    latents = channels_last(np.concatenate([golden["in.latent"], golden["in.latent_extra"]], axis=2))
    cache, parts = decoder_cache(model, 1, 4, 4), []
    for index in range(4):
        video, cache = decode(model, latents[:, index : index + 1], cache, first=index == 0)
        parts.append(channels_first(video))
        np.testing.assert_allclose(parts[-1], golden[f"out.decode.stream{index}"], rtol=0, atol=5e-5)
    whole = np.concatenate(parts[:3], axis=2)
    np.testing.assert_allclose(whole, golden["out.decode.whole"], rtol=0, atol=5e-5)
    used = golden["out.decode.cache_frames"] > 0
    assert [x.shape[1] for x in cache.frames] == golden["out.decode.cache_frames"][used].tolist()
    means = [np.asarray(x).mean() for x in cache.frames]
    np.testing.assert_allclose(means, golden["out.decode.cache_mean"][used], rtol=0, atol=1e-5)


@needs_golden
def test_encoding_equals_the_official_encoder(encoding):
    golden, model = encoding
    video = channels_last(golden["in.video"])
    first, first_variance, cache = encode_moments(model, video[:, :1], encoder_cache(model, 1, 4, 4), first=True)
    np.testing.assert_allclose(channels_first(first), golden["out.encode.first_frame_mu"], rtol=0, atol=5e-5)
    rest, rest_variance, _ = encode_moments(model, video[:, 1:], cache, first=False)
    mean = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(channels_first(mean), golden["out.encode.mu"], rtol=0, atol=5e-5)
    raw = channels_first(mean * np.array(model.config.latents_std) + np.array(model.config.latents_mean))
    np.testing.assert_allclose(raw, golden["out.encode.mu_raw"], rtol=0, atol=5e-5)
    log_variance = channels_first(np.concatenate([first_variance, rest_variance], axis=1))
    np.testing.assert_allclose(log_variance, golden["out.encode.log_var_raw"], rtol=0, atol=5e-5)


@needs_golden
def test_every_official_and_diffusers_name_is_mapped():
    manifest = json.loads((GOLDEN / "manifest_wan_vae.json").read_text())
    abstract = jax.eval_shape(lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0)))
    leaves = {
        path_name(path).removesuffix("/value"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    table = vae_table(VAEConfig())
    # a broadcast scalar has the shape and costs no memory
    shapes = {
        entry.official: list(entry.to_official(np.broadcast_to(np.int8(0), leaves.pop(entry.path))).shape)
        for entry in table
    }
    assert not leaves
    assert shapes == manifest["official"]

    names = manifest["diffusers_to_official"]
    assert {name: vae_name_from_diffusers(name) for name in names} == names
    names = json.loads((GOLDEN / "wan_vae_names.json").read_text())
    assert {name: vae_name_from_diffusers(name, num_res_blocks=1) for name in names} == names


def test_the_default_statistics_are_the_official_ones():
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden fixtures at {GOLDEN}")
    manifest = json.loads((GOLDEN / "manifest_wan_vae.json").read_text())
    assert VAEConfig().latents_mean == tuple(manifest["latents_mean"])
    assert VAEConfig().latents_std == tuple(manifest["latents_std"])


@pytest.fixture(scope="module")
def clip(tiny):
    """Latents [2, 5, 3, 2, 16] and what decoding them in one call gives."""
    latents = np.random.default_rng(1).normal(size=(2, 5, 3, 2, 16)).astype(np.float32)
    return latents, *decode(tiny, latents, decoder_cache(tiny, 2, 3, 2), first=True)


def test_a_stream_decodes_to_the_clip_with_two_compilations(tiny, clip):
    latents, whole, whole_cache = clip
    assert whole.shape == (2, 9, 6, 4, 3)
    stream = jax.jit(
        functools.partial(video_coding.decode), static_argnames="first", donate_argnames="cache", compiler_options=QUICK
    )
    cache, parts = decoder_cache(tiny, 2, 3, 2), []
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    for index in range(5):
        part, cache = stream(tiny, latents[:, index : index + 1], cache, first=index == 0)
        parts.append(part)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == shapes
    assert stream._cache_size() == 2
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), cache, whole_cache)


def test_chunks_of_any_size_decode_to_the_clip(tiny, clip):
    latents, whole, _ = clip
    start, cache = decode(tiny, latents[:, :3], decoder_cache(tiny, 2, 3, 2), first=True)
    rest, _ = decode(tiny, latents[:, 3:], cache, first=False)
    np.testing.assert_allclose(np.concatenate([start, rest], axis=1), whole, rtol=0, atol=1e-5)
    # The step itself takes any number of latents: the scan is there for memory, not for correctness.
    at_once, _ = jax.jit(VAE.decode_step, static_argnames="first", compiler_options=QUICK)(
        tiny, latents[:, 3:], cache, first=False
    )
    np.testing.assert_allclose(at_once, rest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("latents_per_call", [2, 3])
def test_several_latents_per_call_are_one_after_the_other(tiny, clip, latents_per_call):
    """In a whole clip, and in a stream whose calls they do not divide; the caches too, so a stream may change them."""
    latents, whole, whole_cache = clip
    several = nnx.clone(tiny)
    several.config = dataclasses.replace(tiny.config, latents_per_call=latents_per_call)
    once, _ = decode(several, latents, decoder_cache(several, 2, 3, 2), first=True)
    start, cache = decode(several, latents[:, :1], decoder_cache(several, 2, 3, 2), first=True)
    rest, cache = decode(several, latents[:, 1:], cache, first=False)
    for video in (once, np.concatenate([start, rest], axis=1)):
        np.testing.assert_allclose(video, whole, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), cache, whole_cache)


def test_a_stream_encodes_to_the_clip(tiny):
    video = np.random.default_rng(2).uniform(-1, 1, (1, 7, 4, 6, 3)).astype(np.float32)
    whole, *_ = encode_moments(tiny, video, encoder_cache(tiny, 1, 2, 3), first=True)
    assert whole.shape == (1, 4, 2, 3, 16)
    cache, parts, start = encoder_cache(tiny, 1, 2, 3), [], 0
    for size in (1, 2, 2, 2):
        part, _, cache = encode_moments(tiny, video[:, start : start + size], cache, first=start == 0)
        parts.append(part)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_only_the_first_stream_of_its_size_traces_the_network():
    traced = []

    class Traced(VAE):
        def decode_step(self, *arguments):
            traced.append(arguments)
            return super().decode_step(*arguments)

    for seed, height in ((0, 3), (0, 3), (1, 3), (1, 4)):
        model = random_network(lambda: Traced(TINY, rngs=nnx.Rngs(0)), seed)
        cache = decoder_cache(model, 1, height, 2)
        assert cache.frames[0].shape == (1, 2, height, 2, 16)
        assert not any(x.any() for x in cache.frames)
    assert len(traced) == 2


def test_later_latents_change_no_earlier_frame(tiny, clip):
    latents, video, _ = clip
    shifted = latents + np.array([0, 0, 1, 0, 0], np.float32)[:, None, None, None]
    changed, _ = decode(tiny, shifted, decoder_cache(tiny, 2, 3, 2), first=True)
    np.testing.assert_array_equal(video[:, :3], changed[:, :3])
    assert not np.allclose(video[:, 3:], changed[:, 3:])


def test_half_precision_stays_close_and_gives_float32_frames(clip):
    latents, exact, _ = clip
    half = random_network(lambda: VAE(dataclasses.replace(TINY, dtype="bfloat16"), rngs=nnx.Rngs(0)))
    cache = decoder_cache(half, 2, 3, 2)
    assert all(x.dtype == jnp.bfloat16 for x in cache.frames)
    video, _ = decode(half, latents[:, :1], cache, first=True)
    assert video.dtype == jnp.float32
    assert np.std(video - exact[:, :1]) < 0.02 * np.std(exact[:, :1])


def test_one_tile_is_exact_and_many_cover_the_stream(tiny, clip):
    latents, whole, _ = clip
    decode_in_tiles = jax.jit(tiled_decode, static_argnames=("first", "tile", "overlap"), compiler_options=QUICK)
    cache = tiled_decoder_cache(tiny, 2, 3, 2, tile=8, overlap=2)
    video, _ = decode_in_tiles(tiny, latents[:, :1], cache, first=True, tile=8, overlap=2)
    np.testing.assert_allclose(video, whole[:, :1], rtol=0, atol=1e-5)

    cache = tiled_decoder_cache(tiny, 2, 3, 2, tile=2, overlap=1)
    start, cache = decode_in_tiles(tiny, latents[:, :1], cache, first=True, tile=2, overlap=1)
    rest, cache = decode_in_tiles(tiny, latents[:, 1:], cache, first=False, tile=2, overlap=1)
    video = np.concatenate([start, rest], axis=1)
    assert video.shape == whole.shape
    # approximate by design: it resembles the exact video, far more than another video would
    assert np.corrcoef(video.ravel(), whole.ravel())[0, 1] > 0.5


@pytest.mark.parametrize(
    "network",
    [
        lambda tile: VAE(dataclasses.replace(TINY, tile=tile), rngs=nnx.Rngs(0)),
        lambda tile: TinyVAE(TinyVAEConfig(widths=(6, 4, 2), tile=tile), rngs=nnx.Rngs(0)),
    ],
)
def test_a_codec_streams_in_the_tiles_of_its_configuration(network):
    latents = np.random.default_rng(1).normal(size=(1, 3, 6, 7, 16)).astype(np.float32)
    step = jax.jit(WanCodec.decode, static_argnames="first", compiler_options=QUICK)

    def stream(tile, *chunks):
        codec, parts, start = WanCodec(random_network(lambda: network(tile)), None), [], 0
        cache = codec.decode_start(1, 6, 7)
        for size in chunks:
            part, cache = step(codec, latents[:, start : start + size], cache, first=start == 0)
            parts.append(part)
            start += size
        return np.concatenate(parts, axis=1)

    whole, tiled = stream(0, 1, 2), stream(4, 1, 2)
    np.testing.assert_allclose(stream(4, 1, 1, 1), tiled, rtol=0, atol=1e-5 * np.abs(tiled).max())
    # Four tiles, of which none sees the frame: an approximation, but of this video.
    assert 0.01 < np.std(tiled - whole) / np.std(whole) < 0.3


def test_tiles_take_less_memory_than_the_frame():
    def planned(tile):
        model = jax.eval_shape(lambda: VAE(dataclasses.replace(TINY, tile=tile), rngs=nnx.Rngs(0), parts=["decoder"]))
        codec = WanCodec(model, None)
        cache, latents = jax.eval_shape(lambda: codec.decode_start(1, 40, 60)), jnp.zeros((1, 1, 40, 60, 16))
        step = jax.jit(WanCodec.decode, static_argnames="first", donate_argnames="cache", compiler_options=QUICK)
        plan = step.lower(codec, latents, cache, first=False).compile().memory_analysis()
        return plan.argument_size_in_bytes + plan.temp_size_in_bytes

    assert planned(12) < 0.8 * planned(0)


def test_tiles_of_a_constant_video_blend_to_that_constant():
    ones = FeatureCache(())

    class Flat:
        config = TINY

        @staticmethod
        def decode_step(latents, cache, first):
            return jnp.full((1, 1, 2 * latents.shape[2], 2 * latents.shape[3], 3), 0.7), cache

    video, _ = tiled_decode(Flat, jnp.zeros((1, 1, 7, 10, 16)), ones, first=True, tile=4, overlap=2)
    np.testing.assert_allclose(video, np.full((1, 1, 14, 20, 3), 0.7), rtol=1e-6)


def test_fresh_kernels_keep_the_variance_of_their_input():
    kernel = kernel_init(jax.random.key(0), (3, 3, 3, 8, 40), "float32")
    assert kernel.shape == (3, 3, 3, 8, 40)
    np.testing.assert_allclose(np.square(kernel).mean() * 3 * 3 * 3 * 8, 1, rtol=0.05)


def test_misuse_is_refused(tiny):
    cache = decoder_cache(tiny, 1, 2, 2)
    with pytest.raises(ValueError, match="at least one frame"):
        decode(tiny, jnp.zeros((1, 0, 2, 2, 16)), cache, first=True)
    with pytest.raises(ValueError, match="16"):
        decode(tiny, jnp.zeros((1, 1, 2, 2, 8)), cache, first=True)
    cache = encoder_cache(tiny, 1, 2, 2)
    with pytest.raises(ValueError, match="1 \\+ 2 k frames"):
        encode(tiny, jnp.zeros((1, 4, 8, 8, 3)), cache, first=True)
    with pytest.raises(ValueError, match="2 k frames"):
        encode(tiny, jnp.zeros((1, 5, 8, 8, 3)), cache, first=False)
    with pytest.raises(ValueError, match="tiled"):
        encode_clip(tiny, jnp.zeros((1, 5, 8, 9, 3)))
    with pytest.raises(ValueError, match="overlap"):
        tiled_decoder_cache(tiny, 1, 8, 8, tile=4, overlap=4)
    with pytest.raises(ValueError, match="tile must be"):
        VAEConfig(tile=-1)
    with pytest.raises(ValueError, match="parts"):
        VAE(TINY, rngs=nnx.Rngs(0), parts=["decode"])
    with pytest.raises(ValueError, match="temporal_downsample"):
        VAEConfig(temporal_downsample=(True,))
