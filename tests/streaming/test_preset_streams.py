"""Every published method as a stream: scan = generator, nothing absolute, restarts, joint denoising."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax.diffusion import add_noise, flow_to_clean
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.rope import rotate, rotation
from adastate_jax.streaming.anchors.averages import MemoryAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.ping_pong import PingPongAnchor
from adastate_jax.streaming.anchors.static import RollingAnchor
from adastate_jax.streaming.carry import draw_noise, initial_carry, seed_keys
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.rollout import rollout as traced_rollout
from adastate_jax.streaming.rollout import rollout_step, stream, stream_step
from adastate_jax.streaming.schedule import StreamConfig, phase_of

rollout = jax.jit(traced_rollout, static_argnames=("config", "latent_shape", "num_chunks", "first_chunk"))

# The same methods with fewer phases, which take their time to compile; what each phase sees is checked above.
SHORT = {
    "self_forcing": {"past_frames": 3},
    "self_forcing_frame": {"past_frames": 1},
    "causal_forcing": {"past_frames": 3},
    "causal_forcing_frame": {"past_frames": 1},
    "causal_forcing_two_step": {"past_frames": 1},
    "causal_forcing_one_step": {"past_frames": 1},
    "causvid": {"past_frames": 6},
    "longlive": {"past_frames": 3},
    "longlive_infinity": {"past_frames": 3},
    "infinity_rope": {},
    "rolling_forcing": {"past_frames": 3, "denoising_steps": (1000.0, 400.0)},
    "reward_forcing": {},
    "memrope": {"anchor": MemoryAnchor(0), "past_frames": 1},
    "memrope_adaptive": {"anchor": MemoryAnchor(0, adaptive=True), "past_frames": 1},
    "rolling_sink": {"anchor": PingPongAnchor(3)},
    "rolling_sink_fresh_noise": {"anchor": PingPongAnchor(3)},
    "adastate": {},
}


def short(name: str) -> StreamConfig:
    return dataclasses.replace(PRESETS[name].stream, **SHORT[name])


def start(config: StreamConfig, batch: int = 1):
    return initial_carry(SMALL, config, seed_keys(3, batch), *LATENT_SHAPE[:2])


def leaves(carry) -> list:
    return jax.tree.leaves((carry.cache, carry.chunk, carry.estimates))


@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
@pytest.mark.parametrize("name", {preset.stream: name for name, preset in PRESETS.items()}.values())
def test_scan_and_generator_give_the_same_bits(name, student, text):
    """And the generator compiles once per phase, and writes each new carry where the old one was."""
    config, text_kv = short(name), student.text_keys_values(text[:1])
    chunks = config.num_fill_chunks + 2 * len(config.cycle) + config.live_chunks
    phases = {phase_of(chunk, config, remaining=chunks - chunk) for chunk in range(chunks)}
    stream_step.clear_cache()
    streamed, carry = [], start(config)
    for after, chunk in stream(student, carry, text_kv, config, LATENT_SHAPE, chunks):
        assert all(
            leaf.is_deleted() for leaf in jax.tree.leaves(carry) if leaf.ndim
        )  # a number may be a shared constant
        carry = after
        streamed.append(chunk.content)
    assert stream_step._cache_size() == len(phases)
    scanned, latents = rollout(student, start(config), text_kv, config, LATENT_SHAPE, chunks)
    assert np.array_equal(latents, np.concatenate(streamed, axis=1))
    assert all(np.array_equal(a, b) for a, b in zip(leaves(carry), leaves(scanned), strict=True))
    assert latents.shape[1] == chunks * config.chunk_frames
    assert np.isfinite(latents).all()
    assert np.std(latents) > 0.1


def test_phases_repeat_for_ever():
    for preset in PRESETS.values():
        config = preset.stream
        phases = {phase_of(chunk, config) for chunk in range(config.num_fill_chunks + len(config.cycle))}
        assert {phase_of(chunk, config) for chunk in range(9_900, 10_000)} == set(config.cycle) <= phases


@pytest.mark.parametrize("name", ["longlive", "rolling_sink"])
def test_nothing_depends_on_absolute_time(name, student, text):
    """What changes with time is in the carry, and nowhere else: chunk 3 and chunk 9,999 are the same bits."""
    config, text_kv = short(name), student.text_keys_values(text[:1])
    step = jax.jit(rollout_step, static_argnames=("config", "phase"))
    carry, _ = rollout(student, start(config), text_kv, config, LATENT_SHAPE, 3)
    noise = draw_noise(carry, config, LATENT_SHAPE)
    results, programs = [], []
    for chunk in (3, 9_999):
        at = dataclasses.replace(carry, chunk=jnp.int32(chunk))
        after, made = step(student, at, text_kv, noise, config, phase_of(chunk, config))
        results.append(jax.tree.leaves((after.cache, made)))
        programs.append(step._cache_size())
    assert programs[0] == programs[1]
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_rolling_sink_repeats_its_noise():
    config = PRESETS["rolling_sink"].stream
    fresh = PRESETS["rolling_sink_fresh_noise"].stream
    carry = start(short("infinity_rope"))
    later = dataclasses.replace(carry, chunk=jnp.int32(5))
    first, noise, other = (
        draw_noise(*arguments, LATENT_SHAPE).content for arguments in ((carry, config), (later, config), (later, fresh))
    )
    assert np.array_equal(noise[0], first[0])
    assert np.array_equal(noise[1:], other[1:])
    assert not np.array_equal(noise[0], other[0])
    assert np.array_equal(first, draw_noise(carry, fresh, LATENT_SHAPE).content)


def test_a_restart_may_reencode_its_overlap(student, text):
    config, text_kv = short("causvid"), student.text_keys_values(text[:1])
    last = config.num_fill_chunks - 1
    carry, _ = rollout(student, start(config), text_kv, config, LATENT_SHAPE, last)
    step = jax.jit(rollout_step, static_argnames=("config", "phase"))
    noise, phase = draw_noise(carry, config, LATENT_SHAPE), phase_of(last, config)
    halve = jax.tree_util.Partial(lambda scale, overlap: overlap.at[:, 0].multiply(scale), jnp.float32(0.5))
    plain, chunk = step(student, carry, text_kv, noise, config, phase)
    changed, same_chunk = step(student, carry, text_kv, noise, config, phase, halve)
    assert np.array_equal(chunk.content, same_chunk.content)
    for cache, overlap in ((plain.cache, chunk.content), (changed.cache, halve(chunk.content))):
        _, fresh = jax.jit(lambda x: student(x, jnp.zeros(x.shape[:2]), text_kv, (0, 1, 2)))(overlap)
        tokens = fresh.num_tokens
        np.testing.assert_allclose(cache.window.tokens(tokens, tokens).key, fresh.key, atol=1e-5)
        assert not np.any(cache.window.tokens(0, tokens).key)


def test_joint_denoising_is_the_plain_loop_over_passes(student, text):
    """N + T − 1 passes over the chunks that are on their way, all at absolute positions, against all keys ever made."""
    anchor = RollingAnchor(3, attended_frames=15)
    config = StreamConfig(past_frames=9, anchor=anchor, denoising_steps=(1000.0, 600.0, 200.0))
    num_chunks = 6
    text_kv = student.text_keys_values(text[:1])
    latents = rollout(student, start(config), text_kv, config, LATENT_SHAPE, num_chunks)[1]
    steps, frames, tokens = len(config.sigmas), config.chunk_frames, SMALL.frame_tokens(*LATENT_SHAPE[:2])
    grid = (LATENT_SHAPE[0] // 2, LATENT_SHAPE[1] // 2, SMALL.head_dim)
    run = jax.jit(
        lambda live, timesteps, positions, context: student(live, timesteps, text_kv, positions, None, context)
    )

    plain = dataclasses.replace(config, anchor=NoAnchor())
    noise = [
        draw_noise(dataclasses.replace(start(plain), chunk=jnp.int32(chunk)), plain, LATENT_SHAPE).content
        for chunk in range(num_chunks)
    ]
    live = {chunk: noise[chunk][0] for chunk in range(num_chunks)}
    done: list[jax.Array] = []
    held = None

    def look(positions, numbers):
        if not len(numbers):
            return None
        chosen = concatenate(*(held.tokens(int(n) * tokens, tokens) for n in numbers))
        return KeyValues(rotate(chosen.key, rotation(np.asarray(positions), *grid)), chosen.value)

    for index in range(num_chunks + steps - 1):
        oldest = max(0, index - steps + 1)
        on_their_way = range(oldest, min(index, num_chunks - 1) + 1)
        first = oldest * frames
        levels = [index - chunk for chunk in on_their_way]
        sigma = jnp.repeat(jnp.asarray([config.sigmas[level] for level in levels], jnp.float32), frames)[None]
        noisy = jnp.concatenate([live[chunk] for chunk in on_their_way], axis=1)
        working = np.arange(max(first - min(15 - 3 - noisy.shape[1], 9), 0), first)
        anchor = np.arange(min(3, first - len(working)))
        places = [*(first - len(working) - len(anchor) + anchor), *working]
        context = look(places, [*anchor, *working])
        flow, _ = run(noisy, 1000 * sigma, jnp.arange(first, first + noisy.shape[1]), context)
        clean = flow_to_clean(flow, noisy, sigma)
        for i, (chunk, level) in enumerate(zip(on_their_way, levels, strict=True)):
            estimate = clean[:, i * frames : (i + 1) * frames]
            if level + 1 < steps:
                live[chunk] = add_noise(estimate, noise[chunk][level + 1], config.sigmas[level + 1])
            else:
                done.append(estimate)
                past = np.arange(max(first - config.past_frames, 0), first)
                context = look(past, past)
                _, fresh = run(estimate, jnp.zeros((1, frames)), jnp.arange(first, first + frames), context)
                held = fresh if held is None else concatenate(held, fresh)
    np.testing.assert_allclose(latents, jnp.concatenate(done, axis=1), atol=5e-5)
