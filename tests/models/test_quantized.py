"""Frozen weights in eight bits: what they cost, in error and in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit

from adastate_jax.config.stages import DistillConfig
from adastate_jax.models.dit import DiT
from adastate_jax.models.quantized import QuantizedLinear, quantize, quantize_network
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.dmd import clean_estimate, draw_update, student_gradients
from adastate_jax.training.frozen import abstract_network

# The paper's width of a head, and enough inputs for rounding errors to average out as they do at size.
TEACHER = dataclasses.replace(
    SMALL, dim=256, ffn_dim=512, num_heads=2, num_layers=3, param_dtype="bfloat16", dtype="bfloat16"
)
# Relative L2 error of one pass's clean latents against bfloat16 weights, and of a DMD update's gradient in the student.
LATENT_ERROR = {"int8": 0.02, "float8": 0.05}  # found: 0.014, 0.039
GRADIENT_ERROR = {"int8": 0.03, "float8": 0.08}  # found: 0.016, 0.058


@functools.cache
def bfloat16_teacher() -> DiT:
    float32 = make_dit(dataclasses.replace(TEACHER, param_dtype="float32"), 20)
    like = abstract_network(TEACHER)
    leaves = [leaf.astype(jnp.bfloat16) for leaf in jax.tree.leaves(float32)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def relative_error(found, wanted) -> float:
    found, wanted = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_eight_bits_keep_a_weight_to_half_a_step(quantization):
    kernel = jax.random.normal(jax.random.key(0), (3, 64, 5)) * jnp.array([1e-6, 1e-2, 1.0, 50.0, 0.0])
    stored, scale = quantize(kernel, quantization)
    assert stored.dtype.itemsize == 1
    assert scale.shape == (3, 5)
    returned = stored.astype(jnp.float32) * scale[:, None]
    largest = jnp.abs(kernel).max(axis=1, keepdims=True)
    step = largest / 254 if quantization == "int8" else jnp.maximum(jnp.abs(kernel) / 16, largest / 448 / 512)
    assert (jnp.abs(returned - kernel) <= step * 1.001).all()
    np.testing.assert_array_equal(returned[..., 4], 0.0)
    np.testing.assert_allclose(jnp.abs(returned).max(axis=1), largest[:, 0], rtol=1e-6)


def test_a_layer_multiplies_by_what_its_weights_stand_for():
    layer = QuantizedLinear(8, 3, dtype="float32", param_dtype="float32", quantization="int8")
    layer.kernel[...], layer.scale[...] = quantize(jax.random.normal(jax.random.key(0), (8, 3)), "int8")
    layer.bias[...] = jnp.arange(3.0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    wanted = x @ (layer.kernel[...].astype(jnp.float32) * layer.scale[...]) + jnp.arange(3.0)
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_the_error_of_a_pass_and_of_a_distillation_step(quantization, student, critic, text):
    """The gate: what a quantised teacher changes in its latents, and in what the student learns of it."""
    plain = bfloat16_teacher()
    quantized = quantize_network(plain, quantization, make_mesh())
    config, stream = DistillConfig(batch_size=2, rollout_frames=6), StreamConfig()
    draws = draw_update(jax.random.key(3), 2, config, stream, LATENT_SHAPE)
    noisy, sigma = draws.score_noise, jnp.array([0.4, 0.8])

    estimate = jax.jit(clean_estimate)
    error = relative_error(estimate(quantized, noisy, sigma, text), estimate(plain, noisy, sigma, text))
    assert 0 < error < LATENT_ERROR[quantization]

    @jax.jit
    def gradients(teacher):
        return student_gradients(student, critic, teacher, text, 0 * text[:1], draws, config, stream)[0]

    error = relative_error(gradients(quantized), gradients(plain))
    assert 0 < error < GRADIENT_ERROR[quantization]


@pytest.mark.parametrize("quantization", ["int8", "float8"])
def test_first_and_last_layers_stay_and_blocks_halve(quantization):
    plain = bfloat16_teacher()
    quantized = quantize_network(plain, quantization, make_mesh(fsdp=2, model=2))
    for name in ("patch_embedding", "text_in", "text_out", "time_in", "time_out", "time_projection", "head"):
        np.testing.assert_array_equal(getattr(quantized, name).kernel[...], getattr(plain, name).kernel[...])
    kernel = quantized.blocks.ffn_in.kernel[...]
    assert kernel.dtype.itemsize == 1
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 128, 256)

    def nbytes(network):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(network.blocks))

    assert nbytes(quantized) < 0.53 * nbytes(plain)
