"""What a stream's cache holds when what it should hold changes, and what looks at it."""

from collections.abc import Iterator

import jax
import numpy as np

from adastate_jax.data.worlds import World
from adastate_jax.evaluation import small_world
from adastate_jax.evaluation.attention_probe import context_shares, probe_chunk
from adastate_jax.generation.loading import Model, decode_frames
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.rollout import stream_step
from adastate_jax.streaming.schedule import layout_of, phase_of
from studies.changing_world import ABSENCE, CHUNK
from studies.changing_world.worlds import colours_of
from studies.contents import as_features, last_seen, read_linearly

READ_CHUNKS = range(4, 20)  # after which the cache is read: four balls come and go
READ_SEEDS = range(4)  # of noise; as many streams as a linear classifier needs to be fitted on half of them
PROBED_CHUNKS = range(4, 20)  # of the first noise seed, whose attention is measured
LONGEST = 5  # chunks since a change that are told apart: then the next ball comes
AROUND = range(-3, LONGEST)  # chunks around a visit whose attention is told
NEVER, PAST = -1, -2  # in place of chunks since a change: there was none; another ball has come since


def measure_cache(model: Model, worlds: list[World]) -> tuple[Iterator[dict[str, object]], Iterator[dict[str, object]]]:
    """Rows of what is read from the cache, and rows of what looks at it, see `_read` and `_look`."""
    stream, latent_shape, config = model.config.stream, model.config.latent_shape, model.config.data.worlds
    prompts = [world.caption for world in worlds]
    text = jax.jit(model.student.text_keys_values)(model.embed(prompts))
    found, features, masses = [], [], {}
    for seed in READ_SEEDS:
        keys = seed_keys(seed * len(prompts), len(prompts))
        carry = initial_carry(model.student.config, stream, keys, *latent_shape[:2])
        contents, read = [], []
        for chunk in range(READ_CHUNKS.stop):
            phase = phase_of(chunk, stream)
            if seed == READ_SEEDS[0] and chunk in PROBED_CHUNKS:
                masses[chunk] = np.asarray(probe_chunk(model.student, carry, text, stream, latent_shape, phase))
            carry, shown = stream_step(model.student, carry, text, stream, latent_shape, phase)
            contents.append(np.asarray(shown.content))
            if chunk in READ_CHUNKS:
                parts = {"caption": np.zeros((len(prompts), 0)), "window": as_features(carry.cache.window)}
                if stream.anchor.frames:
                    parts["anchor"] = as_features(stream.anchor.read(carry.cache.anchor))
                read.append(parts)
        frames = decode_frames(model.codec, np.concatenate(contents, axis=1), (), True)[0]
        found.append(colours_of(np.asarray(frames), config))
        features.append(read)
    shares = {chunk: _shares(of_chunk, chunk, model) for chunk, of_chunk in masses.items()}
    return _read(np.concatenate(found), features, prompts), _look(found[0], shares)


def since_change(found: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks since a colour was last replaced in view, and the colour before that, by the end of a chunk: [V] each.

    `NEVER` where none was; `PAST` where another ball has come since, or more than `LONGEST` chunks are over: it tells
    the reader which colour it is, the stale one of an arm that forgets, too.
    """
    since, before = np.full((2, len(found)), NEVER)
    visits = small_world.visits(found[:, : (chunk + 1) * CHUNK], ABSENCE)
    for video, entry, last, frame in zip(*(visits[x] for x in ("video", "entry", "exit", "since")), strict=True):
        if entry != last:
            apart = chunk - frame // CHUNK
            since[video], before[video] = apart if apart <= LONGEST else PAST, entry
        elif since[video] != NEVER:
            since[video] = PAST
    return since, before


def _read(found: np.ndarray, features: list, prompts: list[str]) -> Iterator[dict[str, object]]:
    """How often a linear classifier tells the colour last seen, and the one before that was replaced, from each part.

    After each of `READ_CHUNKS` it is fitted to half of the streams and asked about the others, and the other way round.
    A row per part, chunks since the change (up to `LONGEST`) and video, with the number of answers.

    Args:
        found: colours of all streams [S · V, F].
        features: of each seed and chunk, the parts' features [V, D].
    """
    count = len(prompts)
    video = np.tile(np.arange(count), len(features))
    captions = np.unique(prompts, return_inverse=True)[1][video]
    spans = LONGEST + 2  # the first is `NEVER`
    sums = {name: np.zeros((3, spans, count)) for name in features[0][0]}
    for index, chunk in enumerate(READ_CHUNKS):
        last, _ = last_seen(found[:, : (chunk + 1) * CHUNK])
        since, before = since_change(found, chunk)
        here = (last >= 0) & (since != PAST)
        place = since[here] + 1, video[here]
        for name, of_part in sums.items():
            values = np.concatenate([read[index][name] for read in features])[here]
            said = read_linearly(values, last[here], captions[here], video[here] % 2)
            for of_kind, right in zip(of_part, (said == last[here], said == before[here], said >= 0), strict=True):
                np.add.at(of_kind, place, right)
    for name, (right, old, answers) in sums.items():
        for span, number in np.ndindex(spans, count):
            if total := answers[span, number]:
                shares = {"last": right[span, number] / total, "before": old[span, number] / total}
                shares = {key: float(share) for key, share in shares.items()}
                yield {"part": name, "since": span - 1, "video": number, **shares, "answers": int(total)}


def _shares(masses: np.ndarray, chunk: int, model: Model) -> dict[str, np.ndarray]:
    """What content frames give to each part of what they see, in the mean over steps and layers: [V] each."""
    stream = model.config.stream
    layout = layout_of(phase_of(chunk, stream), stream)
    shares = context_shares(masses, len(layout.state)).mean(axis=(0, 1))  # [V, frames]
    parts = {"anchor": layout.anchor, "window": layout.window, "state": layout.state}
    ends = np.cumsum([len(frames) for frames in parts.values()])
    split = np.split(shares[:, : ends[-1]], ends[:-1], axis=1)
    return {name: x.sum(axis=1) for name, x in zip(parts, split, strict=True) if x.shape[1]}


def _look(found: np.ndarray, shares: dict[int, dict[str, np.ndarray]]) -> Iterator[dict[str, object]]:
    """Share of the attention that content gives to each part, by chunks until or since a visit: a row each.

    Of visits that have all of `AROUND` probed, so that each row is of the same ones; `changed` tells those in which a
    colour is replaced, by chunks from the replacement, from the others, by chunks from the visit's second frame.
    """
    sums: dict[tuple[str, int, int], list[float]] = {}
    visits = small_world.visits(found, ABSENCE)
    changed = visits["entry"] != visits["exit"]
    frames = np.where(changed, visits["since"], visits["frame"] + 1)
    for video, frame, is_changed in zip(visits["video"], frames, changed, strict=True):
        chunks = [frame // CHUNK + apart for apart in AROUND]
        if chunks[0] in shares and chunks[-1] in shares:
            for apart, chunk in zip(AROUND, chunks, strict=True):
                for name, of_part in shares[chunk].items():
                    sums.setdefault((name, int(is_changed), apart), []).append(float(of_part[video]))
    for (name, is_changed, apart), found_shares in sorted(sums.items()):
        mean, number = float(np.mean(found_shares)), len(found_shares)
        yield {"part": name, "changed": is_changed, "chunks": apart, "share": mean, "visits": number}
