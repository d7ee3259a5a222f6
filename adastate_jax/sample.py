"""The sample command: a prompt and a model in, an mp4 out, streamed to disk as chunks arrive."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adastate_jax.config.files import parse_config
from adastate_jax.console import CommandParser, progress, run_command
from adastate_jax.errors import UserError
from adastate_jax.generation.loading import Model, load, num_given_frames
from adastate_jax.generation.video_stream import stream
from adastate_jax.media import FPS, VideoWriter, read_image, read_last_frames
from adastate_jax.streaming.presets import STREAM_NAMES
from adastate_jax.streaming.prompts import TRANSITIONS, read_schedule

_EXAMPLE = """examples:
  python -m adastate_jax.sample --checkpoint=tiny --prompt="a camera pans left over green hills with a red ball" \\
      --seconds=30 --output=hills.mp4
  python -m adastate_jax.sample --checkpoint=runs/tiny --prompt="a camera pans right over sand dunes with a white ball"
  python -m adastate_jax.sample --checkpoint=weights --prompt="a red fox runs through fresh snow" --seconds=30
  python -m adastate_jax.sample --checkpoint=weights --prompts=story.txt --seconds=60
  python -m adastate_jax.sample --checkpoint=weights --decoder=tiny --image=fox.jpg --prompt="the fox runs on"
  python -m adastate_jax.sample --random-weights --config=configs/tiny.py --prompt="a dry run" --seconds=1"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.sample",
        description="Streams a video of any length from a prompt into an mp4 file.",
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR|tiny",
        help="a folder that train wrote, or a file that bundle made of it; tiny, the one that ships with this package "
        "(a folder of that name goes before it); or a folder of networks that convert wrote (transformer, "
        "text_encoder, vae or tiny_vae) with the text encoder's tokenizer.json",
    )
    parser.add_argument("--prompt", help="what to show")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="instead of --prompt, a schedule: lines of SECOND [TRANSITION] | PROMPT, or a JSON list of objects; "
        f"transitions are {', '.join(TRANSITIONS)}",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help=f"length at {FPS} frames per second (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument(
        "--anchor",
        choices=STREAM_NAMES,
        metavar="NAME",
        help="published stream or bare anchor strategy, instead of what the model is configured for: "
        + ", ".join(STREAM_NAMES),
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture to start from, scaled and cropped to fit")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="clip to continue; the video starts with the clip's last moments"
    )
    parser.add_argument(
        "--decoder", choices=("wan", "tiny"), help="of converted networks: Wan2.1's, or the fast and less sharp TAEW2.1"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="configuration of converted networks (default: as they are, at 480x832)"
    )
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="unused", help="overrides a field of the configuration")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="dry run of --config without any files: networks and text embeddings are random, the video is noise",
    )
    parser.add_argument(
        "--text-cache", type=Path, metavar="DIR", help="keeps prompts' embeddings (default CHECKPOINT/text_cache)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("out.mp4"), metavar="FILE", help="mp4 file (default out.mp4)"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.output.suffix != ".mp4":
        raise UserError(f"--output={options.output}: must end in .mp4")
    if not math.isfinite(options.seconds) or options.seconds <= 0:
        raise UserError(f"--seconds={options.seconds}: must be positive")
    if options.seed < 0:
        raise UserError(f"--seed={options.seed}: must not be negative")
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("--prompt: say what to show, or name a schedule with --prompts instead")
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt: is empty; say what to show")
    if options.image and options.video:
        raise UserError("--image and --video: a video starts from one of them")
    for file in (options.image, options.video):
        if file and not file.is_file():
            raise UserError(f"{file}: no such file")
    if options.random_weights == (options.checkpoint is not None):
        raise UserError("--checkpoint: name a folder, or give --random-weights and --config instead")
    if options.random_weights and not options.config:
        raise UserError("--random-weights: needs --config, for example --config=configs/wan_1_3b.py")


def _load(options: argparse.Namespace, overrides: Sequence[str]) -> Model:
    if overrides and not options.config:
        raise UserError(f"{overrides[0]}: unknown argument, or needs --config; see --help")
    config = parse_config([f"--config={options.config}", *overrides]) if options.config else None
    if options.random_weights:
        print("random: transformer, codec and text embeddings; the video shows noise", file=sys.stderr)
    return load(
        options.checkpoint,
        config,
        decoder=options.decoder,
        random_weights=options.random_weights,
        text_cache=options.text_cache,
    )


def _start(options: argparse.Namespace, model: Model) -> np.ndarray | None:
    """The frames to start from."""
    size = model.config.data.size
    if options.image:
        return read_image(options.image, *size)
    if options.video:
        most = num_given_frames(model.config, sys.maxsize, options.anchor)
        return read_last_frames(options.video, max(most, 1), *size)  # a stream that can start from none says so itself
    return None


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes the video."""
    options, overrides = _parser().parse_known_args(arguments)
    _check(options)
    prompts = read_schedule(options.prompts) if options.prompts else None
    num_frames = math.ceil(options.seconds * FPS)
    try:
        with VideoWriter(options.output) as writer:  # opened first: what cannot be written need not be generated
            model = _load(options, overrides)
            start = _start(options, model)
            with progress("sample (compiling)", num_frames, unit="frame") as bar:
                shown = (model, options.prompt, options.seconds, options.seed, options.anchor)
                for frames in stream(*shown, start=start, prompts=prompts):
                    writer.write(frames)
                    bar.set_description("sample")
                    bar.update(len(frames))
    except KeyboardInterrupt:
        print(f"stopped; {options.output} was not written", file=sys.stderr)
        return 130
    print(f"{options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
