"""Laws of training on clips: flow matching behind clean chunks, and consistency with a causal teacher."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit
from small_rollouts import STREAMS

from adastate_jax.config.stages import InitializeConfig, OptimizerConfig, PretrainConfig
from adastate_jax.diffusion import add_noise
from adastate_jax.sharding import make_mesh, shard_batch, tree_shardings
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training import clips as training_clips
from adastate_jax.training.clips import clip_step, consistency_loss, consistency_step
from adastate_jax.training.initialize import recurrent_pass
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.state import create_state

OPTIMIZER = OptimizerConfig(betas=(0.9, 0.999))
NULL_TEXT = jnp.ones((1, SMALL.text_length, SMALL.text_dim))
KEY = jax.random.key(7)
WITHOUT_ANCHOR = StreamConfig(3, 3, NoAnchor(), denoising_steps=(1000.0, 500.0))
SMALLER = dataclasses.replace(SMALL, num_layers=1)


@pytest.fixture(scope="module")
def network():
    return make_dit(SMALLER, 0)


def clips(batch, frames):
    return np.random.default_rng(3).standard_normal((batch, frames, *LATENT_SHAPE), np.float32)


def stepped(network, clips, text, config, stream):
    def step(network):
        return clip_step(create_state(network, OPTIMIZER, True), clips, text, NULL_TEXT, KEY, config, stream)[1]

    return jax.jit(step)(network)


@pytest.mark.parametrize("context", ["clean", "stream"])
def test_a_clip_of_one_chunk_is_pretraining(context, network, text):
    """Noise, levels and captions are drawn alike."""
    settings = {"optimizer": OPTIMIZER, "weighting": "bell", "shift": 3.0, "caption_dropout": 0.5}
    video = clips(2, 3)
    found = stepped(network, video, text, InitializeConfig(context=context, **settings), WITHOUT_ANCHOR)

    def pretrained(network):
        state = create_state(network, OPTIMIZER, True)
        return pretrain_step(state, video, text, NULL_TEXT, KEY, PretrainConfig(**settings))[1]

    wanted = jax.jit(pretrained)(network)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5)


def test_all_chunks_at_once_are_chunk_after_chunk_against_the_streams_cache(network, text):
    """In loss and gradient; `tests/training/test_initialize.py` has that the latter is the stream."""
    one, other = (
        stepped(network, clips(2, 12), text, InitializeConfig(context=context, optimizer=OPTIMIZER), WITHOUT_ANCHOR)
        for context in ("clean", "stream")
    )
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4)


def test_beside_a_hidden_state_every_level_is_predicted(network, text):
    """The flow's error of the content at all of the stream's levels, and none of the state."""
    stream, video = STREAMS["adaptive"], clips(2, 9)
    config = InitializeConfig(context="state", optimizer=OPTIMIZER, batch_size=2, accumulate=2)
    levels = jnp.asarray(stream.sigmas)
    noise = jax.random.normal(jax.random.key(1), (2, len(levels), *video.shape[1:]))
    state_noise = jax.random.normal(jax.random.key(2), (3, len(levels), 2, 1, *LATENT_SHAPE))

    def both(network):
        loss = training_clips._loss_at_each_level(network, video, noise, text, state_noise, config, stream)
        noisy = jnp.stack([add_noise(video, noise[:, i], level) for i, level in enumerate(levels)], axis=1)
        estimates = recurrent_pass(network, noisy, text, stream, video, state_noise)
        flow = (noisy - estimates) / levels[:, None, None, None, None]
        return loss, jnp.square(flow - (noise - video[:, None])).mean()

    np.testing.assert_allclose(*jax.jit(both)(network), rtol=1e-4)
    # Micro-batches split every draw along its samples, or shapes would not go together.
    _, scalars = jax.eval_shape(
        lambda network: clip_step(create_state(network, OPTIMIZER, True), video, text, NULL_TEXT, KEY, config, stream),
        network,
    )
    assert scalars["loss"].shape == ()


# --- consistency ------------------------------------------------------------------------------------------------------

CONSISTENCY = InitializeConfig(
    targets="consistency", context="clean", optimizer=OPTIMIZER, ode_steps=4, guidance_scale=2.0, ema_start=5
)


def consistent(state, teacher, batch):
    return consistency_step(state, teacher, batch["clips"], batch["text"], NULL_TEXT, KEY, CONSISTENCY, WITHOUT_ANCHOR)


def test_the_consistency_function_of_a_point_has_no_loss(network, text):
    """All clips are one: the teacher's flow leads straight there, and its end is what a student should say."""
    config = dataclasses.replace(SMALLER, prediction="clean")
    point = make_dit(config, 1)
    point.head.kernel[...] = jnp.zeros_like(point.head.kernel[...])
    state = create_state(point, OPTIMIZER, True)
    batch, step = {"clips": clips(2, 12), "text": text}, jax.jit(consistent)
    _, scalars = step(state, point, batch)
    assert scalars["loss"] < 1e-10
    other = make_dit(config, 1)
    other.head.kernel[...] = jnp.zeros_like(other.head.kernel[...])
    other.head.bias[...] = other.head.bias[...] + 0.5
    _, scalars = step(dataclasses.replace(state, params=other), point, batch)
    np.testing.assert_allclose(scalars["loss"], 0.25, rtol=1e-4)


def gaussian(spread):
    """Consistency function and flow of clips that are normal with this standard deviation, in closed form."""

    def scale(sigma):
        return jnp.sqrt(sigma**2 + (1 - sigma) ** 2 * spread**2)[..., None, None, None]

    def flow(x, sigma):
        return x * (sigma - (1 - sigma) * spread**2)[..., None, None, None] / scale(sigma) ** 2

    return lambda x, sigma: x * spread / scale(sigma), flow


def test_the_consistency_function_of_normal_clips_has_the_loss_of_eulers_step():
    """Whose error is of second order: half the step, a sixteenth of the loss."""
    function, flow = gaussian(0.5)
    noisy, sigma = clips(2, 6), jnp.full((2, 6), 0.3)
    losses = [consistency_loss(function, function, flow, noisy, sigma, sigma - step) for step in (0.1, 0.05, 0.025)]
    for one, half in itertools.pairwise(losses):
        assert 15 < one / half < 18
    wrong = consistency_loss(lambda x, sigma: 1.1 * function(x, sigma), function, flow, noisy, sigma, sigma - 0.025)
    assert wrong > 100 * losses[-1]


def test_neither_target_nor_teacher_gets_a_gradient():
    function, flow = gaussian(0.5)

    def loss(student, target, teacher):
        scaled = (
            lambda x, sigma: student * function(x, sigma),
            lambda x, sigma: target * function(x, sigma),
            lambda x, sigma: teacher * flow(x, sigma),
        )
        return consistency_loss(*scaled, clips(2, 6), jnp.full((2, 6), 0.8), jnp.full((2, 6), 0.7))

    of_student, of_target, of_teacher = jax.grad(loss, argnums=(0, 1, 2))(1.1, 1.0, 1.0)
    assert (of_target, of_teacher) == (0.0, 0.0)
    assert of_student > 0.01


def test_a_consistency_step_on_eight_devices_is_that_on_one(network, text):
    """The teacher is guided, and the average is the student until it starts."""
    state, teacher = create_state(network, OPTIMIZER, True), make_dit(SMALLER, 20)
    batch = {"clips": clips(4, 6), "text": np.concatenate([text, text[::-1]])}
    found = []
    for mesh in (make_mesh(), make_mesh(data=2, fsdp=2, model=2)):
        with jax.set_mesh(mesh):
            placed = (jax.device_put(tree, tree_shardings(tree, mesh)) for tree in (state, teacher))
            found.append(jax.jit(consistent)(*placed, shard_batch(batch, mesh)))
    (one, scalars), (other, others) = found
    for name, value in scalars.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4)
    assert scalars["loss"] > 0
    for a, b, average in zip(*map(jax.tree.leaves, (one.params, other.params, one.ema)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_array_equal(a, average)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "clip"}, "targets must be one of trajectories, clips, consistency, got 'clip'"),
        ({"targets": "consistency"}, "context must be clean or stream for targets consistency, got 'noisy'"),
        ({"weighting": "bells"}, "weighting must be one of"),
        ({"caption_dropout": 1.5}, r"caption_dropout must lie in \[0, 1\]"),
        ({"ema_start": -1}, "ema_start must not be negative, got -1"),
    ],
)
def test_what_initialisation_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InitializeConfig(**fields)
