"""Published streaming methods by name, each with all settings of its stream.

The settings are of inference with the released weights; how the weights were trained is another matter. A preset needs
an entry in `PRESETS`, and its table of positions in the tests.
"""

import dataclasses

from adastate_jax.streaming.anchors import ANCHORS, make_anchor
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.averages import EMAAnchor, MemoryAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.ping_pong import PingPongAnchor
from adastate_jax.streaming.anchors.restart import RestartAnchor
from adastate_jax.streaming.anchors.static import AbsoluteAnchor, RollingAnchor, StaticAnchor
from adastate_jax.streaming.schedule import StreamConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published method.

    Attributes:
        stream: its settings.
        source: where they are from.
    """

    stream: StreamConfig
    source: str


FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
FIVE_STEPS = (1000.0, 800.0, 600.0, 400.0, 200.0)
# CausVid tells the network 1000, 757, 522; the noise levels are the nearest of its scheduler's grid, which has shift 8.
CAUSVID_STEPS, CAUSVID_TIMESTEPS = (1000.0, 280.0, 120.0), (1000.0, 757.0, 522.0)


def _stream(anchor: NoAnchor, past_frames: int, chunk_frames: int = 3, steps=FOUR_STEPS, **settings) -> StreamConfig:
    return StreamConfig(chunk_frames, past_frames, anchor, steps, **settings)


PRESETS = {
    "self_forcing": Preset(_stream(NoAnchor(), 18), "arXiv 2506.08009, chunk-wise, window of 21 frames"),
    "self_forcing_frame": Preset(_stream(NoAnchor(), 20, 1), "arXiv 2506.08009, frame-wise, window of 21 frames"),
    "causal_forcing": Preset(_stream(NoAnchor(), 18), "arXiv 2602.02214, chunk-wise, window of 21 frames"),
    "causal_forcing_frame": Preset(_stream(NoAnchor(), 20, 1), "arXiv 2602.02214, frame-wise, window of 21 frames"),
    "causal_forcing_two_step": Preset(
        _stream(NoAnchor(), 20, 1, (1000.0, 500.0), first_denoising_steps=FOUR_STEPS),
        "arXiv 2605.15141, frame-wise, two steps, four for the first generated frame",
    ),
    "causal_forcing_one_step": Preset(
        _stream(NoAnchor(), 20, 1, (1000.0,), first_denoising_steps=FOUR_STEPS),
        "arXiv 2605.15141, frame-wise, one step, four for the first generated frame",
    ),
    "causvid": Preset(
        _stream(RestartAnchor(), 18, steps=CAUSVID_STEPS, shift=8.0, timesteps=CAUSVID_TIMESTEPS),
        "arXiv 2412.07772, overlap of 3 frames",
    ),
    "longlive": Preset(_stream(AbsoluteAnchor(3), 6), "arXiv 2509.22622, absolute positions"),
    "longlive_infinity": Preset(_stream(StaticAnchor(3), 6), "arXiv 2509.22622, the release's infinity variant"),
    "infinity_rope": Preset(_stream(StaticAnchor(1), 2), "arXiv 2511.20649, the release's window of 6 frames"),
    "rolling_forcing": Preset(_stream(RollingAnchor(3), 18, steps=FIVE_STEPS), "arXiv 2509.25161"),
    "reward_forcing": Preset(_stream(EMAAnchor(3), 3), "arXiv 2512.04678, release after 2025-12-15"),
    "memrope": Preset(_stream(MemoryAnchor(3), 4), "arXiv 2603.12513"),
    "memrope_adaptive": Preset(_stream(MemoryAnchor(3, adaptive=True), 4), "arXiv 2603.12513, option ema_adaptive"),
    "rolling_sink": Preset(_stream(PingPongAnchor(15), 3, repeat_noise=True), "arXiv 2602.07775"),
    "rolling_sink_fresh_noise": Preset(_stream(PingPongAnchor(15), 3), "arXiv 2602.07775, without its repeated noise"),
    "adastate": Preset(_stream(AdaptiveAnchor(1), 3), "arXiv 2605.30349, F_s = 1, W_p + F = 6"),
}

STREAM_NAMES = (*PRESETS, *ANCHORS)


def named_stream(name: str, base: StreamConfig) -> StreamConfig:
    """The stream of this name: a preset with all its settings, or a bare strategy of `ANCHORS` in place of base's.

    A bare strategy takes over the number of anchor frames, so that it can be compared with the one it replaces.

    Raises:
        ValueError: unknown name, or the strategy does not go with base's chunks and window; the message says what does.
    """
    if name in PRESETS:
        return PRESETS[name].stream
    if name not in ANCHORS:
        raise ValueError(f"anchor must be one of {', '.join(STREAM_NAMES)}, got {name!r}")
    anchor = make_anchor(name, max(base.anchor.frames, 1))
    try:
        return dataclasses.replace(base, anchor=anchor)
    except ValueError as error:
        presets = [preset for preset, known in PRESETS.items() if type(known.stream.anchor) is type(anchor)]
        raise ValueError(f"anchor {name}: {error}, or use the preset {' or '.join(presets)}") from None
