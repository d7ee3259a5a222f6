"""Prompt schedules: what is refused, when cues take effect, and what each transition does to the stream."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL

from adastate_jax.errors import UserError
from adastate_jax.models.attention import KeyValues
from adastate_jax.models.rope import rotate, rotation
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming import prompted
from adastate_jax.streaming.anchors.adaptive import AdaptiveAnchor
from adastate_jax.streaming.anchors.contract import NoAnchor
from adastate_jax.streaming.anchors.static import RollingAnchor, StaticAnchor
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.cues import Cue, parse_schedule, read_schedule
from adastate_jax.streaming.names import TRANSITIONS
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.prompted import initial_prompted, prompted_stream
from adastate_jax.streaming.prompts import Reread, Schedule, chunk_of, schedule
from adastate_jax.streaming.rollout import rollout, stream
from adastate_jax.streaming.schedule import CUT_POSITION, StreamConfig, layout_of, sigmas_of

CONFIG = StreamConfig(past_frames=3, anchor=AdaptiveAnchor(1))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_lines_and_json_say_the_same():
    lines = "# a walk\n0 | a meadow\n\n2.5 recache | a desert | at dusk\n5 blend:6 | a sea\n"
    json = """[{"second": 0, "prompt": "a meadow"},
        {"second": 2.5, "prompt": "a desert | at dusk", "transition": "recache"},
        {"second": 5, "prompt": "a sea", "transition": "blend", "chunks": 6}]"""
    assert parse_schedule(lines, "lines") == parse_schedule(json, "json")
    assert parse_schedule(lines, "lines")[2] == Cue(5.0, "a sea", "blend", 6)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no entries"),
        ("[]", "has no entries"),
        ("1 | a", "entry 1 is at second 1; the first one must be at second 0"),
        ("0 | a\n5 | b\n4 | c", "entry 3 is at second 4, not after 5"),
        ("0 | a\n5 | b\n5 | c", "entry 3 is at second 5, not after 5"),
        ("0 | a\n5 jump | b", "entry 2 has transition 'jump'"),
        ("0 | a\n5 |  ", "entry 2 has no prompt"),
        ("0 | a\n5 b", "entry 2 must be SECOND"),
        ("0 | a\nsoon | b", "entry 2 must be SECOND"),
        ("0 | a\nnan | b", "entry 2 has second nan"),
        ("0 | a\n-inf | b", "entry 2 has second -inf"),
        (f'[{{"second": 0, "prompt": "a"}}, {{"second": 1{"0" * 400}, "prompt": "b"}}]', "entry 2 has second 1000"),
        ('[{"second": true, "prompt": "a"}]', "entry 1 has second True"),
        ('[{"second": 0, "prompt": "a", "chunks": true}]', "entry 1 blends over True chunks"),
        ('[{"second": 0, "prompt": "a", "chunks": 2.0}]', "entry 1 blends over 2.0 chunks"),
        ("0 | a\n5 blend:x | b", "entry 2 blends over 'x' chunks"),
        ("0 | a\n5 blend:0 | b", "entry 2 blends over 0 chunks"),
        ('[{"second": 0, "prompt": "a", "colour": 1}]', "entry 1 must have second and prompt"),
        ('[{"second": "0", "prompt": "a"}]', "entry 1 has second '0'"),
        ('[{"second": 0, "prompt": 7}]', "entry 1 has no prompt"),
        ("[0]", "entry 1 must be an object"),
        ("[{", "is not JSON"),
    ],
)
def test_a_bad_schedule_is_refused_by_entry(text, complaint):
    with pytest.raises(UserError, match="file: ") as error:
        parse_schedule(text, "file")
    assert complaint in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent.txt: cannot be read"):
        read_schedule(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_schedule(tmp_path / "binary")


@pytest.mark.parametrize(
    ("transition", "config", "complaint"),
    [
        ("reset_state", StreamConfig(anchor=StaticAnchor(1)), "needs an adaptive anchor"),
        ("keep_state", StreamConfig(anchor=NoAnchor()), "needs an adaptive anchor"),
        ("reset_state", StreamConfig(past_frames=0, anchor=AdaptiveAnchor(1)), "needs a window of 1 frames"),
        ("recache", PRESETS["rolling_forcing"].stream, "does not go with RollingAnchor"),
        ("flush", PRESETS["causvid"].stream, "does not go with RestartAnchor"),
        ("cut", StreamConfig(past_frames=60, anchor=NoAnchor()), "cannot be: a scene cut"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(transition, config, complaint):
    with pytest.raises(UserError, match="entry 2: ") as error:
        schedule([Cue(0, "a"), Cue(60, "b", transition)], config, 4, 16)
    assert complaint in str(error.value)


def test_two_cues_in_one_chunk_are_refused():
    with pytest.raises(UserError, match="entry 3 begins in the same chunk"):
        schedule([Cue(0, "a"), Cue(5, "b"), Cue(5.05, "c")], CONFIG, 4, 16)


@pytest.mark.parametrize("time_factor", [1, 4])
def test_a_cue_waits_for_the_next_chunk(time_factor):
    """Against counting video frames one by one."""
    frames = [0]  # first video frame of each latent
    while len(frames) < 60:
        frames.append(frames[-1] + (1 if len(frames) == 1 else time_factor))
    for tenth in range(0, 20):
        second = tenth / 10
        begins = [frames[chunk * CONFIG.chunk_frames] / 16 for chunk in range(19)]
        expected = next(chunk for chunk, begin in enumerate(begins) if begin >= second - 1e-9)
        assert chunk_of(second, CONFIG, time_factor, 16) == expected


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embeddings(text):
    return [text, -text, text[::-1]]


def start(config=CONFIG):
    carry = initial_carry(SMALL, config, seed_keys(0, 2), *LATENT_SHAPE[:2])
    return initial_prompted(carry, config, LATENT_SHAPE)


def follow(student, embeddings, plan, chunks, config=CONFIG, carry=None):
    """Contents of the chunks, and the last carry."""
    contents, begin = [], carry or start(config)
    for end, chunk in prompted_stream(student, begin, embeddings, plan, config, LATENT_SHAPE, chunks):
        contents.append(np.asarray(chunk.content))
        carry = end
    return contents, carry


def scheduled(*cues):
    """A schedule by chunk numbers: (chunk, transition) behind the first."""
    entries = [Cue(0, "a")] + [Cue(1, "b", transition, 2) for _, transition in cues]
    return Schedule(tuple(entries), (0, *(chunk for chunk, _ in cues)))


def test_one_cue_is_the_plain_stream(student, text, embeddings):
    contents, _ = follow(student, embeddings, scheduled(), 4)
    keys_values = student.text_keys_values(text)
    plain = stream(student, start().stream, keys_values, CONFIG, LATENT_SHAPE, 4)
    for ours, (_, chunk) in zip(contents, plain, strict=True):
        np.testing.assert_array_equal(ours, chunk.content)


def test_a_switch_is_a_rollout_that_goes_on_under_another_text(student, embeddings):
    """Streamed along a schedule = scanned piece by piece."""
    contents, _ = follow(student, embeddings, scheduled((3, "switch")), 6)
    scan = jax.jit(rollout, static_argnums=(3, 4, 5, 6))
    before, after = (student.text_keys_values(e) for e in embeddings[:2])
    carry, first = scan(student, start().stream, before, CONFIG, LATENT_SHAPE, 3, 0)
    _, second = scan(student, carry, after, CONFIG, LATENT_SHAPE, 3, 3)
    np.testing.assert_allclose(np.concatenate(contents, 1), jnp.concatenate([first, second], 1), atol=1e-6)


def test_a_blend_arrives_at_the_new_prompt(student, embeddings):
    plan = scheduled((2, "blend"))
    assert [plan.plan(chunk, CONFIG).blend for chunk in range(5)] == [1.0, 1.0, 0.5, 1.0, 1.0]
    blended, _ = follow(student, embeddings, plan, 3)
    half = [embeddings[0], (embeddings[0] + embeddings[1]) / 2]
    expected, _ = follow(student, half, scheduled((2, "switch")), 3)
    np.testing.assert_allclose(blended[2], expected[2], atol=1e-5)


def fresh_of(student, frames, positions, embedding, context=None):
    """Clean keys (un-rotated) and values of frames that see each other and the context."""
    text = student.text_keys_values(embedding)
    run = jax.jit(lambda frames, context: student(frames, jnp.zeros(frames.shape[:2]), text, positions, None, context))
    return run(frames, context)[1]


def recached(student, embeddings, config, chunk, transition="recache"):
    """The generated frames, the plan, and the caches before and behind a transition before `chunk`."""
    schedule = scheduled((chunk, transition))
    contents, carry = follow(student, embeddings, schedule, chunk, config)
    plan, text = schedule.plan(chunk, config), student.text_keys_values(embeddings[1])
    before = jax.tree.map(np.asarray, carry.stream.cache)
    after = prompted._recache(student, carry.stream, carry.recent, text, config, plan.reread).cache
    return jnp.concatenate(contents, axis=1), plan, before, after


RECACHED = {
    "longlive": PRESETS["longlive"].stream,
    "longlive_infinity": PRESETS["longlive_infinity"].stream,
    "adaptive": StreamConfig(anchor=AdaptiveAnchor(2)),
    "none": StreamConfig(anchor=NoAnchor()),
}


@pytest.mark.parametrize(
    ("name", "chunk", "transition"),
    [
        ("longlive", 1, "recache"),
        ("longlive", 3, "recache"),
        ("longlive", 4, "recache"),
        ("longlive", 6, "renew"),
        ("adaptive", 2, "recache"),
        ("none", 2, "recache"),
    ],
)
def test_a_memory_made_anew_is_that_of_a_stream_of_the_frames_alone(student, embeddings, name, chunk, transition):
    """LongLive's rule at a switch before frame c <= 12: all frames are read, seeing each other; all is rewritten."""
    config = dataclasses.replace(RECACHED[name], denoising_steps=(1000.0,))
    frames, plan, _, after = recached(student, embeddings, config, chunk, transition)
    most = config.anchor.frames + config.past_frames + config.chunk_frames
    frames = frames[:, -(most // config.chunk_frames) * config.chunk_frames :]
    assert plan.reread == Reread(frames.shape[1], anew=True, sees_anchor=False)
    fresh = fresh_of(student, frames, range(frames.shape[1]), embeddings[1])
    tokens = SMALL.frame_tokens(*LATENT_SHAPE[:2])
    shown = min(frames.shape[1], config.past_frames) * tokens
    window = after.window.tokens(after.window.num_tokens - shown, shown)
    for ours, new in zip(jax.tree.leaves(window), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_allclose(ours, new[:, :, new.shape[2] - shown :], atol=1e-5)
    if config.anchor.frames:
        sink = after.anchor.sink if name == "longlive" else after.anchor
        size = config.anchor.frames * tokens
        for ours, new in zip(jax.tree.leaves(sink), jax.tree.leaves(fresh.tokens(0, size)), strict=True):
            np.testing.assert_allclose(ours, new, atol=1e-5)
    if name == "longlive":
        assert int(after.anchor.distance) == max(frames.shape[1] - 9, 0)


@pytest.mark.parametrize("name", ["longlive", "longlive_infinity"])
@pytest.mark.parametrize("chunk", [5, 6])
def test_recache_behind_the_fill_sees_the_old_sink(student, embeddings, name, chunk):
    """LongLive's rule for c > 12, at the positions that its two variants count: c − 9 … c − 1, and slots 3 … 11."""
    config = dataclasses.replace(RECACHED[name], denoising_steps=(1000.0,))
    frames, plan, before, after = recached(student, embeddings, config, chunk)
    assert plan.reread == Reread(9, anew=False, sees_anchor=True)
    first = 3 * chunk - 9 if name == "longlive" else 3
    sink = before.anchor.sink if name == "longlive" else before.anchor
    grid = LATENT_SHAPE[0] // 2, LATENT_SHAPE[1] // 2, SMALL.head_dim
    context = KeyValues(rotate(jnp.asarray(sink.key), rotation(np.arange(3), *grid)), jnp.asarray(sink.value))
    fresh = fresh_of(student, frames[:, -9:], range(first, first + 9), embeddings[1], context)
    for ours, old, new in zip(*map(jax.tree.leaves, (after.window, before.window, fresh)), strict=True):
        np.testing.assert_allclose(ours, new[:, :, -ours.shape[2] :], atol=2e-5)
        assert np.abs(ours - old).max() > 1e-3
    for ours, old in zip(*map(jax.tree.leaves, (after.anchor, before.anchor)), strict=True):
        np.testing.assert_array_equal(ours, old)


def test_a_hidden_state_is_never_read_again(student, embeddings):
    config = StreamConfig(anchor=AdaptiveAnchor(2), denoising_steps=(1000.0,))
    _, plan, before, after = recached(student, embeddings, config, 3)
    assert plan.reread == Reread(6, anew=False, sees_anchor=True)
    for ours, old in zip(*map(jax.tree.leaves, (after.anchor, before.anchor)), strict=True):
        np.testing.assert_array_equal(ours, old)


@pytest.mark.parametrize("transition", ["recache", "renew", "flush", "cut", "reset_state", "blend"])
def test_a_transition_acts_from_its_chunk_on(student, embeddings, transition):
    config = StreamConfig(past_frames=6, anchor=AdaptiveAnchor(1))
    same_text = [embeddings[0], embeddings[1]]
    plain, _ = follow(student, same_text, scheduled((5, "switch")), 6, config)
    other, _ = follow(student, same_text, scheduled((5, transition)), 6, config)
    for chunk in range(5):
        np.testing.assert_array_equal(plain[chunk], other[chunk])
    assert np.abs(plain[5] - other[5]).max() > 1e-4


def test_a_flush_forgets_all_but_two_frames_and_the_window_fills_again():
    config = StreamConfig(past_frames=6, anchor=StaticAnchor(1))
    plan = scheduled((10, "flush"))
    windows = [layout_of(plan.plan(chunk, config).phase, config) for chunk in range(9, 13)]
    assert [len(layout.window) for layout in windows] == [6, 2, 5, 6]
    assert (windows[1].anchor, windows[1].window, windows[1].content) == ((0,), (1, 2), (3, 4, 5))
    assert plan.plan(12, config).phase == plan.plan(9, config).phase


def test_what_a_flush_forgot_no_later_entry_brings_back():
    config = StreamConfig(past_frames=6, anchor=StaticAnchor(1))
    plan = scheduled((10, "flush"), (11, "recache"), (12, "recache"))
    plans = [plan.plan(chunk, config) for chunk in range(10, 13)]
    assert [len(layout_of(plan.phase, config).window) for plan in plans] == [2, 5, 6]
    assert [plan.reread and plan.reread.frames for plan in plans] == [None, 5, 8]


def test_a_renewed_stream_begins_again():
    """What was forgotten before it is read too, and the window is full behind it."""
    config = StreamConfig(past_frames=6, anchor=StaticAnchor(1))
    plan = scheduled((10, "flush"), (11, "renew"), (12, "recache"))
    plans = [plan.plan(chunk, config) for chunk in range(11, 13)]
    assert [len(layout_of(plan.phase, config).window) for plan in plans] == [6, 6]
    assert [plan.reread for plan in plans] == [Reread(9, True, False), Reread(9, False, True)]


def test_a_flush_of_a_young_stream_keeps_its_first_frames():
    config = StreamConfig(past_frames=9, anchor=StaticAnchor(3))
    plan = scheduled((2, "flush"))
    layouts = [layout_of(plan.plan(chunk, config).phase, config) for chunk in (2, 3)]
    assert [(len(layout.anchor), len(layout.window)) for layout in layouts] == [(3, 2), (3, 5)]


def test_the_first_generated_chunk_has_its_own_steps():
    """Causal-Forcing++: frame 0 without a picture, frame 1 with one."""
    config = PRESETS["causal_forcing_two_step"].stream
    for given in range(3):
        plans = [scheduled().plan(chunk, config, given_chunks=given) for chunk in range(5)]
        assert [len(sigmas_of(plan.phase, config)) for plan in plans] == [4 if i == given else 2 for i in range(5)]


def test_a_cut_is_for_one_chunk():
    plan = scheduled((10, "cut"))
    contents = [layout_of(plan.plan(chunk, CONFIG).phase, CONFIG).content for chunk in (9, 10, 11)]
    assert contents == [(5, 6, 7), tuple(range(CUT_POSITION, CUT_POSITION + 3)), (5, 6, 7)]


def test_reset_state_takes_the_newest_frame(student, embeddings):
    _, carry = follow(student, embeddings, scheduled(), 4)
    newest = np.asarray(carry.stream.cache.window.key)
    reset = prompted._reset_state(carry.stream, CONFIG)
    tokens = SMALL.frame_tokens(*LATENT_SHAPE[:2])
    np.testing.assert_array_equal(reset.cache.anchor.key, newest[:, :, -tokens:])


@pytest.fixture
def compiled():
    """Grows by one with every program that XLA compiles."""
    durations = []

    def note(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield durations
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_a_new_prompt_compiles_nothing(student, embeddings, on_a_mesh, compiled):
    """Neither does the fill: after the first chunk nothing is compiled, of a new stream or of one that goes on."""
    config, given = StreamConfig(denoising_steps=(1000.0,), shift=7.0), None  # no other test has this shift
    if on_a_mesh:
        student = jax.device_put(student, jax.NamedSharding(make_mesh(), jax.P()))
        given = jnp.ones((2, 4, *LATENT_SHAPE))
    schedule = scheduled(*enumerate(TRANSITIONS, 3))
    cues, carry = [embeddings[cue % 2] for cue in range(len(schedule.cues))], start(config)
    del compiled[:]
    for chunks in (4, None):
        prompted = prompted_stream(student, carry, cues, schedule, config, LATENT_SHAPE, chunks, given)
        carry, _ = next(prompted)
        assert compiled
        del compiled[:]
        for carry, _ in itertools.islice(prompted, 8):
            assert not compiled, f"chunk {int(carry.stream.chunk) - 1} of a schedule with cues at {schedule.starts}"


@pytest.mark.parametrize("transition", ["recache", "renew", "reset_state", "blend", "flush"])
def test_a_stream_resumed_before_or_after_a_transition_goes_on_the_same(student, embeddings, transition):
    plan = scheduled((4, transition))
    whole, _ = follow(student, embeddings, plan, 6)
    for split in (4, 5):
        first, carry = follow(student, embeddings, plan, split)
        second, _ = follow(student, embeddings, plan, 6 - split, carry=carry)
        for ours, theirs in zip(first + second, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


STREAMS = {name: preset.stream for name, preset in PRESETS.items()} | {"adaptive": CONFIG}


@pytest.mark.parametrize("name", STREAMS)
def test_what_is_compiled_ahead_is_all_that_a_stream_runs(name):
    """Against looking at every chunk, wherever cues lie; and the further they are apart, the less is looked at."""
    config, rng = STREAMS[name], np.random.default_rng(len(name))

    def possible(transition):
        try:
            schedule([Cue(0, "a"), Cue(1000, "b", transition)], config, 4, 16)
        except UserError:
            return False
        return True

    transitions = list(filter(possible, TRANSITIONS))
    for _ in range(12):
        starts = np.sort(rng.choice(np.arange(1, 150), rng.integers(1, 5), replace=False)).tolist()
        plan = scheduled(*((start, str(rng.choice(transitions))) for start in starts))
        first, length, given = (int(rng.integers(0, most)) for most in (100, 150, config.num_fill_chunks))
        last = first + 1 + length

        def programs(chunks, plan=plan, first=first, last=last, given=given):
            plans = [(chunk, plan.plan(chunk, config, last - chunk, given)) for chunk in chunks]
            return {(one.phase, one.transition, one.reread, min(chunk, given), chunk == first) for chunk, one in plans}

        ahead = prompted.chunks_to_compile(plan, config, first, last, given)
        assert programs(ahead) == programs(range(first, last))
    far = scheduled((10**6, "switch"), (10**12, "switch"))
    assert len(prompted.chunks_to_compile(far, config, 0, None)) <= 3 * (config.num_fill_chunks + len(config.cycle))


def test_a_cue_years_ahead_delays_nothing(student, embeddings, monkeypatch):
    plan, looked_at = scheduled((10**9, "recache")), []
    planned = Schedule.plan
    monkeypatch.setattr(Schedule, "plan", lambda self, *arguments: looked_at.append(0) or planned(self, *arguments))
    next(prompted_stream(student, start(), embeddings, plan, CONFIG, LATENT_SHAPE))
    assert len(looked_at) < 20


def test_joint_denoising_takes_a_switch(student, embeddings):
    config = StreamConfig(past_frames=6, anchor=RollingAnchor(3), denoising_steps=(1000.0, 500.0))
    contents, _ = follow(student, embeddings, scheduled((2, "switch")), 4, config)
    assert np.isfinite(np.concatenate(contents)).all()
