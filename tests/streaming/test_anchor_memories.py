"""How the memory of each published anchor changes, against plain averages and copies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.rope import MAX_POSITION, rotate, rotation
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors.averages import EMAAnchor, MemoryAnchor
from adastate_jax.streaming.anchors.contract import Commit
from adastate_jax.streaming.anchors.static import AbsoluteAnchor, Receding
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.schedule import StreamConfig, clean_layout_of, layout_of, phase_of

TOKENS = 2  # per frame
MEMORY_MODEL = dataclasses.replace(SMALL, num_layers=2)


def frames_of(count: int) -> KeyValues:
    """So many frames of random clean keys and values [layers, B, tokens, heads, head_dim]."""
    rng = np.random.default_rng(7)
    shape = (2, 2, count * TOKENS, MEMORY_MODEL.num_heads, MEMORY_MODEL.head_dim)
    return KeyValues(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)))


def committed(config: StreamConfig, chunks: int, content: KeyValues, model: DiTConfig = MEMORY_MODEL):
    """The caches after 1, 2, … chunks of given content."""
    cache = cache_lib.empty(model, config.anchor, config.past_frames, 2, TOKENS)
    size = config.chunk_frames * TOKENS
    for chunk in range(chunks):
        phase = phase_of(chunk, config)
        fresh = content.tokens(chunk * size, size)
        cache = cache_lib.advance(cache, config.anchor, clean_layout_of(phase, config), fresh, phase.first_frame)
        yield cache


def numpy_frames(x: jax.Array) -> np.ndarray:
    """[layers, B, frames · tokens, heads, head_dim] → [frames, layers, B, tokens, heads, head_dim] float64."""
    x = np.asarray(x, np.float64)
    return np.moveaxis(x.reshape(*x.shape[:2], -1, TOKENS, *x.shape[3:]), 2, 0)


def both(check, memory: KeyValues, content: KeyValues) -> None:
    """A check of memory frames against content frames, for keys and for values by themselves."""
    for name in ("key", "value"):
        check(numpy_frames(getattr(memory, name)), numpy_frames(getattr(content, name)))


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_reward_forcing_averages_what_leaves(decay):
    config = dataclasses.replace(PRESETS["reward_forcing"].stream, anchor=EMAAnchor(3, decay))
    content = frames_of(30)
    *_, last = committed(config, 10, content)

    def check(memory, frames):
        sink = frames[0:3]
        for k in range(3, 11):  # at the first pass of chunk k, the chunk 3 k … leaves slots 3-5
            leaving = frames[3 * k - 6 : 3 * k - 3]
            sink = decay * sink + (1 - decay) * leaving
        np.testing.assert_allclose(memory, sink, atol=1e-5)

    both(check, last.anchor, content)


@pytest.mark.parametrize("adaptive", [False, True])
def test_memrope_keeps_two_running_means(adaptive):
    config = dataclasses.replace(PRESETS["memrope"].stream, anchor=MemoryAnchor(3, adaptive=adaptive))
    content = frames_of(24)
    keys = numpy_frames(content.key)
    caches = list(committed(config, 8, content))

    def mean_of(leaving):
        if adaptive:
            return leaving.mean(axis=0)
        return np.broadcast_to(leaving.mean(axis=(0, 3), keepdims=True)[0], leaving.shape[1:])

    def check(memory, frames):
        long = short = short_key = None
        for k in range(4, 9):
            m, m_key = (mean_of(x[3 * k - 7 : 3 * k - 4]) for x in (frames, keys))
            if k == 4:
                long, short, short_key = m, m, m_key
                continue
            rate = 0.1
            if adaptive:  # from the keys alone: a norm per head, its mean over the heads
                gap = np.sqrt(((m_key - short_key) ** 2).sum(axis=-1, keepdims=True)).mean(axis=-2, keepdims=True)
                rate = 0.01 + gap / gap.max(axis=2, keepdims=True) * (0.5 - 0.01)
            long = 0.99 * long + 0.01 * m
            short = (1 - rate) * short + rate * m
            short_key = (1 - rate) * short_key + rate * m_key
        np.testing.assert_allclose(memory, [*frames[:3], long, short], atol=1e-5)

    both(check, caches[-1].anchor, content)
    both(
        lambda memory, frames: np.testing.assert_array_equal(memory, frames[:5].astype(np.float32)),
        caches[2].anchor,
        content,
    )


def test_rolling_sink_replaces_the_previous_chunk():
    """The rule as it is published: a buffer whose previous chunk is overwritten after each chunk from frame 21 on."""
    config = PRESETS["rolling_sink"].stream
    content = frames_of(60)
    buffer: list[int] = []  # frame numbers, a window of 21 frames with the live ones
    for chunk, cache in enumerate(committed(config, 20, content)):
        first = 3 * chunk
        buffer = [*buffer[-18:], first, first + 1, first + 2]
        if first >= 21:
            r, p = first - 3, 18
            o = r % p
            original = [o, o + 1, o + 2] if (r // p) % 2 == 0 else [p - o - 1, p - o - 2, p - o - 3]
            buffer[-6:-3] = original
        layout = layout_of(phase_of(chunk + 1, config), config)
        seen = cache_lib.visible(cache, config.anchor, layout, TOKENS)
        both(lambda ours, frames: np.testing.assert_array_equal(ours, frames[buffer[-18:]]), seen, content)  # noqa: B023


def test_the_sink_of_absolute_positions_recedes():
    """The same attention as with keys rotated once, at the frames' numbers in the stream."""
    config, content = PRESETS["longlive"].stream, frames_of(30)
    head_dim = MEMORY_MODEL.head_dim
    *_, last = committed(config, 10, content)
    layout = layout_of(phase_of(10, config), config)
    ours = cache_lib.read(last, config.anchor, layout, 1, TOKENS, head_dim).key
    absolute = rotate(content.key, rotation(np.arange(30), 1, TOKENS, head_dim))
    absolute = jnp.concatenate([absolute[:, :, : 3 * TOKENS], absolute[:, :, 24 * TOKENS :]], axis=2)
    query = content.key[:, :, : 3 * TOKENS]  # any
    ours = jnp.einsum("lbqhd,lbkhd->lbhqk", rotate(query, rotation(layout.live, 1, TOKENS, head_dim)), ours)
    theirs = jnp.einsum("lbqhd,lbkhd->lbhqk", rotate(query, rotation((30, 31, 32), 1, TOKENS, head_dim)), absolute)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert int(last.anchor.distance) == 30 - 9


@pytest.mark.parametrize("name", ["longlive", "reward_forcing", "memrope"])
def test_what_is_read_is_rounded_once(name):
    """Keys that a strategy holds or turns in float32 are rounded to bfloat16 where they stand, and not before."""
    config = PRESETS[name].stream
    layout = layout_of(phase_of(10, config), config)
    content = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), frames_of(30))

    def read(dtype: str) -> KeyValues:
        *_, last = committed(config, 10, content, dataclasses.replace(MEMORY_MODEL, dtype=dtype))
        return cache_lib.read(last, config.anchor, layout, 1, TOKENS, MEMORY_MODEL.head_dim)

    ours = read("bfloat16")
    assert ours.key.dtype == ours.value.dtype == jnp.bfloat16
    for x, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(read("float32")), strict=True):
        np.testing.assert_array_equal(x, exact.astype(jnp.bfloat16))


def test_the_absolute_distance_ends_with_the_table_of_positions():
    content = frames_of(3)
    commit = Commit(content, None, content, None, TOKENS)
    memory = Receding(content, jnp.int32(MAX_POSITION - 5))
    memory = AbsoluteAnchor(3).update(memory, commit)
    assert int(memory.distance) == MAX_POSITION - 2
    for _ in range(2):
        memory = AbsoluteAnchor(3).update(memory, commit)
        assert int(memory.distance) == MAX_POSITION - 1
