"""A stream that is directed while it runs is the one that a schedule makes; a session's file replays it to the bit."""

import json
import random

import numpy as np
import pytest
from small_run import small_config

import adastate_jax as ada
from adastate_jax.generation.takes import RunningTake, Take, read_session, replay, session_head, take_to_dict
from adastate_jax.streaming.names import TRANSITIONS

SESSIONS = 20
ANCHORS = ("static", "adastate")
PROMPTS = ("a camera pans left", "a red ball", "sand dunes", "a white ball over green hills")


@pytest.fixture(scope="module")
def model():
    return ada.load(config=small_config(), random_weights=True)


def frames_of(video, chunks: int) -> np.ndarray:
    return np.concatenate([next(video) for _ in range(chunks)])


@pytest.mark.parametrize("ahead", [True, False])
def test_a_directed_stream_is_what_its_schedule_makes(model, ahead):
    video = ada.stream(model, PROMPTS[0], seed=4)
    video.video.dispatches_ahead = ahead
    begun = [next(video) for _ in range(4)]
    chunk = video.direct(PROMPTS[1], "recache")
    assert chunk == (5 if ahead else 4)
    directed = np.concatenate([*begun, *(next(video) for _ in range(6))])
    cues = video.video.settings.cues
    assert [(cue.prompt, cue.transition) for cue in cues] == [(PROMPTS[0], "switch"), (PROMPTS[1], "recache")]
    np.testing.assert_array_equal(directed, frames_of(ada.stream(model, prompts=cues, seed=4), 10))


def test_a_direction_that_cannot_be_leaves_the_stream_as_it_was(model):
    video, undisturbed = ada.stream(model, PROMPTS[0]), ada.stream(model, PROMPTS[0])
    with pytest.raises(ada.UserError, match="has not begun"):
        video.direct(PROMPTS[1])
    begun = [next(video) for _ in range(3)]
    for wrong in (("", "switch"), (PROMPTS[1], "fade"), (PROMPTS[1], "blend", 0), (7, "switch")):
        with pytest.raises(ada.UserError, match="direct: entry"):
            video.direct(*wrong)
    video_frames = np.concatenate([*begun, frames_of(video, 3)])
    np.testing.assert_array_equal(video_frames, frames_of(undisturbed, 6))
    planned = ada.stream(model, prompts=(ada.Cue(0, PROMPTS[0]), ada.Cue(30, PROMPTS[1])))
    next(planned)
    with pytest.raises(ada.UserError, match="at second 30"):
        planned.direct(PROMPTS[2])
    short = ada.stream(model, PROMPTS[0], seconds=0.25)
    said = "SingleVideo of 'a camera pans left': 4 frames, of 32×32 pixels, seed 0, anchor adaptive; %d are generated"
    assert repr(short) == said % 0
    assert len(list(short)) == 2
    assert repr(short) == said % 4
    assert repr(planned).startswith("SingleVideo of 'a camera pans left', then 'a red ball': frames without end, of ")
    with pytest.raises(ada.UserError, match="ends before"):
        short.direct(PROMPTS[1])


def test_a_directed_stream_is_saved_and_goes_on(model, tmp_path):
    video = ada.stream(model, PROMPTS[0])
    frames_of(video, 4)
    video.direct(PROMPTS[1], "blend", 3)
    next(video)
    ada.save_stream(video, tmp_path / "paused")
    again = ada.load_stream(model, tmp_path / "paused")
    again.direct(PROMPTS[2], "flush")
    video.direct(PROMPTS[2], "flush")
    np.testing.assert_array_equal(frames_of(again, 4), frames_of(video, 4))


def random_session(model, rng: random.Random) -> tuple[list[Take], list[np.ndarray]]:
    """A session as a person might have it: takes, directions, pictures to start from; and all its frames."""
    takes, frames = [], []
    for _ in range(rng.randrange(1, 3)):
        picture = None
        if rng.random() < 0.2:
            picture = np.random.default_rng(rng.randrange(9)).integers(
                0, 256, (1, *model.config.data.size, 3), np.uint8
            )
        anchors = rng.choice((ANCHORS, ANCHORS, ("adastate",)))
        running = RunningTake(model, rng.choice(PROMPTS), rng.randrange(5), anchors, picture)
        frames.append(running.step().frames)
        for _ in range(rng.randrange(1, 6)):
            for _ in range(rng.choice((1, 2, 6)) if running.next_chunk > 5 else 6):
                frames.append(running.step().frames)
            prompt = rng.choice((None, *PROMPTS))
            transition = rng.choice(("switch", "blend") if prompt and rng.random() < 0.5 else TRANSITIONS)
            running.direct(prompt, transition, rng.randrange(1, 5))
        frames.append(running.step().frames)
        takes.append(running.take())
    return takes, frames


def test_twenty_random_sessions_replay_to_the_same_latents(model, tmp_path):
    rng, directions = random.Random(11), 0
    for _ in range(SESSIONS):
        takes, frames = random_session(model, rng)
        path = tmp_path / "session.json"
        path.write_text(json.dumps(session_head(model) | {"takes": [take_to_dict(take) for take in takes]}))
        read = read_session(path, model)
        assert read == tuple(takes)
        again = list(replay(model, read))
        assert [step.checksum for step in again] == [checksum for take in takes for checksum in take.checksums]
        for step, shown in zip(again, frames, strict=True):
            np.testing.assert_array_equal(step.frames, shown)
        directions += sum(len(panel.cues) - 1 for take in takes for panel in take.panels)
    assert directions > 3 * SESSIONS


def test_the_checksum_sees_one_bit_of_the_latents(model):
    one, other = (RunningTake(model, PROMPTS[0], seed, ("adastate",)) for seed in (0, 1))
    assert one.step().checksum != other.step().checksum


def test_an_anchor_without_a_transition_switches_where_another_has_it(model):
    take = RunningTake(model, PROMPTS[0], 0, ANCHORS)
    for _ in range(5):
        take.step()
    take.direct(PROMPTS[1], "reset_state")
    assert [panel.cues[-1].transition for panel in take.take().panels] == ["switch", "reset_state"]
    alone = RunningTake(model, PROMPTS[0], 0, ("static",))
    for _ in range(5):
        alone.step()
    with pytest.raises(ada.UserError, match="adaptive anchor"):
        alone.direct(PROMPTS[1], "reset_state")
    assert len(alone.take().panels[0].cues) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(model="other"), "another model"),
        (lambda found: found.pop("format"), "is no session"),
        (lambda found: found.pop("takes"), "damaged"),
        (lambda found: found["takes"][0].update(chunks=3), "damaged"),
        (lambda found: found["takes"][0].update(checksums=["x"]), "damaged"),
        (lambda found: found["takes"][0].update(picture="%%"), "damaged"),
        (lambda found: found["takes"][0]["panels"][0]["cues"][0].update(second=4), "damaged"),
        (lambda found: found["takes"][0]["panels"][0]["cues"][0].update(other=4), "damaged"),
        (lambda found: found.update(takes=[]), "nothing was generated"),
    ],
)
def test_a_damaged_session_is_refused_in_a_line(model, tmp_path, change, message):
    take = RunningTake(model, PROMPTS[0], 0, ("adastate",))
    take.step()
    found = session_head(model) | {"takes": [take_to_dict(take.take())]}
    found = json.loads(json.dumps(found))
    change(found)
    path = tmp_path / "session.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ada.UserError, match=message) as error:
        read_session(path, model)
    assert "\n" not in str(error.value)
