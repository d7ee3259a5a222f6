"""Laws of pretraining and of the optimizer around every stage."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import LATENT_SHAPE

from adastate_jax.config.stages import InitializeConfig, OptimizerConfig, PretrainConfig, ode_sigmas
from adastate_jax.diffusion import add_noise, clean_to_flow, denoising_sigmas, draw_normal, flow_to_clean
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.initialize import sample_trajectory
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.state import apply_gradients, create_state

STEP = jax.jit(pretrain_step, static_argnames="config")


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(1), (2, 6, *LATENT_SHAPE))


def test_dropped_captions_are_the_empty_one(student, latents, text):
    null_text = jnp.full((1, *text.shape[1:]), 0.5)
    optimizer = OptimizerConfig(learning_rate=1e-3)
    losses = {}
    for dropout in (0.0, 1.0):
        config = PretrainConfig(optimizer=optimizer, caption_dropout=dropout)
        for name, captions in (("captions", text), ("null", jnp.broadcast_to(null_text, text.shape))):
            state = create_state(student, optimizer, True)
            losses[dropout, name] = float(
                STEP(state, latents, captions, null_text, jax.random.key(0), config)[1]["loss"]
            )
    assert losses[1.0, "captions"] == losses[1.0, "null"] == losses[0.0, "null"]
    assert losses[0.0, "captions"] != losses[0.0, "null"]


@pytest.mark.parametrize("weighting", ["uniform", "bell", "clean"])
def test_training_lowers_the_loss(weighting, student, latents, text):
    config = PretrainConfig(optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99)), weighting=weighting)
    state = create_state(student, config.optimizer, True)
    losses = []
    for _ in range(30):
        state, scalars = STEP(state, latents, text, text[:1], jax.random.key(0), config)
        losses.append(float(scalars["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 30


def test_ema_follows_and_shares_no_buffer(student, latents, text):
    config = PretrainConfig(optimizer=OptimizerConfig(learning_rate=1e-2), ema_decay=0.9)
    state = create_state(student, config.optimizer, True)
    after, _ = STEP(state, latents, text, text[:1], jax.random.key(0), config)
    for old, new, ema in zip(*map(jax.tree.leaves, (state.params, after.params, after.ema)), strict=True):
        np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, atol=1e-6)
    donated = jax.jit(pretrain_step, static_argnames="config", donate_argnums=0)
    donated(jax.tree.map(jnp.copy, state), latents, text, text[:1], jax.random.key(0), config)


def test_gradients_are_clipped():
    """Adam's steps do not show it; its momentum after one update is (1 − β1) of the clipped gradient."""
    gradient = jnp.array([300.0, 0.0, 400.0])
    for largest, scale in ((50.0, 0.1), (1000.0, 1.0)):
        optimizer = OptimizerConfig(betas=(0.75, 0.999), max_gradient_norm=largest)
        state, scalars = apply_gradients(
            create_state({"w": jnp.zeros(3)}, optimizer, False), {"w": gradient}, optimizer
        )
        (momentum,) = (part.mu["w"] for part in state.optimizer if hasattr(part, "mu"))
        np.testing.assert_allclose(momentum, 0.25 * scale * gradient, rtol=1e-6)
        assert float(scalars["gradient_norm"]) == pytest.approx(500.0)  # before clipping


def test_adam_without_momentum_keeps_none_and_computes_the_same():
    optimizer = OptimizerConfig(learning_rate=0.1)
    assert optimizer.betas[0] == 0
    adamw = optax.chain(
        optax.clip_by_global_norm(optimizer.max_gradient_norm),
        optax.adamw(optimizer.learning_rate, *optimizer.betas, weight_decay=optimizer.weight_decay),
    )
    rng = np.random.default_rng(0)
    ours = theirs = {"w": jnp.asarray(rng.standard_normal((64, 3)), jnp.float32)}
    state, their_state = create_state(ours, optimizer, False), adamw.init(theirs)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) < ours["w"].size + 8
    step = jax.jit(lambda state, gradients: apply_gradients(state, gradients, optimizer)[0])
    update = jax.jit(adamw.update)
    for scale in (1e-6, 1.0, 1e3):
        gradients = {"w": jnp.asarray(scale * rng.standard_normal((64, 3)), jnp.float32)}
        state = step(state, gradients)
        updates, their_state = update(gradients, their_state, theirs)
        theirs = jax.jit(optax.apply_updates)(theirs, updates)
        np.testing.assert_allclose(state.params["w"], theirs["w"], rtol=1e-6)  # another compiler may fuse otherwise


def test_weights_of_any_dtype_are_trained_in_float32(student, latents, text):
    """Loaded in 16 bits, their masters, moments and average are float32, and an update of 2e-6 moves them."""
    optimizer = OptimizerConfig(learning_rate=2e-6, betas=(0.9, 0.999))
    config = PretrainConfig(optimizer=optimizer)
    for dtype in (jnp.bfloat16, jnp.float16):
        state = create_state(jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), student), optimizer, True)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    after, _ = STEP(state, latents, text, text[:1], jax.random.key(0), config)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    moved = [after != before for before, after in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True)]
    assert np.mean(np.concatenate([x.ravel() for x in moved])) > 0.99
    in_16_bits = [
        after.astype(jnp.bfloat16) != before.astype(jnp.bfloat16)
        for before, after in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True)
    ]
    assert np.mean(np.concatenate([x.ravel() for x in in_16_bits])) < 0.1  # what 16 bits would have kept of it


def second_moment_after(updates, optimizer, weights):
    """Adam's second moment of weights after so many gradients of one."""
    state = create_state({"w": weights}, optimizer, False)
    gradients = {"w": jnp.ones(weights.shape)}
    state = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, updates, lambda _, state: apply_gradients(state, gradients, optimizer)[0], state
        )
    )(state)
    (second,) = (part.nu["w"] for part in state.optimizer if hasattr(part, "nu"))
    return second, state.params["w"]


def test_the_second_moment_of_16_bit_weights_grows_to_its_value():
    """1 − 0.999ⁿ of a gradient of one; in bfloat16 it stalls at half of that."""
    optimizer = OptimizerConfig(weight_decay=0.0, max_gradient_norm=100.0)
    second, weights = second_moment_after(3000, optimizer, jnp.ones(4, jnp.bfloat16))
    np.testing.assert_allclose(second, 1 - 0.999**3000, rtol=1e-3)
    np.testing.assert_allclose(weights, 1 - 3000 * 2e-6, rtol=2e-4)


def test_a_second_moment_in_16_bits_is_right_on_average():
    """Rounded to the nearest it would stall at a quarter of its value; at random it scatters by a few percent."""
    optimizer = OptimizerConfig(weight_decay=0.0, max_gradient_norm=100.0, second_moment_dtype="bfloat16")
    second, _ = second_moment_after(3000, optimizer, jnp.ones(4096))
    assert second.dtype == jnp.bfloat16
    second, expected = np.asarray(second, np.float64), 1 - 0.999**3000
    assert abs(second.mean() / expected - 1) < 5e-3
    assert 0.01 < second.std() / expected < 0.05

    def to_the_nearest(_, moment):
        return (0.999 * moment.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)

    stalled = jax.lax.fori_loop(0, 3000, to_the_nearest, jnp.bfloat16(0))
    assert stalled == 0.25


def test_rates_are_scheduled():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_steps=8, weight_decay=0.0, betas=(0.0, 0.0))
    state = create_state({"w": jnp.zeros(3)}, optimizer, False)
    sizes = []
    for _ in range(9):
        before = state.params["w"]
        state, _ = apply_gradients(state, {"w": jnp.array([300.0, 0.0, 400.0])}, optimizer)
        sizes.append(float(jnp.abs(state.params["w"] - before).max()))
    np.testing.assert_allclose(sizes[:5], [0, 0.25, 0.5, 0.75, 1.0], atol=1e-5)  # β = 0: a step is the rate itself
    assert sizes[5] < sizes[4]
    assert sizes[8] == pytest.approx(0.0, abs=1e-6)


def test_trajectories_pass_through_the_students_levels(teacher, text):
    stream = StreamConfig()
    sigmas = ode_sigmas(stream, 16)
    assert len(sigmas) == 17
    np.testing.assert_allclose(sigmas[::4], [*stream.sigmas, 0.0], atol=1e-7)
    assert np.all(np.diff(sigmas) < 0)
    noise = jax.random.normal(jax.random.key(3), (2, 3, *LATENT_SHAPE))
    run = jax.jit(lambda scale: sample_trajectory(teacher, noise, text, text[:1], sigmas, scale, 4))
    kept = run(0.0)
    assert kept.shape == (2, 5, 3, *LATENT_SHAPE)
    np.testing.assert_array_equal(kept[:, 0], noise)
    assert float(jnp.abs(run(2.0) - kept).max()) > 1e-3
    with pytest.raises(ValueError, match="multiple of the 4 denoising steps"):
        ode_sigmas(stream, 10)
    with pytest.raises(ValueError, match="context"):
        InitializeConfig(context="future")


def test_flow_and_clean_latents_are_two_views():
    clean, noise = (np.random.default_rng(i).standard_normal((2, 3, 2, 2, 4)).astype(np.float32) for i in range(2))
    sigma = np.array([[0.1, 0.5, 0.9], [1.0, 0.3, 0.7]], np.float32)
    noisy = add_noise(clean, noise, sigma)
    np.testing.assert_allclose(flow_to_clean(noise - clean, noisy, sigma), clean, atol=1e-5)
    np.testing.assert_allclose(clean_to_flow(clean, noisy, sigma), noise - clean, atol=1e-4)
    np.testing.assert_array_equal(add_noise(clean, noise, 0.0), clean)
    np.testing.assert_allclose(denoising_sigmas((1000, 750, 500, 250), 5.0), [1, 0.9375, 5 / 6, 0.625])


def test_drawing_flat_gives_the_same_bits():
    key = jax.random.key(7)
    np.testing.assert_array_equal(draw_normal(key, (2, 3, 5)), jax.random.normal(key, (2, 3, 5)))
