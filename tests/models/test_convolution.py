"""The autoencoder's convolutions: every form is the plain one, whatever it groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adastate_jax.models import convolution
from adastate_jax.models.convolution import causal_convolution, doubling_convolution
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.models.video_coding import decode, decoder_cache

FORMS = pytest.mark.parametrize("rows", [False, True], ids=["frames", "rows"])


@pytest.fixture
def form(rows, monkeypatch):
    monkeypatch.setattr(convolution, "_lies_in_rows", lambda: rows)


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def plain(x, kernel, strides, padding):
    """[B, F, H, W, I] by [f, r, c, I, O], in float64: a sum over the window, offset by offset."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    frames, height, width = (size - window + 1 for size, window in zip(x.shape[1:4], kernel.shape[:3], strict=True))
    y = 0
    for f, r, c in np.ndindex(kernel.shape[:3]):
        y = y + x[:, f : f + frames, r : r + height, c : c + width] @ kernel[f, r, c]
    return y[:, ::strides]


@FORMS
@pytest.mark.parametrize(("space", "stride"), [(3, 1), (1, 1), (1, 2)])
def test_a_causal_convolution_is_the_sum_over_its_window(form, space, stride):
    x, kernel, bias = drawn(2, 7 - stride, 4, 5, 3), drawn(3, space, space, 3, 2), drawn(2)
    y = causal_convolution(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), stride, "float32")
    np.testing.assert_allclose(y, plain(x, kernel, stride, space // 2) + bias, rtol=0, atol=2e-5)


@FORMS
def test_one_frame_of_a_window_is_that_behind_two_of_zeros(form):
    """How a stream's first call runs: with the same bits, and a third of the products."""
    x, kernel, bias = jnp.asarray(drawn(2, 1, 4, 5, 3)), jnp.asarray(drawn(3, 3, 3, 3, 2)), jnp.asarray(drawn(2))
    behind = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
    alone = causal_convolution(x, kernel[2:], bias, 1, "float32")
    np.testing.assert_allclose(alone, causal_convolution(behind, kernel, bias, 1, "float32"), rtol=0, atol=2e-5)


@FORMS
def test_doubling_is_every_pixel_twice_and_a_convolution(form):
    x, kernel, bias = drawn(2, 3, 4, 5, 3), drawn(3, 3, 3, 2), drawn(2)
    larger = plain(x.repeat(2, axis=2).repeat(2, axis=3), kernel[None], 1, 1)
    y = doubling_convolution(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias), "float32")
    assert y.shape == (2, 3, 8, 10, 2)
    np.testing.assert_allclose(y, larger + bias, rtol=0, atol=2e-5)
    y = doubling_convolution(jnp.asarray(x), jnp.asarray(kernel), None, "float32")
    np.testing.assert_allclose(y, larger, rtol=0, atol=2e-5)


def test_large_images_are_convolved_in_parts_to_the_same_numbers(monkeypatch):
    """Of the causal ones, of 480 bytes a frame, two at once or one, of the enlarged ones one."""
    x, kernel, bias = jnp.asarray(drawn(2, 8, 4, 5, 3)), jnp.asarray(drawn(3, 3, 3, 3, 2)), jnp.asarray(drawn(2))

    def convolved():
        forms = {stride: causal_convolution(x[:, : 9 - stride], kernel, bias, stride, "float32") for stride in (1, 2)}
        return [*forms.values(), doubling_convolution(x, kernel[0], bias, "float32")]

    whole = convolved()
    monkeypatch.setattr(convolution, "MOST_CONVOLVED_BYTES", 2 * 480)
    assert "while" in jax.jit(lambda x: causal_convolution(x, kernel, bias, 1, "float32")).lower(x).as_text()
    for parts, wanted in zip(convolved(), whole, strict=True):
        np.testing.assert_allclose(parts, wanted, rtol=0, atol=1e-5)


def test_folded_weights_are_rounded_once():
    """A folded weight is a sum of one, two or four of the kernel's, in float32, whatever they are kept in."""
    kernel = jnp.asarray(drawn(3, 3, 1, 1), jnp.bfloat16)
    folded = convolution._folded(kernel)
    assert folded.dtype == jnp.float32
    exact = np.asarray(kernel, np.float64)[..., 0, 0]
    np.testing.assert_allclose(folded[0, 0, 0, 0, 0, 0], exact[0, 0], rtol=1e-7)
    np.testing.assert_allclose(folded[1, 1, 0, 0, 0, 0], exact[1:, 1:].sum(), rtol=1e-6)
    np.testing.assert_allclose(folded[0, 1, 0, 1, 0, 0], exact[:2, 1:].sum(), rtol=1e-6)


def test_a_decoder_of_rows_streams_what_one_of_frames_decodes_at_once(monkeypatch):
    config = VAEConfig(dim=4, dim_multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
    shapes = jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0), parts=("decoder",)))
    generator = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape) * 0.3, x.dtype), shapes)
    latents, start = jnp.asarray(drawn(2, 4, 3, 5, 16)), decoder_cache(model, 2, 3, 5)
    whole, _ = decode(model, latents, start, first=True)
    monkeypatch.setattr(convolution, "_lies_in_rows", lambda: True)
    cache, parts = start, []
    for first, last in ((0, 1), (1, 4)):
        video, cache = decode(model, latents[:, first:last], cache, first=first == 0)
        parts.append(video)
    streamed = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(streamed, whole, rtol=0, atol=2e-5 * float(jnp.abs(whole).max()))
