"""Short rollouts of the small student, which the laws of initialisation and distillation share."""

import functools

import jax
import jax.numpy as jnp
from conftest import LATENT_SHAPE

from adastate_jax.streaming.memories import AdaptiveAnchor
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.streaming.sinks import StaticAnchor
from adastate_jax.streaming.strategy import NoAnchor
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
    return self_rollout(student, student.text_keys_values(text), noise, exit_step, stream)
