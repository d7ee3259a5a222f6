"""Laws of the stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax.errors import UserError
from adastate_jax.streaming.anchors import make_anchor
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.static import StaticAnchor
from adastate_jax.streaming.carry import draw_noise, initial_carry, seed_keys
from adastate_jax.streaming.rollout import rollout as traced_rollout
from adastate_jax.streaming.rollout import rollout_step as traced_rollout_step
from adastate_jax.streaming.rollout import stream, stream_step
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of

rollout = jax.jit(traced_rollout, static_argnames=("config", "latent_shape", "num_chunks", "first_chunk"))
rollout_step = jax.jit(traced_rollout_step, static_argnames=("config", "phase"))

CONFIGS = {
    "adaptive": StreamConfig(),
    "static": StreamConfig(anchor=StaticAnchor(1)),
    "none": StreamConfig(anchor=NoAnchor()),
    "frame_by_frame": StreamConfig(chunk_frames=1, past_frames=1, anchor=AdaptiveAnchor(2)),
    "uneven": StreamConfig(chunk_frames=2, past_frames=3, anchor=AdaptiveAnchor(3), denoising_steps=(1000, 500)),
    "no_past": StreamConfig(past_frames=0, anchor=StaticAnchor(2), denoising_steps=(1000, 500)),
}


def start(config: StreamConfig, batch: int = 2):
    return initial_carry(SMALL, config, seed_keys(3, batch), *LATENT_SHAPE[:2])


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def without_keys(carry):
    return (carry.cache, carry.chunk, jax.random.key_data(carry.keys))


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_and_generator_give_the_same_bits(name, student, text):
    config = CONFIGS[name]
    text_kv = student.text_keys_values(text)
    chunks = config.num_fill_chunks + 3
    carry, latents = rollout(student, start(config), text_kv, config, LATENT_SHAPE, chunks)
    streamed = []

    for step in stream(student, start(config), text_kv, config, LATENT_SHAPE, chunks):
        streamed_carry, chunk = step
        streamed.append(chunk.content)
    assert np.array_equal(latents, np.concatenate(streamed, axis=1))
    assert equal(without_keys(carry), without_keys(streamed_carry))
    assert np.isfinite(latents).all()
    assert np.std(latents) > 0.1


@pytest.mark.parametrize(("seed", "batch"), [(-1, 1), (-1, 2), (2**32, 1), (2**32 - 1, 2), (2**70, 1)])
def test_seeds_that_would_be_those_of_other_samples_are_refused(seed, batch):
    with pytest.raises(UserError, match=rf"seed must lie in 0 … {2**32 - batch}\b.*, got {seed}"):
        seed_keys(seed, batch)


def test_every_seed_has_its_own_key():
    """And a sample's key is that of its seed, whatever the batch."""
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    keys = [jax.random.key_data(seed_keys(seed, 1))[0].tolist() for seed in seeds]
    assert keys == [jax.random.key_data(jax.random.key(np.uint32(seed))).tolist() for seed in seeds]
    assert len({tuple(key) for key in keys}) == len(seeds)
    assert jax.random.key_data(seed_keys(2**31 - 1, 2)).tolist() == keys[2:4]


def test_a_rollout_goes_on_from_its_carry(student, text):
    config = CONFIGS["adaptive"]
    text_kv = student.text_keys_values(text)
    whole_carry, whole = rollout(student, start(config), text_kv, config, LATENT_SHAPE, 5)
    carry, first = rollout(student, start(config), text_kv, config, LATENT_SHAPE, 1)
    carry, second = rollout(student, carry, text_kv, config, LATENT_SHAPE, 4, first_chunk=1)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)
    assert int(carry.chunk) == int(whole_carry.chunk) == 5


def test_nothing_depends_on_absolute_time(student, text):
    """Chunk 3 and chunk 9,999 with the same carry and noise are the same bits."""
    config = CONFIGS["adaptive"]
    text_kv = student.text_keys_values(text)
    carry, _ = rollout(student, start(config), text_kv, config, LATENT_SHAPE, 3)
    noise = draw_noise(carry, config, LATENT_SHAPE)
    step = jax.jit(traced_rollout_step, static_argnames=("config", "phase"))
    early_carry, early = step(student, carry, text_kv, noise, config, phase_of(3, config))
    programs = step._cache_size()
    late = dataclasses.replace(carry, chunk=jnp.int32(9_999))
    late_carry, late_chunk = step(student, late, text_kv, noise, config, phase_of(9_999, config))
    assert phase_of(3, config) == phase_of(9_999, config)
    assert step._cache_size() == programs
    assert equal(early, late_chunk)
    assert equal(early_carry.cache, late_carry.cache)
    assert not equal(draw_noise(carry, config, LATENT_SHAPE), draw_noise(late, config, LATENT_SHAPE))


def test_one_compilation_per_phase(student, text):
    config = dataclasses.replace(CONFIGS["adaptive"], denoising_steps=(1000.0, 400.0))  # of this test alone
    text_kv = student.text_keys_values(text)
    before = stream_step._cache_size()
    for _ in stream(student, start(config), text_kv, config, LATENT_SHAPE, 12):
        pass
    assert stream_step._cache_size() - before == config.num_fill_chunks + 1 == 3


def test_the_carry_is_donated(student, text):
    """The step writes the new carry where the old one was: every byte of it is aliased."""
    config = CONFIGS["adaptive"]
    text_kv = student.text_keys_values(text)
    carry = start(config)
    compiled = stream_step.lower(student, carry, text_kv, config, LATENT_SHAPE, phase_of(5, config)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(carry))
    kept = jax.tree.map(jnp.copy, carry)
    _, donated = stream_step(student, carry, text_kv, config, LATENT_SHAPE, phase_of(0, config))
    assert carry.cache.window.key.is_deleted()
    noise = draw_noise(kept, config, LATENT_SHAPE)
    _, fresh = rollout_step(student, kept, text_kv, noise, config, phase_of(0, config))
    assert equal(donated, fresh)


def test_samples_of_a_batch_are_independent(student, text):
    """Each sample is what it is alone, up to the rounding of other batch sizes."""
    config = CONFIGS["adaptive"]
    together = rollout(student, start(config), student.text_keys_values(text), config, LATENT_SHAPE, 4)[1]
    for i in range(2):
        carry = initial_carry(SMALL, config, seed_keys(3 + i, 1), *LATENT_SHAPE[:2])
        alone = rollout(student, carry, student.text_keys_values(text[i : i + 1]), config, LATENT_SHAPE, 4)[1]
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5)


def test_the_anchor_is_the_first_frame_then_the_state(student, text):
    text_kv = student.text_keys_values(text)
    tokens = SMALL.frame_tokens(*LATENT_SHAPE[:2])
    caches = []
    for carry, _ in stream(student, start(CONFIGS["adaptive"]), text_kv, CONFIGS["adaptive"], LATENT_SHAPE, 4):
        caches.append(jax.tree.map(jnp.copy, carry.cache))
    assert equal(caches[0].anchor, caches[0].window.tokens(0, tokens))
    assert equal(caches[1].anchor, caches[0].anchor)
    assert not equal(caches[2].anchor, caches[1].anchor)
    assert not equal(caches[3].anchor, caches[2].anchor)
    statics = []
    for carry, _ in stream(student, start(CONFIGS["static"]), text_kv, CONFIGS["static"], LATENT_SHAPE, 4):
        statics.append(jax.tree.map(jnp.copy, carry.cache.anchor))
    assert equal(statics[0], statics[3])
    assert equal(statics[0], caches[0].anchor)


@pytest.mark.parametrize("name", ["adaptive", "static"])
def test_the_anchor_matters_only_once_the_window_evicts(name, student, text):
    config = CONFIGS[name]
    text_kv = student.text_keys_values(text)

    def other(carry):
        anchor = jax.tree.map(lambda x: x + 1.0, carry.cache.anchor)
        return dataclasses.replace(carry, cache=dataclasses.replace(carry.cache, anchor=anchor))

    for chunk, matters in ((1, False), (2, True)):
        carry, _ = rollout(student, start(config), text_kv, config, LATENT_SHAPE, chunk)
        noise = draw_noise(carry, config, LATENT_SHAPE)
        outputs = [
            rollout_step(student, c, text_kv, noise, config, phase_of(chunk, config))[1].content
            for c in (carry, other(carry))
        ]
        assert np.array_equal(*outputs) != matters


def test_layouts():
    """Positions of spec.md §4, in the fill and in the steady state."""
    config = StreamConfig()
    layout = layout_of(phase_of(0, config), config)
    assert (layout.anchor, layout.state, layout.window, layout.content) == ((), (), (), (0, 1, 2))
    layout = layout_of(phase_of(1, config), config)
    assert (layout.anchor, layout.state, layout.window, layout.content) == ((), (), (0, 1, 2), (3, 4, 5))
    for chunk in (2, 3, 10):
        layout = layout_of(phase_of(chunk, config), config)
        assert (layout.anchor, layout.state, layout.window, layout.content) == ((0,), (1,), (2, 3, 4), (5, 6, 7))
    static = dataclasses.replace(config, anchor=StaticAnchor(2))
    layout = layout_of(phase_of(7, static), static)
    assert (layout.anchor, layout.state, layout.window, layout.content) == ((0, 1), (), (2, 3, 4), (5, 6, 7))


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"chunk_frames": 0}, "chunk_frames"),
        ({"past_frames": -1}, "past_frames"),
        ({"denoising_steps": (500, 1000)}, "denoising_steps"),
        ({"denoising_steps": ()}, "denoising_steps"),
        ({"chunk_frames": 1, "past_frames": 0, "anchor": AdaptiveAnchor(2)}, "anchor of 2 frames"),
    ],
)
def test_impossible_streams_are_refused(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        StreamConfig(**arguments)


def test_unknown_anchor_is_refused():
    with pytest.raises(ValueError, match=r"anchor must be one of none, static, adaptive, .*, got 'sticky'"):
        make_anchor("sticky")
    with pytest.raises(ValueError, match="at least one frame"):
        make_anchor("static", 0)


def test_no_assignment_outside_init():
    """Modules are pytrees: an attribute set during a call would be lost, or would retrace."""
    import ast
    import inspect

    from adastate_jax.models import dit

    for node in ast.walk(ast.parse(inspect.getsource(dit))):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            for target in (t for n in ast.walk(node) if isinstance(n, ast.Assign) for t in n.targets):
                assert not isinstance(target, ast.Attribute), f"{node.name} assigns {ast.unparse(target)}"
