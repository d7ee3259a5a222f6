"""Fixtures of streams: AdaState's rollouts, Self-Forcing's with their training passes, one layer of Infinity-RoPE's."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.diffusion import MAX_TIMESTEP, clean_to_flow
from adastate_jax.models.attention import KeyValues, attend_all, concatenate
from adastate_jax.models.dit import Attention, DiT, DiTConfig
from adastate_jax.models.rope import rotate, rotation
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.anchors import make_anchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.static import AbsoluteAnchor, StaticAnchor
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import ChunkNoise, initial_carry, seed_keys
from adastate_jax.streaming.denoising import GeneratedChunk, generate_chunk, read_context
from adastate_jax.streaming.layout import Layout
from adastate_jax.streaming.rollout import rollout_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of
from adastate_jax.training.initialize import block_causal_pass
from adastate_jax.verification.losses import dmd_checks
from adastate_jax.verification.record import (
    Fixture,
    Records,
    abstract,
    channels_first,
    channels_last,
    compiled,
    dit_config,
    load_dit,
)
from adastate_jax.weights.dit import dit_table
from adastate_jax.weights.entries import Entry
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.slots import load_official

# --- AdaState ---------------------------------------------------------------------------------------------------------

_text_keys_values = compiled(DiT.text_keys_values)
_rollout_step = compiled(rollout_step, static_argnames=("config", "phase"))


def adastate_rollout(fixture: Fixture) -> Records:
    """Whole rollouts with every kind of anchor, and the horizon-weighted loss. The weights are `wan_dit`'s."""
    config = dit_config(fixture.header("config"), fixture.settings)
    source = fixture.companion("wan_dit.safetensors")
    tensors = SafeTensors(source)
    official = {name.removeprefix("w."): tensors[name] for name in tensors if name.startswith("w.")}
    model = load_dit(config, official, str(source))
    text = _text_keys_values(model, fixture["in.context"][None])
    for case, settings in fixture.header("rollouts").items():
        yield from _adastate_case(fixture, model, text, case, settings)

    def latents(name: str) -> np.ndarray:
        return channels_last(fixture[f"in.dmd.{name}"], 1)[None]

    yield from dmd_checks(fixture, latents)


def _adastate_case(fixture: Fixture, model: DiT, text: KeyValues, case: str, settings: Mapping[str, Any]) -> Records:
    anchor = make_anchor(settings["anchor"], settings["state_frames"])
    config = StreamConfig(settings["chunk"], settings["past"], anchor)
    content = channels_last(fixture[f"in.{case}.noise"], 3)[:, :, None]  # one sample
    state = content[:, :, :, :0]
    if anchor.state_frames:
        state = channels_last(fixture[f"in.{case}.state_noise"], 3)[:, :, None]
    carry = initial_carry(model.config, config, seed_keys(0, 1), *content.shape[4:6])
    chunks = []
    for index in range(content.shape[0]):
        noise = ChunkNoise(jnp.asarray(content[index]), jnp.asarray(state[index]))
        carry, chunk = _rollout_step(model, carry, text, noise, config=config, phase=phase_of(index, config))
        chunks.append(chunk)

    yield fixture.network(f"{case}.content", channels_first(np.concatenate([c.content[0] for c in chunks]), 1))
    if anchor.state_frames:
        states = np.stack([chunk.state[0] for chunk in chunks if chunk.state is not None])
        yield fixture.network(f"{case}.states", channels_first(states, 2))
    last = model.config.num_layers - 1
    if case in _WITH_CACHE:
        yield fixture.network(f"{case}.anchor_key.layer{last}", carry.cache.anchor.key[last, 0])
        yield fixture.network(f"{case}.window_key.layer{last}", carry.cache.window.key[last, 0])


_WITH_CACHE = ("adaptive", "static")  # the rollouts whose final cache the fixture stores


# --- Self-Forcing -----------------------------------------------------------------------------------------------------


def causal_rollout(fixture: Fixture) -> Records:
    """Self-Forcing's inference around a small network, and its two training passes over whole clips."""
    settings = fixture.header("config")
    config = dit_config(settings["model"], fixture.settings)
    model = load_dit(config, fixture.weights(), str(fixture.path))
    text = _text_keys_values(model, fixture["in.context"])
    for variant, window in settings["variants"].items():
        yield from _causal_variant(fixture, model, text, variant, window["local_attn_size"], window["sink_size"])
    yield from _training_passes(fixture, model)


@functools.partial(compiled, static_argnames=("config", "phase"))
def _generate(
    model: DiT, cache: Cache, text: KeyValues, noise: ChunkNoise, last_step, config: StreamConfig, phase: Phase
) -> tuple[GeneratedChunk, jax.Array, KeyValues, Cache]:
    """A chunk denoised up to `last_step`, then the network's flow for its end at noise level zero, all keys and values
    held with it (un-rotated), and the cache after it."""
    layout = layout_of(phase, config)
    chunk = generate_chunk(model, cache, text, noise, config, phase, last_step)
    context = read_context(model.config, cache, config, layout, chunk.clean)
    flow, _ = model(chunk.clean, jnp.zeros(chunk.clean.shape[:2]), text, layout.live, context=context)
    frame_tokens = chunk.fresh.num_tokens // len(layout.live)
    window = cache_lib.visible(cache, config.anchor, dataclasses.replace(layout, anchor=()), frame_tokens)
    parts = (cache.anchor.sink if layout.anchor else None, window, chunk.fresh)
    held = concatenate(*(part for part in parts if part is not None))
    return chunk, flow, held, cache_lib.advance(cache, config.anchor, layout, chunk.fresh, phase.first_frame)


def _causal_variant(fixture: Fixture, model: DiT, text: KeyValues, variant: str, window: int, sink: int) -> Records:
    settings = fixture.header("config")
    frames, chunks = settings["frames_per_chunk"], settings["chunks"]
    total = chunks * frames
    past = (total if window < 0 else window) - sink - frames
    anchor = AbsoluteAnchor(sink) if sink else NoAnchor()
    config = StreamConfig(frames, past, anchor, shift=settings["timestep_shift"])
    steps = len(config.sigmas)
    start = channels_last(fixture["in.noise"], 2)  # [B, all frames, H, W, C]
    renoise = channels_last(fixture["in.renoise"], 4)  # [chunk, step, B, F, H, W, C]
    batch, _, *size, _ = start.shape
    cache = cache_lib.empty(model.config, config.anchor, config.past_frames, batch, model.config.frame_tokens(*size))

    noisy, clean, flow_at_zero = [], [], []
    for index in range(chunks):
        content = jnp.concatenate([start[None, :, index * frames : (index + 1) * frames], renoise[index]])
        noise = ChunkNoise(content, content[:, :, :0])
        phase = phase_of(index, config)
        for step in range(steps):  # each time anew up to this step, whose input and output are wanted
            chunk, flow, held, after = _generate(model, cache, text, noise, np.int32(step), config=config, phase=phase)
            noisy.append(chunk.noisy)
            clean.append(chunk.clean)
        noisy.append(chunk.clean)  # the input of the pass that fills the cache
        flow_at_zero.append(flow)
        cache = after

    noisy = np.reshape(np.stack(noisy), (chunks, steps + 1, *chunk.clean.shape))
    clean = np.reshape(np.stack(clean), (chunks, steps, *chunk.clean.shape))
    yield fixture.network(f"{variant}.x_in", channels_first(noisy, 4))
    yield fixture.network(f"{variant}.x0", channels_first(clean, 4))
    levels = np.asarray(config.sigmas, np.float32)
    flow = clean_to_flow(clean, noisy[:, :steps], np.broadcast_to(levels[:, None, None], clean.shape[:4]))
    flow = np.concatenate([flow, np.stack(flow_at_zero)[:, None]], axis=1)
    yield fixture.network(f"{variant}.flow", channels_first(flow, 4))
    if variant == "full":  # stored once
        timesteps = np.append(MAX_TIMESTEP * levels, 0.0)[:, None, None]
        yield fixture.arithmetic(f"{variant}.timestep", np.broadcast_to(timesteps, noisy.shape[:4]))
    latents = np.concatenate(list(clean[:, -1]), axis=1)
    yield fixture.network(f"{variant}.latents", channels_first(latents, 2))
    yield from _final_cache(fixture, model.config, text, variant, held, sink, total, tuple(size))


def _final_cache(
    fixture: Fixture,
    config: DiTConfig,
    text: KeyValues,
    variant: str,
    held: KeyValues,
    sink: int,
    frames: int,
    size: tuple[int, int],
) -> Records:
    """The keys and values at the end of a variant; the reference's keys are rotated to their frames' numbers."""
    grid = size[0] // config.patch_size[1], size[1] // config.patch_size[2]
    frame_tokens = config.frame_tokens(*size)
    first = frames - (held.num_tokens // frame_tokens - sink)
    turn = rotation(np.concatenate([np.arange(sink), np.arange(first, frames)]), *grid, config.head_dim)
    yield fixture.network(f"{variant}.kv_k", rotate(held.key, turn))
    yield fixture.network(f"{variant}.kv_v", held.value)
    yield fixture.exact(f"{variant}.local_end_index", np.full(config.num_layers, held.num_tokens))
    yield fixture.exact(f"{variant}.global_end_index", np.full(config.num_layers, frames * frame_tokens))
    if variant == "full":  # stored once
        yield fixture.network(f"{variant}.cross_k", text.key)
        yield fixture.network(f"{variant}.cross_v", text.value)


_block_causal_pass = compiled(block_causal_pass, static_argnames=("chunk_frames", "past_frames"))


def _training_passes(fixture: Fixture, model: DiT) -> Records:
    frames = fixture.header("config")["frames_per_chunk"]
    text = fixture["in.context"]

    noise = channels_last(fixture["in.noise"], 2)
    sigma = fixture["in.df_timestep"] / np.float32(MAX_TIMESTEP)
    flow = _block_causal_pass(model, noise, sigma, text, chunk_frames=frames, past_frames=None)
    yield fixture.network("block_causal.flow", channels_first(flow, 2))

    # The reference's own rollout, at the second step's noise level, beside its own clean latents.
    clean = channels_last(fixture["out.full.latents"], 2)
    noisy = channels_last(np.concatenate(list(fixture["out.full.x_in"][:, 1]), axis=1), 2)
    timestep = np.concatenate(list(fixture["out.full.timestep"][:, 1]), axis=1)
    sigma = timestep / np.float32(MAX_TIMESTEP)
    flow = _block_causal_pass(model, noisy, sigma, text, chunk_frames=frames, past_frames=None, clean=clean)
    yield fixture.network("teacher_forcing.flow", channels_first(flow, 2))


# --- Infinity-RoPE, one attention layer -------------------------------------------------------------------------------


def block_relative_rope(fixture: Fixture) -> Records:
    """One attention layer of infinity-rope: a first-frame anchor, a window, and positions relative to the block."""
    settings = fixture.header("config")
    config = DiTConfig(
        dim=settings["dim"],
        num_heads=settings["num_heads"],
        num_layers=1,
        eps=settings["eps"],
        qk_norm=settings["qk_norm"],
        dtype=fixture.settings.dtype,
        attention=fixture.settings.attention,
    )
    layer = load_official(
        abstract(Attention, config), _self_attention_table(config), fixture.weights(), str(fixture.path)
    )
    for case, options in settings["cases"].items():
        yield from _relative_case(fixture, layer, config, case, options)


def _self_attention_table(config: DiTConfig) -> list[Entry]:
    """The part of the transformer's table that is one self-attention layer's, names without their block."""
    official, ours = "blocks.{layer}.self_attn.", "blocks/self_attention/"
    return [
        dataclasses.replace(entry, official=entry.official.removeprefix(official), path=entry.path.removeprefix(ours))
        for entry in dit_table(config)
        if entry.official.startswith(official)
    ]


# Passes (chunk, pass) of a case whose queries, keys, values and attention are stored, not only their output.
_DETAILED_PASSES = {"c3": ((0, 1), (1, 1), (2, 1), (4, 1)), "c1": ((2, 1), (7, 1)), "cut": ((4, 0),)}
_WHOLE_NUMBERS = ("key_frames", "key_positions", "query_positions")
_DETAILS = ("unroped_q", "unroped_keys", "roped_q", "roped_keys", "values", "attention")


def _relative_case(
    fixture: Fixture, layer: Attention, config: DiTConfig, case: str, options: Mapping[str, Any]
) -> Records:
    settings = fixture.header("config")
    frames, cut_chunk = options["frames_per_chunk"], options["flush_before_chunk"]
    anchor = StaticAnchor(settings["sink_size"])
    stream = StreamConfig(frames, settings["local_attn_size"] - settings["sink_size"] - frames, anchor)
    grid = tuple(settings["grid_hw"])
    inputs = fixture[f"in.x_c{frames}"]
    cache = cache_lib.empty(config, anchor, stream.past_frames, inputs.shape[2], grid[0] * grid[1])
    held = cache_lib.empty(config, anchor, stream.past_frames, 1, 1)  # frame numbers in the place of keys

    found: dict[str, dict[str, Any]] = {}
    for chunk in range(options["chunks"]):
        phase = phase_of(chunk, stream, cut=options["scene_cut"] and chunk == cut_chunk)
        layout = layout_of(phase, stream)
        numbers = np.arange(chunk * frames, (chunk + 1) * frames)[:, None, None]
        numbers = jnp.broadcast_to(
            jnp.asarray(numbers, config.dtype), (1, 1, frames, config.num_heads, config.head_dim)
        )
        numbers = KeyValues(numbers, numbers)
        for index in range(2):
            name = f"{case}.chunk{chunk}.pass{index}"
            ours, fresh = _relative_layer(layer, cache, inputs[chunk, index], stream, layout, grid, config.attention)
            if cut_chunk is not None and chunk < cut_chunk:
                continue  # equal to another case, not stored again
            ours["key_frames"] = _slots(held, anchor, layout, numbers).key[0, 0, :, 0, 0]
            ours["key_positions"], ours["query_positions"] = layout.cached + layout.live, layout.live
            wanted = ["output", *_WHOLE_NUMBERS]
            if (chunk, index) in _DETAILED_PASSES.get(case, ()):
                wanted += _DETAILS
            for quantity in wanted:
                found.setdefault(quantity, {})[f"{name}.{quantity}"] = ours[quantity]
        cache = cache_lib.advance(cache, anchor, layout, fresh, phase.first_frame)
        held = cache_lib.advance(held, anchor, layout, numbers, phase.first_frame)

    for quantity, actual in found.items():
        if quantity in _WHOLE_NUMBERS:
            yield fixture.group(f"{case}.{quantity}", actual, 0.0)
        else:
            yield fixture.networks(f"{case}.{quantity}", actual)


@functools.partial(compiled, static_argnames=("stream", "layout", "grid", "backend"))
def _relative_layer(
    layer: Attention,
    cache: Cache,
    tokens: jax.Array,
    stream: StreamConfig,
    layout: Layout,
    grid: tuple[int, int],
    backend: str,
) -> tuple[dict[str, Any], KeyValues]:
    """All that one pass of the layer computes, by the fixture's names, and the tokens' own keys and values.

    Args:
        tokens: [B, T, D].
        grid: rows and columns of a frame.
    """
    query, fresh = layer.queries(tokens), layer.keys_values(tokens)
    fresh = jax.tree.map(lambda x: x[None], fresh)  # the cache has a layer axis
    slots = jax.tree.map(lambda x: x[0], _slots(cache, stream.anchor, layout, fresh))
    turn = rotation(layout.live, *grid, query.shape[-1])
    context = cache_lib.read(cache, stream.anchor, layout, *grid, query.shape[-1])
    context = jax.tree.map(lambda x: x[0], context)
    rotated = rotate(fresh.key[0], turn)
    attended, _ = attend_all(backend)(query, fresh.key[0], fresh.value[0], turn, context)
    return {
        "unroped_q": query,
        "unroped_keys": slots.key,
        "values": slots.value,
        "roped_q": rotate(query, turn),
        "roped_keys": rotated if context is None else jnp.concatenate([context.key, rotated], axis=1),
        "attention": attended,
        "output": layer.merge(attended),
    }, fresh


def _slots(cache: Cache, anchor: StaticAnchor, layout: Layout, live: KeyValues) -> KeyValues:
    """Un-rotated keys and values of everything that a chunk sees, its own last."""
    cached = cache_lib.visible(cache, anchor, layout, live.num_tokens // len(layout.live))
    return live if cached is None else concatenate(cached, live)
