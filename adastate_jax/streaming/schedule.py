"""What a stream is to be, and which chunk of it sees what: static descriptions, nothing is computed here."""

import dataclasses

from adastate_jax.diffusion import MAX_TIMESTEP, denoising_sigmas
from adastate_jax.fields import one_of
from adastate_jax.streaming.anchors import ANCHORS, make_anchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.layout import Layout, consecutive

CUT_POSITION = 45  # of the first content frame behind a scene cut. Source: Infinity-RoPE, arXiv 2511.20649


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How a stream is generated; the defaults are AdaState's.

    Attributes:
        chunk_frames: content latent frames per chunk, F.
        past_frames: content frames kept in the window, W_p.
        anchor: the anchor strategy, with its frames F_s.
        denoising_steps: raw step list on 0..1000, strictly decreasing.
        shift: warp of the step list.
        timesteps: what the network is told at each denoising step, on 0..1000, where that is not 1000 σ (CausVid);
            empty is 1000 σ.
        first_denoising_steps: another step list for the first chunk that is generated (Causal-Forcing++): the stream's
            first, or behind frames that are given; empty is the same.
        repeat_noise: starts every chunk from the first one's noise (Rolling-Sink); re-noising stays fresh.
    """

    chunk_frames: int = 3
    past_frames: int = 3
    anchor: NoAnchor = one_of(ANCHORS, make_anchor, "adaptive")
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    timesteps: tuple[float, ...] = ()
    first_denoising_steps: tuple[float, ...] = ()
    repeat_noise: bool = False

    def __post_init__(self):
        if self.chunk_frames < 1 or self.past_frames < 0:
            raise ValueError(
                f"chunk_frames must be at least 1 and past_frames at least 0, got {self.chunk_frames} and "
                f"{self.past_frames}"
            )
        self.anchor.check(self.chunk_frames, self.past_frames)
        before_steady = self.num_fill_chunks * self.chunk_frames
        if self.anchor.frames > before_steady:
            raise ValueError(
                f"an anchor of {self.anchor.frames} frames cannot be taken from the {before_steady} frames before "
                "the first eviction; enlarge past_frames or chunk_frames, or shrink the anchor"
            )
        denoising_sigmas(self.denoising_steps, self.shift)
        if self.timesteps:
            if len(self.timesteps) != len(self.denoising_steps):
                raise ValueError(
                    f"timesteps must be as many as denoising_steps, {len(self.denoising_steps)}, got {self.timesteps}"
                )
            if not all(0 < timestep <= MAX_TIMESTEP for timestep in self.timesteps):
                raise ValueError(f"timesteps must lie within (0, 1000], got {self.timesteps}")
            if self.anchor.joint:
                raise ValueError("timesteps must be empty where chunks are denoised jointly")
        if self.first_denoising_steps:
            denoising_sigmas(self.first_denoising_steps, self.shift)
            if self.anchor.joint:
                raise ValueError("first_denoising_steps must be empty where chunks are denoised jointly")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of each denoising step."""
        return denoising_sigmas(self.denoising_steps, self.shift)

    @property
    def first_sigmas(self) -> tuple[float, ...]:
        """Noise level of each denoising step of the first chunk that is generated."""
        return denoising_sigmas(self.first_denoising_steps or self.denoising_steps, self.shift)

    @property
    def num_fill_chunks(self) -> int:
        """Chunks before the steady state; from then on shapes, positions and program repeat for ever."""
        return -(-self.anchor.fill_frames(self.past_frames) // self.chunk_frames)

    @property
    def live_chunks(self) -> int:
        """Chunks denoised together: one per noise level if jointly, else one."""
        return len(self.denoising_steps) if self.anchor.joint else 1

    @property
    def cycle(self) -> tuple["Phase", ...]:
        """The phases that repeat behind the fill: one steady phase; with restarts, all but the fill's first."""
        length = self.num_fill_chunks - 1 if self.anchor.restarts else 1
        return tuple(phase_of(self.num_fill_chunks + i, self) for i in range(length))


@dataclasses.dataclass(frozen=True)
class Phase:
    """What distinguishes one compiled step from another.

    Attributes:
        first_frame: index in the stream (behind a restart, in its rollout) of the chunk's first frame during the fill;
            None in the steady state.
        cut: whether a scene cut precedes the chunk.
        live_chunks: chunks denoised together, this one the oldest.
        window_frames: how many of the window's frames are seen, the newest, where some are forgotten; None is all.
        begins: whether the chunk is the first that is generated, where that one has denoising steps of its own.
    """

    first_frame: int | None
    cut: bool = False
    live_chunks: int = 1
    window_frames: int | None = None
    begins: bool = False

    @property
    def steady(self) -> bool:
        return self.first_frame is None


def phase_of(
    chunk: int, config: StreamConfig, cut: bool = False, remaining: int | None = None, given_chunks: int = 0
) -> Phase:
    """The phase of chunk number `chunk` (from 0).

    Args:
        cut: whether a scene cut precedes the chunk: its content moves far from all that it sees, for this chunk only.
        remaining: chunks from this one to the end of the video; None is no end in sight. Only where chunks are denoised
            jointly does the end matter: fewer and fewer are left to be denoised.
        given_chunks: how many of the stream's first chunks are given whole.
    """
    begins = bool(config.first_denoising_steps) and chunk == given_chunks
    fill = config.num_fill_chunks
    if config.anchor.restarts and chunk >= fill:
        chunk = 1 + (chunk - fill) % (fill - 1)
    live_chunks = config.live_chunks if remaining is None else min(config.live_chunks, remaining)
    return Phase(chunk * config.chunk_frames if chunk < fill else None, cut, live_chunks, begins=begins)


def layout_of(phase: Phase, config: StreamConfig) -> Layout:
    """Positions of everything that a chunk in this phase sees while it is denoised."""
    frames = phase.live_chunks * config.chunk_frames
    layout = config.anchor.layout(phase.first_frame, config.past_frames, frames)
    if phase.window_frames is not None:
        behind = config.anchor.frames if phase.steady else phase.first_frame - phase.window_frames
        anchor = min(config.anchor.frames, behind)
        layout = consecutive(anchor, len(layout.state), phase.window_frames, frames)
    if not phase.cut:
        return layout
    if layout.content[0] > CUT_POSITION:
        raise ValueError(
            f"a scene cut to position {CUT_POSITION} needs fewer than {layout.content[0]} frames before it"
        )
    return dataclasses.replace(layout, content=tuple(range(CUT_POSITION, CUT_POSITION + frames)))


def clean_layout_of(phase: Phase, config: StreamConfig) -> Layout:
    """Positions of everything that a finished chunk sees in its clean pass.

    The same as while it was denoised; after joint denoising, the whole window, without the anchor.
    """
    if not config.anchor.joint:
        return layout_of(phase, config)
    window = config.past_frames if phase.steady else min(phase.first_frame, config.past_frames)
    return consecutive(0, 0, window, config.chunk_frames)


def restarts_after(phase: Phase, config: StreamConfig) -> bool:
    """Whether the stream starts afresh from this phase's chunk."""
    return config.anchor.restarts and phase.first_frame == (config.num_fill_chunks - 1) * config.chunk_frames


def sigmas_of(phase: Phase, config: StreamConfig) -> tuple[float, ...]:
    """Noise level of each denoising step of a chunk in this phase."""
    return config.first_sigmas if phase.begins else config.sigmas


def timesteps_of(phase: Phase, config: StreamConfig) -> tuple[float, ...]:
    """What the network is told at each denoising step of a chunk in this phase, on 0..1000."""
    if config.timesteps and not phase.begins:
        return config.timesteps
    return tuple(MAX_TIMESTEP * sigma for sigma in sigmas_of(phase, config))
