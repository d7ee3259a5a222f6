"""A stream whose prompts change on the way: what each transition does to text, cache and state."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import Chunk, RolloutCarry
from adastate_jax.streaming.continuation import given_step, max_given_frames
from adastate_jax.streaming.denoising import denoise, read_context
from adastate_jax.streaming.layout import Layout, consecutive
from adastate_jax.streaming.prompts import Plan, Reread, Schedule, num_recent
from adastate_jax.streaming.rollout import Reencode, stream_step
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptedCarry:
    """A stream that follows a schedule."""

    # What every chunk replaces.
    stream: RolloutCarry
    # The clean latents of the last frames, which `recache` reads again, the newest last, zeros before the first.
    recent: jax.Array  # [B, F_s + W_p + F, H, W, C]


def initial_prompted(stream: RolloutCarry, config: StreamConfig, latent_shape: tuple[int, int, int]) -> PromptedCarry:
    """The carry before the first chunk; latent_shape is (H, W, C)."""
    return PromptedCarry(stream, jnp.zeros((stream.keys.shape[0], num_recent(config), *latent_shape)))


@jax.jit
def _text_between(model: DiT, before: jax.Array, after: jax.Array, weight) -> KeyValues:
    """Text keys and values of embeddings [B, T, text_dim] between two prompts."""
    between = (1.0 - weight) * before.astype(jnp.float32) + weight * after.astype(jnp.float32)
    return model.text_keys_values(between.astype(after.dtype))


def read_again(
    model: DiT, cache: Cache, recent: jax.Array, text: KeyValues, config: StreamConfig, reread: Reread
) -> tuple[Cache, KeyValues]:
    """Reads a stream's last frames again, clean, under a new text: LongLive's recache, see `prompts`.

    Args:
        cache: before the next chunk.
        recent: the stream's last clean latents [B, n, H, W, C], the newest last.
        text: text keys and values of the new prompt.
        reread: how many of them are read, and how; static.

    Returns:
        The cache, and the new keys (un-rotated) and values of all that was read [layers, B, tokens, heads, head_dim].
    """
    recent = recent[:, recent.shape[1] - reread.frames :]
    layout, context = consecutive(0, 0, 0, reread.frames), None
    if reread.sees_anchor:
        seen = config.anchor.reread_layout(config.past_frames, config.chunk_frames)
        layout = Layout(seen.anchor, (), (), (seen.window + seen.content)[: reread.frames])
        context = read_context(model.config, cache, config, layout, recent)
    _, fresh = denoise(model, recent, 0.0, text, layout, context)
    frame_tokens = fresh.num_tokens // reread.frames
    if not reread.anew:
        return dataclasses.replace(cache, window=_behind(cache.window, fresh)), fresh
    tokens = config.chunk_frames * frame_tokens
    cache = cache_lib.empty(model.config, config.anchor, config.past_frames, recent.shape[0], frame_tokens)
    for chunk in range(reread.frames // config.chunk_frames):
        phase = phase_of(chunk, config)
        layout, chunk_fresh = layout_of(phase, config), fresh.tokens(chunk * tokens, tokens)
        cache = cache_lib.advance(cache, config.anchor, layout, chunk_fresh, phase.first_frame)
    return cache, fresh


def _behind(window: KeyValues, fresh: KeyValues) -> KeyValues:
    """The window whose newest tokens are replaced by the newest of the fresh ones."""
    fresh = jax.tree.map(lambda x, like: x.astype(like.dtype), fresh, window)
    replaced = min(window.num_tokens, fresh.num_tokens)
    kept = window.tokens(0, window.num_tokens - replaced)
    return concatenate(kept, fresh.tokens(fresh.num_tokens - replaced, replaced))


def state_from_window(cache: Cache) -> Cache:
    """Makes the newest frames of the window the adaptive state."""
    tokens = cache.anchor.num_tokens
    state = cache.window.tokens(cache.window.num_tokens - tokens, tokens)
    return dataclasses.replace(cache, anchor=state)


@functools.partial(jax.jit, static_argnames=("config", "reread"), donate_argnames="carry")
def _recache(
    model: DiT,
    carry: RolloutCarry,
    recent: jax.Array,
    text: KeyValues,
    config: StreamConfig,
    reread: Reread,
) -> RolloutCarry:
    """`read_again` of a carry."""
    return dataclasses.replace(carry, cache=read_again(model, carry.cache, recent, text, config, reread)[0])


@functools.partial(jax.jit, static_argnames="config", donate_argnames="carry")
def _reset_state(carry: RolloutCarry, config: StreamConfig) -> RolloutCarry:
    """`state_from_window` of a carry."""
    return dataclasses.replace(carry, cache=state_from_window(carry.cache))


@jax.jit
def _remember(recent: jax.Array, content: jax.Array) -> jax.Array:
    return jnp.concatenate([recent, content], axis=1)[:, content.shape[1] :]


def _call(function: Callable, *arguments) -> Any:
    return function(*arguments)


def _compile(function: Callable, *arguments) -> Any:
    """Compiles a jitted function for these arguments, so that a call need not.

    Returns:
        The shapes of its result, which stand for the result as arguments of the next function.
    """

    def shape(x):
        # Without a mesh arrays are bound to no device; the device that is named here would make them other arguments.
        sharding = None if isinstance(x.sharding, jax.sharding.SingleDeviceSharding) else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(shape, function.lower(*arguments).compile().out_info)


def chunks_to_compile(
    schedule: Schedule, config: StreamConfig, first_chunk: int, last_chunk: int | None, given_chunks: int = 0
) -> list[int]:
    """Chunks among which are all programs that a stream runs: behind its beginning and each cue, and before its end.

    In between, the phases of a cycle repeat, for however long.

    Args:
        first_chunk: the number of the stream's next chunk.
        last_chunk: the number behind the last one; None is a stream without end.
        given_chunks: how many of the stream's first chunks are given, if only in part.
    """
    settling = config.num_fill_chunks + len(config.cycle) + given_chunks
    parts = [range(start, start + settling) for start in (first_chunk, *schedule.starts)]
    if last_chunk is not None:
        parts.append(range(last_chunk - config.live_chunks, last_chunk))
    found = {chunk for part in parts for chunk in part if chunk >= first_chunk}
    return sorted(chunk for chunk in found if last_chunk is None or chunk < last_chunk)


def prompted_stream(
    model: DiT,
    carry: PromptedCarry,
    embeddings: Sequence[jax.Array],
    schedule: Schedule,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    num_chunks: int | None = None,
    given: jax.Array | None = None,
    reencode: Reencode | None = None,
) -> Iterator[tuple[PromptedCarry, Chunk]]:
    """`stream` along a schedule of prompts; with one cue and nothing given, the same bits.

    Every program that the chunks need is compiled before the first of them is generated.

    Args:
        model, config, latent_shape, num_chunks, reencode: as `stream`.
        carry: it is donated when the next chunk is asked for.
        embeddings: of each cue's prompt, [B, T, text_dim].
        given: clean latents that take the place of the stream's first frames, [B, n, H, W, C], n ≤ `max_given_frames`.

    Yields:
        The carry after the chunk, and the chunk.

    Raises:
        ValueError: too many frames are given.
    """
    if given is not None and given.shape[1] > max_given_frames(config):
        raise ValueError(f"at most {max_given_frames(config)} latent frames can be given, got {given.shape[1]}")
    first_chunk = int(carry.stream.chunk)
    last_chunk = None if num_chunks is None else first_chunk + num_chunks
    starts = range(0, 0 if given is None else given.shape[1], config.chunk_frames)
    parts = [given[:, start : start + config.chunk_frames] for start in starts]

    def plan_of(chunk: int) -> Plan:
        remaining = None if last_chunk is None else last_chunk - chunk
        given_frames = 0 if given is None else given.shape[1]
        return schedule.plan(chunk, config, remaining, given_frames // config.chunk_frames)

    def text_of(plan: Plan) -> KeyValues:
        before, after = embeddings[max(plan.cue - 1, 0)], embeddings[plan.cue]
        return _text_between(model, before, after, jnp.float32(plan.blend))

    def step(run: Callable, carry: PromptedCarry, chunk: int, plan: Plan, text: KeyValues):
        state = carry.stream
        if plan.reread:
            state = run(_recache, model, state, carry.recent, text, config, plan.reread)
        elif plan.transition == "reset_state":
            state = run(_reset_state, state, config)
        if chunk < len(parts):
            state, generated = run(given_step, model, state, text, parts[chunk], config, plan.phase)
        else:
            state, generated = run(stream_step, model, state, text, config, latent_shape, plan.phase, reencode)
        return PromptedCarry(state, run(_remember, carry.recent, generated.content)), generated

    ahead = chunks_to_compile(schedule, config, first_chunk, last_chunk, len(parts))
    text, shapes, compiled = text_of(plan_of(first_chunk)), carry, set()
    for chunk in ahead:
        plan = plan_of(chunk)
        # The carry to begin with may be laid over the devices otherwise than those that chunks return.
        program = plan.phase, plan.transition, plan.reread, min(chunk, len(parts)), chunk == first_chunk
        if program not in compiled:
            shapes, _ = step(_compile, shapes, chunk, plan, text)
            compiled.add(program)

    said = None
    for chunk in itertools.count(first_chunk) if last_chunk is None else range(first_chunk, last_chunk):
        plan = plan_of(chunk)
        if said != (plan.cue, plan.blend):
            text, said = text_of(plan), (plan.cue, plan.blend)
        carry, generated = step(_call, carry, chunk, plan, text)
        yield carry, generated
