"""Errors that a user caused and can fix, and how commands report them."""

import logging
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Bad input: the message is one line that names the culprit (a file, a field) and the fix."""


def run_command(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main(argv)` and exits: its return code (None is 0), or 2 with one line for a `UserError`.

    What the package logs (which attention backend serves, for one) goes to stderr.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        code = main(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
