"""All commands by name: `adastate sample …`, as a script or `python -m adastate_jax sample …`."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import importlib
from collections.abc import Sequence

from adastate_jax import __version__
from adastate_jax.console import did_you_mean, run_command
from adastate_jax.errors import UserError

COMMANDS = {
    "sample": "streams a video from a prompt into a file",
    "serve": "serves a page where a stream runs, and a person steers it",
    "watch": "steers a served session from a terminal, and saves it",
    "train": "trains a configuration's stages, and resumes",
    "evaluate": "measures motion and drift of videos, and writes a report",
    "probe": "measures which cached frames the attention goes to",
    "bench": "measures speed and memory on this device",
    "convert": "turns published weights into folders of this package, and back",
    "embed": "encodes prompts into a data set that training reads",
    "encode": "encodes videos into a data set that training reads",
    "bundle": "packs what a finished run generates with into one file",
    "verify": "compares this package's numbers with the official code's",
}


def _list() -> str:
    lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: adastate COMMAND [--help] …", "", "commands:", *lines])


def _dispatch(arguments: Sequence[str]) -> int | None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_list())
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS) or f"; use one of {', '.join(COMMANDS)}"
        raise UserError(f"{name}: no such command{meant}")
    else:
        return importlib.import_module(f"adastate_jax.{name}").main(arguments[1:])
    return 0


def main() -> None:
    """The console script: runs the command that the first argument names, or lists all."""
    run_command(_dispatch)


if __name__ == "__main__":
    main()
