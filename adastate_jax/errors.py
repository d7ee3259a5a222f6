"""Errors that a user caused and can fix."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: the message is one line that names the culprit (a file, a field) and the fix."""


def shortlist(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
