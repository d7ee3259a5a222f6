"""What waits for one viewer: messages in order, and of the pictures the newest. A slow viewer loses frames alone."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from adastate_jax.serving.protocol import Dropped, Message

_MOST_TEXTS = 512
_MOST_CHUNKS = 2  # of which pictures wait
_PATIENCE = 20.0  # seconds that a message may take until the socket has it: who does not read is given up
_MOST_UNSHOWN = 4  # chunks that a viewer was sent and has not shown: what is on its way cannot be taken back


class Viewer:
    """One socket's buffers. The event loop's thread alone uses it."""

    def __init__(self, role: str, client: str):
        self.role, self.client = role, client
        self.dropped = 0
        self.overflow = False  # whether it does not even read its messages
        self._unshown: deque[int] = deque()  # chunks of which pictures were sent
        self._texts: deque[str] = deque()
        self._pictures: deque[tuple[int, int, bytes]] = deque()  # chunk, number of frames, message
        self._news = asyncio.Event()
        self.closing = False

    def say(self, message: Message | str) -> None:
        """Puts a message in the queue; one that was made text for several viewers is taken as it is."""
        if len(self._texts) >= _MOST_TEXTS:
            self.overflow = True
        else:
            self._texts.append(message if isinstance(message, str) else message.model_dump_json())
        self._news.set()

    def show(self, chunk: int, frames: int, message: bytes) -> None:
        """Puts pictures in the queue; the oldest go where there are too many."""
        self._pictures.append((chunk, frames, message))
        while chunk - self._pictures[0][0] >= _MOST_CHUNKS:
            self._drop()
        self._news.set()

    def flush(self) -> None:
        """Drops the pictures that wait: another take begins."""
        while self._pictures:
            self._drop()

    def has_shown(self, chunk: int) -> None:
        """The viewer shows a chunk."""
        while self._unshown and self._unshown[0] <= chunk:
            self._unshown.popleft()
        self._news.set()

    def close(self) -> None:
        """Lets `send` end when its messages are sent."""
        self.closing = True
        self._news.set()

    def _may_send(self, chunk: int) -> bool:
        return chunk in self._unshown or len(self._unshown) < _MOST_UNSHOWN

    def _drop(self) -> None:
        _, frames, _ = self._pictures.popleft()
        self.dropped += frames

    async def send(self, text: Callable[[str], Awaitable[None]], pictures: Callable[[bytes], Awaitable[None]]) -> None:
        """Sends what comes until `close`, or until the viewer reads too little of it.

        Raises:
            TimeoutError: he reads nothing.
        """
        said = 0
        while not self.overflow:
            self._news.clear()
            while self._texts:
                await asyncio.wait_for(text(self._texts.popleft()), _PATIENCE)
            if self._pictures and self._may_send(chunk := self._pictures[0][0]):
                message = self._pictures.popleft()[2]
                if chunk not in self._unshown:
                    self._unshown.append(chunk)
                await asyncio.wait_for(pictures(message), _PATIENCE)
                continue
            if self.dropped != said:
                said = self.dropped
                await asyncio.wait_for(text(Dropped(frames=said).model_dump_json()), _PATIENCE)
            if self.closing and not self._texts:
                return
            await self._news.wait()
