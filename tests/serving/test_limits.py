"""Who is let in, how often, and what a viewer who does not read is sent."""

import asyncio

import pytest

from adastate_jax.serving.limits import Door, Rate, Rates, is_loopback
from adastate_jax.serving.protocol import Pong
from adastate_jax.serving.viewer import Viewer


def test_a_rate_lets_so_many_pass_and_recovers():
    rate = Rate(per_second=2.0, burst=3)
    assert [rate.take(0.0) for _ in range(5)] == [True, True, True, False, False]
    assert [rate.take(1.0) for _ in range(3)] == [True, True, False]


def test_rates_are_of_each_client_and_their_number_is_bounded():
    rates = Rates(1.0, 1)
    assert [rates.take("a", 0.0), rates.take("b", 0.0), rates.take("a", 0.0)] == [True, True, False]
    for number in range(5000):
        rates.take(str(number), 0.0)
    assert len(rates._rates) <= 4096


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("example.org", False), ("", False)],
)
def test_loopback_is_this_machine_alone(host, loopback):
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("listens", "token", "host", "origin", "authorization", "let_in"),
    [
        ("127.0.0.1", None, "127.0.0.1:8000", None, None, True),
        ("127.0.0.1", None, "localhost:8000", "http://localhost:8000", None, True),
        ("127.0.0.1", None, "[::1]:8000", None, None, True),
        ("127.0.0.1", None, "evil.example:8000", None, None, False),  # a name that points here
        ("127.0.0.1", None, "localhost:8000", "http://evil.example", None, False),
        ("127.0.0.1", None, "localhost:8000", "null", None, False),
        ("127.0.0.1", None, "", None, None, False),
        ("0.0.0.0", "secret-token", "gpu.example", "https://gpu.example", "Bearer secret-token", True),
        ("0.0.0.0", "secret-token", "gpu.example", "https://gpu.example", "Bearer other-token", False),
        ("0.0.0.0", "secret-token", "gpu.example", None, None, False),
    ],
)
def test_the_door(listens, token, host, origin, authorization, let_in):
    refusal = Door(listens, token).refusal(host, origin, authorization, guarded=True)
    assert (refusal is None) == let_in


def drain(viewer: Viewer) -> tuple[list[str], list[bytes]]:
    """What a viewer is sent, in this moment."""
    texts, pictures = [], []

    async def run():
        async def text(message):
            texts.append(message)

        async def show(message):
            pictures.append(message)

        task = asyncio.create_task(viewer.send(text, show))
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    return texts, pictures


def test_a_viewer_that_shows_nothing_gets_few_pictures_and_all_messages():
    viewer = Viewer("watch", "")
    sent = []
    for chunk in range(40):
        viewer.say(Pong(number=chunk))
        viewer.show(chunk, 3, str(chunk).encode())
        sent += drain(viewer)[1]
    assert sent == [b"0", b"1", b"2", b"3"]
    assert viewer.dropped == 3 * 34  # all but what was sent, and the two chunks that wait
    viewer.has_shown(3)
    assert drain(viewer)[1] == [b"38", b"39"]


def test_a_viewer_that_shows_what_it_gets_loses_nothing():
    viewer = Viewer("watch", "")
    for chunk in range(40):
        viewer.show(chunk, 3, b"")
        assert len(drain(viewer)[1]) == 1
        viewer.has_shown(chunk)
    assert viewer.dropped == 0


def test_another_take_takes_back_what_waits():
    viewer = Viewer("watch", "")
    viewer.show(0, 3, b"old")
    viewer.flush()
    viewer.show(1, 3, b"new")
    assert drain(viewer)[1] == [b"new"]


def test_a_viewer_that_does_not_even_read_messages_is_given_up():
    viewer = Viewer("watch", "")
    for number in range(600):
        viewer.say(Pong(number=number))
    assert viewer.overflow
    assert len(viewer._texts) <= 512
