"""Every published anchor: what its chunks see and where, and how its memory changes.

The tables name the frames as `content@positions`, in the order of the positions. Content is a frame 7, a walk over
frames 3-8 or 17-15, live frames L9-11, a hidden state s2 (live Ls2), a frame into which all of 5-7 were averaged M5-7,
or frames j of which each holds j, j + 3, … up to the last ones: E24-26. Positions are those that the method's authors
count; only their differences matter, and only they are compared.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiTConfig
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.carry import ChunkNoise, initial_carry, seed_keys
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.rollout import rollout_step
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of

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

    def lay_out(self, context, latents):
        return context

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


def assert_matches(seen: Seen, table: str) -> None:
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
            assert_matches(clean, table)
        for one, timesteps in zip(passes, levels, strict=True):
            assert_matches(one, table)
            np.testing.assert_allclose(one.timesteps, timesteps, rtol=1e-6)
        assert not clean.timesteps.any()


def test_what_rolling_forcings_clean_pass_sees():
    seen = observe_preset("rolling_forcing")
    for chunk, table in ROLLING_FORCING_CLEAN.items():
        assert_matches(seen[chunk][-1], table)


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
    assert_matches(a[0], "0-2@15-17 18-20@18-20 L21-35@21-35")
    assert_matches(b[0], "0-2@15-17 18-23@18-23 L24-35@24-35")
    assert_matches(c[0], "0-2@15-17 18-26@18-26 L27-35@27-35")
    assert_matches(d[0], "0-2@15-17 18-29@18-29 L30-35@30-35")
    assert_matches(e[0], "0-2@15-17 18-32@18-32 L33-35@33-35")
    four = dataclasses.replace(PRESETS["rolling_forcing"].stream, denoising_steps=(1000.0, 750.0, 500.0, 250.0))
    assert_matches(observe(four, 8)[7][0], "0-2@12-14 15-20@15-20 L21-32@21-32")


def test_causvid_restarts_from_its_last_chunk_alone():
    """One more pass follows the last chunk of a rollout: the overlap, clean, sees itself only."""
    seen = observe_preset("causvid")
    assert [len(seen[chunk]) for chunk in (5, 6, 7, 11, 12)] == [4, 5, 4, 4, 5]
    assert_matches(seen[6][-1], "L18-20@0-2")
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
