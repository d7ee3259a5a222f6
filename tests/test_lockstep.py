"""Several processes stop at the same step, and end with a line that names the one that is gone."""

import random
import threading
import time

import pytest

from adastate_jax import interrupts, lockstep


class Service:
    """The coordination service, of threads instead of processes; what they say takes a while to be heard."""

    def __init__(self, seed: int = 0):
        self.kept: dict[str, str] = {}
        self.rng = random.Random(seed)

    def key_value_set(self, name, value, allow_overwrite=False):
        assert allow_overwrite or name not in self.kept
        time.sleep(self.rng.random() * 0.01)
        self.kept[name] = value

    def key_value_dir_get(self, folder):
        time.sleep(self.rng.random() * 0.01)
        return [(name, value) for name, value in list(self.kept.items()) if name.startswith(folder)]


@pytest.mark.parametrize("seed", range(5))
def test_after_a_signal_all_stop_at_the_same_step(monkeypatch, seed):
    """Whichever hears first; a process waits in a collective for those that are behind it, here two steps at most."""
    monkeypatch.setattr(lockstep, "_PERIOD", 0.01)
    signalled = threading.Event()
    monkeypatch.setattr(interrupts, "received", lambda: 15 if signalled.is_set() else None)
    monkeypatch.setattr(lockstep.os, "kill", lambda process, number: signalled.set())  # it hears by the service
    service = Service(seed)
    watches = [lockstep.Watch(service, index, 4, end=lambda *_: None) for index in range(4)]
    steps, stopped = [0] * 4, {}

    def train(index: int):
        rng = random.Random(index * 10 + seed)
        for step in range(10_000):
            while step > min(steps) + 2 and not stopped:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.01)
            steps[index] = step + 1
            if watches[index].pass_step():
                stopped[index] = step + 1
                return

    threads = [threading.Thread(target=train, args=(index,)) for index in range(4)]
    for watch in watches:
        watch.start()
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    signalled.set()
    for thread in threads:
        thread.join(timeout=20)
    for watch in watches:
        watch.close()
    assert len(stopped) == 4
    assert len(set(stopped.values())) == 1, stopped
    assert stopped[0] > 2


def ended(monkeypatch, watch: lockstep.Watch, until) -> list[tuple[int, str]]:
    """How a watch has ended its process after rounds during which the clock moves on by ten seconds each."""
    found, now = [], [1000.0]
    monkeypatch.setattr(lockstep.time, "monotonic", lambda: now[0])
    watch._end = lambda code, line: found.append((code, line))
    while not found and now[0] < 1300:
        until()
        watch.round()
        now[0] += 10
    return [(code, line, now[0] - 1000) for code, line in found]


def test_a_process_without_a_sign_of_life_is_named(monkeypatch):
    service = Service()
    service.kept["adastate/beats/1"] = '[1, 7, "host-b"]'
    watch = lockstep.Watch(service, 0, 2)
    [(code, line, seconds)] = ended(monkeypatch, watch, lambda: None)
    assert code == 75
    assert line.startswith("error: process 1 on host-b has given no sign of life for 40 s: it is dead or stopped; ")
    assert seconds < 120


def test_a_process_that_never_gives_a_sign_of_life_is_named(monkeypatch):
    [(code, line, seconds)] = ended(monkeypatch, lockstep.Watch(Service(), 0, 2), lambda: None)
    assert code == 75
    assert line.startswith("error: process 1 was there at the start and has given no sign of life since: it is dead; ")
    assert seconds < 120


def test_a_process_that_lives_and_passes_no_step_is_named(monkeypatch):
    """The first process has passed four steps, of ten milliseconds each, and waits; the second has passed two."""
    service = Service()
    watch = lockstep.Watch(service, 0, 2)
    monkeypatch.setattr(lockstep.time, "monotonic", lambda: 1000.0)
    for _ in range(5):
        watch.pass_step()
    rounds = iter(range(1000))

    def beat():
        service.kept["adastate/beats/1"] = f'[{next(rounds)}, 2, "host-b"]'

    [(_, line, seconds)] = ended(monkeypatch, watch, beat)
    assert "no step was passed for 60 s; process 1 has passed the fewest, 2: " in line
    assert seconds < 120


@pytest.mark.parametrize("steps", [1, 3])
def test_what_takes_its_time_is_not_taken_for_stuck(monkeypatch, steps):
    """Within any of the steps that it was said of."""
    service = Service()
    watch = lockstep.Watch(service, 0, 2)
    monkeypatch.setattr(lockstep.time, "monotonic", lambda: 1000.0)
    for _ in range(5):
        watch.pass_step()
    watch.untimed(steps)
    for _ in range(steps - 1):
        watch.pass_step()
    rounds = iter(range(1000))

    def beat():
        service.kept["adastate/beats/1"] = f'[{next(rounds)}, 5, "host-b"]'

    assert ended(monkeypatch, watch, beat) == []


def test_a_process_that_has_left_takes_the_others_with_it(monkeypatch):
    monkeypatch.setattr(lockstep, "_FAREWELL", 0.02)
    service = Service()
    lockstep.Watch(service, 1, 2).leave("data.txt: damaged; remove it")
    [(code, line, _)] = ended(monkeypatch, lockstep.Watch(service, 0, 2), lambda: None)
    assert (code, line) == (
        75,
        "error: process 1 has ended: data.txt: damaged; remove it; the same command goes on from the last checkpoint",
    )


def test_leaving_does_not_wait_for_a_service_that_hangs(monkeypatch):
    monkeypatch.setattr(lockstep, "_FAREWELL", 0.05)
    service, hangs = Service(), threading.Event()
    service.key_value_set = lambda *_, **__: hangs.wait(20.0)
    begun = time.monotonic()
    lockstep.Watch(service, 1, 2).leave("it was stopped")
    assert time.monotonic() - begun < 10
    hangs.set()


def test_a_signal_that_ends_a_process_at_once_ends_the_others_by_it(monkeypatch):
    """Where nothing is to be saved, a process has left before its next round."""
    monkeypatch.setattr(lockstep, "_FAREWELL", 0.02)
    service, received, codes = Service(), [15], []
    monkeypatch.setattr(interrupts, "received", lambda: received[0])
    lockstep.Watch(service, 1, 2).leave("it was stopped")
    received[0] = None
    monkeypatch.setattr(lockstep.os, "kill", lambda process, number: received.__setitem__(0, number))
    monkeypatch.setattr(interrupts, "end", codes.append)
    lockstep.Watch(service, 0, 2, end=lambda *_: None).round()
    assert codes == [15]


def test_a_first_process_that_is_dead_is_named_before_jax_aborts(monkeypatch):
    """No call to the service returns, and nobody listens where it was; within the six seconds of `distributed`."""
    monkeypatch.setattr(lockstep, "_PERIOD", 0.05)
    monkeypatch.setattr(lockstep, "_LOOK", 0.05)
    service, ended, gone = Service(), [], threading.Event()
    service.kept["adastate/beats/0"] = '[1, 7, "host-a"]'
    watch = lockstep.Watch(service, 1, 2, end=lambda *what: ended.append(what), refused=gone.is_set)
    watch.start()
    time.sleep(0.5)
    assert ended == []  # it answers
    service.key_value_set = lambda *_, **__: threading.Event().wait(2.0)
    time.sleep(0.5)
    assert ended == []  # it is slow, but somebody listens
    gone.set()
    time.sleep(0.5)
    watch.close()
    assert set(ended) == {
        (
            75,
            "error: process 0 on host-a is dead: nobody listens where it held the coordination service; the same "
            "command goes on from the last checkpoint",
        )
    }
