"""What is timed: passes, chunks, decoders, whole streams, first images and training steps, with weights at random.

Every time ends when the device has done its work. Text embeddings are given, noise is drawn inside.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.benchmarking import flops
from adastate_jax.benchmarking.flops import Flops
from adastate_jax.benchmarking.machine import peak_mebibytes, timed
from adastate_jax.benchmarking.workloads import critic_update, student_update, with_rollout
from adastate_jax.config.run import Config
from adastate_jax.config.stages import OptimizerConfig
from adastate_jax.generation import video_stream
from adastate_jax.generation.loading import Model, decode_frames
from adastate_jax.media import FPS, VideoWriter
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.dit import DiT
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.tiny_vae import TinyVAE
from adastate_jax.models.vae import VAE
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import init_sharded, replicated, tree_shardings
from adastate_jax.streaming.carry import RolloutCarry, initial_carry, seed_keys
from adastate_jax.streaming.cues import Cue
from adastate_jax.streaming.denoising import denoise, read_context
from adastate_jax.streaming.rollout import stream
from adastate_jax.streaming.schedule import layout_of, phase_of
from adastate_jax.training.initialize import initialize_step
from adastate_jax.training.pretrain import pretrain_step
from adastate_jax.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the result.

    Attributes:
        name: what was timed.
        seconds: of each repetition.
        flops: counted operations of one repetition; None if they are not counted.
        dtype: of the operations.
        images_per_second: of a whole stream; None if this is none.
        growth_mebibytes: by how much peak memory grew along the repetitions; None if that is not watched.
        peak_mebibytes: peak memory up to its end, of the device, or of the process if the device does not tell.
    """

    name: str
    seconds: tuple[float, ...]
    flops: int | None = None
    dtype: str | None = None
    images_per_second: float | None = None
    growth_mebibytes: float | None = None
    peak_mebibytes: float = dataclasses.field(default_factory=peak_mebibytes)

    @property
    def median(self) -> float:
        return self.percentile(50)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        student: the transformer.
        codecs: decoders of its latents, the configured one first: both of Wan2.1's, or the patch codec.
        embeddings: of one prompt [1, T, text_dim].
    """

    config: Config
    mesh: jax.sharding.Mesh
    student: DiT
    codecs: Mapping[str, Any]
    embeddings: jax.Array

    @property
    def frame_tokens(self) -> int:
        return self.config.model.frame_tokens(*self.config.latent_shape[:2])

    @property
    def chunk_images(self) -> int:
        """Video frames of a steady chunk."""
        return self.config.stream.chunk_frames * self.config.time_factor

    def text(self) -> KeyValues:
        """The prompt's keys and values."""
        return _text_keys_values(self.student, self.embeddings)

    def carry(self) -> RolloutCarry:
        """A stream before its first chunk."""
        height, width, _ = self.config.latent_shape
        return initial_carry(self.config.model, self.config.stream, seed_keys(0, 1), height, width)

    def model(self, name: str) -> Model:
        """What a user would have loaded, with the decoder of this name; every prompt has the same embeddings."""
        config = dataclasses.replace(self.config, decoder=name)
        return Model(config, self.student, self.codecs[name], lambda _: self.embeddings, lambda _: True, self.mesh)

    def video(self, name: str) -> video_stream.VideoStream:
        """A video without end, as users stream it."""
        return video_stream.stream_batch(self.model(name), [_PROMPT], 0, None)

    def chunks(self, count: int) -> Iterator[tuple[RolloutCarry, jax.Array]]:
        """Carry and content latents of a new stream's chunks."""
        config = self.config
        for carry, chunk in stream(self.student, self.carry(), self.text(), config.stream, config.latent_shape, count):
            yield carry, chunk.content


_PROMPT = "any"
_text_keys_values = jax.jit(DiT.text_keys_values)


def _normal(*shape: int) -> jax.Array:
    """Normal numbers float32, drawn on the host: nothing to compile."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def prepare(config: Config, mesh: jax.sharding.Mesh) -> Subject:
    """Draws the weights and a prompt, each weight on its device."""

    def draw(function):
        return init_sharded(function, mesh)

    student = draw(lambda: DiT(config.model, rngs=nnx.Rngs(0)))
    if config.decoder == "patch":
        size, channels = 3 * config.codec.patch**2, config.codec.channels
        codecs = {"patch": PatchCodec(jnp.zeros(size), _normal(size, channels), jnp.ones(channels))}
    else:
        networks = {
            "wan": draw(lambda: VAE(config.vae, rngs=nnx.Rngs(1), parts=("decoder",))),
            "tiny": draw(lambda: TinyVAE(config.tiny_vae, rngs=nnx.Rngs(1), parts=("decoder",))),
        }
        codecs = {name: WanCodec(networks[name], None) for name in sorted(networks, key=config.decoder.__ne__)}
    embeddings = _normal(1, config.model.text_length, config.model.text_dim)
    return Subject(config, mesh, student, codecs, embeddings)


def until_ready(subject: Subject) -> None:
    """Compiles and runs what a stream with the configured decoder needs: every phase, and both calls of the decoder."""
    video = subject.video(next(iter(subject.codecs)))
    for _ in range(subject.config.stream.num_fill_chunks + 1):
        next(video)


# --- streaming --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="layout")
def _denoise(model: DiT, live: jax.Array, text: KeyValues, context: KeyValues | None, layout) -> Any:
    return denoise(model, live, jnp.float32(0.5), text, layout, context)


def time_pass(subject: Subject, repeats: int) -> Measurement:
    """One pass of the transformer over a steady chunk's live frames, cached keys already rotated."""
    config = subject.config
    steady = config.stream.num_fill_chunks
    layout = layout_of(phase_of(steady, config.stream), config.stream)
    live = _normal(1, len(layout.live), *config.latent_shape)
    context = read_context(config.model, subject.carry().cache, config.stream, layout, live)
    text = subject.text()
    seconds = timed(lambda: _denoise(subject.student, live, text, context, layout), repeats)
    work = flops.chunk_pass_flops(config.model, config.stream, steady, subject.frame_tokens).total
    return Measurement("DiT pass", seconds, work, config.model.dtype)


def time_chunk(subject: Subject, repeats: int) -> Measurement:
    """A steady chunk, from noise to the committed cache: all denoising steps and the clean pass."""
    config = subject.config
    fill = config.stream.num_fill_chunks
    chunks = subject.chunks(fill + 2 + repeats)
    for _ in range(fill + 1):  # everything compiled: what peak memory grows by from here on is the stream's
        jax.block_until_ready(next(chunks))
    before = peak_mebibytes()
    seconds = timed(lambda: next(chunks), repeats)
    growth = peak_mebibytes() - before
    work = flops.chunk_flops(config.model, config.stream, fill, subject.frame_tokens)
    return Measurement("chunk", seconds, work, config.model.dtype, growth_mebibytes=growth)


def time_decoder(subject: Subject, name: str, repeats: int) -> Measurement:
    """The latents of a steady chunk into 8-bit frames on the device."""
    config, codec = subject.config, subject.codecs[name]
    height, width, _ = config.latent_shape
    latents = _normal(1, config.stream.chunk_frames, *config.latent_shape)
    cache = codec.decode_start(1, height, width)
    cache = jax.block_until_ready(decode_frames(codec, latents, cache, True))[1]

    def step():
        nonlocal cache
        frames, cache = decode_frames(codec, latents, cache, False)
        return frames, cache

    decoder = {"patch": config.codec, "wan": config.vae, "tiny": config.tiny_vae}[name]
    seconds = timed(step, repeats)
    work = flops.decoder_flops(decoder, height, width, config.stream.chunk_frames)
    return Measurement(f"decoder {name}", seconds, work, getattr(decoder, "dtype", "float32"))


def time_end_to_end(subject: Subject, name: str, repeats: int) -> Measurement:
    """Steady chunks of a video into an mp4 file: from the end of one chunk's writing to the end of the next's."""
    warm = subject.config.stream.num_fill_chunks + 1
    video, stamps = subject.video(name), []
    with tempfile.TemporaryDirectory() as folder:
        with VideoWriter(Path(folder) / "stream.mp4") as writer:
            for _ in range(warm + repeats):
                writer.write(next(video)[0])
                stamps.append(time.perf_counter())
        closed = time.perf_counter()
    stamps = stamps[warm - 1 :]
    images = repeats * subject.chunk_images
    seconds = tuple(float(x) for x in np.diff(stamps))
    return Measurement(f"end to end, {name}", seconds, images_per_second=images / (closed - stamps[0]))


def time_first_image(subject: Subject, name: str, repeats: int) -> Measurement:
    """From a prompt's embeddings to the first chunk's frames on the host, warm."""
    return Measurement(f"first image, {name}", timed(lambda: next(subject.video(name)), repeats))


def time_prompt_switch(subject: Subject, name: str, repeats: int) -> Measurement:
    """From the last frames of a prompt on the host to the first of the next one, in the steady state."""
    model = subject.model(name)
    config, factor = model.config.stream, model.config.time_factor
    # Every prompt lasts two chunks, and begins with the first video frame of its first.
    starts = [config.num_fill_chunks + 1 + 2 * index for index in range(1 + repeats)]
    seconds = [(1 + (start * config.chunk_frames - 1) * factor) / FPS for start in starts]
    video = video_stream.stream(model, prompts=[Cue(0, _PROMPT), *(Cue(second, _PROMPT) for second in seconds)])
    stamps = []
    for _ in range(starts[-1] + 1):
        next(video)
        stamps.append(time.perf_counter())
    return Measurement(f"prompt switch, {name}", tuple(stamps[start] - stamps[start - 1] for start in starts[1:]))


# --- training ---------------------------------------------------------------------------------------------------------


def time_training(subject: Subject, stage: str, repeats: int) -> Iterator[Measurement]:
    """Training steps of a stage on random latents and embeddings: no data is read, no text or video encoded.

    `distill` gives two: the student's update and the critic's.
    """
    config, model, mesh = subject.config, subject.config.model, subject.mesh
    settings, shape = getattr(config, stage), config.latent_shape
    batch, clip_frames = settings.batch_size, 1 + (config.data.num_frames - 1) // config.time_factor
    text = _normal(batch, model.text_length, model.text_dim)

    def state(optimizer: OptimizerConfig, ema: bool) -> TrainState:
        create = functools.partial(create_state, optimizer=optimizer, ema=ema)
        shardings = tree_shardings(jax.eval_shape(create, subject.student), mesh)
        return jax.jit(lambda params: create(_copy(params)), out_shardings=shardings)(subject.student)

    def measure(name: str, state: TrainState, step: Callable, work: Flops, *given: Any) -> Measurement:
        own = jax.tree.map(lambda x: x.sharding, state)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(own, replicated(mesh)))
        turn = 0

        def update():
            nonlocal state, turn
            state, scalars = compiled(state, jax.random.key(turn), text, *given)
            turn += 1
            return state, scalars

        return Measurement(f"{name}, batch {batch}", timed(update, repeats), batch * work.total, model.dtype)

    if stage == "pretrain":

        def pretrain(state, key, text, latents):
            return pretrain_step(state, latents, text, text[:1], key, settings)

        work = flops.pretrain_flops(model, clip_frames, subject.frame_tokens)
        latents = _normal(batch, clip_frames, *shape)
        yield measure("pretrain", state(settings.optimizer, True), pretrain, work, latents)
    elif stage == "initialize":

        def initialize(state, key, text, trajectory):
            return initialize_step(state, trajectory, text, key, settings, config.stream)

        work = flops.initialize_flops(model, config.stream, clip_frames, subject.frame_tokens, settings.context)
        trajectory = _normal(batch, len(config.stream.sigmas) + 1, clip_frames, *shape)
        yield measure("initialize", state(settings.optimizer, True), initialize, work, trajectory)
    else:
        # Both states are held throughout, as in training.
        critic_state, teacher = state(settings.critic, False), jax.jit(_copy)(subject.student)
        sizes = (config.stream, settings, subject.frame_tokens)
        work = flops.student_flops(model, model, model, *sizes)
        critic, student_state = critic_state.params, with_rollout(state(settings.student, True), config, mesh)
        yield measure("distill student", student_state, student_update(config), work, critic, teacher)
        work = flops.critic_flops(model, model, *sizes)
        critic_state = with_rollout(critic_state, config, mesh)
        yield measure("distill critic", critic_state, critic_update(config), work, teacher)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
