"""What a stream's cache holds: what exchanging a part of it does, what can be read from it, and what looks at it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.data.worlds import World
from adastate_jax.evaluation import small_world
from adastate_jax.evaluation.attention_probe import probe_stream
from adastate_jax.generation.loading import Model, decode_frames
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.carry import RolloutCarry, initial_carry, seed_keys
from adastate_jax.streaming.rollout import rollout, stream_step
from adastate_jax.streaming.schedule import phase_of
from studies.contents import as_features, last_seen, read_linearly
from studies.small_world import ABSENCE, UNSEEN

SWAP_CHUNK, SWAP_CHUNKS = 9, 8  # when anchors are exchanged: no true ball is in a window of 3; how long it goes on
READ_CHUNKS = range(4, 16)  # after which the cache is read: three balls come and go
READ_SEEDS = range(4)  # of noise; as many streams as a linear classifier needs to be fitted on half of them
PROBED_CHUNK = 20  # whose attention is measured


def measure_swaps(model: Model, worlds: list[World], seed: int) -> Iterator[dict[str, object]]:
    """What a stream becomes when, midway, its anchor or its window is exchanged with another video's of its caption.

    Of videos whose last ball before the exchange has another colour than the other video's, and that show a next one
    whatever is exchanged, yields a row per exchange: how far the next chunk's latents move (in units of how far the
    other video's chunk is), and in which share of its frames the next ball has its own video's colour, and the other's.
    """
    config, stream = model.config, model.config.stream
    prompts = [world.caption for world in worlds]
    other = partners(prompts)
    text = jax.jit(model.student.text_keys_values)(model.embed(prompts))
    keys = seed_keys(seed * len(prompts), len(prompts))

    @jax.jit
    def begin(student, text):
        carry = initial_carry(student.config, stream, keys, *config.latent_shape[:2])
        return rollout(student, carry, text, stream, config.latent_shape, SWAP_CHUNK)

    @jax.jit
    def go_on(student, carry, text):
        return rollout(student, carry, text, stream, config.latent_shape, SWAP_CHUNKS, SWAP_CHUNK)[1]

    carry, before = begin(model.student, text)
    carries = {name: _exchanged(carry, name, other) for name in ("anchor", "window")}
    carries = {"own": carry, **carries, "zeroed anchor": _zeroed(carry)}
    streams = {name: np.asarray(go_on(model.student, carry, text)) for name, carry in carries.items()}

    held = last_seen(_colours(model, before))[0]
    differ = (held >= 0) & (held[other] >= 0) & (held != held[other])
    balls = {name: [_next_ball(colours) for colours in _colours(model, latents)] for name, latents in streams.items()}
    next_chunk = {name: latents[:, : stream.chunk_frames] for name, latents in streams.items()}
    apart = np.abs(next_chunk["own"] - next_chunk["own"][other]).mean(axis=(1, 2, 3, 4))
    for index in np.flatnonzero(differ):
        if not all(len(ball[index]) for ball in balls.values()):
            continue
        for name, ball in balls.items():
            yield {
                "swap": name,
                "video": int(index),
                "moved": float(np.abs(next_chunk[name][index] - next_chunk["own"][index]).mean() / apart[index]),
                "own_colour": float((ball[index] == held[index]).mean()),
                "other_colour": float((ball[index] == held[other[index]]).mean()),
            }


def partners(prompts: list[str]) -> np.ndarray:
    """For each video another one of the same prompt, itself where there is none, [V]."""
    other = np.arange(len(prompts))
    for prompt in set(prompts):
        same = np.flatnonzero([other_prompt == prompt for other_prompt in prompts])
        other[same] = np.roll(same, 1)
    return other


def _next_ball(colours: np.ndarray) -> np.ndarray:
    """The colours of the first subject that comes back after an absence, none if none does: [F] → [n]."""
    absent = np.convolve(colours < 0, np.ones(ABSENCE), "valid") == ABSENCE
    after = colours[absent.argmax() + ABSENCE :] if absent.any() else colours[:0]
    seen = after >= 0
    if not seen.any():
        return after[:0]
    after = after[seen.argmax() :]
    return after[: (after < 0).argmax()] if (after < 0).any() else after


def _exchanged(carry: RolloutCarry, part: str, other: np.ndarray) -> RolloutCarry:
    """The carry with every sample's anchor or window replaced by another sample's."""
    cache = {"anchor": carry.cache.anchor, "window": carry.cache.window}
    # Keys and values are [layers, B, tokens, heads, head_dim]; what else an anchor has is the same for all samples.
    cache[part] = jax.tree.map(lambda x: x[:, other] if x.ndim == 5 else x, cache[part])
    return RolloutCarry(Cache(**cache), carry.chunk, carry.keys)


def _zeroed(carry: RolloutCarry) -> RolloutCarry:
    """The carry with an anchor of zeros."""
    anchor = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 5 else x, carry.cache.anchor)
    return RolloutCarry(Cache(anchor, carry.cache.window), carry.chunk, carry.keys)


def measure_contents(model: Model, worlds: list[World]) -> Iterator[dict[str, object]]:
    """How often the colour of the ball last seen is read from the anchor, from the window, or guessed from the caption.

    After each of `READ_CHUNKS`, a linear classifier is fitted to half of the streams and asked about the others, and
    the other way round. It begins with what the caption tells, so that what it gains is remembered. Yields a row per
    part, span of `UNSEEN` and video, with the share that was right and the number of answers.
    """
    stream, latent_shape = model.config.stream, model.config.latent_shape
    prompts = [world.caption for world in worlds]
    text = jax.jit(model.student.text_keys_values)(model.embed(prompts))
    latents, features = [], []
    for seed in READ_SEEDS:
        keys = seed_keys(seed * len(prompts), len(prompts))
        carry = initial_carry(model.student.config, stream, keys, *latent_shape[:2])
        contents, read = [], []
        for chunk in range(READ_CHUNKS.stop):
            carry, shown = stream_step(model.student, carry, text, stream, latent_shape, phase_of(chunk, stream))
            contents.append(shown.content)
            if chunk in READ_CHUNKS:
                parts = {"caption": np.zeros((len(prompts), 0)), "window": as_features(carry.cache.window)}
                if stream.anchor.frames:
                    parts["anchor"] = as_features(stream.anchor.read(carry.cache.anchor))
                read.append(parts)
        latents.append(jnp.concatenate(contents, axis=1))
        features.append(read)
    found = np.concatenate([_colours(model, videos) for videos in latents])
    video = np.tile(np.arange(len(prompts)), len(READ_SEEDS))
    captions = np.unique(prompts, return_inverse=True)[1][video]
    right = {name: np.zeros((len(UNSEEN), len(prompts))) for name in features[0][0]}
    answers = np.zeros((len(UNSEEN), len(prompts)))
    for index, chunk in enumerate(READ_CHUNKS):
        last, unseen = last_seen(found[:, : (chunk + 1) * stream.chunk_frames])
        here = last >= 0
        place = np.digitize(unseen[here], UNSEEN) - 1, video[here]
        np.add.at(answers, place, 1)
        for name, of_part in right.items():
            values = np.concatenate([read[index][name] for read in features])[here]
            said = read_linearly(values, last[here], captions[here], video[here] % 2)
            np.add.at(of_part, place, said == last[here])
    for name, of_part in right.items():
        for span, number in np.ndindex(answers.shape):
            count = answers[span, number]
            share = of_part[span, number] / count if count else float("nan")
            yield {"part": name, "unseen": UNSEEN[span], "video": number, "right": share, "answers": int(count)}


def measure_attention(model: Model, worlds: list[World]) -> Iterator[dict[str, object]]:
    """Where content of `PROBED_CHUNK` looks, as `python -m adastate_jax.probe` measures it, averaged over the videos.

    Yields a row per frame of the cache, in order, and one for each of the chunk's other frames: its part, and its share
    in the mean over steps and layers.
    """
    prompts = [world.caption for world in worlds]
    stream, latent_shape = model.config.stream, model.config.latent_shape
    text = jax.jit(model.student.text_keys_values)(model.embed(prompts))
    carry = initial_carry(model.student.config, stream, seed_keys(0, len(prompts)), *latent_shape[:2])
    (found,) = probe_stream(model.student, carry, text, stream, latent_shape, [PROBED_CHUNK])
    siblings = stream.chunk_frames - 1
    *shares, together = found.shares.mean(axis=(0, 1))
    roles, shares = [*found.roles[:-1], *["chunk"] * siblings], [*shares, *[together / siblings] * siblings]
    for frame, (role, share) in enumerate(zip(roles, shares, strict=True)):
        yield {"part": role, "frame": frame, "share": float(share)}


def _colours(model: Model, latents: jax.Array | np.ndarray) -> np.ndarray:
    """The colour of the subject in each frame of [V, F, H, W, C], −1 for none: [V, F]."""
    frames = decode_frames(model.codec, jnp.asarray(latents), (), True)[0]
    world = model.config.data.worlds
    return small_world.subject_colours(np.asarray(frames), world.colours, world.subject_radius[0])
