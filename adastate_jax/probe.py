"""The probe command: which cached frames a stream's attention goes to, as numbers and as a figure."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adastate_jax.console import CommandParser, progress, run_command
from adastate_jax.errors import UserError
from adastate_jax.evaluation.attention_probe import ChunkShares, check_probe, probe_stream
from adastate_jax.evaluation.plots import attention_shares
from adastate_jax.generation.loading import Model, load, stream_config
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.schedule import StreamConfig

_EXAMPLE = """example:
  python -m adastate_jax.probe --checkpoint=tiny --prompt="a camera pans left over green hills with a red ball" \\
      --anchors static adaptive --past-frames 3 6 --chunks 5 20 --output=probe"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.probe",
        description="Measures which cached frames the frames being denoised attend to: per denoising step, chunk and "
        "layer, averaged over heads, and renormalised over the frames that are not the query's own.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR|tiny", help="as sample's")
    parser.add_argument("--prompt", action="append", required=True, help="what to show; may be given several times")
    parser.add_argument("--anchors", nargs="+", metavar="NAME", help="anchors (default: the model's own)")
    parser.add_argument(
        "--past-frames", nargs="+", type=int, metavar="N", help="window sizes (default: the anchor's own)"
    )
    parser.add_argument(
        "--chunks", nargs="+", type=int, default=[5], metavar="K", help="numbers of the chunks to look at (default 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise of the first prompt (default 0)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for probe.json and probe.png")
    return parser


def _streams(options: argparse.Namespace, config: StreamConfig) -> dict[tuple[str, int], StreamConfig]:
    """Each combination of anchor and window; refused before anything is generated."""
    found = {}
    for name in options.anchors or [None]:
        named = stream_config(config, name)
        for past_frames in options.past_frames or [named.past_frames]:
            try:
                stream = dataclasses.replace(named, past_frames=past_frames)
            except ValueError as error:
                raise UserError(f"--past-frames {past_frames}: {error}") from None
            check_probe(stream, options.chunks)
            found[name or "own", past_frames] = stream
    return found


def _probe(model: Model, text, config: StreamConfig, seed: int, prompts: int, chunks: Sequence[int], bar):
    latent_shape = model.config.latent_shape
    carry = initial_carry(model.student.config, config, seed_keys(seed, prompts), *latent_shape[:2])
    for found in probe_stream(model.student, carry, text, config, latent_shape, chunks):
        bar.update()
        yield found


def _as_json(found: Sequence[ChunkShares]) -> list[dict[str, Any]]:
    return [
        {"chunk": one.chunk, "sigmas": one.sigmas, "frames": one.roles, "shares": np.round(one.shares, 6).tolist()}
        for one in found
    ]


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes probe.json and probe.png."""
    options = _parser().parse_args(arguments)
    if min(options.chunks) < 0:
        raise UserError(f"--chunks {min(options.chunks)}: chunks are numbered from 0")
    model = load(options.checkpoint)
    streams = _streams(options, model.config.stream)
    text = jax.jit(DiT.text_keys_values)(model.student, model.embed(options.prompt))
    results: dict[tuple[str, int], list[ChunkShares]] = {}
    with progress("probe", len(streams) * len(set(options.chunks)), unit="chunk") as bar:
        for key, config in streams.items():
            results[key] = [*_probe(model, text, config, options.seed, len(options.prompt), options.chunks, bar)]
    report = {
        "prompts": options.prompt,
        "seed": options.seed,
        "axes of shares": ["denoising step", "layer", "frame"],
        "streams": [
            {"anchor": name, "past_frames": past, "chunks": _as_json(found)} for (name, past), found in results.items()
        ],
    }
    written = json.dumps(report, indent=1, allow_nan=False) + "\n"
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "probe.png").write_bytes(attention_shares(results))
        (options.output / "probe.json").write_text(written)
    except OSError as error:
        raise UserError(f"--output={options.output}: cannot be written ({error.strerror or error})") from None
    print(f"{options.output}/probe.png, {options.output}/probe.json")
    return 0


if __name__ == "__main__":
    run_command(main)
