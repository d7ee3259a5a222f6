"""All commands by name: `adastate sample …`, or `python -m adastate_jax sample …`, is `python -m adastate_jax.sample …`."""

import importlib
import sys

from adastate_jax import interrupts

COMMANDS = {
    "sample": "streams a video from a prompt into a file",
    "train": "trains a configuration's stages, and resumes",
    "evaluate": "measures motion and drift of videos, and writes a report",
    "probe": "measures which cached frames the attention goes to",
    "bench": "measures speed and memory on this device",
    "convert": "turns published weights into folders of this package, and back",
    "bundle": "packs what a finished run generates with into one file",
    "verify": "compares this package's numbers with the official code's",
}


def _list() -> str:
    lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: adastate COMMAND [--help] …", "", "commands:", *lines])


def main() -> None:
    """The console script: runs the command that the first argument names, or lists all."""
    interrupts.install()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_list())
    elif name == "--version":
        from adastate_jax import __version__

        print(__version__)
    elif name not in COMMANDS:
        print(f"error: {name!r} is no command; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        from adastate_jax.console import run_command

        run_command(importlib.import_module(f"adastate_jax.{name}").main, sys.argv[2:])


if __name__ == "__main__":
    main()
