"""Rollouts longer than what critic and teacher score at once: which part an update scores, and what is carried on.

Either an update rolls out up to a window that is drawn for it, and scores that (Self-Forcing++, arXiv 2510.02283); or
it generates the next segment of a rollout that goes on from update to update (LongLive's streaming long tuning, arXiv
2509.22622). What is carried then is part of the training state, so that a run that is resumed goes on from it.
Parts are functions of an update's number among all updates of the stage.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.config.rollouts import window_starts
from adastate_jax.config.stages import DistillConfig
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.context_parallel import kept_axes
from adastate_jax.models.dit import DiT, DiTConfig
from adastate_jax.sharding import RULES, constrain
from adastate_jax.streaming import cache as cache_lib
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import ChunkNoise
from adastate_jax.streaming.prompted import read_again, state_from_window
from adastate_jax.streaming.prompts import Plan, num_recent, plan_of_change
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.accumulation import join_micro_batches, micro_batches
from adastate_jax.training.self_rollout import Rollout, cache_before, rollout_latents, self_rollout

# --- which part of which rollout ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a rollout as programs are compiled for it: in the steady state one stands for all.

    Attributes:
        first_chunk: number of its first chunk; the number of fill chunks stands for any steady one.
        chunks: how many it has, whose outputs have a gradient.
        goes_on: whether it goes on from what the update before left; else the rollout begins with the update.
        overlap_frames: content frames before it that critic and teacher see with it.
        recent_frames: latents that are left for the next update beside the cache; None leaves nothing.
        change: what its first chunk is generated with, where the prompt changes before it.
    """

    first_chunk: int
    chunks: int
    goes_on: bool = False
    overlap_frames: int = 0
    recent_frames: int | None = None
    change: Plan | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an update's part lies.

    Attributes:
        chunk: number of the part's first chunk in its rollout.
        rollout: number of the rollout in the stage.
        begun: number of the update that the rollout began with.
        changed: whether its prompt has changed by then.
    """

    part: Part
    chunk: int
    rollout: int
    begun: int
    changed: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Start:
    """A part's place, for a program.

    Attributes:
        chunk: number of its first chunk, int32 [].
        keys: random keys of the rollout [B], where it is rolled out up to there; None where it goes on.
        part: static.
    """

    chunk: jax.Array
    keys: jax.Array | None
    part: Part = dataclasses.field(metadata={"static": True})


def place_of(number: int, config: DistillConfig, stream: StreamConfig, seed: int) -> Place | None:
    """What update `number` of the stage scores; None is the whole of a rollout of its own.

    Windows begin with each of `window_starts` equally often. Segments take turns, and the prompt of a rollout changes,
    if at all, before one of them but the first, all equally often.
    """
    size, fill = stream.chunk_frames, stream.num_fill_chunks
    clip = config.clip_frames // size
    if not config.continue_rollout:
        if config.clip_frames == config.rollout_frames:
            return None
        starts = window_starts(config, stream)
        chunk = starts[np.random.default_rng((seed, number)).integers(len(starts))]
        return Place(Part(min(chunk, fill), clip), chunk, number, number)
    rollout, segment = divmod(number, config.segments)
    kept = recent_frames(config, stream)
    if not segment:
        return Place(Part(0, clip, recent_frames=kept), 0, rollout, number)
    changes = 0  # before this segment; before none where it is 0
    if config.prompt_change:
        changes = int(np.random.default_rng((seed, rollout)).integers(1, config.segments))
    new = clip - config.overlap_frames // size
    chunk = clip + (segment - 1) * new
    change = plan_of_change(config.prompt_change, chunk, stream) if segment == changes else None
    part = Part(min(chunk, fill), new, True, config.overlap_frames, kept, change)
    return Place(part, chunk, rollout, number - segment, 0 < changes <= segment)


# --- what is carried from update to update ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CarriedRollout:
    """A rollout between two updates.

    Attributes:
        cache: before the next chunk, the adaptive state in it.
        recent: the newest content latents, which the next update shows to critic and teacher, or reads again where the
            prompt changes, [B, `recent_frames`, H, W, C], zeros before the first; None where there are none.
    """

    cache: Cache
    recent: jax.Array | None


def recent_frames(config: DistillConfig, stream: StreamConfig) -> int:
    """How many latents are carried beside the cache."""
    reread = num_recent(stream) if config.prompt_change in ("recache", "renew") else 0
    return max(config.overlap_frames, reread)


def empty_carried(
    student: DiTConfig, config: DistillConfig, stream: StreamConfig, latent_shape: tuple[int, int, int]
) -> CarriedRollout:
    """What is carried before the first update; latent_shape is (H, W, C)."""
    batch, frame_tokens = config.batch_size, student.frame_tokens(*latent_shape[:2])
    cache = cache_lib.empty(student, stream.anchor, stream.past_frames, batch, frame_tokens)
    frames = recent_frames(config, stream)
    recent = constrain(jnp.zeros((batch, frames, *latent_shape)), "batch") if frames else None
    return CarriedRollout(cache, recent)


def with_carried_shardings(carried: CarriedRollout, mesh: jax.sharding.Mesh) -> CarriedRollout:
    """Shapes of a rollout with the sharding that each part has on a mesh.

    Keys and values lie as all that are kept do, latents with their samples.
    """

    def of_cache(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return place(x, jax.P(None, RULES["batch"], None, *kept_axes(*x.shape[3:], mesh)) if x.ndim == 5 else jax.P())

    def place(x: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    recent = None if carried.recent is None else place(carried.recent, jax.P(RULES["batch"]))
    return CarriedRollout(jax.tree.map(of_cache, carried.cache), recent)


def carry_on(carried: CarriedRollout | None, cache: Cache, latents: jax.Array, part: Part) -> CarriedRollout | None:
    """What is carried after an update, if anything is; before it `carried`, or None where the rollout began with it.

    Args:
        cache: after its last chunk.
        latents: content that it generated, [B, N, H, W, C].
    """
    frames = part.recent_frames
    if not frames:
        return None if frames is None else CarriedRollout(cache, None)
    if latents.shape[1] < frames:
        before = jnp.zeros((latents.shape[0], frames, *latents.shape[2:])) if carried is None else carried.recent
        latents = jnp.concatenate([before, latents], axis=1)
    return CarriedRollout(cache, jax.lax.stop_gradient(latents[:, latents.shape[1] - frames :]))


def change_prompt(
    student: DiT, carried: CarriedRollout, text: KeyValues, stream: StreamConfig, change: Plan
) -> CarriedRollout:
    """What a change of prompt does to a rollout, see `streaming/prompts.py`.

    Args:
        text: the student's text keys and values of the new prompt.
        change: static.
    """
    if change.transition == "reset_state":
        return dataclasses.replace(carried, cache=state_from_window(carried.cache))
    if change.reread is None:
        return carried
    cache, _ = read_again(student, carried.cache, carried.recent, text, stream, change.reread)
    return dataclasses.replace(carried, cache=cache)


def split_carried(carried: CarriedRollout | None, count: int) -> CarriedRollout | None:
    """Its micro-batches, stacked."""
    if carried is None:
        return None

    def of_cache(x: jax.Array) -> Any:
        return micro_batches(x, count, axis=1) if x.ndim > 1 else jnp.broadcast_to(x, (count, *x.shape))

    return CarriedRollout(jax.tree.map(of_cache, carried.cache), micro_batches(carried.recent, count))


def join_carried(parts: CarriedRollout | None) -> CarriedRollout | None:
    """What `split_carried` split."""
    if parts is None:
        return None

    def of_cache(x: jax.Array) -> Any:
        return join_micro_batches(x, axis=1) if x.ndim > 2 else x[0]

    return CarriedRollout(jax.tree.map(of_cache, parts.cache), join_micro_batches(parts.recent))


# --- the part ---------------------------------------------------------------------------------------------------------


def roll_out_part(
    student: DiT,
    text: jax.Array,
    noise: ChunkNoise,
    exit_step: jax.Array,
    stream: StreamConfig,
    start: Start | None = None,
    carried: CarriedRollout | None = None,
) -> tuple[Rollout, jax.Array, CarriedRollout | None]:
    """The scored part of a rollout.

    Args:
        text: embeddings of the prompts [B, T, text_dim].
        noise, exit_step: of the part's chunks, see `self_rollout`.
        start: where the part begins; None is a rollout that is scored whole.
        carried: what the rollout goes on from; not looked at where it begins with this update.

    Returns:
        The record, the clip that critic and teacher see [B, N, H, W, C], whose last frames are the record's, and what
        the next update goes on from.
    """
    text = jax.lax.stop_gradient(student.text_keys_values(text))
    if start is None:
        record, _ = self_rollout(student, text, noise, exit_step, stream)
        return record, rollout_latents(record, stream), None
    part, before = start.part, None
    if part.goes_on:
        if part.change is not None:
            carried = change_prompt(student, carried, text, stream, part.change)
        before = carried.cache
    elif part.first_chunk:
        shape = noise.content.shape[4:]
        before = cache_before(student, text, start.keys, exit_step, stream, shape, start.chunk, part.first_chunk)
    record, cache = self_rollout(student, text, noise, exit_step, stream, before, part.first_chunk)
    clip = latents = rollout_latents(record, stream)
    if part.overlap_frames:
        overlap = carried.recent[:, carried.recent.shape[1] - part.overlap_frames :]
        clip = jnp.concatenate([overlap, latents], axis=1)
    return record, clip, carry_on(carried, cache, latents, part)
