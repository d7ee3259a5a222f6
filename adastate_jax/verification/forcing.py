"""Fixtures of Rolling-Forcing, Causal-Forcing and CausVid: joint denoising, first frames that are given, restarts.

As those in `anchors.py`: the authors' own loops, against this package's presets and its own steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from adastate_jax.generation import restart
from adastate_jax.models.dit import DiT
from adastate_jax.models.vae import VAE
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.schedule import Phase, StreamConfig, timesteps_of
from adastate_jax.verification import witness
from adastate_jax.verification.anchors import load, quantities, stated
from adastate_jax.verification.record import (
    BrokenFixtureError,
    Fixture,
    Records,
    abstract,
    channels_first,
    channels_last,
    compiled,
    vae_config,
)
from adastate_jax.verification.witness import Step
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.vae import vae_table

# --- Rolling-Forcing --------------------------------------------------------------------------------------------------


def rolling_forcing(fixture: Fixture) -> Records:
    """Whole videos, the staircase that grows and the end with it, with five levels and with four."""
    settings, model = fixture.header("config"), load(fixture)
    text = witness.text_keys_values(model, fixture["in.context"])
    for case, options in settings["cases"].items():
        config = dataclasses.replace(
            PRESETS["rolling_forcing"].stream,
            denoising_steps=tuple(map(float, options["denoising_step_list"])),
            shift=options["timestep_shift"],
        )
        yield stated(fixture, f"{case}.timesteps", timesteps_of(Phase(None), config))
        noise = _staircase_noise(fixture, config, settings["chunks"])
        steps = list(witness.run(model, [text], config, noise, settings["chunks"]))
        yield from quantities(fixture, case, steps, "latents", "clean_flow")
        if case == "five":
            yield fixture.network(f"{case}.x0", channels_first(_estimates(steps), 4))
        windows, clean_frames = _windows(steps)
        yield fixture.exact(f"{case}.windows", windows)
        yield fixture.exact(f"{case}.clean_frames", clean_frames)


def _staircase_noise(fixture: Fixture, config: StreamConfig, chunks: int):
    """Noise of all chunks that are live together, by the number of the oldest; zeros behind the video's end."""
    frames, levels = config.chunk_frames, len(config.sigmas)
    start = channels_last(fixture["in.noise"], 2)  # [B, frames, H, W, C]
    renoise = channels_last(fixture["in.renoise"], 4)  # [chunk, level, B, F, H, W, C]

    def of_block(block: int) -> np.ndarray:
        if block >= chunks:
            return np.zeros((levels, *renoise.shape[2:]), np.float32)
        first = start[None, :, block * frames : (block + 1) * frames]
        return np.concatenate([first, renoise[block, : levels - 1]])

    return lambda chunk: np.concatenate([of_block(chunk + i) for i in range(levels)], axis=2)


def _estimates(steps: list[Step]) -> np.ndarray:
    """Clean estimate of every chunk after every level, [chunk, level, B, F, H, W, C]."""
    frames = steps[0].config.chunk_frames
    found: list[list[np.ndarray]] = [[] for _ in steps]
    for oldest, step in enumerate(steps):
        for one in step.passes[:-1]:
            blocks = np.split(one.clean, one.clean.shape[1] // frames, axis=1)
            for block, estimate in enumerate(blocks, oldest):
                found[block].append(estimate)
    return np.stack(found)


def _windows(steps: list[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Of each denoising pass: oldest chunk, live chunks, frames attended; and frames attended in the clean pass behind
    it. The release repeats the first chunk's clean pass behind every pass of the staircase that grows."""
    windows, clean = [], []
    for oldest, step in enumerate(steps):
        for one in step.passes[:-1]:
            windows.append((oldest, one.latents.shape[1] // step.config.chunk_frames, one.frames_attended()))
            clean.append(step.passes[-1].frames_attended())
    return np.asarray(windows), np.asarray(clean)


# --- Causal-Forcing ---------------------------------------------------------------------------------------------------

_CAUSAL_PRESETS = {
    "causal_forcing_dmd_chunkwise": "causal_forcing",
    "causal_forcing_dmd_framewise": "causal_forcing_frame",
    "causal_forcing_dmd_framewise_2step": "causal_forcing_two_step",
    "causal_forcing_dmd_framewise_1step": "causal_forcing_one_step",
}


def causal_forcing(fixture: Fixture) -> Records:
    """Chunk by chunk and frame by frame, with few steps, and from a picture."""
    settings, model = fixture.header("config"), load(fixture)
    text = witness.text_keys_values(model, fixture["in.context"])
    start = channels_last(fixture["in.noise"], 2)
    renoise = channels_last(fixture["in.renoise"], 3)  # [step, B, frames, H, W, C]
    picture = channels_last(fixture["in.image"], 2)
    for case, options in settings["cases"].items():
        config = PRESETS[_CAUSAL_PRESETS[options["config"]]].stream
        steps = [options[name] for name in ("denoising_step_list", "denoising_step_list_first_chunk")]
        if steps != [list(config.denoising_steps), list(config.first_denoising_steps)]:
            raise BrokenFixtureError(f"{case} takes the steps {steps}, its preset others")
        size = config.chunk_frames

        def noise_of(chunk: int, size: int = size) -> np.ndarray:
            frames = slice(chunk * size, (chunk + 1) * size)
            return np.concatenate([start[None, :, frames], renoise[:, :, frames]])

        given = picture if options["image"] else None
        run = list(witness.run(model, [text], config, noise_of, options["frames"] // size, given=given))
        yield from quantities(fixture, case, run, "latents")


# --- CausVid ----------------------------------------------------------------------------------------------------------

_decode = compiled(WanCodec.decode, static_argnums=3)
_shared_frame = compiled(restart.shared_frame)


def causvid(fixture: Fixture) -> Records:
    """Long videos by overlapping rollouts, each decoded by itself from the picture that both show."""
    settings, model = fixture.header("config"), load(fixture)
    text = witness.text_keys_values(model, fixture["in.context"])
    config = vae_config(settings["vae"], fixture.settings)
    vae = load_official(abstract(VAE, config), vae_table(config), fixture.weights("vae."), str(fixture.path))
    codec = WanCodec(vae, vae)
    for case, options in settings["cases"].items():
        stream = _causvid_stream(case, options)
        yield stated(fixture, f"{case}.sigmas", stream.sigmas)
        yield stated(fixture, f"{case}.timesteps", timesteps_of(Phase(None), stream))
        rollouts, shared = _rollouts(fixture, model, text, codec, stream)
        yield fixture.network(f"{case}.latents", channels_first(rollouts, 3))
        pictures = rollouts[1:, :, :1]
        yield fixture.decoded(f"{case}.image_latents", channels_first(pictures, 3))
        if case == "four_step":
            yield fixture.decoded(f"{case}.shared_frames", channels_first(shared, 2))


def _causvid_stream(case: str, options: Mapping[str, Any]) -> StreamConfig:
    stream = PRESETS["causvid"].stream
    if stream.shift != options["timestep_shift"]:
        raise BrokenFixtureError(f"{case} has timestep_shift {options['timestep_shift']}, its preset {stream.shift}")
    if case == "release":
        return stream
    if case == "grid":  # what the network is told lies on the scheduler's grid, too
        return dataclasses.replace(stream, timesteps=())
    steps = PRESETS["self_forcing"].stream.denoising_steps
    return dataclasses.replace(stream, denoising_steps=steps, timesteps=())


def _rollouts(
    fixture: Fixture, model: DiT, text, codec: WanCodec, stream: StreamConfig
) -> tuple[np.ndarray, np.ndarray]:
    """All frames of every rollout [rollout, B, 21, H, W, C], and the video frames in 0..1 that two of them show."""
    settings, size = fixture.header("config"), stream.chunk_frames
    start = channels_last(fixture["in.noise"], 3)  # [rollout, B, frames, H, W, C]
    renoise = channels_last(fixture["in.renoise"], 4)  # [rollout, step, B, frames, H, W, C]
    per_rollout = settings["rollout_frames"] // size
    places = [(0, 0)]  # rollout, chunk in it; those behind the first begin with a chunk that is given
    places += [(rollout, chunk) for rollout in range(settings["rollouts"]) for chunk in range(1, per_rollout)]

    def noise_of(number: int) -> np.ndarray:
        rollout, chunk = places[number]
        frames = slice(chunk * size, (chunk + 1) * size)
        return np.concatenate([start[rollout, None, :, frames], renoise[rollout, : len(stream.sigmas) - 1, :, frames]])

    decoder = {"cache": codec.decode_start(start.shape[1], *start.shape[3:5])}
    reencode = jax.tree_util.Partial(restart.reencode, codec, decoder)
    rollouts: list[list[jax.Array]] = [[]]
    shared = []
    run = witness.run(model, [text], stream, noise_of, len(places), reencode=reencode)
    for number, step in enumerate(run):
        rollouts[-1].append(step.chunk.content)
        overlap = step.chunk.overlap
        if overlap is None:
            _, decoder["cache"] = _decode(codec, step.chunk.content, decoder["cache"], number == 0)
        elif len(rollouts) < settings["rollouts"]:
            shared.append(_shared_frame(codec, decoder["cache"], step.chunk.content)[:, 0])
            rollouts.append([overlap])
            empty = codec.decode_start(start.shape[1], *start.shape[3:5])
            _, decoder["cache"] = _decode(codec, overlap, empty, True)
    return np.stack([np.concatenate(one, axis=1) for one in rollouts]), (np.stack(shared) + 1) / 2
