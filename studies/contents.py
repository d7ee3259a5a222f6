"""What can be read from a cache: linear classifiers of what it holds, beyond what the caption tells."""

import numpy as np

from adastate_jax.models.attention import KeyValues

_RIDGE = 1.0  # of the features' mean square


def as_features(cached: KeyValues) -> np.ndarray:
    """Keys and values [layers, B, tokens, heads, head_dim] as one row for each sample."""
    rows = [np.moveaxis(np.asarray(x, np.float32), 1, 0) for x in (cached.key, cached.value)]
    return np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1)


def last_seen(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colour last seen in each video, −1 for none, and the frames since: [V, F] → [V], [V]."""
    since = (found[:, ::-1] >= 0).argmax(axis=1)
    return found[np.arange(len(found)), found.shape[1] - 1 - since], since


def read_linearly(features: np.ndarray, labels: np.ndarray, captions: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """What a classifier that is fitted to the other folds says of each row: its label, −1 where there are no others.

    How often each label goes with the row's caption, plus a ridge regression of the rest on what the features have
    beyond their caption's mean.

    Args:
        features: [N, D], D may be 0.
        labels, captions, folds: whole numbers [N].
    """
    said = np.full_like(labels, -1)
    for fold in np.unique(folds):
        known, asked = folds != fold, folds == fold
        if not known.any():
            continue
        kinds = np.unique(labels[known])
        target = (labels[known][:, None] == kinds).astype(np.float64)
        score, rest = _beyond_captions(target, captions[known], captions[asked])
        if features.shape[1]:
            asked_mean, known_rest = _beyond_captions(features[known], captions[known], captions[asked])
            scale = known_rest.std(axis=0) + 1e-6
            known_rest, asked_rest = known_rest / scale, (features[asked] - asked_mean) / scale
            kernel = known_rest @ known_rest.T
            ridge = _RIDGE * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
            score = score + asked_rest @ known_rest.T @ np.linalg.solve(kernel + ridge, rest)
        said[asked] = kinds[score.argmax(axis=1)]
    return said


def _beyond_captions(values: np.ndarray, captions: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means by caption of values [N, D] for each asked caption [M, D], and the values without theirs [N, D].

    A caption that no value has gets the mean of all.
    """
    means = {caption: values[captions == caption].mean(axis=0) for caption in np.unique(captions)}
    every = values.mean(axis=0)
    return np.stack([means.get(x, every) for x in asked]), values - np.stack([means[x] for x in captions])
