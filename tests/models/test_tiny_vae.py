"""The tiny video autoencoder against the official numbers, its names, and the laws of streaming."""

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

from adastate_jax.models import tiny_vae, video_coding
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.video_coding import decode, decoder_cache
from adastate_jax.sharding import path_name
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.tiny_vae import tiny_vae_table, tiny_vae_tensors

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")

TINY = TinyVAEConfig(latent_channels=4, widths=(8, 6, 4))

# These networks run in milliseconds: optimising them would take longer than all the tests.
QUICK = {"xla_backend_optimization_level": 0}
decode = jax.jit(decode, static_argnames="first", compiler_options=QUICK)
encode = jax.jit(tiny_vae.encode, compiler_options=QUICK)


def random_network(build, seed=0):
    """The network that `build` makes, with every weight random, biases and gains too; without compiling draws."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        return jnp.asarray(generator.normal(size=leaf.shape) * scale + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(build))


def official_tensors(golden):
    return {name.removeprefix("w."): golden[name] for name in golden if name.startswith("w.")}


@pytest.fixture(scope="module")
def golden():
    return SafeTensors(GOLDEN / "taehv.safetensors")


@pytest.fixture(scope="module")
def official(golden):
    """The fixture's decoder."""
    sizes = json.loads(golden.metadata["config"])
    widths = tuple(sizes["widths"][name] for name in ("256", "128", "64"))
    config = TinyVAEConfig(latent_channels=sizes["latent_channels"], widths=widths)
    abstract = jax.eval_shape(lambda: TinyVAE(config, rngs=nnx.Rngs(0), parts=["decoder"]))
    tensors = tiny_vae_tensors(config, official_tensors(golden))
    return load_official(abstract, tiny_vae_table(config), tensors, "taehv.safetensors")


@pytest.fixture(scope="module")
def tiny():
    return random_network(lambda: TinyVAE(TINY, rngs=nnx.Rngs(0)))


def official_range(video):
    """Ours, −1..1 → 0..1."""
    return (np.asarray(video) + 1) / 2


@needs_golden
def test_decoding_a_clip_equals_the_official_decoder(golden, official):
    latents = einops.rearrange(golden["in.latent"], "b f c h w -> b f h w c")
    video, _ = decode(official, latents, decoder_cache(official, 1, 3, 4), first=True)
    video = einops.rearrange(official_range(video), "b f h w c -> b f c h w")
    np.testing.assert_allclose(video, golden["out.raw_sequential"][:, 3:], rtol=0, atol=5e-5)
    np.testing.assert_allclose(np.clip(video, 0, 1), golden["out.video"], rtol=0, atol=5e-5)


@needs_golden
def test_decoding_a_stream_equals_the_official_streaming_decoder(golden, official):
    latents = einops.rearrange(golden["in.latent"], "b f c h w -> b f h w c")
    cache = decoder_cache(official, 1, 3, 4)
    for index in range(3):
        video, cache = decode(official, latents[:, index : index + 1], cache, first=index == 0)
        video = einops.rearrange(np.clip(official_range(video), 0, 1), "b f h w c -> b f c h w")
        np.testing.assert_allclose(video, golden[f"out.stream{index}"], rtol=0, atol=5e-5)


@needs_golden
def test_every_official_name_is_mapped():
    manifest = json.loads((GOLDEN / "manifest_taew2_1.json").read_text())
    abstract = jax.eval_shape(lambda: TinyVAE(TinyVAEConfig(), rngs=nnx.Rngs(0)))
    leaves = {
        path_name(path).removesuffix("/value"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    # a broadcast scalar has the shape and costs no memory
    shapes = {
        entry.official: list(entry.to_official(np.broadcast_to(np.int8(0), leaves.pop(entry.path))).shape)
        for entry in tiny_vae_table(TinyVAEConfig())
    }
    assert not leaves
    assert shapes == manifest["official"]


@needs_golden
def test_surplus_rows_of_a_growing_layer_are_dropped(golden, official):
    tensors = official_tensors(golden)
    exact = tensors["decoder.7.conv.weight"]
    tensors["decoder.7.conv.weight"] = np.concatenate([np.ones_like(exact), exact])
    trimmed = tiny_vae_tensors(official.config, tensors)
    np.testing.assert_array_equal(trimmed["decoder.7.conv.weight"], exact)
    assert trimmed.keys() == tensors.keys()


@pytest.fixture(scope="module")
def clip(tiny):
    """Latents [2, 4, 3, 2, 4] and what decoding them in one call gives."""
    latents = np.random.default_rng(1).normal(size=(2, 4, 3, 2, 4)).astype(np.float32)
    return latents, *decode(tiny, latents, decoder_cache(tiny, 2, 3, 2), first=True)


def test_a_stream_decodes_to_the_clip_with_two_compilations(tiny, clip):
    latents, whole, whole_cache = clip
    assert whole.shape == (2, 13, 24, 16, 3)
    stream = jax.jit(
        functools.partial(video_coding.decode), static_argnames="first", donate_argnames="cache", compiler_options=QUICK
    )
    cache, parts = decoder_cache(tiny, 2, 3, 2), []
    for index in range(4):
        part, cache = stream(tiny, latents[:, index : index + 1], cache, first=index == 0)
        parts.append(part)
    assert stream._cache_size() == 2
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), cache, whole_cache)


def test_a_stream_encodes_to_the_clip(tiny):
    video = np.random.default_rng(2).uniform(-1, 1, (1, 9, 16, 24, 3)).astype(np.float32)
    whole = jax.jit(tiny_vae.encode_clip, compiler_options=QUICK)(tiny, video)
    assert whole.shape == (1, 3, 2, 3, 4)

    padded = np.concatenate([video, np.repeat(video[:, -1:], 3, axis=1)], axis=1)
    cache, parts = tiny_vae.encoder_cache(tiny, 1, 2, 3), []
    for start in (0, 4, 8):
        part, cache = encode(tiny, padded[:, start : start + 4], cache)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-5)


def test_the_encoder_in_one_pass_equals_one_pass_per_latent(tiny):
    video = np.random.default_rng(3).uniform(-1, 1, (1, 8, 16, 24, 3)).astype(np.float32)
    at_once, _ = jax.jit(TinyVAE.encode_step, compiler_options=QUICK)(tiny, video, None)
    each, _ = encode(tiny, video, tiny_vae.encoder_cache(tiny, 1, 2, 3))
    np.testing.assert_allclose(at_once, each, rtol=0, atol=1e-5)


def test_half_precision_stays_close_and_gives_float32_frames(clip):
    latents, exact, _ = clip
    half = random_network(lambda: TinyVAE(dataclasses.replace(TINY, dtype="bfloat16"), rngs=nnx.Rngs(0)))
    cache = decoder_cache(half, 2, 3, 2)
    assert all(x.dtype == jnp.bfloat16 for x in cache.frames)
    video, _ = decode(half, latents[:, :1], cache, first=True)
    assert video.dtype == jnp.float32
    assert np.std(video - exact[:, :1]) < 0.02 * np.std(exact[:, :1])


def test_misuse_is_refused(tiny):
    with pytest.raises(ValueError, match="4 k frames"):
        tiny_vae.encode(tiny, jnp.zeros((1, 5, 8, 8, 3)), tiny_vae.encoder_cache(tiny, 1, 1, 1))
    with pytest.raises(ValueError, match="tiled"):
        tiny_vae.encode_clip(tiny, jnp.zeros((1, 5, 8, 9, 3)))
    with pytest.raises(ValueError, match="parts"):
        TinyVAE(TINY, rngs=nnx.Rngs(0), parts=[])
    with pytest.raises(ValueError, match="frame rate"):
        TinyVAEConfig(temporal_upsample=(True, True, True))
