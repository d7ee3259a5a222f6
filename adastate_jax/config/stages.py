"""Settings of the training stages; the defaults are the paper's, and Self-Forcing's where the paper gives none."""

import dataclasses
import itertools

import numpy as np

from adastate_jax.checks import require_positive
from adastate_jax.diffusion import MAX_TIMESTEP, warp
from adastate_jax.streaming.anchors.static import StaticAnchor
from adastate_jax.streaming.schedule import StreamConfig


def require_decay(config) -> None:
    """Raises ValueError if the field `ema_decay` is none."""
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {config.ema_decay}")


def require_micro_batches(config) -> None:
    """Raises ValueError if the field `accumulate` does not divide `batch_size`."""
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise ValueError(f"accumulate must divide batch_size {config.batch_size}, got {config.accumulate}")


WEIGHTINGS = ("uniform", "bell", "clean")


def require_weighting(config) -> None:
    """Raises ValueError if the fields `weighting` or `caption_dropout` are none."""
    if config.weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {config.weighting!r}")
    if not 0.0 <= config.caption_dropout <= 1.0:
        raise ValueError(f"caption_dropout must lie in [0, 1], got {config.caption_dropout}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping; the defaults are Self-Forcing's for the student.

    Attributes:
        learning_rate: peak learning rate.
        betas: of AdamW.
        weight_decay: decoupled.
        max_gradient_norm: global norm that gradients are clipped to.
        warmup_steps: of linear warm-up from zero.
        decay_steps: total steps of a cosine decay to zero, warm-up included; 0 keeps the rate constant.
        second_moment_dtype: float32, or bfloat16, rounded at random: 2 bytes less per weight, and steps that scatter by
            1 or 2 %.
    """

    learning_rate: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    max_gradient_norm: float = 10.0
    warmup_steps: int = 0
    decay_steps: int = 0
    second_moment_dtype: str = "float32"

    def __post_init__(self):
        if self.second_moment_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"second_moment_dtype must be float32 or bfloat16, got {self.second_moment_dtype!r}")
        require_positive(self, "learning_rate", "max_gradient_norm")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if min(self.weight_decay, self.warmup_steps, self.decay_steps) < 0:
            raise ValueError("weight_decay, warmup_steps and decay_steps must not be negative")
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps {self.decay_steps} must be more than warmup_steps {self.warmup_steps}, which it includes "
                "and behind which the rate is zero; or 0, for no decay"
            )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Flow matching on video clips.

    Attributes:
        steps, batch_size: of the stage.
        accumulate: micro-batches that a batch is computed in, one after another; it divides `batch_size`.
        optimizer: of the network.
        ema_decay: of the weights that later stages use as the teacher.
        caption_dropout: share of captions replaced by the empty one, for guidance.
        shift: warp of the uniformly drawn noise level.
        weighting: loss weight per noise level: `uniform`; `bell`, Wan's; or `clean`, min(1, (σ / 0.3)²), which suits a
            network that predicts clean latents.
    """

    steps: int = 10000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.999))
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    shift: float = 5.0
    weighting: str = "uniform"

    def __post_init__(self):
        require_positive(self, "steps", "batch_size", "shift")
        require_decay(self)
        require_micro_batches(self)
        require_weighting(self)


CONTEXTS = ("noisy", "clean", "stream", "state")
TARGETS = ("trajectories", "clips", "consistency")
RANDOM = "random"  # weights to start from that are none


@dataclasses.dataclass(frozen=True)
class InitializeConfig:
    """The causal student, before distillation or without it.

    Attributes:
        targets: what it learns to predict. `trajectories`: the ends of the teacher's ODE trajectories (Self-Forcing).
            `clips`: the run's clips, by flow matching; no teacher takes part. `consistency`: what its own average
            predicts one step of the teacher's ODE further down, for clips with noise (Causal-Forcing++); the teacher
            is a causal one, trained on `clips`.
        steps, batch_size: of the stage.
        accumulate: micro-batches that a batch is computed in, one after another; it divides `batch_size`.
        optimizer: of the student.
        ema_decay: of the weights that distillation starts from, and that `consistency` has as its target, from step
            `ema_start` on; until then they are the student's.
        trajectories: how many trajectories the teacher draws before the first step.
        ode_steps: Euler steps from noise to a clip; a multiple of the number of denoising steps.
        guidance_scale: w of cond + w (cond − uncond) of the teacher; 5 is the conventional 6.
        context: what a chunk sees of earlier chunks: their `noisy` latents, each at a level of its own (Self-Forcing;
            of clips, diffusion forcing), their `clean` ends (teacher forcing), or what the `stream` keeps of these: its
            window and its anchor, where the stream puts them in time; a static one stands for a hidden state. The first
            two show no anchor. `state` is what the stream keeps with its hidden state, which is denoised beside the
            trajectory, or the clip with noise, at each of the stream's levels, with gradient through all chunks before:
            several times the work of a step. `consistency` knows `clean` and `stream`.
        weights: what the student starts from, as a network's `weights` says it (`config/networks.py`); empty is a copy
            of the teacher, and `random` is nothing.
        caption_dropout, shift, weighting: of `clips`, as in pretraining; every chunk has a noise level of its own.
    """

    targets: str = "trajectories"

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-6, betas=(0.9, 0.999))
    ema_decay: float = 0.99
    ema_start: int = 0
    trajectories: int = 16000
    ode_steps: int = 48
    guidance_scale: float = 5.0
    context: str = "noisy"
    weights: str = ""
    caption_dropout: float = 0.1
    shift: float = 5.0
    weighting: str = "uniform"

    def __post_init__(self):
        require_positive(self, "steps", "batch_size", "trajectories", "ode_steps", "shift")
        require_decay(self)
        require_micro_batches(self)
        require_weighting(self)
        if self.ema_start < 0:
            raise ValueError(f"ema_start must not be negative, got {self.ema_start}")
        if self.targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)}, got {self.targets!r}")
        if self.targets == "consistency" and self.context not in ("clean", "stream"):
            raise ValueError(f"context must be clean or stream for targets consistency, got {self.context!r}")
        if self.context not in CONTEXTS:
            raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {self.context!r}")


_MAX_ODE_STEPS = 100_000  # far beyond any solver's; the levels are listed when a configuration is checked


def ode_sigmas(config: StreamConfig, ode_steps: int) -> np.ndarray:
    """Noise levels [ode_steps + 1] from 1 to 0 on which the student's own levels lie exactly.

    Between two of the student's raw steps the raw grid is uniform; the warp is the student's.

    Raises:
        ValueError: `ode_steps` is no multiple of the number of denoising steps, the first step is not 1000, or the
            network is told other timesteps than 1000 σ, of which it would be trained for none.
    """
    if config.timesteps:
        raise ValueError("initialisation tells the network 1000 times the noise level; leave stream.timesteps empty")
    steps = config.denoising_steps
    if ode_steps % len(steps) or ode_steps < len(steps):
        raise ValueError(f"ode_steps {ode_steps} must be a multiple of the {len(steps)} denoising steps")
    if ode_steps > _MAX_ODE_STEPS:
        raise ValueError(f"ode_steps {ode_steps} must be at most {_MAX_ODE_STEPS}")
    if steps[0] != MAX_TIMESTEP:
        raise ValueError(f"trajectories start from pure noise, so denoising_steps must start at 1000, not {steps[0]}")
    per_step = ode_steps // len(steps)
    knots = np.array([*steps, 0.0]) / MAX_TIMESTEP
    raw = np.concatenate([np.linspace(a, b, per_step, endpoint=False) for a, b in itertools.pairwise(knots)])
    return np.append(warp(raw, config.shift), 0.0)


def stream_of_clips(stream: StreamConfig, context: str) -> StreamConfig:
    """The stream that `context` shows: with `stream`, a static anchor takes the place of a hidden state.

    Raises:
        ValueError: its cache is not filled chunk after chunk, or it has no hidden state for `state`.
    """
    anchor = stream.anchor
    if anchor.joint or anchor.restarts:
        raise ValueError(f"initialize.context {context} needs a cache that is filled chunk after chunk, not {anchor}'s")
    if context == "state":
        if not anchor.state_frames:
            raise ValueError(f"initialize.context state needs a hidden state, which {anchor} has not; choose stream")
        return stream
    return dataclasses.replace(stream, anchor=StaticAnchor(anchor.frames)) if anchor.state_frames else stream


PROMPT_CHANGES = ("switch", "recache", "renew", "reset_state")
CACHE_GRADIENTS = ("stop", "window", "straight_through", "state")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation; the defaults are AdaState's, and Self-Forcing's where the paper gives none.

    Attributes:
        steps: iterations, each one critic update.
        batch_size: prompts per iteration.
        accumulate: micro-batches that these are computed in, one after another; it divides `batch_size`.
        rollout_frames: content frames N of a training rollout, a whole number of chunks.
        scored_frames: how many of them critic and teacher score at once, a whole number of chunks: what the teacher
            was trained on. Fewer than N are a window that is drawn for every update, and the gradient is that of its
            chunks (Self-Forcing++); 0 is all of them.
        scored_every: such windows begin at multiples of so many frames, a whole number of chunks: where a scene is
            periodic, and the teacher knows clips alone that begin as a period does. 0 is any chunk.
        continue_rollout: every update, the student's or the critic's, generates and scores the next segment of one
            rollout, which begins anew after N frames (LongLive's streaming long tuning). The first segment is of
            `scored_frames`, each later one shorter by the overlap.
        overlap_frames: last frames of the segment before that critic and teacher see in front of a segment; they are
            not in the loss. A whole number of chunks; LongLive's is one.
        prompt_change: what becomes of the cache where the prompt of such a rollout changes, once, before a segment that
            is drawn: `switch`, `recache`, `renew` or `reset_state` of `streaming/prompts.py` (LongLive trains with what
            is `renew` here); empty keeps the prompt.
        horizon_alpha: slope α of the weight 1 + α i / (N − 1) of frame i, counted from the rollout's beginning,
            wherever the scored part lies.
        horizon_normalize: divides that weight by its mean.
        guidance_scale: w of the teacher's cond + w (cond − uncond).
        critic_ratio: critic updates per student update.
        student, critic: their optimizers.
        ema_decay: of the student's weights, from iteration `ema_start` on.
        shift: warp of the score's noise level.
        min_timestep, max_timestep: range that the score's timestep is clipped to.
        cache_gradient: whether a chunk's loss reaches the keys and values of earlier chunks. `stop`: it does not.
            `straight_through`: it does, through all that the cache holds; the numbers are those of the clean pass, the
            gradient that of the pass before it. Self-Forcing's released trainer does this: a chunk's last noisy pass
            stays in the cache's autograd graph, and the clean pass overwrites its numbers only; in the reference file
            `train_step` this is 13 % of the gradient's L2 norm. `window`: so through the window, but not through the
            anchor: the released habit with the paper's detached recurrence. `state`: through an adaptive state alone,
            as the last and the clean pass of a chunk made it of the state before.
        cache_gradient_chunks: how many chunks back a chunk's loss goes through the `state`; each takes two more passes
            with their gradients, and as much memory.
    """

    steps: int = 1000
    batch_size: int = 4
    accumulate: int = 1
    rollout_frames: int = 21
    scored_frames: int = 0
    scored_every: int = 0
    continue_rollout: bool = False
    overlap_frames: int = 0
    prompt_change: str = ""
    horizon_alpha: float = 2.0
    horizon_normalize: bool = False
    guidance_scale: float = 3.0
    critic_ratio: int = 5
    student: OptimizerConfig = OptimizerConfig()
    critic: OptimizerConfig = OptimizerConfig(learning_rate=4e-7)
    ema_decay: float = 0.99
    ema_start: int = 200
    shift: float = 5.0
    min_timestep: float = 20.0
    max_timestep: float = 980.0
    cache_gradient: str = "stop"
    cache_gradient_chunks: int = 1

    def __post_init__(self):
        require_positive(
            self, "steps", "batch_size", "rollout_frames", "critic_ratio", "shift", "cache_gradient_chunks"
        )
        require_decay(self)
        require_micro_batches(self)
        self._require_parts()
        if self.horizon_alpha < 0 or self.ema_start < 0:
            raise ValueError("horizon_alpha and ema_start must not be negative")
        if self.cache_gradient not in CACHE_GRADIENTS:
            raise ValueError(f"cache_gradient must be one of {', '.join(CACHE_GRADIENTS)}, got {self.cache_gradient!r}")
        if not 0 <= self.min_timestep <= self.max_timestep <= MAX_TIMESTEP:
            raise ValueError(f"0 <= min_timestep <= max_timestep <= 1000, got {self.min_timestep}, {self.max_timestep}")

    def _require_parts(self) -> None:
        """Raises ValueError if the rollout has no such parts."""
        if min(self.scored_frames, self.scored_every, self.overlap_frames) < 0:
            raise ValueError("scored_frames, scored_every and overlap_frames must not be negative")
        if self.scored_every and (self.continue_rollout or not self.scored_frames):
            raise ValueError(f"scored_every {self.scored_every} is for windows: set scored_frames, or leave it")
        if self.scored_every > max(self.rollout_frames - self.scored_frames, 0):
            raise ValueError(
                f"scored_every {self.scored_every} leaves the first window alone of rollout_frames "
                f"{self.rollout_frames}: lengthen the rollout, or set it to less"
            )
        if self.scored_frames > self.rollout_frames:
            raise ValueError(
                f"scored_frames {self.scored_frames} are more than rollout_frames {self.rollout_frames}: lengthen the "
                "rollout, or score fewer"
            )
        if not self.continue_rollout:
            for field in ("overlap_frames", "prompt_change"):
                if value := getattr(self, field):
                    raise ValueError(f"{field} {value} is for rollouts that go on: set continue_rollout, or leave it")
            return
        new = self.clip_frames - self.overlap_frames
        if new <= 0:
            raise ValueError(f"overlap_frames {self.overlap_frames} leave nothing new of {self.clip_frames} frames")
        if odd := (self.rollout_frames - self.clip_frames) % new:
            raise ValueError(
                f"rollout_frames {self.rollout_frames} are no whole number of segments, the first of {self.clip_frames}"
                f" frames and later ones of {new}: set it to {self.rollout_frames - odd} or "
                f"{self.rollout_frames - odd + new}"
            )
        if self.prompt_change and self.prompt_change not in PROMPT_CHANGES:
            known = ", ".join(PROMPT_CHANGES)
            raise ValueError(f"prompt_change must be empty or one of {known}, got {self.prompt_change!r}")
        if self.prompt_change and self.segments == 1:
            raise ValueError("prompt_change needs a rollout of at least two segments; lengthen rollout_frames")

    @property
    def clip_frames(self) -> int:
        """Content frames that critic and teacher see at once."""
        return self.scored_frames or self.rollout_frames

    @property
    def passes_with_gradient(self) -> int:
        """Of the student, for a chunk: the one whose output it is, and two of each chunk that its state goes back."""
        return 1 + 2 * self.cache_gradient_chunks if self.cache_gradient == "state" else 1

    @property
    def segments(self) -> int:
        """Updates that a rollout which goes on takes."""
        return 1 + (self.rollout_frames - self.clip_frames) // (self.clip_frames - self.overlap_frames)

    def updates_student(self, iteration: int) -> bool:
        """Whether this iteration (from 0) updates the student before the critic."""
        return iteration % self.critic_ratio == 0

    def update_numbers(self, iteration: int) -> dict[str, int]:
        """The place of this iteration's updates, by network, among all updates of the stage, from 0.

        Each update draws prompts of its own, one batch after another, as Self-Forcing's trainer does.
        """
        before = iteration + -(-iteration // self.critic_ratio)
        networks = ("student", "critic") if self.updates_student(iteration) else ("critic",)
        return {network: before + i for i, network in enumerate(networks)}

    def update_of(self, number: int) -> tuple[int, int]:
        """The iteration of an update, and which of that iteration's it is: 0 of the student, 1 of the critic."""
        rounds, place = divmod(number, self.critic_ratio + 1)
        return rounds * self.critic_ratio + max(place - 1, 0), min(place, 1)


def num_chunks(frames: int, stream: StreamConfig) -> int:
    """Chunks of a rollout of `frames` content frames; raises ValueError if there is no such rollout to train on."""
    if stream.anchor.joint or stream.first_denoising_steps or stream.timesteps:
        raise ValueError(
            "distillation rolls out chunk by chunk with one step list, its timesteps not stated; choose another stream"
        )
    if stream.anchor.restarts and frames > stream.num_fill_chunks * stream.chunk_frames:
        raise ValueError("a rollout of this stream ends where it restarts; shorten distill.rollout_frames")
    if frames < 1 or frames % stream.chunk_frames:
        raise ValueError(f"{frames} rollout frames are no whole number of chunks of {stream.chunk_frames} frames")
    return frames // stream.chunk_frames
