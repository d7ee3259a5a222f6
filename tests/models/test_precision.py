"""Float32 is meant where it is written: every product of float32 factors says so to the compiler.

Unless told, a TPU rounds such factors to bfloat16, and a GPU to TF32; a CPU never does, so numbers cannot tell here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import TextConfig, TextEncoder
from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig

_PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution).*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> ")


def products(function, *arguments) -> list[tuple[str, bool]]:
    """Of every product that a function lowers to: its factors' dtype, and whether it is to be exact."""
    found = []
    for line in jax.jit(function).lower(*arguments).as_text().splitlines():
        if "stablehlo.dot_general" in line or "stablehlo.convolution" in line:
            dtypes = {shape.rpartition("x")[2] for shape in _PRODUCT.search(line).groups()}
            # JAX's attention in 16 bits says it by an algorithm, where one factor of a gradient comes in float32.
            if "lhs_precision_type = bf16, rhs_precision_type = bf16, accumulation_type = f32" in line:
                dtypes = {"bf16"}
            assert len(dtypes) == 1, line
            found.append((dtypes.pop(), line.count("HIGHEST") == 2))
    return found


def dit(dtype):
    config = DiTConfig(
        dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_channels=4, out_channels=4, text_dim=8, text_length=4,
        freq_dim=8, dtype=dtype, attention="xla",
    )  # fmt: skip
    model = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    past = jax.ShapeDtypeStruct((2, 1, 8, 2, 8), dtype)
    inputs = jax.ShapeDtypeStruct((1, 4, 8), jnp.float32), jax.ShapeDtypeStruct((1, 2, 4, 4, 4), jnp.float32)

    def loss(model, text, latents, context):
        flow, kept = model(latents, jnp.full((1, 2), 500.0), model.text_keys_values(text), (0, 1), context=context)
        return (flow**2).mean() + sum((x.astype(jnp.float32) ** 2).mean() for x in jax.tree.leaves(kept))

    return jax.value_and_grad(loss), model, *inputs, KeyValues(past, past)


def autoencoder(kind, config):
    model = jax.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    video = jnp.zeros((1, 4, 16, 16, 3))
    later = () if kind is TinyVAE else (False,)

    def both(model):
        moments, _ = model.encode_step(video, None, *later)
        latents = moments if kind is TinyVAE else moments[0]
        return model.decode_step(latents, None, False)

    return both, model


def text_encoder(dtype):
    config = TextConfig(
        vocab_size=20, dim=16, dim_attention=8, ffn_dim=32, num_heads=2, num_layers=2, text_length=4, dtype=dtype
    )
    model = jax.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))
    return TextEncoder.__call__, model, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)


def wan(dtype):
    config = VAEConfig(dim=4, dim_multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,), dtype=dtype)
    return autoencoder(VAE, config)


def tiny(dtype):
    return autoencoder(TinyVAE, TinyVAEConfig(latent_channels=4, widths=(8, 6, 4), dtype=dtype))


NETWORKS = {"dit": dit, "text": text_encoder, "wan": wan, "tiny": tiny}


@functools.cache
def products_of(name, dtype):
    return products(*NETWORKS[name](dtype))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float32_network_is_float32(name):
    """Its gradient too, where it is trained."""
    found = products_of(name, "float32")
    assert len(found) > 4
    assert set(found) == {("f32", True)}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_float32_in_a_network_of_16_bits_is_float32(name):
    found = products_of(name, "bfloat16")
    assert ("f32", False) not in found
    assert "bf16" in {dtype for dtype, _ in found}
    assert len(found) == len(products_of(name, "float32"))
    if name in ("dit", "wan"):  # the timestep embedding and the head; the last convolutions
        assert ("f32", True) in found


def test_the_patch_codec_is_float32():
    codec = PatchCodec(jnp.zeros(12), jnp.eye(12)[:, :4], jnp.ones(4))
    found = products(lambda: codec.decode(codec.encode(jnp.zeros((1, 1, 4, 4, 3))), (), False))
    assert found == [("f32", True)] * 2
