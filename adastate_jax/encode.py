"""The encode command: a folder of videos into a data set of the latents of their clips, for training."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

from collections.abc import Sequence
from pathlib import Path

from adastate_jax.console import CommandParser, run_command, starting
from adastate_jax.errors import UserError
from adastate_jax.files import existing_name, what_lies_near
from adastate_jax.generation.data_sets import add_options, job_of
from adastate_jax.interrupts import if_stopped

_DESCRIPTION = """Encodes the clips of a folder of videos with a converted video autoencoder, once, into a data set for
training. Stopped or killed, the same command goes on with the shard it was at, and ends with the same bytes."""
_EXAMPLE = """example:
  python -m adastate_jax.encode --checkpoint=weights --videos=videos --output=data/clips
  python -m adastate_jax.embed --checkpoint=weights --prompts=data/clips/captions.jsonl --output=data/captions

--checkpoint is a folder with vae, which convert wrote. Clips are cut as train cuts them: each lies within one shot,
and is scaled and cropped to fit. Captions are NAME.txt beside each video, or captions.json in the folder."""


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m adastate_jax.encode", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of video files")
    for name, default, help in (
        ("height", 480, "of the clips in pixels"),
        ("width", 832, "of the clips in pixels"),
        ("frames", 81, "of a clip; one, and then whole latents of four"),
        ("fps", 16, "frames per second of the clips, whatever the files'"),
        ("stride", 0, "frames from one clip to the next; 0 is a whole clip"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the latents (default %(default)s)"
    )
    add_options(parser, "clips", batch_size=1)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and encodes."""
    options = _parser().parse_args(arguments)
    job = job_of(options, "height", "width", "frames", "fps")
    if options.stride < 0:
        raise UserError(f"--stride={options.stride}: must not be negative")
    if not existing_name(options.videos).is_dir():
        raise UserError(f"--videos={options.videos}: no such folder{what_lies_near(options.videos)}")
    starting()
    from adastate_jax.data.footage import ClipConfig
    from adastate_jax.generation.clip_sets import write_clip_set

    clips = ClipConfig(options.height, options.width, options.frames, options.fps, options.stride)
    with if_stopped("the same command goes on"):
        write_clip_set(job, options.videos, clips, options.dtype)
    return 0


if __name__ == "__main__":
    run_command(main)
