"""Laws of the transformer that the reference numbers do not state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit

from adastate_jax.models.attention import KeyValues, attend_block_causal
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.rope import MAX_POSITION, rotate, rotation


@pytest.fixture(scope="module")
def inputs(student, text):
    latents = jax.random.normal(jax.random.key(0), (2, 3, *LATENT_SHAPE))
    return latents, jnp.full((2, 3), 500.0), student.text_keys_values(text)


def test_only_differences_of_positions_matter(student, inputs):
    latents, timesteps, text = inputs
    run = jax.jit(lambda positions: student(latents, timesteps, text, positions)[0])
    np.testing.assert_allclose(run(jnp.arange(3)), run(jnp.arange(3) + 700), atol=1e-4)
    assert np.abs(run(jnp.arange(3)) - run(jnp.array([0, 1, 9]))).max() > 1e-3


def test_a_context_is_seen_as_if_it_were_live(student, inputs):
    """Frames handed over as cached keys and values of their own pass weigh on a later frame as the clean copy does."""
    latents, timesteps, text = inputs
    timesteps = timesteps.at[:, :2].set(0.0)
    frame_tokens = SMALL.frame_tokens(*LATENT_SHAPE[:2])
    causal = attend_block_causal("xla", frame_tokens)
    whole, fresh = student(latents, timesteps, text, np.arange(3), causal)
    past = fresh.tokens(0, 2 * frame_tokens)
    context = KeyValues(rotate(past.key, rotation(np.arange(2), 2, 2, SMALL.head_dim)), past.value)
    last, _ = student(latents[:, 2:], timesteps[:, 2:], text, np.array([2]), context=context)
    np.testing.assert_allclose(last, whole[:, 2:], atol=1e-5)


def test_clean_prediction_is_a_flow(student, inputs):
    """A network that predicts clean latents gives the flow that leads there."""
    latents, timesteps, text = inputs
    clean_model = make_dit(dataclasses.replace(SMALL, prediction="clean"), 0)
    output, _ = student(latents, timesteps, text, np.arange(3))
    flow, _ = clean_model(latents, timesteps, text, np.arange(3))
    np.testing.assert_allclose(latents - 0.5 * flow, output, atol=1e-4)


@pytest.mark.parametrize("remat", ["block", "attention", "dots"])
def test_rematerialisation_changes_no_gradient(remat, student, inputs):
    latents, timesteps, text = inputs
    other = jax.tree.unflatten(
        jax.tree.structure(make_dit(dataclasses.replace(SMALL, remat=remat), 0)), jax.tree.leaves(student)
    )

    @jax.jit
    def gradient(model):
        return jax.grad(lambda m: jnp.square(m(latents, timesteps, text, np.arange(3))[0]).sum())(model)

    for a, b in zip(jax.tree.leaves(gradient(student)), jax.tree.leaves(gradient(other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_less_is_computed_again_where_more_is_kept(inputs):
    """Products in the program of a gradient."""
    latents, timesteps, text = inputs

    def products(remat):
        model = make_dit(dataclasses.replace(SMALL, remat=remat), 0)
        loss = jax.grad(lambda m: jnp.square(m(latents, timesteps, text, np.arange(3))[0]).sum())
        return str(jax.make_jaxpr(loss)(model)).count("dot_general")

    none, dots, attention, block = map(products, ("none", "dots", "attention", "block"))
    assert none < dots < attention < block


def test_bfloat16_stays_close(student, inputs):
    latents, timesteps, text = inputs
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    low = jax.tree.unflatten(jax.tree.structure(make_dit(config, 0)), jax.tree.leaves(student))
    exact, _ = student(latents, timesteps, text, np.arange(3))
    rounded, fresh = low(latents, timesteps, text, np.arange(3))
    assert fresh.key.dtype == jnp.bfloat16
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.05 * float(jnp.abs(exact).max())


def test_what_cannot_be_is_refused(student, inputs):
    latents, timesteps, text = inputs
    with pytest.raises(ValueError, match="not tiled by patches"):
        student(latents[:, :, :3], timesteps, text, np.arange(3))
    with pytest.raises(ValueError, match="temporal positions must lie in"):
        student(latents, timesteps, text, np.array([0, 1, MAX_POSITION]))
    with pytest.raises(ValueError, match="no whole number of chunks"):
        student(latents, timesteps, text, np.arange(3), attend_block_causal("xla", 5))
    with pytest.raises(ValueError, match="takes no cached context"):
        attend_block_causal("xla", 4)(None, None, None, None, text)
    for field, value in (("dim", 33), ("prediction", "noise"), ("remat", "all"), ("attention", "flash")):
        with pytest.raises(ValueError, match=field):
            DiTConfig(**{field: value})
