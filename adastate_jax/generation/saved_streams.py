"""Videos in the making, kept on disk half-way and taken up again: a folder of `stream.json`, the state, and a seal."""

import dataclasses
import hashlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.checkpoint import load_tree, save_tree
from adastate_jax.errors import UserError, shown, writing
from adastate_jax.fields import to_dict
from adastate_jax.files import whole_folder, write_text
from adastate_jax.generation.loading import Model, stream_config
from adastate_jax.generation.settings import Settings, check_model
from adastate_jax.generation.video_stream import SingleVideo, VideoState, VideoStream, initial_state
from adastate_jax.seals import is_sealed, seal, verify
from adastate_jax.streaming.continuation import max_given_frames
from adastate_jax.streaming.cues import Cue
from adastate_jax.texts import read_json

_DESCRIPTION = "stream.json"
_FORMAT = 1  # of a folder; those of earlier versions state none, and some of them have no seal


def save_stream(video: VideoStream | SingleVideo, path: str | Path) -> None:
    """Keeps a video in the making; what it yields next, `load_stream` yields, to the bit.

    Args:
        video: is not changed, and may go on.
        path: a new folder.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    if not isinstance(video, VideoStream | SingleVideo):
        raise UserError(f"video must be what stream or load_stream returns, got {shown(video)}")
    single, video = isinstance(video, SingleVideo), video.video if isinstance(video, SingleVideo) else video
    path = _folder(path).absolute()
    if path.exists():
        raise UserError(f"{path}: exists; name a new folder")
    video.check()
    ahead = video.state.ahead
    description = {
        "format": _FORMAT,
        "settings": dataclasses.asdict(video.settings),
        "single": single,
        "given": video.state.given.shape[1],
        "ahead": None if ahead is None else ahead.shape[1],
        "model": _fingerprint(video.model),
    }
    with writing(path), whole_folder(path) as temporary:
        save_tree(temporary / "state", _stored(video.state))
        write_text(temporary / _DESCRIPTION, json.dumps(description, indent=1) + "\n")
        seal(temporary)


def load_stream(model: Model, path: str | Path) -> VideoStream | SingleVideo:
    """The video that `save_stream` kept.

    Args:
        model: the one that it is made with: the same configuration and weights. Its text encoder is not used.
        path: the folder.

    Raises:
        UserError: the folder is missing or damaged, lacks its seal, or belongs to another model. One of an earlier
            version may lack it, and stderr says so.
    """
    check_model(model)
    path = _folder(path)
    file = path / _DESCRIPTION
    fix = "save the stream again"
    found = read_json(file, "name a folder of save_stream")
    if not isinstance(found, dict):
        raise UserError(f"{file}: is damaged; {fix}")
    if found.get("format", _FORMAT) != _FORMAT:
        raise UserError(f"{path}: is of format {shown(found['format'])}, this version reads {_FORMAT}; {fix}")
    if is_sealed(path) or "format" in found:
        verify(path, fix)
    else:
        print(f"note: {path}: of an earlier version, {file.name} is not checked against a seal", file=sys.stderr)
    try:
        settings = found["settings"] | {"cues": tuple(Cue(**cue) for cue in found["settings"]["cues"])}
        settings = Settings(**settings | {"prompts": tuple(map(tuple, settings["prompts"]))})
        single, given, ahead, fingerprint = (found[name] for name in ("single", "given", "ahead", "model"))
    except (KeyError, TypeError, UserError):
        raise UserError(f"{file}: is damaged; {fix}") from None
    stream = stream_config(model.config.stream, settings.anchor)
    if fingerprint != _fingerprint(model):
        raise UserError(f"{path}: was saved with another model; load the one that it is made with")
    most = stream.chunk_frames * model.config.time_factor
    if given not in range(max_given_frames(stream) + 1) or not (ahead is None or ahead in range(1, most + 1)):
        raise UserError(f"{file}: is damaged; {fix}")
    text = model.config.text
    with jax.set_mesh(model.mesh):  # what is loaded comes to lie where these do
        state = initial_state(model, settings, jnp.zeros((settings.batch, given, *model.config.latent_shape)))
        embeddings = jnp.zeros((settings.batch, text.text_length, text.dim), text.dtype)
        state = dataclasses.replace(state, embeddings=(embeddings,) * len(settings.prompts))
        if ahead is not None:
            frames = jnp.zeros((settings.batch, ahead, *model.config.data.size, 3), "uint8")
            state = dataclasses.replace(state, ahead=frames)
    kept = load_tree(path / "state", _stored(state))
    state = jax.tree.map(lambda fresh, stored: fresh if stored is None else stored, state, kept)
    video = VideoStream(model, settings, state)
    return SingleVideo(video) if single else video


def _folder(path: str | Path) -> Path:
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"path must name a folder, got {shown(path)}")
    return Path(path)


def _stored(state: VideoState) -> VideoState:
    """The state without its random keys, which follow from the settings' seed, and without empty arrays."""

    def stored(leaf: jax.Array) -> jax.Array | None:
        return None if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.size else leaf

    return jax.tree.map(stored, state)


def fingerprint(model: Model) -> str:
    """A short text that another model, or the same with one weight changed, has another of."""
    return hashlib.sha256(json.dumps(_fingerprint(model), sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(model: Model) -> dict[str, Any]:
    """What two models must have in common for one to go on where the other stopped."""
    config = to_dict(model.config)
    kept = {name: config[name] for name in ("model", "stream", "decoder", "codec", "vae", "tiny_vae", "text")}
    checksums = jax.device_get([_checksum(leaf) for leaf in jax.tree.leaves((model.student, model.codec))])
    return json.loads(json.dumps({**kept, "weights": zlib.crc32(np.asarray(checksums, np.uint32))}))


@jax.jit
def _checksum(weights: jax.Array) -> jax.Array:
    """uint32 [] of an array's bits and their places, in whatever pieces it lies on devices.

    The sum over all elements of a hash of bits and place: any one change makes another sum, several nearly always.
    """
    place = jnp.uint32(0)
    for axis, size in enumerate(weights.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, weights.shape, axis)
    bits = jax.lax.bitcast_convert_type(weights, f"uint{8 * weights.dtype.itemsize}").astype(jnp.uint32)
    bits ^= place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # numbers of Wellons' lowbias32
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)
