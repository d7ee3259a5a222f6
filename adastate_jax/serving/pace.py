"""When the next chunk may be generated: the picture leads its viewer by one chunk at most. The clock is handed in."""

_AHEAD = 0.75  # of a chunk's own duration; a viewer who shows faster than that is made to wait


class Pace:
    """Of one session.

    Args:
        seconds: that a chunk is shown for.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._last: float | None = None

    def wait(self, now: float, lead: int) -> float | None:
        """Seconds until the next chunk may be generated; None before the viewer has shown another.

        lead: chunks that are generated and not shown.
        """
        if lead >= 1:
            return None
        return 0.0 if self._last is None else max(0.0, self._last + _AHEAD * self._seconds - now)

    def begun(self, now: float) -> None:
        """The next chunk is being generated."""
        self._last = now
