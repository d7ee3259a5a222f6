"""What a stream's cache holds: what exchanging a part of it does, what can be read from it, and what looks at it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.data.worlds import World
from adastate_jax.evaluation import small_world
from adastate_jax.evaluation.attention_probe import probe_stream
from adastate_jax.generate import Model, decode_frames
from adastate_jax.streaming.cache import Cache
from adastate_jax.streaming.rollout import RolloutCarry, initial_carry, rollout, seed_keys, stream_step
from adastate_jax.streaming.schedule import phase_of

ABSENCE = 4  # frames without a subject after which it counts as coming back
SWAP_CHUNK, SWAP_CHUNKS = 9, 8  # when anchors are exchanged: no ball is in the window; how long the stream goes on
READ_CHUNKS = range(4, 16)  # after which the cache is read: three balls come and go
READ_SEEDS = range(4)  # of noise; as many streams as a linear classifier needs to be fitted on half of them
UNSEEN = ((0, 0), (1, 5), (6, 11))  # frames since a ball was seen, both included, that are told apart
PROBED_CHUNK = 20  # whose attention is measured
_RIDGE = 0.1  # of the features' mean square


def measure_swaps(model: Model, worlds: list[World], seed: int) -> Iterator[dict[str, object]]:
    """What a stream becomes when, midway, its anchor or its window is exchanged with another video's of its caption.

    Yields a row per video and exchange: how far the next chunk's latents move (in units of how far the other video's
    chunk is), and in the frames after the next absence, which share of the subjects has the colour of its own video
    and which that of the other, where these differ.
    """
    config, stream = model.config, model.config.stream
    prompts = [world.caption for world in worlds]
    other = np.empty(len(prompts), int)
    for caption in set(prompts):
        same = np.flatnonzero([prompt == caption for prompt in prompts])
        other[same] = np.roll(same, 1)
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
    streams = {"own": go_on(model.student, carry, text)}
    for name in ("anchor", "window"):
        streams[name] = go_on(model.student, _exchanged(carry, name, other), text)
    streams["erased anchor"] = go_on(model.student, _erased(carry), text)

    def colours(latents):
        return _colours(model, jnp.concatenate([before, latents], axis=1))

    past = SWAP_CHUNK * stream.chunk_frames
    own_found = colours(streams["own"])
    first = np.array([found[(found >= 0).argmax()] for found in own_found])
    next_chunk = {name: np.asarray(latents[:, : stream.chunk_frames]) for name, latents in streams.items()}
    apart = np.abs(next_chunk["own"] - next_chunk["own"][other]).mean(axis=(1, 2, 3, 4))
    apart[apart == 0] = np.nan  # the only video of its caption
    for name, latents in streams.items():
        found = colours(latents)
        moved = np.abs(next_chunk[name] - next_chunk["own"]).mean(axis=(1, 2, 3, 4)) / apart
        for index, colour in enumerate(found):
            if first[index] < 0 or first[other[index]] < 0 or first[index] == first[other[index]]:
                continue
            absent = np.convolve(colour[past:] < 0, np.ones(ABSENCE), "valid") == ABSENCE
            after = colour[past + absent.argmax() + ABSENCE :] if absent.any() else colour[:0]
            after = after[after >= 0]
            yield {
                "swap": name,
                "video": index,
                "moved": float(moved[index]),
                "own_colour": float((after == first[index]).mean()) if len(after) else float("nan"),
                "other_colour": float((after == first[other[index]]).mean()) if len(after) else float("nan"),
            }


def _exchanged(carry: RolloutCarry, part: str, other: np.ndarray) -> RolloutCarry:
    """The carry with every sample's anchor or window replaced by another sample's."""
    cache = {"anchor": carry.cache.anchor, "window": carry.cache.window}
    # Keys and values are [layers, B, tokens, heads, head_dim]; what else an anchor has is the same for all samples.
    cache[part] = jax.tree.map(lambda x: x[:, other] if x.ndim == 5 else x, cache[part])
    return RolloutCarry(Cache(**cache), carry.chunk, carry.keys)


def _erased(carry: RolloutCarry) -> RolloutCarry:
    """The carry with an anchor of zeros."""
    anchor = jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 5 else x, carry.cache.anchor)
    return RolloutCarry(Cache(anchor, carry.cache.window), carry.chunk, carry.keys)


def measure_contents(model: Model, worlds: list[World]) -> Iterator[dict[str, object]]:
    """How often a linear classifier reads the colour of the ball last seen from the anchor, the window, or the caption.

    After each of `READ_CHUNKS`, one is fitted to half of the streams and asked about the others, and the other way
    round. What the caption tells, the cache tells too: only what is read beyond it is remembered. Yields a row per
    part and per span of `UNSEEN`, with the share that was right and the number of answers.
    """
    stream, latent_shape = model.config.stream, model.config.latent_shape
    prompts = [world.caption for world in worlds]
    captions = np.unique(prompts, return_inverse=True)[1]
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
                parts = {"window": carry.cache.window}
                if stream.anchor.frames:
                    parts["anchor"] = stream.anchor.read(carry.cache.anchor)
                read.append({name: _as_features(part) for name, part in parts.items()})
        latents.append(jnp.concatenate(contents, axis=1))
        features.append(read)
    found = np.concatenate([_colours(model, videos) for videos in latents])
    folds = np.tile(np.arange(len(prompts)) % 2, len(READ_SEEDS))
    told = np.tile(np.eye(captions.max() + 1)[captions], (len(READ_SEEDS), 1))
    answers = {}
    for index, chunk in enumerate(READ_CHUNKS):
        last, unseen = _last_seen(found[:, : (chunk + 1) * stream.chunk_frames])
        here = last >= 0
        parts = {name: np.concatenate([read[index][name] for read in features]) for name in features[0][index]}
        for name, values in {**parts, "caption": told}.items():
            right = _read_linearly(values[here], last[here], folds[here]) == last[here]
            for span in UNSEEN:
                within = (unseen[here] >= span[0]) & (unseen[here] <= span[1])
                answers.setdefault((name, span), []).append(right[within])
    for (name, span), right in answers.items():
        right = np.concatenate(right)
        yield {
            "part": name,
            "unseen": span[0],
            "right": float(right.mean()) if len(right) else float("nan"),
            "answers": len(right),
        }


def measure_attention(model: Model, worlds: list[World]) -> Iterator[dict[str, object]]:
    """Where content of `PROBED_CHUNK` looks, as `python -m adastate_jax.probe` measures it, averaged over the videos.

    Yields a row per frame of the cache, in order: its part, and its share in the mean over steps and layers.
    """
    prompts = [world.caption for world in worlds]
    stream, latent_shape = model.config.stream, model.config.latent_shape
    text = jax.jit(model.student.text_keys_values)(model.embed(prompts))
    carry = initial_carry(model.student.config, stream, seed_keys(0, len(prompts)), *latent_shape[:2])
    (found,) = probe_stream(model.student, carry, text, stream, latent_shape, [PROBED_CHUNK])
    for frame, (role, share) in enumerate(zip(found.roles, found.shares.mean(axis=(0, 1)), strict=True)):
        yield {"part": role, "frame": frame, "share": float(share)}


def _colours(model: Model, latents: jax.Array) -> np.ndarray:
    frames = decode_frames(model.codec, latents, (), True)[0]
    world = model.config.data.worlds
    return small_world.subject_colours(np.asarray(frames), world.colours, world.subject_radius[0])


def _as_features(cached) -> np.ndarray:
    """Keys and values [layers, B, tokens, heads, head_dim] as one row for each sample."""
    rows = [np.moveaxis(np.asarray(x, np.float32), 1, 0) for x in (cached.key, cached.value)]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1)


def _last_seen(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour last seen in each video, −1 for none, and the frames since: [V, F] → [V], [V]."""
    since = (found[:, ::-1] >= 0).argmax(axis=1)
    return found[np.arange(len(found)), found.shape[1] - 1 - since], since


def _read_linearly(features: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """What ridge regression onto each label, fitted to the other folds, says of each row: [N, D], [N], [N] → [N]."""
    said = np.empty_like(labels)
    for fold in np.unique(folds):
        known, asked = folds != fold, folds == fold
        mean, scale = features[known].mean(axis=0), features[known].std(axis=0) + 1e-6
        x, y = (features[known] - mean) / scale, (features[asked] - mean) / scale
        kinds = np.unique(labels[known])
        target = (labels[known][:, None] == kinds).astype(np.float64)
        kernel = x @ x.T
        ridge = _RIDGE * np.trace(kernel) / len(x) * np.eye(len(x))
        weights = np.linalg.solve(kernel + ridge, target - target.mean(axis=0))
        said[asked] = kinds[(y @ x.T @ weights + target.mean(axis=0)).argmax(axis=1)]
    return said
