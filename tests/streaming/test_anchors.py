"""Every published anchor: what its chunks see and where, and how its memory changes.

The tables name the frames as `content@positions`, in the order of the positions. Content is a frame 7, a walk over
frames 3-8 or 17-15, live frames L9-11, a hidden state s2 (live Ls2), a frame into which all of 5-7 were averaged M5-7,
or frames j of which each holds j, j + 3, … up to the last ones: E24-26. Positions are those that the method's authors
count; only their differences matter, and only they are compared.
"""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax.diffusion import add_noise, flow_to_clean
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.rope import MAX_POSITION, rotate, rotation
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors import ANCHORS, make_anchor
from adastate_jax.streaming.carry import ChunkNoise, draw_noise, initial_carry, seed_keys
from adastate_jax.streaming.denoising import generate_chunk
from adastate_jax.streaming.memories import AdaptiveAnchor, EMAAnchor, MemoryAnchor, PingPongAnchor
from adastate_jax.streaming.presets import PRESETS, STREAM_NAMES, named_stream
from adastate_jax.streaming.rollout import rollout as traced_rollout
from adastate_jax.streaming.rollout import rollout_step, stream, stream_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, clean_layout_of, layout_of, phase_of
from adastate_jax.streaming.sinks import AbsoluteAnchor, Receding, RestartAnchor, RollingAnchor, StaticAnchor
from adastate_jax.streaming.strategy import Commit, NoAnchor

rollout = jax.jit(traced_rollout, static_argnames=("config", "latent_shape", "num_chunks", "first_chunk"))

# --- what a chunk sees ------------------------------------------------------------------------------------------------

WINDOW_21 = {
    0: "L0-2@0-2",
    1: "0-2@0-2 L3-5@3-5",
    2: "0-5@0-5 L6-8@6-8",
    3: "0-8@0-8 L9-11@9-11",
    7: "3-20@3-20 L21-23@21-23",
    10: "12-29@12-29 L30-32@30-32",
}
YOUNG_BY_FRAME = {
    0: "L0@0",
    1: "0@0 L1@1",
    2: "0-1@0-1 L2@2",
    3: "0-2@0-2 L3@3",
    10: "0-9@0-9 L10@10",
}
WINDOW_21_BY_FRAME = YOUNG_BY_FRAME | {20: "0-19@0-19 L20@20", 22: "2-21@2-21 L22@22"}
MEMROPE = {
    0: "L0-2@0-2",
    1: "0-2@0-2 L3-5@3-5",
    2: "0-5@0-5 L6-8@6-8",
    3: "0-8@0-8 L9-11@9-11",
    4: "0-2@0-2 M5-7@3 M5-7@4 8-11@5-8 L12-14@9-11",
    10: "0-2@0-2 M5-25@3 M5-25@4 26-29@5-8 L30-32@9-11",
}
ROLLING_SINK = {
    0: "L0-2@0-2",
    1: "0-2@0-2 L3-5@3-5",
    2: "0-5@0-5 L6-8@6-8",
    3: "0-8@0-8 L9-11@9-11",
    7: "3-20@3-20 L21-23@21-23",
    8: "6-17@6-17 17-15@18-20 21-23@21-23 L24-26@24-26",
    10: "12-17@12-17 17-15@18-20 14-12@21-23 11-9@24-26 27-29@27-29 L30-32@30-32",
    13: "14-0@21-35 36-38@36-38 L39-41@39-41",
}
TABLES = {
    "self_forcing": WINDOW_21,
    "self_forcing_frame": WINDOW_21_BY_FRAME,
    "causal_forcing": WINDOW_21,
    "causal_forcing_frame": WINDOW_21_BY_FRAME,
    "causal_forcing_two_step": YOUNG_BY_FRAME,
    "causal_forcing_one_step": YOUNG_BY_FRAME,
    # Frames 18-20, the overlap, begin the second rollout.
    "causvid": {
        0: "L0-2@0-2",
        1: "0-2@0-2 L3-5@3-5",
        2: "0-5@0-5 L6-8@6-8",
        3: "0-8@0-8 L9-11@9-11",
        6: "0-17@0-17 L18-20@18-20",
        7: "18-20@0-2 L21-23@3-5",
        10: "18-29@0-11 L30-32@12-14",
        13: "36-38@0-2 L39-41@3-5",
    },
    "longlive": {
        0: "L0-2@0-2",
        1: "0-2@0-2 L3-5@3-5",
        2: "0-5@0-5 L6-8@6-8",
        3: "0-8@0-8 L9-11@9-11",
        4: "0-2@0-2 6-11@6-11 L12-14@12-14",
        10: "0-2@0-2 24-29@24-29 L30-32@30-32",
    },
    "longlive_infinity": {
        0: "L0-2@0-2",
        1: "0-2@0-2 L3-5@3-5",
        2: "0-5@0-5 L6-8@6-8",
        3: "0-8@0-8 L9-11@9-11",
        4: "0-2@0-2 6-11@3-8 L12-14@9-11",
        10: "0-2@0-2 24-29@3-8 L30-32@9-11",
    },
    "infinity_rope": {
        0: "L0-2@0-2",
        1: "0-2@0-2 L3-5@3-5",
        2: "0@0 4@1 5@2 L6-8@3-5",
        3: "0@0 7@1 8@2 L9-11@3-5",
        10: "0@0 28@1 29@2 L30-32@3-5",
    },
    "rolling_forcing": {
        0: "L0-14@0-14",
        1: "0-2@0-2 L3-17@3-17",
        2: "0-2@0-2 3-5@3-5 L6-20@6-20",
        3: "0-2@3-5 6-8@6-8 L9-23@9-23",
        10: "0-2@24-26 27-29@27-29 L30-44@30-44",
    },
    "reward_forcing": {
        0: "L0-2@0-2",
        1: "0-2@0-2 L3-5@3-5",
        2: "0-5@0-5 L6-8@6-8",
        3: "E3-5@0-2 6-8@3-5 L9-11@6-8",
        10: "E24-26@0-2 27-29@3-5 L30-32@6-8",
    },
    "memrope": MEMROPE,
    "memrope_adaptive": MEMROPE,
    "rolling_sink": ROLLING_SINK,
    "rolling_sink_fresh_noise": ROLLING_SINK,
    "adastate": {
        0: "L0-2@0-2",
        1: "0-2@0-2 L3-5@3-5",
        2: "0@0 Ls2@1 3-5@2-4 L6-8@5-7",
        3: "s2@0 Ls3@1 6-8@2-4 L9-11@5-7",
        10: "s9@0 Ls10@1 27-29@2-4 L30-32@5-7",
    },
}
# Rolling-Forcing's clean pass sees something else than its denoising.
ROLLING_FORCING_CLEAN = {
    0: "L0-2@0-2",
    1: "0-2@0-2 L3-5@3-5",
    2: "0-5@0-5 L6-8@6-8",
    3: "0-8@0-8 L9-11@9-11",
    6: "0-17@0-17 L18-20@18-20",
    7: "3-20@3-20 L21-23@21-23",
    10: "12-29@12-29 L30-32@30-32",
}

FIRST_STATE = 64  # the spy's number of state s_0
SPY = DiTConfig(dim=96, num_heads=1, num_layers=1, in_channels=1, out_channels=1, patch_size=(1, 1, 1))


@dataclasses.dataclass(frozen=True)
class Seen:
    """One pass: what is in each cached slot, and all positions less that of the first live content frame."""

    slots: tuple[frozenset, ...]
    positions: tuple[int, ...]
    live: tuple[str, ...]
    timesteps: np.ndarray


class Spy:
    """Stands in for the network, and writes down what each pass is shown.

    A frame's value is one at its number, so that a slot says whose content it holds; its key is the same for all, so
    that the angle of a rotated key says its position. The text is the number of the chunk.
    """

    config = SPY

    def __init__(self, chunk_frames: int, passes: list[Seen]):
        self.chunk_frames, self.passes = chunk_frames, passes

    def __call__(self, latents, timesteps, text, positions, attend=None, context=None):
        frames = latents.shape[1]
        state_frames = frames % self.chunk_frames
        state = jnp.full(state_frames, FIRST_STATE + text)
        numbers = jnp.concatenate([state, text * self.chunk_frames + jnp.arange(frames - state_frames)])
        jax.debug.callback(self.write_down, numbers, timesteps[0], positions, state_frames, context, ordered=True)
        key = jnp.zeros((1, latents.shape[0], frames, 1, SPY.head_dim)).at[..., ::2].set(1.0)
        value = jax.nn.one_hot(numbers, SPY.head_dim)[None, None, :, None]
        return jnp.zeros_like(latents), KeyValues(key, value)

    def write_down(self, numbers, timesteps, positions, state_frames, context):
        names = [f"Ls{n - FIRST_STATE}" if i < state_frames else f"L{n}" for i, n in enumerate(numbers)]
        slots, places = (), ()
        if context is not None:
            slots = tuple(frozenset(np.flatnonzero(value).tolist()) for value in np.asarray(context.value[0, 0, :, 0]))
            places = tuple(_position(key) for key in np.asarray(context.key[0, 0, :, 0]))
        origin = positions[state_frames]
        places = tuple(int(place - origin) for place in (*places, *positions))
        self.passes.append(Seen(slots, places, tuple(names), np.asarray(timesteps)))


def _position(key: np.ndarray) -> int:
    """The temporal position that turned (1, 0, 1, 0, …) into this key: from its slowest pair, the last temporal one."""
    pairs = (SPY.head_dim - 4 * (SPY.head_dim // 6)) // 2
    slowest = 10000.0 ** (-2 * (pairs - 1) / (2 * pairs))
    position = np.arctan2(key[2 * pairs - 1], key[2 * pairs - 2]) / slowest
    assert abs(position - round(position)) < 0.01
    return round(position)


def expected(table: str) -> list[tuple[int, frozenset | str]]:
    """A line of a table as (position, content), positions relative to the first live content frame."""
    slots = []
    for token in table.split():
        content, places = token.split("@")
        kind, ends = re.fullmatch(r"(L?s|[LME]?)([\d-]+)", content).groups()
        first, last = (int(end) for end in (*ends.split("-"), ends)[:2]) if "-" in ends else (int(ends), int(ends))
        start, stop = (int(end) for end in places.split("-")) if "-" in places else (int(places), int(places))
        if kind == "M":
            named = [frozenset(range(first, last + 1))]
        elif kind == "E":
            named = [frozenset(range(n % 3, n + 1, 3)) for n in range(first, last + 1)]
        elif kind == "s":
            named = [frozenset([FIRST_STATE + first])]
        elif kind in ("L", "Ls"):
            named = [f"{kind}{n}" for n in range(first, last + 1)]
        else:
            numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
            named = [frozenset([n]) for n in numbers]
        assert len(named) == stop + 1 - start, token
        slots += zip(range(start, stop + 1), named, strict=True)
    origin = next(place for place, name in slots if isinstance(name, str) and not name.startswith("Ls"))
    return [(place - origin, name) for place, name in slots]


_passes: list[Seen] = []


@functools.partial(jax.jit, static_argnames=("config", "phase"))
def observed_step(carry, noise, config, phase):
    return rollout_step(Spy(config.chunk_frames, _passes), carry, carry.chunk, noise, config, phase)[0]


@functools.cache
def observe(config: StreamConfig, chunks: int, ends: bool = False) -> list[tuple[Seen, ...]]:
    """All passes of each chunk of a stream, which may end behind the last of them."""
    carry = initial_carry(SPY, config, seed_keys(0, 1), 1, 1)
    steps = max(len(config.sigmas), len(config.first_sigmas))
    noise = ChunkNoise(
        jnp.zeros((steps, 1, config.live_chunks * config.chunk_frames, 1, 1, 1)),
        jnp.zeros((steps, 1, config.anchor.state_frames, 1, 1, 1)),
    )
    seen = []
    for chunk in range(chunks):
        _passes.clear()
        phase = phase_of(chunk, config, remaining=chunks - chunk if ends else None)
        carry = observed_step(carry, noise, config, phase)
        jax.effects_barrier()
        seen.append(tuple(_passes))
    return seen


def observe_preset(name: str) -> list[tuple[Seen, ...]]:
    return observe(PRESETS[name].stream, max(TABLES[name]) + 1)


def matches(seen: Seen, table: str) -> None:
    ours = sorted(zip(seen.positions, (*seen.slots, *seen.live), strict=True), key=lambda slot: slot[0])
    assert ours == expected(table)


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_chunk_sees(name):
    config, seen = PRESETS[name].stream, observe_preset(name)
    for chunk, table in TABLES[name].items():
        if config.anchor.joint:  # one pass, each chunk at a level of its own, the oldest at the lowest
            levels = [1000 * np.repeat(config.sigmas[::-1], config.chunk_frames)]
            *_, denoising, clean = seen[chunk]
            passes = [denoising]
        else:
            levels = config.timesteps or np.multiply(config.first_sigmas if chunk == 0 else config.sigmas, 1000.0)
            *passes, clean = seen[chunk][: len(levels) + 1]
            matches(clean, table)
        for one, timesteps in zip(passes, levels, strict=True):
            matches(one, table)
            np.testing.assert_allclose(one.timesteps, timesteps, rtol=1e-6)
        assert not clean.timesteps.any()


def test_what_rolling_forcings_clean_pass_sees():
    seen = observe_preset("rolling_forcing")
    for chunk, table in ROLLING_FORCING_CLEAN.items():
        matches(seen[chunk][-1], table)


def test_rolling_forcing_grows_its_staircase():
    """Five passes before the first chunk: the k highest levels, one chunk more each; then one pass per chunk."""
    seen = observe_preset("rolling_forcing")
    levels = [1000 * sigma for sigma in PRESETS["rolling_forcing"].stream.sigmas]
    for k, one in enumerate(seen[0][:-1], 1):
        np.testing.assert_allclose(one.timesteps, np.repeat(levels[:k][::-1], 3), rtol=1e-6)
        assert one.live == tuple(f"L{n}" for n in range(3 * k))
        assert not one.slots
    assert [len(seen[chunk]) for chunk in range(4)] == [6, 2, 2, 2]


def test_rolling_forcing_sees_more_of_the_past_towards_the_end():
    """21 frames in all: what fewer live chunks leave is the window's."""
    *_, a, b, c, d, e = observe(PRESETS["rolling_forcing"].stream, 12, ends=True)
    matches(a[0], "0-2@15-17 18-20@18-20 L21-35@21-35")
    matches(b[0], "0-2@15-17 18-23@18-23 L24-35@24-35")
    matches(c[0], "0-2@15-17 18-26@18-26 L27-35@27-35")
    matches(d[0], "0-2@15-17 18-29@18-29 L30-35@30-35")
    matches(e[0], "0-2@15-17 18-32@18-32 L33-35@33-35")
    four = dataclasses.replace(PRESETS["rolling_forcing"].stream, denoising_steps=(1000.0, 750.0, 500.0, 250.0))
    matches(observe(four, 8)[7][0], "0-2@12-14 15-20@15-20 L21-32@21-32")


def test_causvid_restarts_from_its_last_chunk_alone():
    """One more pass follows the last chunk of a rollout: the overlap, clean, sees itself only."""
    seen = observe_preset("causvid")
    assert [len(seen[chunk]) for chunk in (5, 6, 7, 11, 12)] == [4, 5, 4, 4, 5]
    matches(seen[6][-1], "L18-20@0-2")
    assert not seen[6][-1].timesteps.any()


def test_a_scene_cut_moves_one_chunk():
    """Infinity-RoPE: the live frames at 45, 46, 47 for one chunk, what is cached where it was."""
    config = PRESETS["infinity_rope"].stream
    cut = layout_of(phase_of(4, config, cut=True), config)
    assert (cut.cached, cut.live) == ((0, 1, 2), (45, 46, 47))
    assert layout_of(phase_of(5, config), config).live == (3, 4, 5)
    wide = StreamConfig(past_frames=48, anchor=NoAnchor())
    with pytest.raises(ValueError, match="scene cut"):
        layout_of(phase_of(17, wide, cut=True), wide)


def test_published_steps():
    """The timesteps of anchors.md, whatever the way they are written down in."""
    timesteps = {name: np.multiply(preset.stream.sigmas, 1000.0) for name, preset in PRESETS.items()}
    for name in ("self_forcing", "longlive", "infinity_rope", "reward_forcing", "memrope", "rolling_sink", "adastate"):
        np.testing.assert_allclose(timesteps[name], [1000, 937.5, 833.33, 625], atol=0.01)
    np.testing.assert_allclose(timesteps["rolling_forcing"], [1000, 952.38, 882.35, 769.23, 555.56], atol=0.01)
    np.testing.assert_allclose(timesteps["causvid"], [1000, 756.757, 521.739], atol=0.001)
    assert PRESETS["causvid"].stream.timesteps == (1000, 757, 522)
    np.testing.assert_allclose(timesteps["causal_forcing_two_step"], [1000, 833.33], atol=0.01)
    np.testing.assert_allclose(
        PRESETS["causal_forcing_one_step"].stream.first_sigmas, [1, 0.9375, 0.83333, 0.625], rtol=1e-5
    )


# --- how memories change ----------------------------------------------------------------------------------------------

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


# --- presets as streams -----------------------------------------------------------------------------------------------

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


# --- names and refusals -----------------------------------------------------------------------------------------------


def test_names():
    base = StreamConfig(anchor=AdaptiveAnchor(2))
    assert named_stream("longlive", base) is PRESETS["longlive"].stream
    assert named_stream("static", base) == dataclasses.replace(base, anchor=StaticAnchor(2))
    assert named_stream("none", base).anchor == NoAnchor()
    assert all(preset.source for preset in PRESETS.values())
    assert not set(PRESETS) & set(ANCHORS)
    assert set(STREAM_NAMES) == {*PRESETS, *ANCHORS}
    with pytest.raises(ValueError, match=r"anchor must be one of self_forcing.*none.*got 'sticky'"):
        named_stream("sticky", base)


@pytest.mark.parametrize("name", ANCHORS)
def test_a_bare_strategy_that_does_not_go_with_a_stream_says_what_does(name):
    """In AdaState's own stream half of them do not; the settings or the preset that the message names do."""
    base = PRESETS["adastate"].stream
    try:
        named_stream(name, base)
        return
    except ValueError as error:
        setting, frames, presets = re.search(r": set (\S+)=(\d+), or use the preset (.*)$", str(error)).groups()
    assert all(type(PRESETS[preset].stream.anchor) is ANCHORS[name] for preset in presets.split(" or "))
    settings = {"anchor.frames": {"anchor": AdaptiveAnchor(int(frames))}, "past_frames": {"past_frames": int(frames)}}
    assert type(named_stream(name, dataclasses.replace(base, **settings[setting])).anchor) is ANCHORS[name]


def test_anchors_by_name_and_settings():
    for preset in PRESETS.values():
        anchor = preset.stream.anchor
        name = next(name for name, kind in ANCHORS.items() if type(anchor) is kind)
        assert make_anchor(name, **dataclasses.asdict(anchor)) == anchor
    with pytest.raises(ValueError, match="anchor 'ema' has no setting 'decoy'; known are frames, decay"):
        make_anchor("ema", decoy=0.9)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"anchor": AbsoluteAnchor(2), "past_frames": 3}, "AbsoluteAnchor needs anchor and window .* 2 \\+ 3"),
        ({"anchor": EMAAnchor(3), "chunk_frames": 1}, "EMAAnchor pairs its frames"),
        ({"anchor": PingPongAnchor(15), "past_frames": 4}, "PingPongAnchor"),
        ({"anchor": MemoryAnchor(3), "past_frames": 3}, "MemoryAnchor"),
        ({"anchor": RestartAnchor(), "past_frames": 2}, "restarts need a window"),
        ({"anchor": RollingAnchor(), "first_denoising_steps": (1000, 500)}, "jointly"),
        ({"first_denoising_steps": (500, 1000)}, "denoising_steps"),
        ({"timesteps": (1000, 500)}, "as many as denoising_steps, 4"),
        ({"timesteps": (1000, 500, 250, 0)}, "timesteps must lie within"),
        ({"anchor": RollingAnchor(), "timesteps": (1000, 750, 500, 250)}, "timesteps must be empty"),
    ],
)
def test_impossible_streams_are_refused(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        StreamConfig(**arguments)


def test_no_chunk_is_generated_alone_where_all_are_denoised_jointly(student):
    config = PRESETS["rolling_forcing"].stream
    with pytest.raises(ValueError, match="jointly"):
        generate_chunk(student, None, None, None, config, Phase(None), 4)


def test_the_documentations_strategy_streams(student, text):
    """The example of docs/anchors.md as it is printed."""
    page = (Path(__file__).parents[2] / "docs" / "anchors.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "RenewedAnchor" in code)
    names = {"__name__": "example"}
    exec(compile(example, "docs/anchors.md", "exec"), names)
    config = StreamConfig(anchor=names["RenewedAnchor"](3, period=2), denoising_steps=(1000, 500))
    text_kv = student.text_keys_values(text[:1])
    sinks, windows = [], []
    for carry, chunk in stream(student, start(config), text_kv, config, LATENT_SHAPE, 6):
        sinks.append(np.asarray(config.anchor.read(carry.cache.anchor).key))
        windows.append(np.asarray(carry.cache.window.key))
        assert np.isfinite(chunk.content).all()
    # Chunk 2 evicts first; chunks 3 and 5 are every second one after it, and evict what chunks 2 and 4 left.
    origins = [0, 0, 0, 2, 2, 4]
    assert [next(i for i, window in enumerate(windows) if np.array_equal(sink, window)) for sink in sinks] == origins


def test_the_documentation_lists_every_preset():
    page = (Path(__file__).parents[2] / "docs" / "anchors.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE))
    assert listed == {
        name: next(key for key, kind in ANCHORS.items() if type(preset.stream.anchor) is kind)
        for name, preset in PRESETS.items()
    }
