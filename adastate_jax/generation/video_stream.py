"""Videos that are generated chunk by chunk: from prompts to frames, kept on disk half-way, and taken up again."""

import dataclasses
import hashlib
import json
import math
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.checkpoint import load_tree, save_tree
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.generation import restart
from adastate_jax.generation.loading import Model, decode_frames, encode_frames, num_given_frames, stream_config
from adastate_jax.media import FPS
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.prompted import PromptedCarry, initial_prompted, prompted_stream
from adastate_jax.streaming.prompts import Cue, read_schedule, schedule

_DESCRIPTION = "stream.json"


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What determines a video, beside the model and the frames that it starts from.

    Attributes:
        cues: when prompts change, and how.
        prompts: of each cue, a text per sample.
        seed: of the first sample.
        num_frames: video frames in all; None is without end.
        anchor: a preset or strategy instead of the model's; None keeps it.
    """

    cues: tuple[Cue, ...]
    prompts: tuple[tuple[str, ...], ...]
    seed: int
    num_frames: int | None
    anchor: str | None

    @property
    def batch(self) -> int:
        return len(self.prompts[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """All that a stream of video carries on."""

    # What every chunk replaces.
    carry: PromptedCarry  # of the stream; its random keys are the settings' seeds
    decoder: Any  # the codec's cache
    # What never changes.
    given: jax.Array  # latents that the video starts from [B, n, H, W, C], n may be 0
    embeddings: tuple[jax.Array, ...] = ()  # of each cue's prompts, [B, T, text_dim]; none before they are encoded
    # For the outside: frames that are dispatched and not handed out yet [B, n, height, width, 3] uint8; None at either
    # end, and behind the first chunk.
    ahead: jax.Array | None = None


class VideoStream(Iterator[np.ndarray]):
    """A video in the making: an iterator over uint8 [B, frames of the chunk, height, width, 3]; see `stream_batch`.

    A chunk and its decoding are dispatched before the one before it is handed out, so that the device never waits for
    the host. The second alone is not: the first image would wait until the decoder is compiled for what follows.
    """

    def __init__(self, model: Model, settings: _Settings, state: _State):
        config = model.config
        self.model, self.settings = model, settings
        stream = stream_config(config.stream, settings.anchor)
        self._chunk_frames = stream.chunk_frames
        plan = schedule(settings.cues, stream, config.time_factor, FPS)
        self._chunk = int(state.carry.stream.chunk)
        num_chunks = None
        if settings.num_frames is not None:
            num_latents = 1 + -(-(settings.num_frames - 1) // config.time_factor)
            num_chunks = -(-num_latents // stream.chunk_frames) - self._chunk
        if not state.embeddings:
            with jax.set_mesh(model.mesh):
                embeddings = tuple(model.embed(list(prompts)) for prompts in settings.prompts)
            state = dataclasses.replace(state, embeddings=embeddings)
        self.state = state
        self._decoder = {"cache": state.decoder}  # every chunk leaves another one, and a restart reads the latest
        # A rollout that begins with a picture is decoded by itself; without an encoder there is no such picture.
        codec = model.codec
        self._decodes_afresh = stream.anchor.restarts and isinstance(codec, WanCodec) and codec.encoder is not None
        reencode = jax.tree_util.Partial(restart.reencode, codec, self._decoder) if self._decodes_afresh else None
        self._chunks = prompted_stream(
            model.student,
            state.carry,
            state.embeddings,
            plan,
            stream,
            config.latent_shape,
            num_chunks,
            state.given,
            reencode,
        )

    def __next__(self) -> np.ndarray:
        with jax.set_mesh(self.model.mesh):
            if self.state.ahead is None:
                self._dispatch()
            frames = self.state.ahead
            if frames is None:
                raise StopIteration
            if self._chunk > 1:
                self._dispatch()
            else:
                self.state = dataclasses.replace(self.state, ahead=None)
        return np.asarray(frames)

    def _dispatch(self) -> None:
        """Puts the next chunk's frames ahead, None behind the last."""
        found = next(self._chunks, None)
        if found is None:
            self.state = dataclasses.replace(self.state, ahead=None)
            return
        carry, chunk = found
        frames, decoder = decode_frames(self.model.codec, chunk.content, self.state.decoder, self._chunk == 0)
        if self._decodes_afresh and chunk.overlap is not None:
            start = self.model.codec.decode_start(chunk.overlap.shape[0], *chunk.overlap.shape[2:4])
            anew, decoder = decode_frames(self.model.codec, chunk.overlap, start, True)
            frames = restart.join_rollouts(frames, anew, self.model.config.time_factor)
        if self.settings.num_frames is not None:
            frames = frames[:, : self.settings.num_frames - self._num_frames(self._chunk)]
        frames.copy_to_host_async()
        self._chunk += 1
        self._decoder["cache"] = decoder
        self.state = dataclasses.replace(self.state, carry=carry, decoder=decoder, ahead=frames)

    def _num_frames(self, chunk: int) -> int:
        """Video frames before a chunk."""
        latents = chunk * self._chunk_frames
        return 1 + (latents - 1) * self.model.config.time_factor if latents else 0


# --- beginning --------------------------------------------------------------------------------------------------------


def stream_batch(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    num_frames: int | None,
    anchor: str | None = None,
    start: np.ndarray | None = None,
) -> VideoStream:
    """Generates videos of several prompts together, chunk by chunk.

    Args:
        prompts: B texts.
        seed: of the first sample; sample i has seed + i, and is what it would be alone.
        num_frames: video frames in all; the last chunk is cut to fit. None is without end.
        anchor: a preset or strategy to use instead of the configured one, see `named_stream`.
        start: frames to start all videos from, uint8 [n, height, width, 3]; a video begins with the last of them that
            `num_given_frames` counts, as the codec gives them back.

    Returns:
        An iterator over uint8 [B, frames of the chunk, height, width, 3].

    Raises:
        UserError: the anchor is unknown, the codec cannot encode `start`, or its frames are all that is asked for.
    """
    return _begin(model, _Settings((Cue(0, "as given"),), (tuple(prompts),), seed, num_frames, anchor), start)


def stream(
    model: Model,
    prompt: str | None = None,
    seconds: float | None = None,
    seed: int = 0,
    anchor: str | None = None,
    start: np.ndarray | None = None,
    prompts: str | Path | Sequence[Cue] | None = None,
) -> "SingleVideo":
    """Generates a video chunk by chunk, at 16 frames per second.

    Args:
        prompt: what to show.
        seconds: length of the video; None is without end.
        seed: of the noise.
        anchor: a preset or strategy to use instead of the configured one.
        start: frames to start from, uint8 [n, height, width, 3], see `stream_batch`.
        prompts: instead of `prompt`, a schedule of several, or the file of one; see `streaming.prompts`.

    Returns:
        An iterator over uint8 [frames of the chunk, height, width, 3], which `save_stream` takes too.

    Raises:
        UserError: the length is not positive, the anchor is unknown, the schedule makes no sense, or as `stream_batch`.

    >>> from adastate_jax.generate import load
    >>> model = load(config="configs/tiny.py", random_weights=True)
    >>> [frames.shape for frames in stream(model, "a camera pans left", seconds=0.5)]
    [(3, 32, 32, 3), (3, 32, 32, 3), (2, 32, 32, 3)]
    """
    if seconds is not None and (not math.isfinite(seconds) or seconds <= 0):
        raise UserError(f"seconds must be positive, got {seconds}")
    if (prompt is None) == (prompts is None):
        raise UserError("give either a prompt or a schedule of prompts")
    if isinstance(prompts, str | Path):
        prompts = read_schedule(Path(prompts))
    cues = (Cue(0, prompt),) if prompts is None else tuple(prompts)
    for number, cue in enumerate(cues if prompts is not None else (), 1):
        if isinstance(cue.prompt, str) and not model.fits(cue.prompt):
            raise UserError(
                f"prompts: entry {number} is longer than {model.config.text.text_length} tokens: shorten it"
            )
    if prompt is not None and not model.fits(prompt):
        print(f"note: the prompt is longer than {model.config.text.text_length} tokens: it is cut", file=sys.stderr)
    num_frames = None if seconds is None else math.ceil(seconds * FPS)
    settings = _Settings(cues, tuple((cue.prompt,) for cue in cues), seed, num_frames, anchor)
    return SingleVideo(_begin(model, settings, start))


class SingleVideo(Iterator[np.ndarray]):
    """A `VideoStream` of one sample: an iterator over uint8 [frames of the chunk, height, width, 3]."""

    def __init__(self, video: VideoStream):
        self.video = video

    def __next__(self) -> np.ndarray:
        return next(self.video)[0]


def _begin(model: Model, settings: _Settings, start: np.ndarray | None) -> VideoStream:
    given = jnp.zeros((settings.batch, 0, *model.config.latent_shape))
    if start is not None:
        with jax.set_mesh(model.mesh):
            given = _encode_start(model, start, settings)
        given = jnp.broadcast_to(given, (settings.batch, *given.shape[1:]))
    return VideoStream(model, settings, _initial_state(model, settings, given))


def _initial_state(model: Model, settings: _Settings, given: jax.Array) -> _State:
    config, latent_shape = stream_config(model.config.stream, settings.anchor), model.config.latent_shape
    with jax.set_mesh(model.mesh):
        keys = seed_keys(settings.seed, settings.batch)
        carry = initial_carry(model.student.config, config, keys, *latent_shape[:2])
        decoder = model.codec.decode_start(settings.batch, *latent_shape[:2])
        return _State(initial_prompted(carry, config, latent_shape), decoder, given)


def _encode_start(model: Model, start: np.ndarray, settings: _Settings) -> jax.Array:
    """Latents [1, n, H, W, C] of the frames that a stream starts from."""
    count = num_given_frames(model.config, len(start), settings.anchor)
    if not count:
        raise UserError(
            f"anchor {settings.anchor or 'of the configuration'}: denoises chunks jointly, and starts from no frames"
        )
    if settings.num_frames is not None and count >= settings.num_frames:
        raise UserError(f"the video starts with {count} given frames; ask for more than {count / FPS:g} seconds")
    if isinstance(model.codec, WanCodec) and model.codec.encoder is None:
        raise UserError("this model cannot encode the frames to start from; add the network vae to its folder")
    return encode_frames(model.codec, start[None, -count:])


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_stream(video: VideoStream | SingleVideo, path: str | Path) -> None:
    """Keeps a video in the making; what it yields next, `load_stream` yields, to the bit.

    Args:
        video: is not changed, and may go on.
        path: a new folder.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    single, video = isinstance(video, SingleVideo), video.video if isinstance(video, SingleVideo) else video
    path = Path(path).absolute()
    if path.exists():
        raise UserError(f"{path}: exists; name a new folder")
    partial = path.with_name(f".{path.name}.partial")
    ahead = video.state.ahead
    description = {
        "settings": dataclasses.asdict(video.settings),
        "single": single,
        "given": video.state.given.shape[1],
        "ahead": None if ahead is None else ahead.shape[1],
        "model": _fingerprint(video.model),
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_tree(partial / "state", _stored(video.state))
        (partial / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_stream(model: Model, path: str | Path) -> VideoStream | SingleVideo:
    """The video that `save_stream` kept.

    Args:
        model: the one that it is made with: the same configuration and weights. Its text encoder is not used.
        path: the folder.

    Raises:
        UserError: the folder is missing or damaged, or belongs to another model.
    """
    path = Path(path)
    file = path / _DESCRIPTION
    try:
        found = json.loads(file.read_text())
        settings = found["settings"] | {"cues": tuple(Cue(**cue) for cue in found["settings"]["cues"])}
        settings = _Settings(**settings | {"prompts": tuple(map(tuple, settings["prompts"]))})
        single, given, ahead, fingerprint = (found[name] for name in ("single", "given", "ahead", "model"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name a folder of save_stream") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is damaged; save the stream again") from None
    if fingerprint != _fingerprint(model):
        raise UserError(f"{path}: was saved with another model; load the one that it is made with")
    text = model.config.text
    with jax.set_mesh(model.mesh):  # what is loaded comes to lie where these do
        state = _initial_state(model, settings, jnp.zeros((settings.batch, given, *model.config.latent_shape)))
        embeddings = jnp.zeros((settings.batch, text.text_length, text.dim), text.dtype)
        state = dataclasses.replace(state, embeddings=(embeddings,) * len(settings.prompts))
        if ahead is not None:
            frames = jnp.zeros((settings.batch, ahead, *model.config.data.size, 3), "uint8")
            state = dataclasses.replace(state, ahead=frames)
    kept = load_tree(path / "state", _stored(state))
    state = jax.tree.map(lambda fresh, stored: fresh if stored is None else stored, state, kept)
    video = VideoStream(model, settings, state)
    return SingleVideo(video) if single else video


def _stored(state: _State) -> _State:
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
