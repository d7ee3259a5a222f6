"""From a prompt to video frames: load a trained model, and stream or sample from it."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.checkpoint import latest_step, load_tree
from adastate_jax.config import Config, load_config
from adastate_jax.errors import UserError
from adastate_jax.media import FPS
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import ByteTokenizer, TextEncoder
from adastate_jax.sharding import make_mesh, tree_shardings
from adastate_jax.streaming.anchors import make_anchor
from adastate_jax.streaming.rollout import RolloutCarry, StreamConfig, initial_carry, rollout, seed_keys
from adastate_jax.streaming.rollout import stream as stream_chunks

# Where a run's folder keeps the weights to generate with, the best first: (stage, part of its checkpoint).
_STUDENTS = (("distill", "student/ema"), ("initialize", "ema"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What no stage trains: the codec between video and latents, and the text encoder."""

    codec: PatchCodec
    text_encoder: TextEncoder


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model: configuration, causal student, and the frozen parts around it."""

    config: Config
    student: DiT
    frozen: Frozen

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame."""
        return self.frozen.codec.latent_shape(*self.config.data.size)


def abstract_dit(config: Config) -> DiT:
    """The transformer's shapes, without weights."""
    return jax.eval_shape(lambda: DiT(config.model, rngs=nnx.Rngs(0)))


def abstract_frozen(config: Config) -> Frozen:
    """The frozen parts' shapes, without weights."""
    size, channels = 3 * config.codec.patch**2, config.codec.channels
    codec = PatchCodec(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size,), (size, channels), (channels,)))
    )
    return Frozen(codec, jax.eval_shape(lambda: TextEncoder(config.text, rngs=nnx.Rngs(0))))


def with_shardings(abstract, mesh):
    """Shapes with the sharding that each leaf has on a mesh, ready to be loaded into."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        tree_shardings(abstract, mesh),
    )


def load(path: str | Path) -> Model:
    """Loads the model of a folder that `train` wrote: the distilled student, or the initialised one before that.

    Raises:
        UserError: the folder is missing, holds no student, or is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name one that train wrote")
    config = load_config(path / "config.json")
    mesh = make_mesh()
    for stage, part in _STUDENTS:
        step = latest_step(path / stage)
        if step is not None:
            student = load_tree(path / stage / str(step), with_shardings(abstract_dit(config), mesh), part)
            frozen = load_tree(path / "frozen", with_shardings(abstract_frozen(config), mesh))
            return Model(config, student, frozen)
    raise UserError(f"{path}: holds no causal student yet; train the stages initialize or distill first")


@jax.jit
def _encode_text(encoder: TextEncoder, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
    return encoder.encode(token_ids, mask)


def embed_prompts(frozen: Frozen, prompts: Sequence[str]) -> jax.Array:
    """Text embeddings of prompts [B, T, text_dim], zero past each prompt."""
    tokenizer = ByteTokenizer(frozen.text_encoder.config.text_length)
    return _encode_text(frozen.text_encoder, *map(jnp.asarray, tokenizer.tokenize(list(prompts))))


@functools.partial(jax.jit, static_argnames="first")
def decode_frames(codec: PatchCodec, latents: jax.Array, cache, first: bool):
    """Latents [B, F, H, W, C] and the decoder's cache → frames [B, frames, height, width, 3] uint8, and the cache."""
    video, cache = codec.decode(latents, cache, first)
    return jnp.round((jnp.clip(video, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8), cache


def stream_batch(
    model: Model, prompts: Sequence[str], seed: int, num_frames: int, anchor: str | None = None
) -> Iterator[np.ndarray]:
    """Generates videos of several prompts together, chunk by chunk.

    The next chunk is dispatched before the last one is fetched, so that the device does not wait for the host.

    Args:
        prompts: B texts.
        seed: of the first sample; sample i has seed + i.
        num_frames: video frames in all; the last chunk is cut to fit.
        anchor: a strategy to use instead of the configured one, with the same number of frames.

    Yields:
        uint8 [B, frames of the chunk, height, width, 3].
    """
    config = stream_config(model.config.stream, anchor)
    text = jax.jit(DiT.text_keys_values)(model.student, embed_prompts(model.frozen, prompts))
    carry = initial_carry(model.student.config, config, seed_keys(seed, len(prompts)), *model.latent_shape[:2])
    codec = model.frozen.codec
    cache = codec.decode_start(len(prompts), *model.latent_shape[:2])
    previous = None
    remaining = num_frames
    for index, (_, chunk) in enumerate(stream_chunks(model.student, carry, text, config, model.latent_shape)):
        frames, cache = decode_frames(codec, chunk.content, cache, index == 0)
        frames.copy_to_host_async()
        if previous is not None:
            yield np.asarray(previous)
        previous = frames[:, :remaining]
        remaining -= previous.shape[1]
        if remaining <= 0:
            break
    yield np.asarray(previous)


def stream(model: Model, prompt: str, seconds: float, seed: int = 0, anchor: str | None = None) -> Iterator[np.ndarray]:
    """Generates a video chunk by chunk, at 16 frames per second.

    Args:
        prompt: what to show.
        seconds: length of the video.
        seed: of the noise.
        anchor: a strategy to use instead of the configured one.

    Yields:
        uint8 [frames of the chunk, height, width, 3].

    Raises:
        UserError: the length is not positive, or the anchor is unknown.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise UserError(f"seconds must be positive, got {seconds}")
    for frames in stream_batch(model, [prompt], seed, math.ceil(seconds * FPS), anchor):
        yield frames[0]


def stream_config(config: StreamConfig, anchor: str | None) -> StreamConfig:
    """The stream's configuration with another anchor strategy of as many frames; None keeps the configured one.

    Raises:
        UserError: the name is unknown.
    """
    if anchor is None:
        return config
    try:
        return dataclasses.replace(config, anchor=make_anchor(anchor, max(config.anchor.frames, 1)))
    except ValueError as error:
        raise UserError(str(error)) from None


def make_sampler(config: Config):
    """A jitted pure function (student, text, keys, num_chunks) → (latents, carry) for whole rollouts.

    `text` is `student.text_keys_values(embeddings)`, `keys` [B] random keys, `num_chunks` static; latents
    [B, num_chunks · F, H, W, C].
    """
    height, width = config.data.size
    latent_shape = (height // config.codec.patch, width // config.codec.patch, config.codec.channels)

    @functools.partial(jax.jit, static_argnames="num_chunks")
    def sample(student: DiT, text: KeyValues, keys: jax.Array, num_chunks: int) -> tuple[jax.Array, RolloutCarry]:
        carry = initial_carry(student.config, config.stream, keys, *latent_shape[:2])
        carry, latents = rollout(student, carry, text, config.stream, latent_shape, num_chunks)
        return latents, carry

    return sample
