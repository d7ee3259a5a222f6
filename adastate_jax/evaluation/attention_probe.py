"""The attention probe: which cached frames the frames that are being denoised look at.

Source: AdaState (arXiv 2605.30349), section 3.1: softmax probabilities over the keys are summed per frame, averaged
over the heads, and renormalised over the frames that are not the query's own.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.diffusion import add_noise
from adastate_jax.errors import UserError
from adastate_jax.models.attention import Attend, KeyValues, attention, concatenate
from adastate_jax.models.dit import DiT
from adastate_jax.models.rope import rotate
from adastate_jax.streaming.carry import RolloutCarry, draw_noise
from adastate_jax.streaming.denoising import denoise, live_noise, read_context
from adastate_jax.streaming.rollout import stream_step
from adastate_jax.streaming.schedule import Phase, StreamConfig, layout_of, phase_of, sigmas_of, timesteps_of

_MOST_QUERIES = 256  # at once: against 12 frames of 480×832 and 12 heads, their scores take 230 MB


def frame_masses(query: jax.Array, key: jax.Array, frame_tokens: int) -> jax.Array:
    """Softmax mass that the queries of each frame give to the keys of each frame, averaged over heads and queries.

    Scores exist for a few hundred queries at a time only.

    Args:
        query: rotated, [B, Q · frame_tokens, heads, head_dim].
        key: rotated, [B, K · frame_tokens, heads, head_dim].

    Returns:
        [B, Q, K] float32; every row sums to one.
    """
    block = max(size for size in range(1, _MOST_QUERIES + 1) if frame_tokens % size == 0)
    blocks = einops.rearrange(query, "b (n q) h d -> n b q h d", q=block).astype(jnp.float32)
    key = key.astype(jnp.float32)

    def masses(block: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", block, key) / np.sqrt(query.shape[-1])
        weights = jax.nn.softmax(scores, axis=-1)
        return einops.reduce(weights, "b h q (f s) -> b f", "sum", s=frame_tokens) / (block.shape[1] * block.shape[2])

    return einops.reduce(jax.lax.map(masses, blocks), "(q n) b f -> b q f", "mean", n=frame_tokens // block)


def _attend_and_weigh(backend: str, frame_tokens: int) -> Attend:
    """`attend_all` that keeps each layer's `frame_masses` beside its keys and values."""

    def attend(query, key, value, rotation, context):
        live = KeyValues(rotate(key, rotation), value)
        seen = live if context is None else concatenate(context, live)
        query = rotate(query, rotation)
        masses = frame_masses(query, seen.key, frame_tokens)
        return attention(query, seen.key, seen.value, backend), (KeyValues(key, value), masses)

    return attend


@functools.partial(jax.jit, static_argnames=("config", "latent_shape", "phase"))
def probe_chunk(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    phase: Phase,
) -> jax.Array:
    """Attention masses of the carry's next chunk, which is denoised as the stream would and then forgotten.

    Args:
        model, carry, text, config, latent_shape, phase: as `stream_step`; nothing is donated.

    Returns:
        [T, layers, B, F_s + F, K] float32: at each denoising step, of each live frame (state first), over the frames
        that it sees: anchor, window, state, content.
    """
    layout = layout_of(phase, config)
    noises = live_noise(draw_noise(carry, config, latent_shape), layout)
    context = read_context(model.config, carry.cache, config, layout, noises[0])
    attend = _attend_and_weigh(model.config.attention, model.config.frame_tokens(*latent_shape[:2]))
    live, steps, sigmas = noises[0], [], sigmas_of(phase, config)
    for step, (sigma, timestep) in enumerate(zip(sigmas, timesteps_of(phase, config), strict=True)):
        clean, (_, masses) = denoise(model, live, sigma, text, layout, context, attend, timestep)
        if step + 1 < len(sigmas):
            live = add_noise(clean, noises[step + 1], sigmas[step + 1])
        steps.append(masses)
    return jnp.stack(steps)


def context_shares(masses: np.ndarray, state_frames: int) -> np.ndarray:
    """Where content frames look when they do not look at themselves.

    Args:
        masses: [..., F_s + F, K] of `frame_masses`, live frames last among the K and in the same order.
        state_frames: F_s.

    Returns:
        [..., K − F + 1]: shares of the anchor, window and state frames, and last that of the chunk's other content
        frames together; averaged over the content frames. They sum to one. A content frame that is all that there is
        looks nowhere else: `check_probe` refuses it.
    """
    content = masses.shape[-2] - state_frames
    others = masses.shape[-1] - content
    rows = masses[..., state_frames:, :]
    own = np.stack([rows[..., frame, others + frame] for frame in range(content)], axis=-1)  # [..., F]
    elsewhere = 1.0 - own
    shares = rows[..., :others] / elsewhere[..., None]
    siblings = (rows[..., others:].sum(axis=-1) - own) / elsewhere
    return np.concatenate([shares, siblings[..., None]], axis=-1).mean(axis=-2)


@dataclasses.dataclass(frozen=True)
class ChunkShares:
    """Attention of one chunk.

    Attributes:
        chunk: its number in the stream.
        sigmas: noise level of each denoising step, [T].
        roles: what stands where: anchor, state or window of each frame, by position in time; last, `siblings`.
        shares: [T, layers, roles], see `context_shares`; averaged over the samples.
    """

    chunk: int
    sigmas: tuple[float, ...]
    roles: tuple[str, ...]
    shares: np.ndarray


def check_probe(config: StreamConfig, chunks: Sequence[int]) -> None:
    """Raises UserError if chunks are denoised jointly, or one of these sees nothing but a single frame of its own."""
    if config.anchor.joint:
        raise UserError(f"{type(config.anchor).__name__} denoises chunks jointly; there is no single one to probe")
    for chunk in chunks:
        layout = layout_of(phase_of(chunk, config), config)
        if len(layout.cached + layout.live) == 1:
            fix = "enlarge past_frames" if chunk else "probe a later one"
            raise UserError(f"chunk {chunk} of a frame-wise stream sees no other frame; {fix}")


def probe_stream(
    model: DiT,
    carry: RolloutCarry,
    text: KeyValues,
    config: StreamConfig,
    latent_shape: tuple[int, int, int],
    chunks: Sequence[int],
) -> Iterator[ChunkShares]:
    """Streams from `carry` and probes some chunks on the way.

    Args:
        model, carry, text, config, latent_shape: as `stream`; the carry is donated.
        chunks: numbers of the chunks to probe, none before the carry's next one.

    Yields:
        One result per chunk of `chunks`, in ascending order.

    Raises:
        UserError: as `check_probe`.
    """
    check_probe(config, chunks)
    wanted = sorted(set(chunks))
    for chunk in range(int(carry.chunk), wanted[-1] + 1):
        phase = phase_of(chunk, config)
        if chunk in wanted:
            layout = layout_of(phase, config)
            masses = np.asarray(probe_chunk(model, carry, text, config, latent_shape, phase))
            parts = (("anchor", layout.anchor), ("window", layout.window), ("state", layout.state))
            roles = [name for name, frames in parts for _ in frames]
            in_time = [*np.argsort(layout.cached + layout.state), len(roles)]
            shares = context_shares(masses, len(layout.state)).mean(axis=2)[..., in_time]
            named = tuple([*roles, "siblings"][place] for place in in_time)
            yield ChunkShares(chunk, sigmas_of(phase, config), named, shares)
        if chunk < wanted[-1]:
            carry, _ = stream_step(model, carry, text, config, latent_shape, phase)
