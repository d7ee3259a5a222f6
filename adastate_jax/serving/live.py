"""The desk between sockets and generator: sessions, their queue, their viewers.

The event loop's thread and the generator's both come here; what they share is changed under one lock, and held for
microseconds. Viewers' buffers belong to the event loop alone: the generator's words reach them through it.
"""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from adastate_jax.errors import UserError
from adastate_jax.generation.takes import RunningTake, Step
from adastate_jax.serving import protocol
from adastate_jax.serving.metrics import Metrics
from adastate_jax.serving.pace import Pace
from adastate_jax.serving.protocol import Control, Message, Prompt, Resume
from adastate_jax.serving.queue import Queue
from adastate_jax.serving.said import Facts, place_of, state_of, welcome
from adastate_jax.serving.session import RETURN_SECONDS, Session, State, Wish
from adastate_jax.serving.viewer import Viewer

_log = logging.getLogger(__name__)

MOST_WATCHERS = 64  # of a session
_TICK = 0.25


class Live:
    """Sessions, from the queue to their end.

    Args:
        facts: of the model.
        queue: who is next.
        clock: seconds, handed in.
    """

    def __init__(self, facts: Facts, queue: Queue, clock: Callable[[], float] = time.monotonic):
        self.facts, self.queue, self.clock = facts, queue, clock
        self.metrics = Metrics()
        self.percent, self.trouble = 0, ""
        self.stopping = False
        self.sessions: dict[str, Session] = {}
        self._viewers: dict[str, list[Viewer]] = {}
        self._lock = threading.Condition()
        self._pace = Pace(facts.chunk_seconds)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: dict[tuple[str, int], float] = {}  # prompts that have not been followed yet
        self._device: Session | None = None  # whose take the generator holds
        self._last: float | None = None  # when the running session's last chunk was done

    # --- the event loop's side

    async def watch_the_clock(self) -> None:
        """Moves the queue on, for as long as the server runs."""
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                self.tick()
            except Exception:  # the queue must move on, whatever one session has done
                _log.exception("the clock")
            await asyncio.sleep(_TICK)

    def tick(self) -> None:
        """What the time brings."""
        now = self.clock()
        with self._lock:
            moves = self.queue.advance(now)
            for session, state, reason in moves:
                self._move(session, state, reason)
            waiting = list(self.queue.waiting)
            for name, session in list(self.sessions.items()):
                if session.state == State.ENDED and now - session.ended > RETURN_SECONDS:
                    for viewer in self._viewers[name]:
                        viewer.close()
                    if not self._viewers[name]:
                        del self.sessions[name], self._viewers[name]
        self.metrics.waiting.set(len(waiting))
        for session in waiting:
            self.say_here(session, place_of(session, self.clock(), self.queue))

    def create(self, wish: Wish) -> Session:
        """A new session, at the queue's end; raises UserError where that is full."""
        with self._lock:
            if self.trouble:
                raise UserError(f"the generator has stopped: {self.trouble}")
            if self.queue.full():
                raise UserError(f"the queue is full: {self.queue.most} sessions wait already; come back later")
            session = Session(wish, self.clock())
            self.sessions[session.name], self._viewers[session.name] = session, []
            self.queue.add(session)
        self.tick()
        return session

    def connect(self, session: Session, role: str, client: str) -> Viewer:
        """A new viewer, with what it needs to know waiting for it; raises UserError where there are too many.

        Who steers takes the place of another socket with the same key.
        """
        viewers = self._viewers[session.name]
        if role == "steer":
            for other in viewers:
                if other.role == "steer":
                    other.say(protocol.Refused(reason="the session was opened elsewhere, and is steered from there"))
                    other.close()
        elif sum(other.role == "watch" for other in viewers) >= MOST_WATCHERS:
            raise UserError(f"{MOST_WATCHERS} viewers watch this session already")
        viewer = Viewer(role, client)
        with self._lock:
            viewers.append(viewer)
            if role == "steer":
                session.left = None
                session.shown = session.chunk - 1  # what was on its way is lost
            self._lock.notify_all()
            viewer.say(welcome(self.facts, session, role, self.queue.limit))
            viewer.say(state_of(session, self.clock(), self.queue.limit))
            if self.percent < 100:
                viewer.say(protocol.Compiling(percent=self.percent))
            for entry in session.entries():
                viewer.say(entry)
            if session.state == State.QUEUED:
                viewer.say(place_of(session, self.clock(), self.queue))
        self.metrics.viewers.inc()
        return viewer

    def disconnect(self, session: Session, viewer: Viewer) -> None:
        """A viewer has gone."""
        with self._lock:
            viewers = self._viewers.get(session.name, [])
            viewers.remove(viewer)
            steered = any(other.role == "steer" and not other.closing for other in viewers)
            if viewer.role == "steer" and not steered:
                session.left = self.clock()
        self.metrics.viewers.dec()
        self.metrics.dropped.inc(viewer.dropped)

    def hear(self, session: Session, viewer: Viewer, message: Message) -> None:
        """Takes what a viewer says."""
        if isinstance(message, protocol.Ping):
            viewer.say(protocol.Pong(number=message.number))
        elif isinstance(message, protocol.Shown):
            viewer.has_shown(message.chunk)
            if viewer.role == "steer":
                with self._lock:
                    session.shown = max(session.shown, min(message.chunk, session.chunk - 1))
                    self._lock.notify_all()
        elif viewer.role != "steer":
            viewer.say(protocol.Refused(number=message.number, reason="this link watches; it does not steer"))
        else:
            self._control(session, viewer, message)

    def _control(self, session: Session, viewer: Viewer, control: Control) -> None:
        with self._lock:
            again = control.number <= session.last_number
            now = session.comes_at_once(control)
            if isinstance(control, Resume) and not now:
                viewer.say(protocol.Refused(number=control.number, reason="resume comes at once; leave out at"))
                return
            answers = [session.submit(control)]
            if isinstance(answers[0], protocol.Received) and not again:
                if now:
                    session.pending = [one for one in session.pending if one.control is not control]
                    answers.append(self._at_once(session, control))
                else:
                    self._arrived[session.name, control.number] = self.clock()
            elif isinstance(answers[0], protocol.Withdrawn):
                self._arrived.pop((session.name, control.target), None)
            self._lock.notify_all()
        for answer in answers:
            self.metrics.controls.labels(answer.type).inc()
            viewer.say(answer)
        if isinstance(answers[0], protocol.Withdrawn) and not again:
            self.say_here(session, answers[0], but=viewer)
        if isinstance(answers[0], protocol.Received) and not again and not now:
            for entry in session.entries():
                if entry.number == control.number:
                    self.say_here(session, entry, but=viewer)

    def _at_once(self, session: Session, control: Control) -> Message:
        """Pauses, resumes or stops."""
        wanted = {"pause": State.PAUSED, "resume": State.RUNNING, "stop": State.ENDED}[control.type]
        allowed = {"pause": (State.RUNNING,), "resume": (State.PAUSED,), "stop": set(State) - {State.ENDED}}[
            control.type
        ]
        if session.state not in allowed:
            return session.failed(control, f"the session is {session.state}")
        self._move(session, wanted, "it was stopped by who steers it" if control.type == "stop" else "")
        return session.applied(control, session.chunk)

    def say_here(self, session: Session, message: Message, but: Viewer | None = None) -> None:
        """Says something to all viewers of a session, from the event loop's thread."""
        text = message.model_dump_json()
        for viewer in self._viewers.get(session.name, ()):
            if viewer is not but:
                viewer.say(text)

    def find(self, name: str, key: str) -> tuple[Session, str] | None:
        """A session and what a key allows there; None for anybody else."""
        session = self.sessions.get(name)
        role = session and session.role(key)
        return (session, role) if role else None

    def stop(self) -> None:
        """Ends all sessions, and the generator."""
        with self._lock:
            self.stopping = True
            for session in self.sessions.values():
                if session.state != State.ENDED:
                    self._move(session, State.ENDED, "the server stops")
            self._lock.notify_all()

    def _move(self, session: Session, state: State, reason: str = "", label: str = "") -> None:
        """Under the lock: goes to a state; `label` is the reason in the metrics, where that could name anything."""
        session.move(state, self.clock(), reason)
        if state == State.ENDED:
            self.queue.remove(session)
            self._arrived = {who: at for who, at in self._arrived.items() if who[0] != session.name}
            self.metrics.sessions.labels(label or reason.partition(":")[0]).inc()
            waiting, session.pending = session.pending, []
            for pending in waiting:
                self.say(session, session.failed(pending.control, f"the session has ended: {reason}"))
        self.say(session, state_of(session, self.clock(), self.queue.limit))
        self._lock.notify_all()

    # --- the generator's side

    def next_work(self) -> tuple[Session | None, list[Control]] | None:
        """Waits for the next chunk to make: its session and the controls that are due. None ends the generator.

        A session of None says that the running one has ended.
        """
        with self._lock:
            while not self.stopping:
                session = self.queue.current
                if self._device is not None and self._device is not session:
                    self._device = None
                    return None, []
                delay = self._delay(session)
                if delay == 0.0:
                    self._pace.begun(self.clock())
                    self._device = session
                    return session, session.due()
                self._lock.wait(delay)
            return None

    def _delay(self, session: Session | None) -> float | None:
        """Seconds until a session's next chunk is due; None is not before something happens."""
        if session is None or session.state not in (State.STARTING, State.RUNNING) or session.left is not None:
            return None
        return self._pace.wait(self.clock(), session.chunk - 1 - session.shown)

    def compiled(self, percent: int) -> None:
        self.percent = percent
        self.metrics.ready.set(percent == 100)
        self._later(self._tell_all, protocol.Compiling(percent=percent))

    def broken(self, reason: str) -> None:
        """The generator has stopped, and why."""
        with self._lock:
            self.trouble = reason
            self.metrics.ready.set(0)
            for session in self.sessions.values():
                if session.state != State.ENDED:
                    self._move(session, State.ENDED, f"the generator has stopped: {reason}")

    def began(self, session: Session, settled: int) -> None:
        with self._lock:
            session.settled, self._last = settled, None

    def restarted(self, session: Session, take: RunningTake, settled: int) -> None:
        """Another take begins with the next chunk."""
        with self._lock:
            session.take, session.cues, session.settled = session.take + 1, 1, session.chunk + settled
            session.wish = Wish(take.prompt, take.seed, tuple(anchor or "" for anchor in take.anchors))
        self._later(self._new_take, session)

    def applied(self, session: Session, control: Control) -> None:
        with self._lock:
            if isinstance(control, Prompt):
                session.cues += 1
                session.wish = dataclasses.replace(session.wish, prompt=control.text or session.wish.prompt)
            if control.type in ("pause", "stop"):
                answer = self._at_once(session, control)
            else:
                answer = session.applied(control, session.chunk)
        self._answer(session, control, answer)

    def refused(self, session: Session, control: Control, reason: str) -> None:
        with self._lock:
            answer = session.failed(control, reason)
        self._answer(session, control, answer)

    def _answer(self, session: Session, control: Control, answer: Message) -> None:
        self.metrics.controls.labels(answer.type).inc()
        if answer.type == "refused":
            with self._lock:
                self._arrived.pop((session.name, control.number), None)
        self.say(session, answer)

    def goes_on(self, session: Session) -> bool:
        """Whether the next chunk is still wanted."""
        with self._lock:
            return session.state in (State.STARTING, State.RUNNING)

    def generated(self, session: Session) -> tuple[int, int]:
        """A chunk was generated: its number, and its take's."""
        with self._lock:
            session.chunk += 1
            if session.state == State.STARTING:
                self._move(session, State.RUNNING)
            return session.chunk - 1, session.take

    def done(self, session: Session, chunk: int, take: int, step: Step, total: float) -> None:
        """A chunk's pictures are on their way."""
        now = self.clock()
        for metric, seconds in (("network", step.network), ("decoded", step.decoded), ("total", total)):
            getattr(self.metrics, metric).observe(seconds)
        with self._lock:
            if self._last is not None:
                self.metrics.interval.observe(now - self._last)
            self._last = now
            for entry in session.log:
                if entry.chunk == chunk and (arrived := self._arrived.pop((session.name, entry.number), None)):
                    self.metrics.prompt.observe(now - arrived)
            lead = chunk - session.shown
        kept = {"network_ms": step.network, "decoded_ms": step.decoded, "total_ms": total}
        times = {name: round(1000 * seconds, 2) for name, seconds in kept.items()}
        self.say(session, protocol.ChunkDone(chunk=chunk, take=take, frames=len(step.frames), lead=lead, **times))

    def end(self, session: Session, reason: str, label: str = "") -> None:
        """Ends a session that has not ended; see `_move`."""
        with self._lock:
            if session.state != State.ENDED:
                self._move(session, State.ENDED, reason, label)

    def failed(self, session: Session, reason: str) -> None:
        """A session cannot go on."""
        self.end(session, reason, "it failed")

    def controls_of(self, session: Session) -> list[dict[str, Any]]:
        """What was applied, for the session's file."""
        with self._lock:
            return [entry.model_dump(exclude={"type", "applied"}) for entry in session.log]

    def show(self, session: Session, chunk: int, frames: int, message: bytes) -> None:
        self._later(self._show_here, session, chunk, frames, message)

    def say(self, session: Session, message: Message) -> None:
        """Says something to all viewers of a session, from any thread."""
        self._later(self.say_here, session, message)

    # --- between the two

    def _later(self, function: Callable, *arguments) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _show_here(self, session: Session, chunk: int, frames: int, message: bytes) -> None:
        for viewer in self._viewers.get(session.name, ()):
            viewer.show(chunk, frames, message)

    def _new_take(self, session: Session) -> None:
        for viewer in self._viewers.get(session.name, ()):
            viewer.flush()
            viewer.say(welcome(self.facts, session, viewer.role, self.queue.limit))

    def _tell_all(self, message: Message) -> None:
        for session in list(self.sessions.values()):
            self.say_here(session, message)
