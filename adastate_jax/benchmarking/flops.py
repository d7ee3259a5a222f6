"""How many floating-point operations the work takes: matrix products, convolutions and attention.

A multiply-add is two; element-wise work is not counted. What is counted is the model's arithmetic, not what a backend
makes of it: padding and the recomputation inside flash attention are nobody's merit. Everything is per sample.
Of adapters (`lora`; None, or of rank 0, trains all weights) both narrow products are counted.
"""

import math
from typing import Any, NamedTuple

from adastate_jax.config.rollouts import window_starts
from adastate_jax.config.stages import DistillConfig, num_chunks, stream_of_clips
from adastate_jax.models.adapters import LoRAConfig, adapted_shapes
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


# Layers that the text passes through, once per prompt, and those of a frame's time; all others see the video's tokens.
_OF_THE_TEXT = ("blocks/cross_attention/key", "blocks/cross_attention/value", "text_")
_OF_TIME = ("time_",)


def _adapter_products(config: DiTConfig, lora: LoRAConfig | None, of_text: bool) -> int:
    """Multiply-adds that adapters add per token, of the text or of the video."""
    if lora is None or not lora.rank:
        return 0
    shapes = adapted_shapes(config, lora).items()
    chosen = [x for name, x in shapes if name.startswith(_OF_THE_TEXT) == of_text and not name.startswith(_OF_TIME)]
    return sum(math.prod(shape[:-2]) * lora.rank * sum(shape[-2:]) for shape in chosen)


def pass_flops(
    config: DiTConfig, live_frames: int, seen_frames: int, frame_tokens: int, lora: LoRAConfig | None = None
) -> Flops:
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
    adapters = _adapter_products(config, lora, of_text=False)
    linear = tokens * (config.num_layers * projections + ends + adapters) + live_frames * time
    return Flops(2 * linear, 2 * config.num_layers * scores)


def text_flops(config: DiTConfig, lora: LoRAConfig | None = None) -> Flops:
    """Text embeddings → keys and values of all layers, once per prompt."""
    dim = config.dim
    products = config.text_dim * dim + dim * dim + config.num_layers * 2 * dim * dim
    return Flops(2 * config.text_length * (products + _adapter_products(config, lora, of_text=True)), 0)


def clip_flops(config: DiTConfig, frames: int, frame_tokens: int, lora: LoRAConfig | None = None) -> Flops:
    """A bidirectional pass over a clip, the text included."""
    return _sum(pass_flops(config, frames, frames, frame_tokens, lora), text_flops(config, lora))


def chunk_pass_flops(
    config: DiTConfig, stream: StreamConfig, chunk: int, frame_tokens: int, lora: LoRAConfig | None = None
) -> Flops:
    """One pass over the live frames of a stream's chunk (from 0), as far as its phase goes."""
    layout = layout_of(phase_of(chunk, stream), stream)
    live = len(layout.live)
    return pass_flops(config, live, live + len(layout.cached), frame_tokens, lora)


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


def _gradient(config: DiTConfig, forward: Flops, frozen: Flops) -> Flops:
    """Forward, backward, and what `remat` computes again; `frozen` as for `_backward`."""
    again = {
        "none": Flops(0, 0),
        "block": forward,
        "attention": Flops(forward.linear, 0),
        "dots": Flops(0, forward.attention),
    }[config.remat]
    return _sum(forward, _backward(forward, frozen), again)


_NOTHING = Flops(0, 0)


def _backward(forward: Flops, frozen: Flops) -> Flops:
    """Every product twice, for what came in and for the weights; those of `frozen` weights once."""
    return Flops(2 * forward.linear - frozen.linear, 2 * forward.attention)


def pretrain_flops(config: DiTConfig, frames: int, frame_tokens: int, lora: LoRAConfig | None = None) -> Flops:
    """A step of flow matching on a clip of latent frames."""
    frozen = clip_flops(config, frames, frame_tokens) if lora and lora.rank else _NOTHING
    return _gradient(config, clip_flops(config, frames, frame_tokens, lora), frozen)


def initialize_flops(
    config: DiTConfig,
    stream: StreamConfig,
    frames: int,
    frame_tokens: int,
    context: str,
    lora: LoRAConfig | None = None,
) -> Flops:
    """A step of regression, over a clean copy of the clip too unless `context` is `noisy`; `state`: at every level."""
    shape = stream, frames, frame_tokens, context
    frozen = _causal_pass(config, *shape, None) if lora and lora.rank else _NOTHING
    return _gradient(config, _causal_pass(config, *shape, lora), frozen)


def consistency_flops(
    config: DiTConfig,
    teacher: DiTConfig,
    stream: StreamConfig,
    frames: int,
    frame_tokens: int,
    context: str,
    guided: bool,
    lora: LoRAConfig | None = None,
) -> Flops:
    """A step of causal consistency: the student's gradient, its average's pass, the teacher's one or, guided, two."""
    shape = stream, frames, frame_tokens, context
    average, asked = _causal_pass(config, *shape, lora), _causal_pass(teacher, *shape, None)
    return _sum(initialize_flops(config, *shape, lora), average, asked.times(2 if guided else 1))


def trajectory_flops(teacher: DiTConfig, frames: int, frame_tokens: int, ode_steps: int) -> Flops:
    """A trajectory of the teacher: two passes at each step, with the prompt and with the negative one."""
    texts = text_flops(teacher).times(2)
    return _sum(pass_flops(teacher, frames, frames, frame_tokens).times(2 * ode_steps), texts)


def _causal_pass(
    config: DiTConfig,
    stream: StreamConfig,
    frames: int,
    frame_tokens: int,
    context: str,
    lora: LoRAConfig | None,
) -> Flops:
    """All forward passes of a step of initialisation, the text included."""
    passes = {"noisy": 1, "state": len(stream.sigmas) + 1}.get(context, 2)
    if context in ("stream", "state"):
        one_pass = _rollout_pass(config, stream_of_clips(stream, context), frames, frame_tokens, lora)
    else:
        chunk, past = stream.chunk_frames, stream.past_frames
        seen = [min(start, past) + chunk for start in range(0, frames, chunk)]
        one_pass = _sum(*(pass_flops(config, chunk, each, frame_tokens, lora) for each in seen))
    return _sum(*[one_pass] * passes, text_flops(config, lora))


def _rollout_pass(
    config: DiTConfig, stream: StreamConfig, frames: int, frame_tokens: int, lora: LoRAConfig | None = None
) -> Flops:
    """One pass over every chunk of a rollout."""
    chunks = range(num_chunks(frames, stream))
    return _sum(*(chunk_pass_flops(config, stream, chunk, frame_tokens, lora) for chunk in chunks))


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
    config: DiTConfig, stream: StreamConfig, settings: DistillConfig, frame_tokens: int, lora: LoRAConfig | None
) -> tuple[Flops, Flops]:
    """What an update rolls out, and one pass over what it scores of that, on average over the parts it may score.

    A window is rolled out from the beginning of its rollout; a segment goes on.
    """
    chunks = num_chunks(settings.rollout_frames, stream)
    passes = [chunk_pass_flops(config, stream, chunk, frame_tokens, lora) for chunk in range(chunks)]
    if settings.continue_rollout:
        one_pass = _share(_sum(*passes), settings.segments)
        return _rolled_out(one_pass, stream), one_pass
    clip = settings.clip_frames // stream.chunk_frames
    starts = window_starts(settings, stream)
    rolled = [each for start in starts for each in passes[: start + clip]]
    scored = [each for start in starts for each in passes[start : start + clip]]
    return _rolled_out(_share(_sum(*rolled), len(starts)), stream), _share(_sum(*scored), len(starts))


def critic_flops(
    student: DiTConfig,
    critic: DiTConfig,
    stream: StreamConfig,
    settings: DistillConfig,
    frame_tokens: int,
    student_lora: LoRAConfig | None = None,
    critic_lora: LoRAConfig | None = None,
) -> Flops:
    """A critic update: the student's rollout, and flow matching on what is scored of it."""
    rollout, _ = _part_flops(student, stream, settings, frame_tokens, student_lora)
    return _sum(rollout, pretrain_flops(critic, settings.clip_frames, frame_tokens, critic_lora))


def student_flops(
    student: DiTConfig,
    critic: DiTConfig,
    teacher: DiTConfig,
    stream: StreamConfig,
    settings: DistillConfig,
    frame_tokens: int,
    student_lora: LoRAConfig | None = None,
    critic_lora: LoRAConfig | None = None,
) -> Flops:
    """A student update: rollout, one pass per chunk with its gradient, the critic's score, the teacher's guided one."""
    rollout, one_pass = _part_flops(student, stream, settings, frame_tokens, student_lora)
    adapted = student_lora and student_lora.rank
    frozen = _part_flops(student, stream, settings, frame_tokens, None)[1] if adapted else _NOTHING
    scored = _sum(one_pass, _backward(one_pass, frozen))
    return _sum(
        rollout,
        scored.times(settings.passes_with_gradient),
        clip_flops(critic, settings.clip_frames, frame_tokens, critic_lora),
        clip_flops(teacher, settings.clip_frames, frame_tokens).times(2),
    )
