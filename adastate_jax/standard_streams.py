"""stdout and stderr of a command: that nobody reads them, or that a disk is full, stops no work."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class _Output:
    """A standard stream whose failure stops nothing: what cannot be written is dropped, and the failure kept."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: OSError | ValueError) -> None:
        """Points the descriptor to nowhere, or what is left in the stream's buffer fails again at the process' end."""
        if isinstance(error, ValueError) and not self._stream.closed:  # a library may have closed it
            raise error
        self.failure = self.failure or error
        if self._stream.closed:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def unfailing() -> Iterator[_Output]:
    """Makes stdout, which is yielded, and stderr such that writing to them never fails; what was closed is nowhere."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a test's
            stream.reconfigure(errors="backslashreplace")
    try:
        yield sys.stdout
    finally:
        sys.stdout, sys.stderr = before
