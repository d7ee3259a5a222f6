"""Streams that are run as they are by the package's own steps, around a network that writes down what it is shown."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.diffusion import MAX_TIMESTEP, flow_to_clean
from adastate_jax.models.attention import KeyValues, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.models.rope import rotate, rotation
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import Chunk, ChunkNoise, RolloutCarry, initial_carry, seed_keys
from adastate_jax.streaming.continuation import given_chunk
from adastate_jax.streaming.cues import Cue
from adastate_jax.streaming.layout import Layout
from adastate_jax.streaming.prompted import read_again
from adastate_jax.streaming.prompts import Plan, Schedule
from adastate_jax.streaming.rollout import rollout_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of
from adastate_jax.verification.record import compiled


@dataclasses.dataclass(frozen=True)
class Pass:
    """One call of the network: its arguments and what came of it, as numpy arrays."""

    latents: np.ndarray  # [B, F, H, W, C]
    timesteps: np.ndarray  # [B, F]
    context: KeyValues | None  # what was cached, keys rotated, [layers, B, S, heads, head_dim]
    flow: np.ndarray  # [B, F, H, W, C]
    fresh: KeyValues  # of the live frames, keys un-rotated, [layers, B, T, heads, head_dim]

    @property
    def clean(self) -> np.ndarray:
        """The clean estimate where the noise level is what the network was told, [B, F, H, W, C]."""
        return np.asarray(flow_to_clean(self.flow, self.latents, self.timesteps / np.float32(MAX_TIMESTEP)))

    def frames_attended(self) -> int:
        """Cached and live frames."""
        tokens = self.fresh.num_tokens // self.latents.shape[1]
        return self.latents.shape[1] + (0 if self.context is None else self.context.num_tokens // tokens)


_passes: list[Pass] = []


class Witness:
    """Stands in for the network: hands every call on, and writes it down."""

    def __init__(self, model: DiT):
        self.model, self.config = model, model.config

    def lay_out(self, context, latents):
        """Contexts are written down as they are."""
        return context

    def __call__(self, latents, timesteps, text, positions, attend=None, context=None):
        flow, fresh = self.model(latents, timesteps, text, positions, attend, context)
        jax.debug.callback(self._write_down, latents, timesteps, context, flow, fresh, ordered=True)
        return flow, fresh

    @staticmethod
    def _write_down(*arguments):
        _passes.append(Pass(*jax.tree.map(np.asarray, arguments)))


@functools.partial(compiled, static_argnames=("config", "phase"))
def _rollout_step(model, carry, text, noise, reencode, config, phase):
    return rollout_step(Witness(model), carry, text, noise, config, phase, reencode)


@functools.partial(compiled, static_argnames=("config", "phase"))
def _given_chunk(model, carry, text, given, noise, config, phase):
    return given_chunk(Witness(model), carry, text, given, noise, config, phase)


_read_again = compiled(read_again, static_argnames=("config", "reread"))
text_keys_values = compiled(DiT.text_keys_values)


@dataclasses.dataclass(frozen=True)
class Step:
    """One chunk of a stream.

    Attributes:
        phase, config: what it was run as.
        before, after: the carries.
        reread: keys (un-rotated) and values of the frames that were read again before it; None if none were.
        passes: all calls of the network, the clean pass last; what was read again is not among them.
        chunk: what came of it.
    """

    phase: Phase
    config: StreamConfig
    before: RolloutCarry
    after: RolloutCarry
    reread: KeyValues | None
    passes: tuple[Pass, ...]
    chunk: Chunk

    @property
    def layout(self) -> Layout:
        return layout_of(self.phase, self.config)

    def seen(self, cache: Cache | None = None) -> KeyValues:
        """Keys (un-rotated) and values of what the chunk saw, its own frames last, clean."""
        fresh = self.passes[-1].fresh
        frame_tokens = fresh.num_tokens // len(self.layout.live)
        cached = cache_lib.visible(cache or self.before.cache, self.config.anchor, self.layout, frame_tokens)
        return fresh if cached is None else concatenate(cached, fresh)


ONE_PROMPT = Schedule((Cue(0, "as given"),), (0,))


def run(
    model: DiT,
    texts: Sequence[KeyValues],
    config: StreamConfig,
    noise_of: Callable[[int], np.ndarray],
    chunks: int,
    schedule: Schedule = ONE_PROMPT,
    given: np.ndarray | None = None,
    reencode: Callable | None = None,
) -> Iterator[Step]:
    """Streams by the package's own steps, along a schedule of prompts, from noise that is given.

    Args:
        texts: text keys and values of each cue's prompt.
        noise_of: of a chunk's number, content noise as in `ChunkNoise`.
        given: clean latents of the first frames [B, n, H, W, C].
        reencode: see `rollout_step`; used where the stream restarts.
    """
    carry, contents = None, []
    given_frames = 0 if given is None else given.shape[1]
    for number in range(chunks):
        noise = jnp.asarray(noise_of(number))
        noise = ChunkNoise(noise, noise[:, :, :0])
        if carry is None:
            batch, _, *size, _ = noise.content.shape[1:]
            carry = initial_carry(model.config, config, seed_keys(0, batch), *size)
        plan = schedule.plan(number, config, chunks - number, given_frames // config.chunk_frames)
        carry, fresh = _reread(model, carry, contents, texts[plan.cue], config, plan)
        _passes.clear()
        first = number * config.chunk_frames
        if first < given_frames:
            part = given[:, first : first + config.chunk_frames]
            after, chunk = _given_chunk(model, carry, texts[plan.cue], part, noise, config=config, phase=plan.phase)
        else:
            restarts = reencode if config.anchor.restarts and not plan.phase.steady else None
            after, chunk = _rollout_step(
                model, carry, texts[plan.cue], noise, restarts, config=config, phase=plan.phase
            )
        jax.effects_barrier()
        yield Step(plan.phase, config, carry, after, fresh, tuple(_passes), chunk)
        carry, contents = after, [*contents, chunk.content]


def _reread(
    model: DiT, carry: RolloutCarry, contents: list[jax.Array], text: KeyValues, config: StreamConfig, plan: Plan
) -> tuple[RolloutCarry, KeyValues | None]:
    if plan.reread is None:
        return carry, None
    recent = jnp.concatenate(contents, axis=1)[:, -plan.reread.frames :]
    cache, fresh = _read_again(model, carry.cache, recent, text, config=config, reread=plan.reread)
    return dataclasses.replace(carry, cache=cache), fresh


# --- what a run is asked for ------------------------------------------------------------------------------------------


def latents_of(steps: Sequence[Step]) -> np.ndarray:
    """The stream [B, frames, H, W, C]."""
    return np.concatenate([step.chunk.content for step in steps], axis=1)


def estimates_of(steps: Sequence[Step]) -> np.ndarray:
    """Clean estimate of every denoising pass, [chunk, step, B, F, H, W, C]."""
    return np.stack([[one.clean for one in step.passes[:-1]] for step in steps])


def clean_flows_of(steps: Sequence[Step]) -> np.ndarray:
    """The network's flow for every finished chunk at noise level zero, [chunk, B, F, H, W, C]."""
    return np.stack([step.passes[-1].flow for step in steps])


def flows_of(steps: Sequence[Step]) -> np.ndarray:
    """The network's flow in every pass, [chunk, step + 1, B, F, H, W, C]."""
    return np.stack([[one.flow for one in step.passes] for step in steps])


def timesteps_seen(steps: Sequence[Step]) -> np.ndarray:
    """What the network was told in every pass, [chunk, step + 1, B, F]."""
    return np.stack([[one.timesteps for one in step.passes] for step in steps])


def slot_frames(steps: Sequence[Step], slots: int) -> np.ndarray:
    """Whose clean values each slot held while a chunk was denoised, bit for bit.

    Returns:
        [chunk, slots]: a frame's number; live slots are the chunk's own; −1 is empty, −2 equal to no frame.
    """
    known: list[np.ndarray] = []  # [layers, B, tokens, heads, head_dim] of every frame
    found = np.full((len(steps), slots), -1)
    for row, step in zip(found, steps, strict=True):
        first, size = len(known), len(step.layout.content)
        context = step.passes[0].context
        held = [] if context is None else _framewise(context.value, len(step.layout.cached))
        for slot, value in enumerate(held):
            row[slot] = next((i for i, frame in enumerate(known) if np.array_equal(value, frame)), -2)
        row[len(held) : len(held) + size] = np.arange(first, first + size)
        known += _framewise(step.passes[-1].fresh.value, size)
    return found


def _framewise(tokens: np.ndarray, frames: int) -> list[np.ndarray]:
    return np.split(np.asarray(tokens), frames, axis=2) if frames else []


def turned(model: DiT, key: jax.Array, positions: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Keys [layers, B, tokens, heads, head_dim] rotated to temporal positions, in latents of height × width."""
    _, patch_height, patch_width = model.config.patch_size
    grid = size[0] // patch_height, size[1] // patch_width
    return np.asarray(rotate(jnp.asarray(key), rotation(np.asarray(positions), *grid, model.config.head_dim)))
