"""A session's states, its controls and its place in the queue, with a clock of the test's own: all is instant."""

import itertools

import pytest

from adastate_jax.serving.pace import Pace
from adastate_jax.serving.protocol import Applied, Pause, Prompt, Received, Refused, Restart, Stop, Withdraw, Withdrawn
from adastate_jax.serving.queue import CLAIM_SECONDS, Queue
from adastate_jax.serving.session import (
    MOST_GIVEN,
    MOST_PENDING,
    MOST_TAKES,
    RETURN_SECONDS,
    IllegalTransition,
    Session,
    State,
    Wish,
)

LEGAL = {
    ("queued", "starting"),
    ("queued", "ended"),
    ("starting", "running"),
    ("starting", "ended"),
    ("running", "paused"),
    ("running", "ended"),
    ("paused", "running"),
    ("paused", "ended"),
}
PATHS = {
    "queued": [],
    "starting": ["starting"],
    "running": ["starting", "running"],
    "paused": ["starting", "running", "paused"],
    "ended": ["ended"],
}


def new(now: float = 0.0) -> Session:
    return Session(Wish("a prompt", 0, ("",)), now)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(State, State)))
def test_a_session_goes_where_its_state_leads_and_nowhere_else(source, target):
    session = new()
    for state in PATHS[source]:
        session.move(State(state), 0.0)
    if (source, target) in LEGAL:
        session.move(target, 1.0, "why")
        assert (session.state, session.reason) == (target, "why")
    else:
        with pytest.raises(IllegalTransition):
            session.move(target, 1.0)
        assert session.state == source


def test_keys_say_who_may_steer():
    session = new()
    assert session.role(session.key) == "steer"
    assert session.role(session.watch_key) == "watch"
    assert session.role("") is session.role("é") is session.role(new().key) is None


def test_controls_come_due_at_their_chunks_in_order_one_change_at_a_time():
    session = new()
    session.chunk = 4
    for number, at in enumerate((None, 9, None, 6)):
        assert isinstance(session.submit(Prompt(number=number, text=f"p{number}", at=at)), Received)
    session.submit(Pause(number=4, at=6))
    seen = {}
    for chunk in range(4, 12):
        session.chunk = chunk
        seen[chunk] = [control.number for control in session.due()]
    assert seen == {4: [0], 5: [2], 6: [3, 4], 7: [], 8: [], 9: [1], 10: [], 11: []}


def test_a_retry_does_nothing_twice_and_gets_the_latest_answer():
    session = new()
    session.chunk = 3
    prompt = Prompt(number=0, text="once")
    assert session.submit(prompt) == session.submit(prompt) == Received(number=0, chunk=3)
    assert session.due() == [prompt]
    applied = session.applied(prompt, 3)
    assert session.submit(prompt) == applied == Applied(number=0, chunk=3)
    assert session.due() == []
    session.submit(Prompt(number=5, text="later"))
    assert isinstance(session.submit(Prompt(number=4, text="too late")), Refused)


def test_what_waits_is_bounded_and_can_be_withdrawn():
    session = new()
    for number in range(MOST_PENDING):
        assert isinstance(session.submit(Prompt(number=number, text="x", at=50 + number)), Received)
    full = session.submit(Prompt(number=MOST_PENDING, text="x"))
    assert isinstance(full, Refused)
    assert str(MOST_PENDING) in full.reason
    assert isinstance(session.submit(Pause(number=MOST_PENDING + 1)), Received)  # waits for nothing
    session.pending = [waiting for waiting in session.pending if not isinstance(waiting.control, Pause)]
    assert session.submit(Withdraw(number=100, target=3)) == Withdrawn(number=100, target=3)
    assert session.submit(Prompt(number=3, text="x")) == Refused(number=3, reason="it was withdrawn")
    assert isinstance(session.submit(Withdraw(number=101, target=3)), Refused)
    assert len(session.pending) == MOST_PENDING - 1


def test_takes_are_bounded_those_from_pictures_more_narrowly():
    session = new()
    for number in range(MOST_GIVEN):
        assert isinstance(session.submit(Restart(number=number, picture="0" * 16)), Received)
    assert isinstance(session.submit(Restart(number=MOST_GIVEN, picture="0" * 16)), Refused)
    assert isinstance(session.submit(Restart(number=MOST_GIVEN + 1)), Received)
    session.take = MOST_TAKES
    assert isinstance(session.submit(Restart(number=MOST_GIVEN + 2)), Refused)


def test_what_makes_no_sense_is_refused_with_the_reason():
    session = new()
    assert "needs a text" in session.submit(Prompt(number=0)).reason
    session.move(State.ENDED, 1.0, "it was enough")
    assert "it was enough" in session.submit(Stop(number=1)).reason


def test_transitions_that_change_the_memory_wait_until_they_are_compiled():
    session = new()
    session.settled = 7
    assert session.submit(Prompt(number=0, text="x")).chunk == 1  # the first chunk has the first prompt
    assert session.submit(Prompt(number=1, transition="cut")).chunk == 7
    assert session.submit(Restart(number=2)).chunk == 0


# --- the queue --------------------------------------------------------------------------------------------------------


def run(queue: Queue, now: float) -> None:
    for session, state, reason in queue.advance(now):
        session.move(state, now, reason)


def test_sessions_run_in_the_order_that_they_came_and_know_how_long_they_wait():
    queue = Queue(limit=100.0, most=8)
    sessions = [new() for _ in range(3)]
    for session in sessions:
        session.left = None
        queue.add(session)
    run(queue, 0.0)
    assert [session.state for session in sessions] == ["starting", "queued", "queued"]
    sessions[0].move(State.RUNNING, 10.0)
    assert [queue.position(session) for session in sessions[1:]] == [1, 2]
    assert [queue.seconds(session, 30.0) for session in sessions[1:]] == [80.0, 180.0]
    run(queue, 110.0)
    assert sessions[0].state == "running"
    run(queue, 110.1)
    assert (sessions[0].state, sessions[1].state) == ("ended", "starting")
    assert "100 seconds" in sessions[0].reason
    sessions[1].move(State.ENDED, 111.0, "stopped")
    run(queue, 111.0)
    assert sessions[2].state == "starting"


def test_a_turn_that_nobody_claims_passes_on():
    queue = Queue(limit=100.0, most=8)
    absent, present = new(), new()
    present.left = None
    queue.add(absent)
    queue.add(present)
    run(queue, 0.0)
    run(queue, CLAIM_SECONDS)
    assert (absent.state, present.state) == ("starting", "queued")
    run(queue, CLAIM_SECONDS + 0.1)
    assert (absent.state, present.state) == ("ended", "starting")


def test_who_loads_the_page_again_while_programs_are_compiled_keeps_the_turn():
    queue = Queue(limit=100.0, most=8)
    session = new()
    session.left = None
    queue.add(session)
    run(queue, 0.0)
    session.left = CLAIM_SECONDS + 10  # long after the turn came
    run(queue, CLAIM_SECONDS + 11)
    assert session.state == "starting"
    run(queue, 2 * CLAIM_SECONDS + 11)
    assert session.state == "ended"


def test_who_went_away_keeps_the_place_for_a_minute():
    queue = Queue(limit=1000.0, most=8)
    running, waiting, last = new(), new(), new()
    for session in (running, waiting, last):
        session.left = None
        queue.add(session)
    run(queue, 0.0)
    running.move(State.RUNNING, 0.0)
    running.left = waiting.left = 10.0
    run(queue, 10.0 + RETURN_SECONDS)
    assert (running.state, waiting.state) == ("running", "queued")
    running.left = None  # back in time
    run(queue, 10.1 + RETURN_SECONDS)
    assert (running.state, waiting.state, last.state) == ("running", "ended", "queued")
    running.left = 100.0
    run(queue, 100.1 + RETURN_SECONDS)
    assert (running.state, last.state) == ("ended", "starting")
    assert "did not come back" in running.reason


def test_generation_leads_by_one_chunk_and_no_faster_than_it_is_shown():
    pace = Pace(1.0)
    assert pace.wait(0.0, lead=0) == 0.0
    pace.begun(0.0)
    assert pace.wait(5.0, lead=1) is None
    assert pace.wait(0.25, lead=0) == pytest.approx(0.5)
    assert pace.wait(0.75, lead=0) == 0.0
