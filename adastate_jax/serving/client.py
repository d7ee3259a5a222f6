"""A client without a page: follows a session in real time, steers it, and notes how long everything takes."""

import contextlib
import dataclasses
import json
import statistics
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from adastate_jax.errors import UserError
from adastate_jax.errors import reason as why
from adastate_jax.serving.protocol import Pictures, unpack
from adastate_jax.streaming.cues import Cue

_PATIENCE = 120.0  # seconds without any message, while programs compile
_MOST_ANSWER = 1 << 22  # bytes of a message from the server


@dataclasses.dataclass
class Timings:
    """Seconds, as this client saw them."""

    begun: float = 0.0
    first: float | None = None  # until the first pictures
    intervals: list[float] = dataclasses.field(default_factory=list)  # between chunks
    prompts: list[float] = dataclasses.field(default_factory=list)  # from sending a prompt to its first pictures
    leads: list[int] = dataclasses.field(default_factory=list)
    stale: int = 0
    dropped: int = 0


class Client:
    """One session, steered or watched.

    Args:
        url: what serve printed, or a watch link.
        realtime: shows chunks no faster than they last; else at once.

    Raises:
        UserError: the address makes no sense.
    """

    def __init__(self, url: str, realtime: bool = True):
        parts = urlsplit(url if "//" in url else f"//{url}", "http")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{url}: must be an address like http://127.0.0.1:8000/")
        fragment = parse_qs(parts.fragment)
        self._base, self._secure = parts.netloc, parts.scheme == "https"
        self._token = fragment.get("token", [""])[0]
        self._watch = fragment.get("watch", [""])[0]
        self._realtime = realtime
        self.session: dict[str, Any] = {}
        self.welcome: dict[str, Any] = {}
        self.state, self.reason = "", ""
        self.messages: list[dict[str, Any]] = []  # answers and states, for who wants to know
        self.timings = Timings()
        self._number = 0
        self._sent: dict[int, tuple[float, int | None]] = {}  # prompts: when, and from which chunk on
        self.chunk = -1  # the newest that was shown
        self.drawn: list[Pictures] = []  # of the newest chunk
        self._socket: ClientConnection | None = None
        self._opened = contextlib.ExitStack()  # sockets that close at the end

    @property
    def watches(self) -> bool:
        return bool(self._watch)

    # --- HTTP

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer's body; raises UserError with the server's reason."""
        scheme = "https" if self._secure else "http"
        request = urllib.request.Request(f"{scheme}://{self._base}{path}", body, method=method)
        if body is not None:
            request.add_header("content-type", "application/json")
        if self._token:
            request.add_header("authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise UserError(f"{path.partition('?')[0]}: {_detail(error)}") from None
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(
                f"{self._base}: does not answer ({why(getattr(error, 'reason', error))}); is serve running there?"
            ) from None

    def begin(self, prompt: str | None = None, seed: int = 0, anchors: Sequence[str] | None = None) -> None:
        """Begins a session, or finds the one of the watch link, and opens its socket."""
        self.timings.begun = time.monotonic()
        if self._watch:
            name, _, key = self._watch.partition(".")
            self.session = {"id": name, "key": key}
        else:
            wanted = {"prompt": prompt, "seed": seed, "anchors": anchors and list(anchors)}
            self.session = json.loads(self.request("POST", "/v1/sessions", json.dumps(wanted).encode()))
        self.open()

    def fetch(self, file: str) -> bytes:
        """The recording's `video.mp4` or `session.json`."""
        return self.request("GET", f"/v1/sessions/{self.session['id']}/{file}?key={quote(self.session['key'])}")

    def finish(self) -> None:
        """Stops the session, and waits until its recording is complete."""
        self.control("stop")
        while self.state != "ended":
            if self.hear(10.0) is None:
                raise UserError(f"{self._base}: does not stop")
        for _ in range(100):
            if json.loads(self.fetch("session.json"))["ended"] is not None:
                return
            time.sleep(0.1)
        raise UserError(f"{self._base}: the recording does not end")

    # --- the socket

    def open(self) -> None:
        """Opens the socket, also again."""
        scheme = "wss" if self._secure else "ws"
        address = f"{scheme}://{self._base}/v1/sessions/{self.session['id']}?key={quote(self.session['key'])}"
        try:
            socket = connect(address, compression=None, max_size=_MOST_ANSWER, open_timeout=30, proxy=None)
            self._socket = self._opened.enter_context(socket)
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise UserError(f"{self._base}: the socket does not open ({error})") from None

    def close(self) -> None:
        self._opened.close()

    def say(self, message: dict[str, Any]) -> None:
        self._socket.send(json.dumps(message))

    def control(self, kind: str, **settings) -> int:
        """Sends a control; returns its number."""
        number, self._number = self._number, self._number + 1
        if kind == "prompt" and settings.get("at") is None:
            self._sent[number] = time.monotonic(), None
        self.say(
            {"type": kind, "number": number, **{name: value for name, value in settings.items() if value is not None}}
        )
        return number

    def hear(self, timeout: float = _PATIENCE) -> dict[str, Any] | Pictures | None:
        """The next message, taken note of; None where none comes in time. Raises UserError where the socket closes."""
        try:
            received = self._socket.recv(timeout)
        except TimeoutError:
            return None
        except ConnectionClosed as error:
            reason = self.reason or (error.rcvd.reason if error.rcvd else "") or "the server closed the socket"
            raise UserError(f"{self._base}: {reason}") from None
        if isinstance(received, bytes):
            return self._see(unpack(received))
        message = json.loads(received)
        kind = message["type"]
        if kind == "welcome":
            self.welcome, self._number = message, max(self._number, message["last_number"] + 1)
        elif kind == "state":
            self.state, self.reason = message["state"], message["reason"]
        elif kind == "chunk":
            self.timings.leads.append(message["lead"])
        elif kind == "dropped":
            self.timings.dropped = message["frames"]
        elif kind == "applied" and message["number"] in self._sent:
            self._sent[message["number"]] = self._sent[message["number"]][0], message["chunk"]
        elif kind == "refused" and message["number"] is None:
            self.reason = message["reason"]
        if kind not in ("chunk", "meters", "dropped"):
            self.messages.append(message)
        return message

    def _see(self, pictures: Pictures) -> Pictures:
        now = time.monotonic()
        if pictures.chunk < self.chunk:
            self.timings.stale += 1
            return pictures
        if pictures.chunk > self.chunk:
            if self.timings.first is None:
                self.timings.first = now - self.timings.begun
            self.drawn = []
            for number, (sent, chunk) in list(self._sent.items()):
                if chunk is not None and chunk <= pictures.chunk:
                    self.timings.prompts.append(now - sent)
                    del self._sent[number]
        self.drawn.append(pictures)
        return pictures

    def shown(self, chunk: int) -> None:
        """Says that a chunk is shown."""
        self.chunk = chunk
        self.say({"type": "shown", "chunk": chunk})

    def follow(
        self, seconds: float, cues: Sequence[Cue] = (), heard: Callable[[float], None] = lambda seconds: None
    ) -> None:
        """Shows the stream for so many seconds of it, or to its end, giving each cue when its time comes.

        Raises:
            UserError: the session ends before, or the server goes.
        """
        cues, last, due, shows = list(cues), None, 0.0, []
        while True:
            now = time.monotonic()
            if shows and now >= due:
                chunk, length = shows.pop(0)
                due = (due if now - due < length else now) + length if self._realtime else 0.0
                self.shown(chunk)
                heard((chunk + 1) * length)
                while cues and cues[0].second <= (chunk + 1) * length:
                    cue = cues.pop(0)
                    self.control("prompt", text=cue.prompt, transition=cue.transition, chunks=cue.chunks)
                if (chunk + 1) * length >= seconds and not cues:
                    return
            message = self.hear(max(0.0, due - time.monotonic()) if shows else _PATIENCE)
            if message is None and not shows:
                raise UserError(f"{self._base}: nothing came for {_PATIENCE:g} seconds")
            if isinstance(message, Pictures) and message.chunk > self.chunk:
                if message.first + len(message.frames) == message.count:
                    now = time.monotonic()
                    if last is not None:
                        self.timings.intervals.append(now - last)
                    last = now
                    shows.append((message.chunk, message.count / self.welcome["fps"]))
            elif self.state == "ended":
                raise UserError(f"the session has ended: {self.reason}")

    def report(self) -> dict[str, Any]:
        """What was measured, in seconds and chunks."""
        timings = self.timings
        return {
            "first_picture_s": round(timings.first, 3) if timings.first is not None else None,
            "chunks": len(timings.intervals) + (timings.first is not None),
            "chunk_interval_median_s": _quantile(timings.intervals, 0.5),
            "chunk_interval_p95_s": _quantile(timings.intervals, 0.95),
            "prompts": len(timings.prompts),
            "prompt_median_s": _quantile(timings.prompts, 0.5),
            "prompt_p95_s": _quantile(timings.prompts, 0.95),
            "lead_most_chunks": max(timings.leads, default=0),
            "dropped_frames": timings.dropped,
        }


def _quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of them do not exceed."""
    if not values:
        return None
    if share == 0.5:
        return round(statistics.median(values), 4)
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 4)


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read()).get("detail", error.reason))
    except (ValueError, AttributeError):
        return str(error.reason)
