"""Short rollouts of the small student, which the laws of initialisation and distillation share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import LATENT_SHAPE

from adastate_jax.diffusion import add_noise
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.static import StaticAnchor
from adastate_jax.streaming.carry import draw_noise, initial_carry
from adastate_jax.streaming.denoising import denoise, live_noise, read_context, split_live
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of
from adastate_jax.training.self_rollout import draw_rollout_noise, self_rollout

STREAMS = {
    "adaptive": StreamConfig(denoising_steps=(1000.0, 600.0, 300.0)),
    "adaptive_wide": StreamConfig(2, 3, AdaptiveAnchor(2), denoising_steps=(1000.0, 600.0, 300.0)),
    "static": StreamConfig(2, 2, StaticAnchor(1), denoising_steps=(1000.0, 600.0, 300.0)),
    "none": StreamConfig(1, 2, NoAnchor(), denoising_steps=(1000.0, 600.0, 300.0)),
}
CHUNKS = 5
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))


@functools.partial(jax.jit, static_argnames="stream")
def record_of(student, text, exit_step, stream):
    noise = draw_rollout_noise(KEYS, stream, LATENT_SHAPE, CHUNKS)
    return self_rollout(student, student.text_keys_values(text), noise, exit_step, stream)[0]


def naive_latents(student, text, exit_step, stream, cache_gradient="stop", first_chunk=0):
    """The rollout as the paper tells it: one loop, the exit pass with gradient, the cache carried along.

    Of the chunks before `first_chunk`, which have no gradient, the content is left out.
    """
    frozen = jax.lax.stop_gradient(student)
    text_kv = student.text_keys_values(text)
    frozen_text = jax.lax.stop_gradient(text_kv)
    carry = initial_carry(student.config, stream, KEYS, *LATENT_SHAPE[:2])
    contents = []
    for index in range(CHUNKS):
        phase = phase_of(index, stream)
        layout = layout_of(phase, stream)
        noise = live_noise(draw_noise(carry, stream, LATENT_SHAPE), layout)
        context = read_context(student.config, carry.cache, stream, layout, noise[0])
        live = noise[0]
        for step in range(exit_step):
            fixed = jax.lax.stop_gradient(context)
            clean, _ = denoise(frozen, live, stream.sigmas[step], frozen_text, layout, fixed)
            live = add_noise(clean, noise[step + 1], stream.sigmas[step + 1])
        live = jax.lax.stop_gradient(live)
        clean, exit_fresh = denoise(student, live, stream.sigmas[exit_step], text_kv, layout, context)
        contents.append(split_live(clean, layout).content)
        fixed = jax.lax.stop_gradient(context)
        _, fresh = denoise(frozen, jax.lax.stop_gradient(clean), 0.0, frozen_text, layout, fixed)
        if cache_gradient != "stop":
            fresh = jax.tree.map(lambda v, path: v + path - jax.lax.stop_gradient(path), fresh, exit_fresh)
        cache = cache_lib.advance(carry.cache, stream.anchor, layout, fresh, phase.first_frame)
        if cache_gradient == "window":
            cache = dataclasses.replace(cache, anchor=jax.lax.stop_gradient(cache.anchor))
        if index < first_chunk:
            cache = jax.lax.stop_gradient(cache)
        carry = dataclasses.replace(carry, cache=cache, chunk=carry.chunk + 1)
    return jnp.concatenate(contents[first_chunk:], axis=1)


def weighted(latents):
    """A loss that treats every latent differently."""
    weights = np.random.default_rng(0).standard_normal(latents.shape).astype(np.float32)
    return (weights * latents).mean() + jnp.square(latents).mean()


def differ(a, b) -> float:
    """Largest difference of two gradients, of each leaf relative to its largest entry."""
    # A bias that moves all keys by the same hardly changes a softmax: where b is but rounding noise, so may a be.
    noise = 1e-3 * max(float(jnp.abs(y).max()) for y in jax.tree.leaves(b))

    def leaf(x, y) -> float:
        return float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), noise))

    return max(jax.tree.leaves(jax.tree.map(leaf, a, b)))
