"""Fixtures of the published anchors: rollouts of the authors' own loops, against this package's presets.

All of them run as streams do, see `witness.py`; what is written here is where a fixture keeps its noise and texts, and
which of a stream's numbers it holds.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adastate_jax.models.attention import concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.cues import Cue
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.prompts import Schedule, schedule
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.verification import witness
from adastate_jax.verification.record import (
    ARITHMETIC_TOLERANCE,
    BrokenFixtureError,
    Check,
    Fixture,
    Records,
    channels_first,
    channels_last,
    dit_config,
    load_dit,
)
from adastate_jax.verification.witness import Step


def load(fixture: Fixture) -> DiT:
    """The fixture's network."""
    config = dit_config(fixture.header("config")["model"], fixture.settings)
    return load_dit(config, fixture.weights(), str(fixture.path))


def with_sizes(preset: str, window: int, sink: int) -> StreamConfig:
    """A preset whose window of `window` frames, sink and chunk among them, has `sink` frames that stay."""
    stream = PRESETS[preset].stream
    anchor = dataclasses.replace(stream.anchor, frames=sink)
    return dataclasses.replace(stream, anchor=anchor, past_frames=window - sink - stream.chunk_frames)


def stated(fixture: Fixture, name: str, ours: Sequence[float]) -> Check:
    """That the stream has the noise levels or timesteps which the fixture states among its inputs."""
    pairs = ((f"in.{name}", fixture[f"in.{name}"], np.asarray(ours)),)
    return Check(name, pairs, ARITHMETIC_TOLERANCE, relative=True)


def noise_by_chunk(fixture: Fixture, config: StreamConfig, batch: int) -> Callable[[int], np.ndarray]:
    """Noise that begins with `in.noise` [B, frames, C, H, W] and goes on with `in.renoise` [chunk, step, B, F, …]."""
    start = channels_last(fixture["in.noise"], 2)[:batch]
    renoise = channels_last(fixture["in.renoise"], 4)[:, :, :batch]
    size = config.chunk_frames

    def noise_of(chunk: int) -> np.ndarray:
        first = 0 if config.repeat_noise else chunk * size
        return np.concatenate([start[None, :, first : first + size], renoise[chunk]])

    return noise_of


def keys_values(fixture: Fixture, name: str, key: Any, value: Any) -> Records:
    """The records of keys and values [L, B, tokens, heads, head_dim] that the fixture has as `name_k` and `name_v`."""
    yield fixture.network(f"{name}_k", key)
    yield fixture.network(f"{name}_v", value)


# --- LongLive and Infinity-RoPE ---------------------------------------------------------------------------------------


def longlive(fixture: Fixture) -> Records:
    """LongLive and its infinity variant."""
    settings, model = fixture.header("config"), load(fixture)
    for case, variant in settings["variants"].items():
        config = with_sizes(variant["preset"], variant["local_attn_size"], variant["sink_size"])
        batch = variant["batch"]
        text = witness.text_keys_values(model, fixture["in.context"][:batch])
        noise = noise_by_chunk(fixture, config, batch)
        steps = list(witness.run(model, [text], config, noise, settings["chunks"]))
        yield from quantities(fixture, case, steps, "latents", "x0", "clean_flow")
        held = steps[-1].seen()
        key = held.key
        if not variant["use_infinite_attention"]:
            key = _at_frame_numbers(model, steps[-1], key, settings)
        yield from keys_values(fixture, f"{case}.kv", key, held.value)
    yield _stated_steps(fixture, config)


def _stated_steps(fixture: Fixture, config: StreamConfig) -> Check:
    return stated(fixture, "denoising_step_list", np.multiply(config.sigmas, 1000.0))


# What a run is asked for, by the fixtures' names: latents, and where their channels stand in the fixture.
_QUANTITIES: dict[str, tuple[Callable[[Sequence[Step]], np.ndarray], int]] = {
    "latents": (witness.latents_of, 2),
    "x0": (witness.estimates_of, 4),
    "clean_flow": (witness.clean_flows_of, 3),
    "flow": (witness.flows_of, 4),
}


def quantities(fixture: Fixture, case: str, steps: Sequence[Step], *names: str) -> Records:
    """Checks of what a run shows, some of `_QUANTITIES`."""
    for name in names:
        quantity, axis = _QUANTITIES[name]
        yield fixture.network(f"{case}.{name}", channels_first(quantity(steps), axis))


def _at_frame_numbers(model: DiT, step: Step, key: Any, settings: Mapping[str, Any]) -> np.ndarray:
    """Keys of all that the last chunk saw, rotated so that its own frames stand at their numbers in the stream."""
    first = (settings["chunks"] - 1) * settings["frames_per_chunk"] - step.layout.content[0]
    places = np.add(step.layout.cached + step.layout.live, first)
    return witness.turned(model, key, places, settings["latent_hw"])


_WITH_RECACHED = ("at9", "at15", "infinity_at18")  # of these the fixture stores the cache behind the switch


def longlive_recache(fixture: Fixture) -> Records:
    """Prompt switches of LongLive, before and after the sink has left the window."""
    settings, model = fixture.header("config"), load(fixture)
    contexts, size = fixture["in.context"], settings["frames_per_chunk"]
    for case, variant in settings["variants"].items():
        batch = variant["batch"]
        preset = "longlive_infinity" if variant["use_infinite_attention"] else "longlive"
        config = with_sizes(preset, settings["local_attn_size"], settings["sink_size"])
        texts = [witness.text_keys_values(model, context[:batch]) for context in contexts]
        transition = "recache" if variant["global_sink"] else "renew"
        seconds = [(4 * frame - 3) / 16 for frame in variant["switch_frames"]]  # latent f begins at video frame 4 f − 3
        cues = [Cue(0, "first"), *(Cue(second, "next", transition) for second in seconds)]
        plan = schedule(cues, config, time_factor=4, fps=16)
        noise = noise_by_chunk(fixture, config, batch)
        steps = list(witness.run(model, texts, config, noise, settings["chunks"], plan))
        if [start * size for start in plan.starts[1:]] != variant["switch_at"]:
            raise BrokenFixtureError(f"{case} switches at {variant['switch_at']}, chunks {plan.starts[1:]} here")
        yield fixture.network(
            f"{case}.latents", channels_first(witness.latents_of(steps)[:, variant["latents_from"] :], 2)
        )
        if case in _WITH_RECACHED:
            yield from _recached(fixture, case, model, steps[plan.starts[1]], plan.starts[1] * size)


def _recached(fixture: Fixture, case: str, model: DiT, step: Step, frame: int) -> Records:
    """The slots before the chunk that begins at `frame`: the sink, where it was not read again, and what was."""
    held, settings = step.reread, fixture.header("config")
    frames = held.num_tokens // settings["tokens_per_frame"]
    numbers = np.arange(frame - frames, frame)
    if frames < min(frame, settings["local_attn_size"]):
        memory = step.before.cache.anchor
        held = concatenate(getattr(memory, "sink", memory), held)
        numbers = np.concatenate([np.arange(settings["sink_size"]), numbers])
    key = held.key
    if not settings["variants"][case]["use_infinite_attention"]:
        key = witness.turned(model, key, numbers, settings["latent_hw"])
    yield from keys_values(fixture, f"{case}.recached", key, held.value)


_WHOLE_SCENES = ("continuous", "cut")  # of these the fixture stores more than latents


def infinity_rope(fixture: Fixture) -> Records:
    """Scenes of Infinity-RoPE: a flush at every boundary, cuts, and other windows."""
    settings, model = fixture.header("config"), load(fixture)
    texts = [witness.text_keys_values(model, context[None]) for context in fixture["in.context"]]
    for case, variant in settings["variants"].items():
        config = with_sizes("infinity_rope", variant["local_attn_size"], variant["sink_size"])
        cues = [Cue(i, "a scene", transition or "switch") for i, transition in enumerate(variant["transitions"])]
        plan = Schedule(tuple(cues), tuple(variant["scene_chunks"]))
        noise = noise_by_chunk(fixture, config, 1)
        steps = list(witness.run(model, texts, config, noise, settings["chunks"], plan))
        yield from quantities(fixture, case, steps, "latents")
        if case in _WHOLE_SCENES:
            yield from quantities(fixture, case, steps, "x0", "clean_flow")
            held, tokens = steps[-1].seen(), settings["tokens_per_frame"]
            first = witness.turned(model, held.key[:, :, :tokens], (0,), settings["latent_hw"])
            key = np.concatenate([first, held.key[:, :, tokens:]], axis=2)
            yield from keys_values(fixture, f"{case}.kv", key, held.value)
    yield _stated_steps(fixture, config)


# --- anchors whose memory changes -------------------------------------------------------------------------------------


def reward_forcing(fixture: Fixture) -> Records:
    """The averaged sink, with the preset's decay and another."""

    def stream(variant: Mapping[str, Any]) -> StreamConfig:
        config = with_sizes("reward_forcing", variant["local_attn_size"], variant["sink_size"])
        return dataclasses.replace(
            config, anchor=dataclasses.replace(config.anchor, decay=variant["compression_alpha"])
        )

    for case, steps in _variants(fixture, stream):
        yield from _memory_checks(fixture, case, steps, "sink", 0)


def memrope(fixture: Fixture) -> Records:
    """The two running means, with fixed rates and with the adaptive one."""

    def stream(variant: Mapping[str, Any]) -> StreamConfig:
        config = PRESETS["memrope_adaptive" if variant.get("ema_adaptive") else "memrope"].stream
        anchor = dataclasses.replace(
            config.anchor,
            sink_frames=variant["sink_size"],
            long_rate=variant["ema_alpha_long"],
            short_rate=variant["ema_alpha_short"],
        )
        return dataclasses.replace(config, anchor=anchor, past_frames=variant["recent_size"])

    for case, steps in _variants(fixture, stream):
        yield from _memory_checks(fixture, case, steps, "memory", steps[0].config.anchor.sink_frames)


def _memory_checks(fixture: Fixture, case: str, steps: Sequence[Step], name: str, first_frame: int) -> Records:
    """What the anchor shows from `first_frame` on, in every chunk that is full, and all that the last chunk saw."""
    yield from _common(fixture, case, steps)
    full = _slots(steps) // steps[0].config.chunk_frames
    shown = [_shown(step, first_frame) for step in steps[full:]]
    yield from keys_values(fixture, f"{case}.{name}", *map(np.stack, zip(*shown, strict=True)))
    held = steps[-1].seen()
    yield from keys_values(fixture, f"{case}.kv", held.key, held.value)


def rolling_sink(fixture: Fixture) -> Records:
    """The walk over the first frames, with repeated noise and without."""
    settings = fixture.header("config")
    model = load(fixture)

    def stream(variant: Mapping[str, Any]) -> StreamConfig:
        return PRESETS["rolling_sink" if variant["repeat_noise"] else "rolling_sink_fresh_noise"].stream

    for case, steps in _variants(fixture, stream):
        yield from _common(fixture, case, steps)
        # The release has replaced the previous chunk's slots already: as the next chunk sees them.
        last, size = steps[-1], settings["frames_per_chunk"] * settings["tokens_per_frame"]
        before, after = last.seen(), last.seen(last.after.cache)
        held = concatenate(before.tokens(0, size), after.tokens(0, after.num_tokens - size))
        frames = settings["chunks"] * settings["frames_per_chunk"]
        numbers = np.arange(frames - held.num_tokens // settings["tokens_per_frame"], frames)
        key = witness.turned(model, held.key, numbers, settings["latent_hw"])
        yield from keys_values(fixture, f"{case}.kv", key, held.value)


def _variants(
    fixture: Fixture, stream: Callable[[Mapping[str, Any]], StreamConfig]
) -> Iterator[tuple[str, list[Step]]]:
    """Every variant's name, and its run; `stream` makes a variant's settings a stream."""
    settings, model = fixture.header("config"), load(fixture)
    text = witness.text_keys_values(model, fixture["in.context"])
    for case, variant in settings["variants"].items():
        config = stream(variant)
        noise = noise_by_chunk(fixture, config, settings["batch"])
        # The steps are the same: whether noise repeats is decided where it is drawn.
        config = dataclasses.replace(config, repeat_noise=False)
        yield case, list(witness.run(model, [text], config, noise, settings["chunks"]))


def _common(fixture: Fixture, case: str, steps: Sequence[Step]) -> Records:
    yield from quantities(fixture, case, steps, "latents", "flow")
    if case == "preset":
        yield from quantities(fixture, case, steps, "x0")
        yield _stated_steps(fixture, steps[0].config)
    yield fixture.exact(f"{case}.slot_frames", witness.slot_frames(steps, _slots(steps)))
    seen = {"timestep": witness.timesteps_seen(steps)}
    yield fixture.group(f"{case}.timestep", seen, ARITHMETIC_TOLERANCE, relative=True)


def _slots(steps: Sequence[Step]) -> int:
    """Frames that a full chunk sees, its own among them."""
    layout = steps[-1].layout
    return len(layout.cached + layout.live)


def _shown(step: Step, first_frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Un-rotated keys and values of the anchor's frames from `first_frame` on, as the chunk sees them."""
    shown = step.config.anchor.read(step.before.cache.anchor)
    tokens = shown.num_tokens // step.config.anchor.frames * first_frame
    shown = shown.tokens(tokens, shown.num_tokens - tokens)
    return np.asarray(shown.key), np.asarray(shown.value)
