"""Videos that are generated chunk by chunk: from prompts to frames."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.errors import UserError, shown
from adastate_jax.fields import to_dict
from adastate_jax.generation import restart
from adastate_jax.generation.loading import Model, decode_checked, encode_frames, num_given_frames, stream_config
from adastate_jax.generation.settings import (
    Settings,
    check_model,
    check_start,
    cues_of,
    frames_of,
    texts_of,
)
from adastate_jax.media import FPS
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import replicated
from adastate_jax.streaming.carry import Chunk, initial_carry, seed_keys
from adastate_jax.streaming.cues import Cue, check_schedule, read_schedule
from adastate_jax.streaming.prompted import PromptedCarry, initial_prompted, prompted_stream
from adastate_jax.streaming.prompts import Schedule, schedule
from adastate_jax.texts import is_text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VideoState:
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
    the host. The second alone is not: the first image would wait until the decoder is compiled for what follows. With
    `dispatches_ahead` set to false none is: what is directed then takes effect a chunk earlier.
    """

    def __init__(self, model: Model, settings: Settings, state: VideoState):
        config = model.config
        self.model, self.settings = model, settings
        self.dispatches_ahead = True
        self._stream = stream = stream_config(config.stream, settings.anchor)
        self._chunk_frames = stream.chunk_frames
        plan = schedule(settings.cues, stream, config.time_factor, FPS)
        self._chunk = int(state.carry.stream.chunk)
        self._last, self.unseen = None, []  # entries of the schedule, from 1, that begin behind the end
        if settings.num_frames is not None:
            num_latents = 1 + -(-(settings.num_frames - 1) // config.time_factor)
            self._last = -(-num_latents // stream.chunk_frames)
            self.unseen = [number for number, start in enumerate(plan.starts, 1) if start >= self._last]
        if not state.embeddings:
            state = dataclasses.replace(state, embeddings=tuple(map(self._embed, settings.prompts)))
        self.state = state
        self._finite = True  # whether the frames ahead are; on the device until they are handed out
        self._decoder = {"cache": state.decoder}  # every chunk leaves another one, and a restart reads the latest
        # A rollout that begins with a picture is decoded by itself; without an encoder there is no such picture.
        codec = model.codec
        self._decodes_afresh = stream.anchor.restarts and isinstance(codec, WanCodec) and codec.encoder is not None
        if self._decodes_afresh and model.codec_mesh != model.mesh:
            raise UserError(
                f"anchor {settings.anchor or 'of the configuration'}: decodes and encodes between its chunks: leave "
                "the decoder on the transformer's devices"
            )
        self._chunks = self._follow(plan)

    def __repr__(self) -> str:
        """What it shows, how long and large it is, and how far."""
        settings, (height, width) = self.settings, self.model.config.data.size
        frames = "frames without end" if settings.num_frames is None else f"{settings.num_frames} frames"
        prompts = ", then ".join(shown(texts[0] if len(texts) == 1 else list(texts)) for texts in settings.prompts)
        anchor = settings.anchor or to_dict(self._stream)["anchor"]["name"]
        done = min(self._num_frames(self._chunk), settings.num_frames or sys.maxsize)
        return (
            f"VideoStream of {prompts}: {frames}, of {height}×{width} pixels, seed {settings.seed}, anchor {anchor}; "
            f"{done} are generated"
        )

    def _embed(self, prompts: Sequence[str]) -> jax.Array:
        with jax.set_mesh(self.model.mesh):
            return self.model.embed(list(prompts))

    def _follow(self, plan: Schedule) -> Iterator[tuple[PromptedCarry, Chunk]]:
        """The chunks from here on, along a schedule."""
        codec, state = self.model.codec, self.state
        return prompted_stream(
            self.model.student,
            state.carry,
            state.embeddings,
            plan,
            self._stream,
            self.model.config.latent_shape,
            None if self._last is None else self._last - self._chunk,
            state.given,
            jax.tree_util.Partial(restart.reencode, codec, self._decoder) if self._decodes_afresh else None,
        )

    @property
    def next_chunk(self) -> int:
        """Number of the next chunk that is not dispatched yet."""
        return self._chunk

    def direct(self, prompt: str | None = None, transition: str = "switch", chunks: int = 4) -> int:
        """Adds an entry to the schedule of a running stream, in effect from `next_chunk` on.

        A stream that was directed is the one that a schedule with the same entries makes, to the bit.

        Args:
            prompt: what to show, in all samples; None goes on with the prompt that there is.
            transition, chunks: as in `Cue`.

        Returns:
            The number of the chunk with which it takes effect.

        Raises:
            UserError: nothing is generated yet; the schedule goes on behind that chunk, or an entry begins with it; the
                video ends before it; or as `check_schedule` and `schedule`. The stream then goes on as it was.
        """
        config, number = self.model.config, self._chunk
        if not number:
            raise UserError("the stream has not begun; give its first prompt to stream")
        if self._last is not None and number >= self._last:
            raise UserError("the video ends before another chunk begins")
        texts = self.settings.prompts[-1] if prompt is None else (prompt,) * self.settings.batch
        second = self._num_frames(number) / FPS
        cue = Cue(second, self.settings.cues[-1].prompt if prompt is None else prompt, transition, chunks)
        check_schedule([dataclasses.replace(cue, second=0)], "direct")
        if self.settings.cues[-1].second >= second:
            raise UserError(
                f"the schedule has an entry at second {self.settings.cues[-1].second:g}, and the next chunk begins at "
                f"{second:g}: direct the stream behind it"
            )
        cues = (*self.settings.cues, cue)
        plan = schedule(cues, self._stream, config.time_factor, FPS, "direct")
        known = dict(zip(self.settings.prompts, self.state.embeddings, strict=True))
        embedding = known[texts] if texts in known else self._embed(texts)
        self.settings = dataclasses.replace(self.settings, cues=cues, prompts=(*self.settings.prompts, texts))
        self.state = dataclasses.replace(self.state, embeddings=(*self.state.embeddings, embedding))
        self._chunks = self._follow(plan)
        return number

    def latents(self) -> jax.Array:
        """Clean latents [B, F, H, W, C] of the chunk that was dispatched last; deleted with the next one's dispatch."""
        return self.state.carry.recent[:, -self._chunk_frames :]

    def __next__(self) -> np.ndarray:
        with jax.set_mesh(self.model.mesh):
            if self.state.ahead is None:
                self._dispatch()
            frames, finite = self.state.ahead, self._finite
            if frames is None:
                raise StopIteration
            if self._chunk > 1 and self.dispatches_ahead:
                self._dispatch()
            else:
                self.state = dataclasses.replace(self.state, ahead=None)
        self._refuse_not_finite(finite)
        return np.asarray(frames)

    def dispatch(self) -> None:
        """Puts the next chunk's computation on the device, if it is not there yet; `next` then hands out its frames."""
        with jax.set_mesh(self.model.mesh):
            if self.state.ahead is None:
                self._dispatch()

    def check(self) -> None:
        """Raises UserError if the frames that come next are not finite."""
        self._refuse_not_finite(self._finite)

    def _refuse_not_finite(self, finite: jax.Array | bool) -> None:
        if not finite:
            self._chunks.close()
            self.state = dataclasses.replace(self.state, ahead=None)
            raise UserError(
                "the model's frames are not finite: its weights, its text embeddings or the stream that it goes on "
                "with hold NaN or infinity; make them again"
            )

    def _dispatch(self) -> None:
        """Puts the next chunk's frames ahead, None behind the last."""
        found = next(self._chunks, None)
        if found is None:
            self.state = dataclasses.replace(self.state, ahead=None)
            return
        carry, chunk = found
        with jax.set_mesh(self.model.codec_mesh):  # the next chunk need not wait for a decoder that lies elsewhere
            frames, decoder, self._finite = self._decode(chunk)
            if self.settings.num_frames is not None:
                frames = frames[:, : self.settings.num_frames - self._num_frames(self._chunk)]
        frames.copy_to_host_async()
        self._chunk += 1
        self._decoder["cache"] = decoder
        self.state = dataclasses.replace(self.state, carry=carry, decoder=decoder, ahead=frames)

    def _decode(self, chunk: Chunk) -> tuple[jax.Array, Any, jax.Array]:
        """The chunk's frames, the decoder's cache behind them, and whether all are finite."""
        codec, content = self.model.codec, _moved(chunk.content, self.model, self.model.codec_mesh)
        frames, decoder, finite = decode_checked(codec, content, self.state.decoder, self._chunk == 0)
        if self._decodes_afresh and chunk.overlap is not None:
            start = codec.decode_start(chunk.overlap.shape[0], *chunk.overlap.shape[2:4])
            anew, decoder, anew_finite = decode_checked(codec, chunk.overlap, start, True)
            frames = restart.join_rollouts(frames, anew, self.model.config.time_factor)
            finite &= anew_finite
        return frames, decoder, finite

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
        UserError: an argument is of a wrong type or out of range, the anchor is unknown, the codec cannot encode
            `start`, or its frames are all that is asked for. Later, from `next`: frames are not finite.
    """
    check_model(model)
    return _begin(model, Settings((Cue(0, "as given"),), (texts_of(prompts),), seed, num_frames, anchor), start)


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
        An iterator over uint8 [frames of the chunk, height, width, 3], which `saved_streams.save_stream` takes too.

    Raises:
        UserError: the length is not positive, the schedule makes no sense, or as `stream_batch`.

    >>> from adastate_jax.generation.loading import load
    >>> model = load(config="configs/tiny.py", random_weights=True)
    >>> [frames.shape for frames in stream(model, "a camera pans left", seconds=0.5)]
    [(3, 32, 32, 3), (3, 32, 32, 3), (2, 32, 32, 3)]
    """
    check_model(model)
    num_frames = frames_of(seconds)
    if (prompt is None) == (prompts is None):
        raise UserError("give either a prompt or a schedule of prompts")
    if isinstance(prompts, str | Path):
        prompts = read_schedule(Path(prompts))
    if prompts is None and not (is_text(prompt) and prompt.strip()):
        raise UserError(f"prompt must be a text that says something, got {shown(prompt)}")
    cues = (Cue(0, prompt),) if prompts is None else cues_of(prompts)
    check_schedule(cues)
    settings = Settings(cues, tuple((cue.prompt,) for cue in cues), seed, num_frames, anchor)
    for number, cue in enumerate(cues if prompts is not None else (), 1):
        if not model.fits(cue.prompt):
            raise UserError(
                f"prompts: entry {number} is longer than {model.config.text.text_length} tokens: shorten it"
            )
    if prompt is not None and not model.fits(prompt):
        print(f"note: the prompt is longer than {model.config.text.text_length} tokens: it is cut", file=sys.stderr)
    video = _begin(model, settings, start)
    for number in video.unseen:
        second = cues[number - 1].second
        print(f"note: prompts: entry {number} at second {second:g} comes behind the video's end", file=sys.stderr)
    return SingleVideo(video)


class SingleVideo(Iterator[np.ndarray]):
    """A `VideoStream` of one sample: an iterator over uint8 [frames of the chunk, height, width, 3]."""

    def __init__(self, video: VideoStream):
        self.video = video

    def __repr__(self) -> str:
        return repr(self.video).replace("VideoStream", "SingleVideo", 1)

    def __next__(self) -> np.ndarray:
        return next(self.video)[0]

    def direct(self, prompt: str | None = None, transition: str = "switch", chunks: int = 4) -> int:
        """See `VideoStream.direct`."""
        return self.video.direct(prompt, transition, chunks)


def _begin(model: Model, settings: Settings, start: np.ndarray | None) -> VideoStream:
    given = jnp.zeros((settings.batch, 0, *model.config.latent_shape))
    if start is not None:
        with jax.set_mesh(model.codec_mesh):
            given = _encode_start(model, start, settings)
        given = _moved(given, model, model.mesh)
        given = jnp.broadcast_to(given, (settings.batch, *given.shape[1:]))
    return VideoStream(model, settings, initial_state(model, settings, given))


def initial_state(model: Model, settings: Settings, given: jax.Array) -> VideoState:
    """The state before the first chunk, for latents that the video starts from [B, n, H, W, C]."""
    config, latent_shape = stream_config(model.config.stream, settings.anchor), model.config.latent_shape
    with jax.set_mesh(model.mesh):
        keys = seed_keys(settings.seed, settings.batch)
        carry = initial_carry(model.student.config, config, keys, *latent_shape[:2])
        carry = initial_prompted(carry, config, latent_shape)
    with jax.set_mesh(model.codec_mesh):
        decoder = model.codec.decode_start(settings.batch, *latent_shape[:2])
    return VideoState(carry, _moved(decoder, model, model.codec_mesh), given)


def _moved(tree: Any, model: Model, mesh: jax.sharding.Mesh) -> Any:
    """Arrays on the devices of `mesh`, where the decoder has devices of its own; else as they are."""
    return tree if model.codec_mesh == model.mesh else jax.device_put(tree, replicated(mesh))


def _encode_start(model: Model, start: np.ndarray, settings: Settings) -> jax.Array:
    """Latents [1, n, H, W, C] of the frames that a stream starts from."""
    check_start(model, start)
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
