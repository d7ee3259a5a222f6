"""How many floating-point operations the work takes: matrix products, convolutions and attention.

A multiply-add is two; element-wise work is not counted. What is counted is the model's arithmetic, not what a backend
makes of it: padding and the recomputation inside flash attention are nobody's merit. Everything is per sample.
"""

import math
from typing import Any, NamedTuple

from adastate_jax.config.stages import DistillConfig, num_chunks, stream_of_clips
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.patch_codec import PatchCodecConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig, decoder_levels
from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of

_MEMORY_BLOCKS = 3  # of each level of the tiny decoder


class Flops(NamedTuple):
    """Operations of attention (scores and weighted values), and of all other products."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def times(self, factor: int) -> "Flops":
        return Flops(self.linear * factor, self.attention * factor)


def _sum(*parts: Flops) -> Flops:
    return Flops(*(sum(column) for column in zip(*parts, strict=True)))


def pass_flops(config: DiTConfig, live_frames: int, seen_frames: int, frame_tokens: int) -> Flops:
    """One forward pass, the text's keys and values given.

    Args:
        live_frames: latent frames that are passed through the network, each with a timestep.
        seen_frames: latent frames that each of them attends to, itself among them.
        frame_tokens: tokens per latent frame.
    """
    dim, tokens = config.dim, live_frames * frame_tokens
    patch = math.prod(config.patch_size)
    projections = 4 * dim * dim + 2 * dim * dim + 2 * dim * config.ffn_dim  # self, cross without text, feed-forward
    ends = patch * (config.in_channels + config.out_channels) * dim
    time = config.freq_dim * dim + 7 * dim * dim
    scores = 2 * tokens * dim * (seen_frames * frame_tokens + config.text_length)
    linear = tokens * (config.num_layers * projections + ends) + live_frames * time
    return Flops(2 * linear, 2 * config.num_layers * scores)


def text_flops(config: DiTConfig) -> Flops:
    """Text embeddings → keys and values of all layers, once per prompt."""
    dim = config.dim
    embed = config.text_dim * dim + dim * dim
    return Flops(2 * config.text_length * (embed + config.num_layers * 2 * dim * dim), 0)


def clip_flops(config: DiTConfig, frames: int, frame_tokens: int) -> Flops:
    """A bidirectional pass over a clip, the text included."""
    return _sum(pass_flops(config, frames, frames, frame_tokens), text_flops(config))


def chunk_pass_flops(config: DiTConfig, stream: StreamConfig, chunk: int, frame_tokens: int) -> Flops:
    """One pass over the live frames of a stream's chunk (from 0), as far as its phase goes."""
    layout = layout_of(phase_of(chunk, stream), stream)
    live = len(layout.live)
    return pass_flops(config, live, live + len(layout.cached), frame_tokens)


def chunk_flops(config: DiTConfig, stream: StreamConfig, chunk: int, frame_tokens: int) -> int:
    """A chunk of a stream: every denoising step and the clean pass."""
    return (len(stream.sigmas) + 1) * chunk_pass_flops(config, stream, chunk, frame_tokens).total


# --- decoders -------------------------------------------------------------------------------------------------------


def decoder_flops(config: Any, height: int, width: int, frames: int, first: bool = False) -> int:
    """Latents to video.

    Args:
        config: of the decoder: `VAEConfig`, `TinyVAEConfig` or `PatchCodecConfig`.
        height, width, frames: of the latents.
        first: whether they start the stream.
    """
    if isinstance(config, PatchCodecConfig):
        return 2 * frames * height * width * config.channels * 3 * config.patch**2
    if isinstance(config, TinyVAEConfig):
        return _tiny_decoder(config, height, width, frames)
    if first:
        start = _vae_decoder(config, height, width, 1, upsamples_time=False)
        return start + _vae_decoder(config, height, width, frames - 1, upsamples_time=True)
    return _vae_decoder(config, height, width, frames, upsamples_time=True)


def _vae_decoder(config: VAEConfig, height: int, width: int, frames: int, upsamples_time: bool) -> int:
    levels = decoder_levels(config)
    latent, middle = config.latent_channels, levels[0].inputs
    pixels = height * width
    residual = 2 * 27 * middle**2
    attention = 4 * middle**2 + 2 * pixels * middle  # four projections; scores and weighted values
    products = frames * pixels * (latent**2 + 27 * latent * middle + 2 * residual + attention)
    for level in levels:
        inputs, outputs = level.inputs, level.outputs
        if level.resample:
            if level.temporal and upsamples_time:
                products += frames * pixels * 3 * inputs * 2 * inputs
                frames *= 2
            pixels *= 4
            products += frames * pixels * 9 * inputs * outputs
        else:
            shortcut = inputs * outputs if inputs != outputs else 0
            products += frames * pixels * (27 * (inputs * outputs + outputs**2) + shortcut)
    return 2 * (products + frames * pixels * 27 * config.dim * 3)


def _tiny_decoder(config: TinyVAEConfig, height: int, width: int, frames: int) -> int:
    widths = (*config.widths, config.widths[-1])
    pixels = height * width
    products = frames * pixels * 9 * config.latent_channels * widths[0]
    for inputs, outputs, temporal in zip(widths, widths[1:], config.temporal_upsample, strict=False):
        products += _MEMORY_BLOCKS * frames * pixels * 9 * 4 * inputs**2
        # Growing in time is counted behind the upsampling, where it officially is; ours comes before, for a quarter.
        pixels *= 4
        grown = 1 + temporal
        products += frames * pixels * grown * inputs**2
        frames *= grown
        products += frames * pixels * 9 * inputs * outputs
    return 2 * (products + frames * pixels * 9 * widths[-1] * 3)


# --- training steps -------------------------------------------------------------------------------------------------


def _gradient(config: DiTConfig, forward: Flops) -> Flops:
    """Forward, backward (twice that), and what `remat` computes again."""
    again = {
        "none": Flops(0, 0),
        "block": forward,
        "attention": Flops(forward.linear, 0),
        "dots": Flops(0, forward.attention),
    }[config.remat]
    return _sum(forward.times(3), again)


def pretrain_flops(config: DiTConfig, frames: int, frame_tokens: int) -> Flops:
    """A step of flow matching on a clip of latent frames."""
    return _gradient(config, clip_flops(config, frames, frame_tokens))


def initialize_flops(config: DiTConfig, stream: StreamConfig, frames: int, frame_tokens: int, context: str) -> Flops:
    """A step of regression, over a clean copy of the clip too unless `context` is `noisy`; `state`: at every level."""
    passes = {"noisy": 1, "state": len(stream.sigmas) + 1}.get(context, 2)
    if context in ("stream", "state"):
        one_pass = _rollout_pass(config, stream_of_clips(stream, context), frames, frame_tokens)
    else:
        chunk, past = stream.chunk_frames, stream.past_frames
        starts = range(0, frames, chunk)
        one_pass = _sum(*(pass_flops(config, chunk, min(start, past) + chunk, frame_tokens) for start in starts))
    return _gradient(config, _sum(*[one_pass] * passes, text_flops(config)))


def _rollout_pass(config: DiTConfig, stream: StreamConfig, frames: int, frame_tokens: int) -> Flops:
    """One pass over every chunk of a rollout."""
    chunks = range(num_chunks(frames, stream))
    return _sum(*(chunk_pass_flops(config, stream, chunk, frame_tokens) for chunk in chunks))


def rollout_flops(config: DiTConfig, stream: StreamConfig, frames: int, frame_tokens: int) -> Flops:
    """A training rollout from its beginning."""
    return _rolled_out(_rollout_pass(config, stream, frames, frame_tokens), stream)


def _rolled_out(one_pass: Flops, stream: StreamConfig) -> Flops:
    """Chunks of a rollout: on average half of the denoising steps (the exit step is drawn), and the clean pass.

    one_pass: over each of them.
    """
    # (1 + 2 + … + steps) / steps denoising passes, and one clean pass
    return _share(one_pass.times(len(stream.sigmas) + 3), 2)


def _share(whole: Flops, parts: int) -> Flops:
    return Flops(whole.linear // parts, whole.attention // parts)


def _part_flops(
    config: DiTConfig, stream: StreamConfig, settings: DistillConfig, frame_tokens: int
) -> tuple[Flops, Flops]:
    """What an update rolls out, and one pass over what it scores of that, on average over the parts it may score.

    A window is rolled out from the beginning of its rollout; a segment goes on.
    """
    chunks = num_chunks(settings.rollout_frames, stream)
    passes = [chunk_pass_flops(config, stream, chunk, frame_tokens) for chunk in range(chunks)]
    if settings.continue_rollout:
        one_pass = _share(_sum(*passes), settings.segments)
        return _rolled_out(one_pass, stream), one_pass
    clip = settings.clip_frames // stream.chunk_frames
    starts = range(chunks - clip + 1)
    rolled = [each for start in starts for each in passes[: start + clip]]
    scored = [each for start in starts for each in passes[start : start + clip]]
    return _rolled_out(_share(_sum(*rolled), len(starts)), stream), _share(_sum(*scored), len(starts))


def critic_flops(
    student: DiTConfig, critic: DiTConfig, stream: StreamConfig, settings: DistillConfig, frame_tokens: int
) -> Flops:
    """A critic update: the student's rollout, and flow matching on what is scored of it."""
    rollout, _ = _part_flops(student, stream, settings, frame_tokens)
    return _sum(rollout, pretrain_flops(critic, settings.clip_frames, frame_tokens))


def student_flops(
    student: DiTConfig,
    critic: DiTConfig,
    teacher: DiTConfig,
    stream: StreamConfig,
    settings: DistillConfig,
    frame_tokens: int,
) -> Flops:
    """A student update: rollout, one pass per chunk with its gradient, the critic's score, the teacher's guided one."""
    rollout, one_pass = _part_flops(student, stream, settings, frame_tokens)
    return _sum(
        rollout,
        one_pass.times(3 * settings.passes_with_gradient),
        clip_flops(critic, settings.clip_frames, frame_tokens),
        clip_flops(teacher, settings.clip_frames, frame_tokens).times(2),
    )
