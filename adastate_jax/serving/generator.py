"""The generator: the one thread that uses the device; behind it, one that encodes, and one that records and measures.

It asks its desk (`live.py`) what to do next, does it, and tells the desk what came of it; it knows no sockets.
"""

import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from adastate_jax.errors import UserError, one_line
from adastate_jax.generation.loading import Model, stream_config
from adastate_jax.generation.takes import RunningTake, Step, Take, check_anchors, check_prompt, session_head
from adastate_jax.media import FPS, read_image
from adastate_jax.serving.live import Live
from adastate_jax.serving.meters import LiveMeters
from adastate_jax.serving.protocol import Control, Pictures, Prompt, Restart, pack
from adastate_jax.serving.recording import Recording, Store
from adastate_jax.serving.said import Facts
from adastate_jax.serving.session import Session, State, Wish
from adastate_jax.streaming.names import TRANSITIONS
from adastate_jax.streaming.prompts import obstacle

_log = logging.getLogger(__name__)

_SMALL = 256 * 256  # pixels of a picture that is enlarged where it is shown
_QUALITY, _FINE_QUALITY = 90, 95
_FULL_COLOUR = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
_MEASURED = 0.4  # seconds between chunks that are measured: the flow takes a quarter of a chunk's time on two cores
_MESSAGE = 96 * 1024  # bytes from which on pictures go in another message
_MOST_FAILURES = 3  # sessions in a row that fail without a chunk in between: then it is not they
_BEHIND = 4  # chunks that may be generated and not recorded: bounds memory


@dataclasses.dataclass
class _Running:
    """The session on the device."""

    session: Session
    take: RunningTake
    meters: LiveMeters
    recording: Recording
    measured: float = -math.inf  # when a chunk was measured last


class Generator(threading.Thread):
    """Owns the device and the running take.

    Args:
        model: to generate with.
        live: what it works for.
        store: where sessions are recorded.
        anchors: of the landing view, for which everything is compiled at the start.
        prompt: to compile with.
    """

    def __init__(self, model: Model, live: Live, store: Store, anchors: Sequence[str], prompt: str):
        super().__init__(name="generator", daemon=True)
        self._model, self._live, self._store = model, live, store
        self._anchors, self._prompt = [anchor or None for anchor in anchors], prompt
        self._head = session_head(model)
        self._running: _Running | None = None
        self._sender = concurrent.futures.ThreadPoolExecutor(1, "sender")
        self._recorder = concurrent.futures.ThreadPoolExecutor(1, "recorder")
        self._behind = threading.Semaphore(_BEHIND)
        self._failures = 0
        self.pictures: dict[str, Path] = {}  # uploads, by name

    def run(self) -> None:
        try:
            self._warm_up()
            while (found := self._live.next_work()) is not None:
                session, controls = found
                if session is None:  # the running one has ended
                    self._finish()
                    continue
                try:
                    self._work(session, controls)
                except UserError as error:
                    self._live.failed(session, str(error))
                except Exception as error:
                    self._fail(session, error)
            self._finish()
        except Exception as error:  # nothing goes on without this thread: the desk says so
            traceback.print_exc()
            self._live.broken(one_line(f"{type(error).__name__}: {error}", 300))
        finally:
            self._sender.shutdown()
            self._recorder.shutdown()

    def _fail(self, session: Session, error: Exception) -> None:
        """Ends a session that broke, and raises the error again where one after the other breaks."""
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):  # it asked for too much
            self._failures += 1
        if self._failures >= _MOST_FAILURES:
            raise error
        traceback.print_exception(error)
        self._live.failed(session, one_line(f"{type(error).__name__}: {error}", 300))

    def check(self, wish: Wish) -> None:
        """Raises UserError for what no session can begin with; from any thread."""
        check_prompt(self._model, wish.prompt)
        check_anchors(self._model, [anchor or None for anchor in wish.anchors])

    # --- at the start

    def _warm_up(self) -> None:
        """Compiles what the landing view will need, by using it."""
        configs = [stream_config(self._model.config.stream, anchor) for anchor in self._anchors]
        transitions = [name for name in TRANSITIONS if not all(obstacle(name, config) for config in configs)]
        chunks = max(config.num_fill_chunks for config in configs) + 2
        total, take = 2 + len(transitions), None
        for done, transition in enumerate((None, *transitions), 1):
            if self._live.stopping:
                return
            if take is None:
                take = RunningTake(self._model, self._prompt, 0, self._anchors)
            else:
                take.direct(self._prompt, transition)
            for _ in range(chunks):
                step = take.step()
            self._live.compiled(100 * done // total)
        for _ in encode(step.frames, 0, 0):
            pass
        LiveMeters(FPS).measure(0, 0, step.frames, len(self._anchors))
        self._live.compiled(100)

    # --- a chunk

    def _work(self, session: Session, controls: list[Control]) -> None:
        """Applies the controls that are due, and generates the next chunk.

        Raises:
            UserError: the session cannot go on.
        """
        begun = time.perf_counter()
        if self._running is None or self._running.session is not session:
            self._finish()
            take = self._begin(session.wish.prompt, session.wish.seed, session.wish.anchors, None)
            recording = self._store.begin(session, self._head, FPS)
            self._running = _Running(session, take, LiveMeters(FPS), recording)
            self._live.began(session, self._settled())
        running = self._running
        for control in controls:
            if session.state == State.ENDED:  # the one before has stopped it
                self._live.refused(session, control, f"the session has ended: {session.reason}")
                continue
            try:
                self._apply(running, control)
            except UserError as error:
                self._live.refused(session, control, str(error))
            else:
                self._live.applied(session, control)
        if not self._live.goes_on(session):
            return
        step = running.take.step()
        self._failures = 0
        chunk, number = self._live.generated(session)
        self._behind.acquire()
        jobs = (
            self._sender.submit(self._send, session, chunk, number, step, begun),
            self._recorder.submit(self._record, running, chunk, number, step, running.take.take()),
        )
        for job in jobs:
            job.add_done_callback(lambda job: self._report(session, job))
        jobs[1].add_done_callback(lambda job: self._behind.release())

    def _begin(self, prompt: str, seed: int, anchors: Sequence[str | None], picture: np.ndarray | None) -> RunningTake:
        return RunningTake(self._model, prompt, seed, [anchor or None for anchor in anchors], picture)

    def _settled(self) -> int:
        """The first chunk, counted in the take, from which on all transitions are compiled."""
        configs = [stream_config(self._model.config.stream, anchor) for anchor in self._running.take.anchors]
        return max(config.num_fill_chunks for config in configs)

    def _apply(self, running: _Running, control: Control) -> None:
        take = running.take
        if isinstance(control, Prompt):
            take.direct(control.text, control.transition, control.chunks)
        elif isinstance(control, Restart):
            seed = take.seed if control.seed is None else control.seed
            anchors = take.anchors if control.anchors is None else control.anchors
            running.take = self._begin(control.text or take.prompt, seed, anchors, self._picture(control.picture))
            self._live.restarted(running.session, running.take, self._settled())

    def _picture(self, name: str | None) -> np.ndarray | None:
        if not name:
            return None
        if name not in self.pictures:
            raise UserError("the picture is not here any more: send it again")
        return read_image(self.pictures[name], *self._model.config.data.size)

    def _finish(self) -> None:
        """Ends the recording of a session that has ended."""
        if self._running is not None:
            running, self._running = self._running, None
            session = running.session
            ending = self._recorder.submit(running.recording.end, session.reason, self._live.controls_of(session))
            error = ending.exception()
            if isinstance(error, UserError):  # a full disk: what was written before stays, and the next session begins
                _log.warning("%s", error)
            elif error is not None:
                traceback.print_exception(error)

    # --- behind it

    def _send(self, session: Session, chunk: int, number: int, step: Step, begun: float) -> None:
        """Encodes a chunk and hands its pictures out, in the sender's thread."""
        for pictures in encode(step.frames, chunk, number):
            self._live.show(session, chunk, len(pictures.frames), pack(pictures))
        self._live.done(session, chunk, number, step, time.perf_counter() - begun)

    def _record(self, running: _Running, chunk: int, number: int, step: Step, take: Take) -> None:
        """Records and measures a chunk, in the recorder's thread."""
        running.recording.add(take, number, step, self._live.controls_of(running.session))
        now = time.perf_counter()
        if take.chunks > 1 and now - running.measured < _MEASURED:
            return
        running.measured = now
        meters = running.meters.measure(chunk, number, step.frames, len(take.panels))
        if meters is not None:
            self._live.say(running.session, meters)

    def _report(self, session: Session, job: concurrent.futures.Future) -> None:
        """Ends a session of which a chunk could not be sent or recorded."""
        error = job.exception()
        if error is not None:
            self._live.failed(session, str(error) if isinstance(error, UserError) else "recording it failed")
            if not isinstance(error, UserError):
                traceback.print_exception(error)


def facts_of(model: Model, anchors: Sequence[str]) -> Facts:
    """What clients are told of a model, and of what the landing view can do."""
    height, width = model.config.data.size
    configs = [stream_config(model.config.stream, anchor or None) for anchor in anchors]
    frames = configs[0].chunk_frames * model.config.time_factor
    possible = tuple(name for name in TRANSITIONS if not all(obstacle(name, config) for config in configs))
    return Facts(FPS, height, width, frames, frames / FPS, possible)


def encode(frames: np.ndarray, chunk: int, take: int):
    """Yields `Pictures` of frames uint8 [F, H, W, 3]: JPEG, of small frames with all their colour.

    WebP of the same look takes half the bytes and 13 times as long.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    if frames.shape[1] * frames.shape[2] <= _SMALL:
        options = [cv2.IMWRITE_JPEG_QUALITY, _FINE_QUALITY, *_FULL_COLOUR]
    encoded, first = [], 0
    for number, frame in enumerate(frames, 1):
        encoded.append(cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), options)[1].tobytes())
        if sum(map(len, encoded)) >= _MESSAGE or number == len(frames):
            yield Pictures(chunk, take, first, len(frames), tuple(encoded))
            encoded, first = [], number
