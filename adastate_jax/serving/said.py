"""What clients are told of a session: who and what they see, its state, its place in the queue."""

import dataclasses

from adastate_jax.serving import protocol
from adastate_jax.serving.queue import Queue
from adastate_jax.serving.session import Session, State


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a client is told of the model."""

    fps: int
    height: int
    width: int
    chunk_frames: int
    chunk_seconds: float
    transitions: tuple[str, ...]


def welcome(facts: Facts, session: Session, role: str, limit: float) -> protocol.Welcome:
    """The first message on a socket, and at a new take; `limit` is of a session, in seconds."""
    wish = session.wish
    return protocol.Welcome(
        session=session.name,
        role=role,
        prompt=wish.prompt,
        seed=wish.seed,
        anchors=list(wish.anchors),
        fps=facts.fps,
        height=facts.height,
        width=facts.width,
        chunk_frames=facts.chunk_frames,
        transitions=list(facts.transitions),
        limit_seconds=limit,
        last_number=session.last_number,
    )


def state_of(session: Session, now: float, limit: float) -> protocol.StateChange:
    """Its state, and the seconds that are left to it."""
    left = 0.0
    if session.began is not None and session.state != State.ENDED:
        left = max(0.0, limit - (now - session.began))
    return protocol.StateChange(
        state=session.state.value, reason=session.reason, chunk=session.chunk, seconds_left=round(left, 1)
    )


def place_of(session: Session, now: float, queue: Queue) -> protocol.Queued:
    """Its place among those that wait."""
    seconds = round(queue.seconds(session, now), 1)
    return protocol.Queued(position=queue.position(session), waiting=len(queue.waiting), seconds=seconds)
