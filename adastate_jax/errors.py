"""Errors that a user caused and can fix."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input: the message is one line that names the culprit (a file, a field) and the fix."""


def shortlist(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def shown(value: object, limit: int = 80) -> str:
    """A value of somebody else's as an error shows it: its `repr`, cut short, whatever it is.

    Lists that hold themselves, nesting of any depth and integers of any length are shown as what they are.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or nested too deeply
        text = f"{type(value).__name__} of more than can be shown"
    return text if len(text) <= limit else f"{text[:limit]}…"


def one_line(message: str, limit: int = 2000) -> str:
    """A message as one line of a terminal: white space becomes single spaces, what is not to be seen is escaped.

    Names and values in it may be those of a hostile file, with control characters that move the cursor, colour what
    follows or set the window's title, or that reverse the direction of writing; or a megabyte long: of more than
    `limit` characters the middle is left out.
    """
    text = " ".join(message.split())
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
