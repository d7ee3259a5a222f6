"""A session: a state machine with its controls, and nothing of threads, sockets or devices. The clock is handed in."""

import dataclasses
import enum
import hashlib
import secrets
from collections import OrderedDict

from adastate_jax.serving import protocol
from adastate_jax.serving.protocol import (
    Applied,
    Control,
    Message,
    Pause,
    Prompt,
    Received,
    Refused,
    Restart,
    Resume,
    Stop,
    Withdraw,
    Withdrawn,
)

MOST_PENDING = 64  # controls that wait
MOST_CUES = 500  # of a take
MOST_TAKES = 200
MOST_GIVEN = 8  # takes that begin from a picture: the session's file holds it once for each
_MOST_REMEMBERED = 1000  # answers, for retries
RETURN_SECONDS = 60.0  # within which a client that went away comes back


class State(enum.StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


_NEXT = {
    State.QUEUED: {State.STARTING, State.ENDED},
    State.STARTING: {State.RUNNING, State.ENDED},
    State.RUNNING: {State.PAUSED, State.ENDED},
    State.PAUSED: {State.RUNNING, State.ENDED},
    State.ENDED: set(),
}


# Transitions that leave the memory alone: they need no program of their own, and may come before the window is full.
_TEXT_ALONE = ("switch", "blend", "keep_state")


class IllegalTransition(Exception):
    """A session was to go where it cannot go from its state: a mistake in this program."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a session begins with. An anchor of "" is the model's own."""

    prompt: str
    seed: int
    anchors: tuple[str, ...]


@dataclasses.dataclass
class Pending:
    """A control that waits for its chunk."""

    control: Control
    chunk: int


class Session:
    """One client's stream, from the queue to its end.

    `key` steers it and `watch_key` watches; whoever has neither cannot name it.
    """

    def __init__(self, wish: Wish, now: float, name: str | None = None):
        self.name = name or secrets.token_hex(8)
        self.key, self.watch_key = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        self.wish = wish
        self.state, self.reason = State.QUEUED, ""
        self.created, self.began, self.ended = now, None, None
        self.left: float | None = now  # since when nobody steers; None while somebody does
        self.chunk = 0  # the next one to generate
        self.shown = -1  # the newest that the steering viewer shows
        self.take = 0
        self.given = 0  # takes that were to begin from a picture
        self.cues = 1  # of the running take
        self.settled = 1  # the first chunk before which its memory may be changed
        self.last_number = -1
        self.pending: list[Pending] = []
        self.log: list[protocol.Entry] = []
        self._answers: OrderedDict[int, Message] = OrderedDict()

    # --- states

    def move(self, state: State, now: float, reason: str = "") -> None:
        """Goes to a state; raises IllegalTransition where that does not follow this one."""
        if state not in _NEXT[self.state]:
            raise IllegalTransition(f"{self.state} does not lead to {state}")
        self.state, self.reason = state, reason
        if state == State.RUNNING and self.began is None:
            self.began = now
        if state == State.ENDED:
            self.ended = now

    def role(self, key: str) -> str | None:
        """What a key allows: steer, watch, or nothing."""
        if secrets.compare_digest(key.encode(), self.key.encode()):
            return "steer"
        return "watch" if secrets.compare_digest(key.encode(), self.watch_key.encode()) else None

    # --- controls

    def comes_at_once(self, control: Control) -> bool:
        """Whether a control waits for no chunk."""
        return isinstance(control, Pause | Resume | Stop) and (control.at or 0) <= self.chunk

    def submit(self, control: Control) -> Message:
        """The first answer to a control: received, or refused; of one that was sent before, its latest answer."""
        known = self._answers.get(control.number)
        if known is not None:
            return known
        if control.number <= self.last_number:
            return Refused(number=control.number, reason="numbers ascend, and this one is too old to be remembered")
        self.last_number = control.number
        return self._remember(self._first_answer(control))

    def _first_answer(self, control: Control) -> Message:
        number = control.number
        if self.state == State.ENDED:
            return Refused(number=number, reason=f"the session has ended: {self.reason}")
        if isinstance(control, Withdraw):
            return self._withdraw(control)
        if len(self.pending) >= MOST_PENDING and not self.comes_at_once(control):
            return Refused(number=number, reason=f"{MOST_PENDING} controls are waiting already")
        if isinstance(control, Prompt) and control.text is None and control.transition in ("switch", "blend"):
            return Refused(number=number, reason=f"{control.transition} needs a text")
        if isinstance(control, Prompt) and self.cues >= MOST_CUES:
            return Refused(number=number, reason=f"the take has {MOST_CUES} prompts already: restart")
        if isinstance(control, Restart):
            if self.take >= MOST_TAKES:
                return Refused(number=number, reason=f"the session has begun anew {MOST_TAKES} times: start another")
            if control.picture and self.given >= MOST_GIVEN:
                return Refused(number=number, reason=f"a session begins from a picture {MOST_GIVEN} times at most")
            self.given += bool(control.picture)
        chunk = max(control.at or 0, self.chunk)
        if isinstance(control, Prompt):
            chunk = max(chunk, 1 if control.transition in _TEXT_ALONE else self.settled)
        self.pending.append(Pending(control, chunk))
        self.pending.sort(key=lambda waiting: (waiting.chunk, waiting.control.number))
        return Received(number=number, chunk=chunk)

    def _withdraw(self, control: Withdraw) -> Message:
        for waiting in self.pending:
            if waiting.control.number == control.target:
                self.pending.remove(waiting)
                self._remember(Refused(number=control.target, reason="it was withdrawn"))
                return Withdrawn(number=control.number, target=control.target)
        return Refused(number=control.number, reason=f"control {control.target} does not wait any more")

    def due(self) -> list[Control]:
        """Takes the controls out that are due before the next chunk, in order; one at most that changes the picture."""
        found, changes = [], 0
        for waiting in list(self.pending):
            changes += isinstance(waiting.control, Prompt | Restart)
            if waiting.chunk > self.chunk or changes > 1:
                break
            self.pending.remove(waiting)
            found.append(waiting.control)
        return found

    def applied(self, control: Control, chunk: int) -> Applied:
        """The second answer: it took effect."""
        self.log.append(entry_of(control, chunk, applied=True))
        del self.log[:-MOST_CUES]
        return self._remember(Applied(number=control.number, chunk=chunk))

    def failed(self, control: Control, reason: str) -> Refused:
        """The second answer, where it turned out that it cannot be."""
        return self._remember(Refused(number=control.number, reason=reason))

    def _remember(self, answer: Message) -> Message:
        self._answers[answer.number] = answer
        while len(self._answers) > _MOST_REMEMBERED:
            self._answers.popitem(last=False)
        return answer

    def entries(self) -> list[protocol.Entry]:
        """What was applied, and what waits."""
        return [*self.log, *(entry_of(waiting.control, waiting.chunk, applied=False) for waiting in self.pending)]


def entry_of(control: Control, chunk: int, applied: bool) -> protocol.Entry:
    """A control as the timeline shows it."""
    return protocol.Entry(
        number=control.number,
        kind=control.type,
        text=getattr(control, "text", None) or "",
        transition=getattr(control, "transition", ""),
        chunk=chunk,
        applied=applied,
    )


def digest(key: str) -> str:
    """What is kept of a key on disk."""
    return hashlib.sha256(key.encode()).hexdigest()
