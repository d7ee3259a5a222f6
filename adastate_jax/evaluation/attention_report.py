"""What the probe command writes: shares of attention for each anchor and window, averaged over prompts."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adastate_jax.errors import UserError
from adastate_jax.evaluation.attention_plot import attention_shares
from adastate_jax.evaluation.attention_probe import ChunkShares, check_probe, probe_stream
from adastate_jax.files import write_bytes, write_text
from adastate_jax.generation.loading import Model, stream_config
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.schedule import StreamConfig

Results = dict[tuple[str, int], list[ChunkShares]]


def chosen_streams(
    config: StreamConfig, anchors: Sequence[str] | None, windows: Sequence[int] | None, chunks: Sequence[int]
) -> dict[tuple[str, int], StreamConfig]:
    """The stream of each combination of anchor and window, by (name, frames of the window).

    Args:
        config: the model's own stream, which is also what serves where `anchors` or `windows` is None.
        chunks: that are to be probed.

    Raises:
        UserError: a combination, or a chunk of it, cannot be probed; before anything is generated.
    """
    found = {}
    for name in anchors or [None]:
        named = stream_config(config, name)
        for past_frames in windows or [named.past_frames]:
            try:
                stream = dataclasses.replace(named, past_frames=past_frames)
            except ValueError as error:
                raise UserError(f"--past-frames {past_frames}: {error}") from None
            check_probe(stream, chunks)
            found[name or "own", past_frames] = stream
    return found


def probe_streams(
    model: Model,
    prompts: Sequence[str],
    streams: Mapping[tuple[str, int], StreamConfig],
    chunks: Sequence[int],
    seed: int,
    advance: Callable[[], Any],
) -> Results:
    """Streams a video of each prompt in each way, and looks where the attention of some chunks goes.

    Args:
        chunks: numbers of the chunks to look at.
        seed: of the first prompt's noise.
        advance: called after each of them.
    """
    text = jax.jit(DiT.text_keys_values)(model.student, model.embed(prompts))
    latent_shape = model.config.latent_shape
    results: Results = {}
    for key, config in streams.items():
        carry = initial_carry(model.student.config, config, seed_keys(seed, len(prompts)), *latent_shape[:2])
        results[key] = []
        for found in probe_stream(model.student, carry, text, config, latent_shape, chunks):
            results[key].append(found)
            advance()
    return results


def write_report(folder: Path, results: Results, prompts: Sequence[str], seed: int) -> None:
    """Writes probe.json and probe.png; raises OSError if they cannot be written."""
    report = {
        "prompts": list(prompts),
        "seed": seed,
        "axes of shares": ["denoising step", "layer", "frame"],
        "streams": [
            {"anchor": name, "past_frames": past, "chunks": [_as_json(one) for one in found]}
            for (name, past), found in results.items()
        ],
    }
    write_bytes(folder / "probe.png", attention_shares(results))
    write_text(folder / "probe.json", json.dumps(report, indent=1, allow_nan=False) + "\n")


def _as_json(found: ChunkShares) -> dict[str, Any]:
    shares = np.round(found.shares, 6).tolist()
    return {"chunk": found.chunk, "sigmas": found.sigmas, "frames": found.roles, "shares": shares}
