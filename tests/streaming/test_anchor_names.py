"""Anchors by name and settings, impossible streams, and what the documentation says of both."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax.streaming.anchors import ANCHORS, make_anchor
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.averages import EMAAnchor, MemoryAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.ping_pong import PingPongAnchor
from adastate_jax.streaming.anchors.restart import RestartAnchor
from adastate_jax.streaming.anchors.static import AbsoluteAnchor, RollingAnchor, StaticAnchor
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.denoising import generate_chunk
from adastate_jax.streaming.presets import PRESETS, STREAM_NAMES, named_stream
from adastate_jax.streaming.rollout import stream
from adastate_jax.streaming.schedule import Phase, StreamConfig


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
    first = initial_carry(SMALL, config, seed_keys(3, 1), *LATENT_SHAPE[:2])
    for carry, chunk in stream(student, first, text_kv, config, LATENT_SHAPE, 6):
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
