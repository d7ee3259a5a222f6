"""The embed command: a file of prompts into a data set of their embeddings, which training reads in their place."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

from collections.abc import Sequence
from pathlib import Path

from adastate_jax.console import CommandParser, run_command, starting
from adastate_jax.errors import UserError
from adastate_jax.files import what_lies_near
from adastate_jax.generation.data_sets import add_options, job_of
from adastate_jax.interrupts import if_stopped
from adastate_jax.texts import is_text

_DESCRIPTION = """Encodes the prompts of a file with a converted text encoder, once, into a data set for training.
Stopped or killed, the same command goes on with the shard it was at, and ends with the same bytes."""
_EXAMPLE = """example:
  python -m adastate_jax.embed --checkpoint=weights --prompts=prompts.txt --output=data/prompts

--checkpoint is a folder with text_encoder, which convert wrote, and tokenizer.json. A file of prompts has one per line,
or is JSON lines with a field "prompt", as encode writes the captions of its clips. The empty prompt and the negative
ones are always encoded, too."""


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m adastate_jax.embed", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file, or .jsonl")
    parser.add_argument(
        "--negative-prompt",
        action="append",
        metavar="TEXT",
        help="what a teacher is guided away from; may be given several times (default: Wan2.1's)",
    )
    parser.add_argument("--text-length", type=int, default=512, metavar="N", help="tokens at most (default 512)")
    add_options(parser, "prompts", batch_size=8)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and embeds."""
    options = _parser().parse_args(arguments)
    job = job_of(options, "text_length")
    if not options.prompts.is_file():
        raise UserError(f"--prompts={options.prompts}: no such file{what_lies_near(options.prompts)}")
    if not all(map(is_text, options.negative_prompt or ())):
        raise UserError("--negative-prompt: is not UTF-8 text")
    starting()
    from adastate_jax.generation.prompt_sets import write_prompt_set

    with if_stopped("the same command goes on"):
        write_prompt_set(job, options.prompts, options.negative_prompt, options.text_length)
    return 0


if __name__ == "__main__":
    run_command(main)
