"""Who is next: sessions in the order that they came, one at a time on the device. The clock is handed in."""

from adastate_jax.serving.session import RETURN_SECONDS, Session, State

CLAIM_SECONDS = 30.0  # within which a client connects when it is its turn


class Queue:
    """The sessions that run or wait.

    Args:
        limit: seconds that a session runs at most.
        most: sessions that may wait.
    """

    def __init__(self, limit: float, most: int):
        self.limit, self.most = limit, most
        self.waiting: list[Session] = []
        self.current: Session | None = None
        self._offered = 0.0  # when the current one's turn came

    def full(self) -> bool:
        return len(self.waiting) >= self.most

    def add(self, session: Session) -> None:
        self.waiting.append(session)

    def position(self, session: Session) -> int:
        """How many are before a session that waits."""
        return self.waiting.index(session) + (self.current is not None)

    def seconds(self, session: Session, now: float) -> float:
        """At most so long, if all before it stay as long as they may."""
        ahead = self.waiting.index(session) * self.limit
        if self.current is None:
            return ahead
        began = self.current.began if self.current.began is not None else now
        return ahead + max(0.0, self.limit - (now - began))

    def advance(self, now: float) -> list[tuple[Session, State, str]]:
        """What the time brings: the moves that are due, for the caller to make, each with its reason."""
        moves = []
        for session in list(self.waiting):
            if session.left is not None and now - session.left > RETURN_SECONDS:
                self.waiting.remove(session)
                moves.append((session, State.ENDED, "its client went away while it waited"))
        session = self.current
        if session is not None and session.state != State.ENDED:
            away = session.left is not None
            if away and session.began is None and now - max(self._offered, session.left) > CLAIM_SECONDS:
                moves.append((session, State.ENDED, "nobody came when it was its turn"))
            elif away and now - session.left > RETURN_SECONDS:
                moves.append((session, State.ENDED, "its client went away, and did not come back within a minute"))
            elif session.began is not None and now - session.began > self.limit:
                moves.append((session, State.ENDED, f"its time is up: a session lasts {self.limit:g} seconds"))
        if moves and moves[-1][0] is session:
            self.current = None
        if self.current is None or self.current.state == State.ENDED:
            self.current = self.waiting.pop(0) if self.waiting else None
            if self.current is not None:
                self._offered = now
                moves.append((self.current, State.STARTING, ""))
        return moves

    def remove(self, session: Session) -> None:
        """Takes out a session that has ended by itself."""
        if session in self.waiting:
            self.waiting.remove(session)
        if self.current is session:
            self.current = None
