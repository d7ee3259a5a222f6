"""The watch command: steers a served session from a terminal, or looks on; saves it, and says how long things took."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command, starting
from adastate_jax.errors import UserError, writing
from adastate_jax.files import what_lies_near, whole_file
from adastate_jax.streaming.cues import read_schedule

_EXAMPLE = """examples:
  python -m adastate_jax.watch http://127.0.0.1:8000/ --prompts=story.txt --seconds=20 --output=story.mp4
  python -m adastate_jax.watch "http://127.0.0.1:8000/#watch=…" --seconds=10"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.watch",
        description="Steers a session of the serve command along a schedule, or watches one, without a browser.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("url", metavar="URL", help="what serve printed, or a watch link")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a schedule as of the sample command, given while the stream runs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--anchors", nargs="+", metavar="NAME", help="one, or two side by side (default: the server's)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the stream (default 10)")
    parser.add_argument("--session", type=Path, metavar="FILE", help="saves the session's file, too")
    parser.add_argument("--json", action="store_true", help="prints the latencies as JSON")
    output_argument(parser, "an .mp4", default="watched.mp4")
    return parser


def _print(report: dict, as_json: bool) -> None:
    """To stdout where it was asked for as JSON, which then has nothing else; else beside the files' names."""
    if as_json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name.replace('_', ' '):28}{value}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, follows the session, and saves it."""
    options = _parser().parse_args(arguments)
    if not math.isfinite(options.seconds) or options.seconds <= 0:
        raise UserError(f"--seconds={options.seconds}: must be positive")
    output = options.output or options.default_output
    if output.suffix != ".mp4":
        raise UserError(f"--output={output}: must end in .mp4")
    if options.prompts and not options.prompts.is_file():
        raise UserError(f"--prompts={options.prompts}: no such file{what_lies_near(options.prompts)}")
    cues = read_schedule(options.prompts) if options.prompts else ()
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(claimed_output(options))
        starting("the client")
        from adastate_jax.serving.client import Client

        client = Client(options.url)
        if client.watches and (cues or options.anchors):
            raise UserError("--prompts and --anchors: a watch link does not steer")
        client.begin(cues[0].prompt if cues else None, options.seed, options.anchors)
        with progress("watch", math.ceil(options.seconds), unit="s") as bar:
            client.follow(options.seconds, cues[1:], lambda seconds: bar.update(int(seconds) - bar.n))
        if not client.watches:
            client.finish()
        names = sys.stderr if options.json else sys.stdout
        for file, name in ((path, "video.mp4"), (options.session, "session.json")):
            if file:
                with writing(file), whole_file(file) as temporary:
                    temporary.write_bytes(client.fetch(name))
                print(file, file=names)
    _print(client.report(), options.json)
    return 0


if __name__ == "__main__":
    run_command(main)
