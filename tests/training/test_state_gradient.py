"""The law of the gradient through the state: that of automatic differentiation of so many chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit
from small_rollouts import KEYS, differ, weighted

from adastate_jax.config.rollouts import require_parts
from adastate_jax.config.stages import DistillConfig
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors import make_anchor
from adastate_jax.streaming.carry import initial_carry
from adastate_jax.streaming.denoising import denoise, read_context, split_live
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of
from adastate_jax.training.self_rollout import draw_rollout_noise, gradient_pass, self_rollout

STREAM = StreamConfig(1, 1, make_anchor("adaptive", 1), denoising_steps=(1000.0,))
CHUNKS, FILL = 5, STREAM.num_fill_chunks


def naive_latents(student, text, noise, through_chunks):
    """One loop for every chunk: back to where its state begins to have a gradient, and forward again."""
    text = student.text_keys_values(text)

    def passes(cache, chunk):
        """Content of a chunk, and the cache behind it; the latter keeps all gradients."""
        phase = phase_of(chunk, STREAM)
        layout = layout_of(phase, STREAM)
        parts = ([noise.state[chunk, 0]] if layout.state else []) + [noise.content[chunk, 0]]
        context = read_context(SMALL, cache, STREAM, layout, parts[-1])
        clean, _ = denoise(student, jnp.concatenate(parts, axis=1), 1.0, text, layout, context)
        _, fresh = denoise(student, clean, 0.0, text, layout, context)
        return split_live(clean, layout).content, cache_lib.advance(
            cache, STREAM.anchor, layout, fresh, phase.first_frame
        )

    caches = [initial_carry(student.config, STREAM, KEYS, *LATENT_SHAPE[:2]).cache]
    for chunk in range(CHUNKS):
        caches.append(jax.lax.stop_gradient(passes(caches[-1], chunk)[1]))
    contents = []
    for chunk in range(CHUNKS):
        first = max(FILL, chunk - through_chunks)
        state = caches[min(first, chunk)].anchor
        for earlier in range(first, chunk):
            state = passes(dataclasses.replace(caches[earlier], anchor=state), earlier)[1].anchor
        contents.append(passes(dataclasses.replace(caches[chunk], anchor=state), chunk)[0])
    return jnp.concatenate(contents, axis=1)


def test_it_is_that_of_automatic_differentiation():
    """One chunk back, and two; both are others than none."""
    student, text = make_dit(dataclasses.replace(SMALL, num_layers=1), 0), np.ones((2, SMALL.text_length, 12)) / 3
    noise = draw_rollout_noise(KEYS, STREAM, LATENT_SHAPE, CHUNKS)
    record = jax.jit(lambda student: self_rollout(student, student.text_keys_values(text), noise, 0, STREAM)[0])(
        student
    )

    def gradient(how, chunks):
        def loss(params):
            return weighted(gradient_pass(params, params.text_keys_values(text), record, STREAM, how, chunks))

        return jax.jit(jax.grad(loss))(student)

    found = [gradient("stop", 0), *(gradient("state", chunks) for chunks in (1, 2))]
    for chunks, ours in enumerate(found[1:], 1):
        naive = jax.jit(jax.grad(lambda student, n=chunks: weighted(naive_latents(student, text, noise, n))))(student)
        assert differ(ours, naive) < 1e-4
    assert differ(found[1], found[0]) > 1e-2
    assert differ(found[2], found[1]) > 1e-3


def test_it_needs_a_state():
    with pytest.raises(ValueError, match=r"distill\.cache_gradient state needs an adaptive anchor"):
        require_parts(DistillConfig(cache_gradient="state"), StreamConfig(anchor=make_anchor("static")))
    with pytest.raises(ValueError, match="cache_gradient_chunks must be positive, got 0"):
        DistillConfig(cache_gradient="state", cache_gradient_chunks=0)
