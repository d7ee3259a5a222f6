"""Laws of rollouts that are longer than what is scored: windows of them, and segments that go on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LATENT_SHAPE, SMALL, make_dit
from small_rollouts import CHUNKS, KEYS, STREAMS, differ, naive_latents, weighted

from adastate_jax.config.rollouts import require_parts
from adastate_jax.config.stages import DistillConfig, OptimizerConfig
from adastate_jax.models.adapters import LoRAConfig, create_adapters, join
from adastate_jax.sharding import make_mesh, shard_batch, tree_shardings
from adastate_jax.streaming.anchors import make_anchor
from adastate_jax.streaming.denoising import denoise
from adastate_jax.streaming.layout import consecutive
from adastate_jax.streaming.schedule import StreamConfig
from adastate_jax.training.dmd import (
    critic_segment_step,
    draw_update,
    student_segment_step,
    student_step,
)
from adastate_jax.training.long_rollout import (
    Part,
    Place,
    Start,
    change_prompt,
    empty_carried,
    join_carried,
    place_of,
    roll_out_part,
    split_carried,
    with_carried_shardings,
)
from adastate_jax.training.self_rollout import draw_rollout_noise, gradient_pass, rollout_latents, self_rollout
from adastate_jax.training.state import create_state

TINY = dataclasses.replace(SMALL, num_layers=1)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999))
NULL_TEXT = np.ones((1, SMALL.text_length, SMALL.text_dim), np.float32)
# One denoising step: every update stops at the same one, so that what several generate is one rollout.
STREAM = StreamConfig(1, 2, make_anchor("adaptive", 1), denoising_steps=(1000.0,))
KEY = jax.random.key(5)


@functools.cache
def network(seed):
    return make_dit(TINY, seed)


def texts(seed, batch=2):
    shape = batch, SMALL.text_length, SMALL.text_dim
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def long_tuning(**fields):
    """Rollouts of three segments, of three, two and two chunks of one frame."""
    settings = {"batch_size": 2, "rollout_frames": 7, "scored_frames": 3, "overlap_frames": 1, "critic_ratio": 1}
    optimizers = {"student": OPTIMIZER, "critic": OPTIMIZER}
    return DistillConfig(**settings | {"continue_rollout": True} | optimizers | fields)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chunk", "cache_gradient"),
    [("adaptive", 1, "stop"), ("static", 3, "straight_through")],
)
def test_a_window_has_the_naive_gradient(name, chunk, cache_gradient):
    """That of one loop whose gradient is stopped before the window; in the fill, and in the steady state."""
    stream, student, text = STREAMS[name], network(0), texts(0)
    part = Part(min(chunk, stream.num_fill_chunks), CHUNKS - chunk)

    @jax.jit
    def of_window(student, chunk):
        noise = draw_rollout_noise(KEYS, stream, LATENT_SHAPE, part.chunks, chunk)
        start = Start(chunk, KEYS, part)
        record, clip, _ = roll_out_part(student, text, noise, jnp.int32(0), stream, start)

        def loss(params):
            latents = gradient_pass(params, params.text_keys_values(text), record, stream, cache_gradient)
            return weighted(latents), latents

        (_, latents), gradient = jax.value_and_grad(loss, has_aux=True)(student)
        return clip, latents, gradient

    def naive(student):
        latents = naive_latents(student, text, 0, stream, cache_gradient, chunk)
        return weighted(latents), latents

    clip, latents, gradient = of_window(student, jnp.int32(chunk))
    (_, expected), naive_gradient = jax.jit(jax.value_and_grad(naive, has_aux=True))(student)
    np.testing.assert_allclose(clip, expected, atol=1e-5)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    assert differ(gradient, naive_gradient) < 1e-4


def test_before_the_first_update_adapters_change_nothing_of_a_window():
    """Neither what lies before it, which is the cache that it begins with, nor its frames, to the bit."""
    adapters, text = create_adapters(TINY, LoRAConfig(rank=2), KEY), texts(0)

    @jax.jit
    def window(student, chunk):
        noise = draw_rollout_noise(KEYS, STREAM, LATENT_SHAPE, 2, chunk)
        return roll_out_part(student, text, noise, jnp.int32(0), STREAM, Start(chunk, KEYS, Part(3, 2)))

    plain, adapted = (window(student, jnp.int32(4)) for student in (network(0), join(adapters, network(0))))
    for one, other in zip(*map(jax.tree.leaves, (plain, adapted)), strict=True):
        np.testing.assert_array_equal(one, other)
    changed = jax.tree.map(lambda x: x + 0.1, adapters)
    assert np.abs(window(join(changed, network(0)), jnp.int32(4))[1] - plain[1]).max() > 1e-3


def test_windows_are_drawn_from_everywhere_and_again():
    config = DistillConfig(rollout_frames=12, scored_frames=6)
    places = [place_of(number, config, StreamConfig(), seed=3) for number in range(200)]
    assert {place.chunk for place in places} == {0, 1, 2}
    counts = np.bincount([place.chunk for place in places])
    assert counts.min() > 40
    assert all(place.part == Part(min(place.chunk, 2), 2) for place in places)  # all steady ones are one program
    assert places == [place_of(number, config, StreamConfig(), seed=3) for number in range(200)]
    assert places != [place_of(number, config, StreamConfig(), seed=4) for number in range(200)]


def test_windows_may_begin_at_multiples_alone():
    config = DistillConfig(rollout_frames=30, scored_frames=6, scored_every=9)
    chunks = [place_of(number, config, StreamConfig(), seed=3).chunk for number in range(200)]
    assert set(chunks) == {0, 3, 6}
    assert np.bincount(chunks)[[0, 3, 6]].min() > 40
    any_chunk = DistillConfig(rollout_frames=30, scored_frames=6, scored_every=3)
    unsaid = DistillConfig(rollout_frames=30, scored_frames=6)
    for number in range(20):
        assert place_of(number, any_chunk, StreamConfig(), 0) == place_of(number, unsaid, StreamConfig(), 0)


def test_a_window_of_all_is_the_whole_rollout():
    """The same program, and the same draws."""
    whole, window = (DistillConfig(rollout_frames=9, scored_frames=frames) for frames in (0, 9))
    assert [place_of(number, window, StreamConfig(), 0) for number in range(20)] == [None] * 20
    assert window.clip_frames == whole.clip_frames
    draw = functools.partial(draw_update, KEY, 2, stream=StreamConfig(), latent_shape=LATENT_SHAPE)
    for one, other in zip(*(jax.tree.leaves(draw(config=config)) for config in (whole, window)), strict=True):
        np.testing.assert_array_equal(one, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opinion:
    """A score that takes any noisy clip for one clean clip [N, H, W, C]."""

    clean: jax.Array

    def text_keys_values(self, embeddings):
        return embeddings

    def __call__(self, noisy, timesteps, text, positions):
        return (noisy - self.clean) / (timesteps[..., None, None, None] / 1000.0), None


def test_a_window_is_scored_alone_with_the_weights_of_its_place():
    """Loss of the student's update in two micro-batches, told apart from the frames of the whole rollout."""
    config = DistillConfig(
        batch_size=2, accumulate=2, rollout_frames=6, scored_frames=2, horizon_alpha=3.0, student=OPTIMIZER
    )
    fake, real = (Opinion(jax.random.normal(jax.random.key(i), (2, *LATENT_SHAPE))) for i in (1, 2))
    state, text = create_state(network(0), OPTIMIZER, True), texts(0)

    @jax.jit
    def update(state, chunk):
        draws = draw_update(KEY, 2, config, STREAM, LATENT_SHAPE, Part(3, 2), chunk)
        return student_step(state, fake, real, text, NULL_TEXT, jnp.int32(0), draws, config, STREAM)[1]

    @jax.jit
    def whole(student):
        keys = jax.random.split(jax.random.split(jax.random.split(KEY, 3)[0])[1], 2)
        noise = draw_rollout_noise(keys, STREAM, LATENT_SHAPE, 6)
        return rollout_latents(self_rollout(student, student.text_keys_values(text), noise, 0, STREAM)[0], STREAM)

    frames = whole(state.params)
    for chunk in (3, 4):
        scored = frames[:, chunk : chunk + 2]
        scale = jnp.abs(scored - real.clean).mean(axis=(1, 2, 3, 4), keepdims=True)
        weights = (1.0 + 3.0 * jnp.arange(chunk, chunk + 2) / 5.0)[:, None, None, None]
        expected = (weights * jnp.square((fake.clean - real.clean) / scale) / 2).mean()
        np.testing.assert_allclose(update(state, jnp.int32(chunk))["loss"], expected, rtol=1e-4)
    assert update._cache_size() == 1


# --- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adaptive", "ping_pong"])
def test_segments_are_the_whole_rollout(name):
    """Cache, anchor and noise go on: with weights that stay, what the segments generate is one rollout."""
    anchor = make_anchor(name, 1)
    stream, config, student = StreamConfig(1, 2, anchor, denoising_steps=(1000.0,)), long_tuning(), network(0)
    places = [place_of(number, config, stream, 0) for number in range(3)]
    assert [(place.chunk, place.part.chunks) for place in places] == [(0, 3), (3, 2), (5, 2)]

    @jax.jit
    def both(student, text):
        carried, clips = empty_carried(TINY, config, stream, LATENT_SHAPE), []
        for number, place in enumerate(places):
            key, chunk = jax.random.key(number), jnp.int32(place.chunk)
            draws = draw_update(key, 2, config, stream, LATENT_SHAPE, place.part, chunk, KEY)
            given = draws.noise, draws.exit_step, stream, draws.start
            _, clip, carried = roll_out_part(student, text, *given, carried)
            carried = join_carried(split_carried(carried, 2))  # as between micro-batches
            clips.append(clip)
        keys = jax.random.split(jax.random.split(jax.random.split(KEY, 3)[0])[1], 2)
        noise = draw_rollout_noise(keys, stream, LATENT_SHAPE, 7)
        record, cache = self_rollout(student, student.text_keys_values(text), noise, 0, stream)
        return clips, carried, rollout_latents(record, stream), cache

    clips, carried, whole, cache = both(student, texts(0))
    for clip, frames in zip(clips, (slice(0, 3), slice(2, 5), slice(4, 7)), strict=True):  # with the overlap of one
        np.testing.assert_allclose(clip, whole[:, frames], atol=1e-5)
    np.testing.assert_allclose(carried.recent, whole[:, 6:], atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), carried.cache, cache)


def test_one_segment_per_rollout_is_plain_distillation():
    """To the bit, whatever the rollout before left behind: of the student's update, and what the critic's draws."""
    stream = StreamConfig(1, 1, make_anchor("adaptive", 1), denoising_steps=(1000.0, 500.0))
    fields = {"batch_size": 2, "rollout_frames": 3, "student": OPTIMIZER, "critic": OPTIMIZER}
    plain, long = DistillConfig(**fields), DistillConfig(**fields, continue_rollout=True)
    assert long.segments == 1
    part = place_of(0, long, stream, 0).part
    fake, real = (Opinion(jax.random.normal(jax.random.key(i), (3, *LATENT_SHAPE))) for i in (1, 2))
    given = fake, real, texts(0), NULL_TEXT, jnp.int32(0)
    state = create_state(network(0), OPTIMIZER, True)
    carried = jax.tree.map(lambda x: x + 1, empty_carried(TINY, long, stream, LATENT_SHAPE))

    @jax.jit
    def one(state, key):
        draws = draw_update(key, 2, plain, stream, LATENT_SHAPE)
        return student_step(state, *given, draws, plain, stream), draws

    @jax.jit
    def other(state, carried, key):
        draws = draw_update(key, 2, long, stream, LATENT_SHAPE, part, jnp.int32(0), key)
        (state, _), scalars = student_segment_step((state, carried), *given, draws, long, stream)
        return (state, scalars), dataclasses.replace(draws, start=None)

    for x, y in zip(*map(jax.tree.leaves, (one(state, KEY), other(state, carried, KEY))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_only_the_new_frames_are_in_the_critics_loss():
    """The loss is that of the frames behind the overlap, which is seen: another overlap is another loss."""
    config, student, critic, text = long_tuning(), network(0), network(1), texts(0)
    part = place_of(1, config, STREAM, 0).part
    carried = empty_carried(TINY, config, STREAM, LATENT_SHAPE)

    @jax.jit
    def update(carried):
        draws = draw_update(KEY, 2, config, STREAM, LATENT_SHAPE, part, jnp.int32(3), KEY)
        state = create_state(critic, OPTIMIZER, False)
        (_, after), scalars = critic_segment_step((state, carried), student, text, draws, config, STREAM)
        given = draws.noise, draws.exit_step, STREAM, draws.start
        clip = roll_out_part(student, text, *given, carried)[1]
        sigma = jnp.broadcast_to(draws.sigma[:, None], (2, 3))
        noisy = (1 - sigma[..., None, None, None]) * clip + sigma[..., None, None, None] * draws.score_noise
        estimate = critic(noisy, 1000 * sigma, critic.text_keys_values(text), np.arange(3))[0]
        error = jnp.square(estimate - (draws.score_noise - clip))
        return scalars["loss"], error[:, 1:].mean(), clip, after.recent

    loss, expected, clip, recent = update(carried)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(clip[:, 0], carried.recent[:, 0])
    np.testing.assert_array_equal(recent, clip[:, 2:])
    other = update(dataclasses.replace(carried, recent=carried.recent + 1.0))
    assert abs(float(other[0] - loss)) > 1e-4


def test_segments_take_turns_and_prompts_change_before_one():
    config, stream = long_tuning(prompt_change="recache"), STREAM
    places = [place_of(number, config, stream, 7) for number in range(60)]
    assert [place.rollout for place in places] == [number // 3 for number in range(60)]
    assert [place.begun for place in places] == [number // 3 * 3 for number in range(60)]
    assert [place.part.goes_on for place in places] == [number % 3 > 0 for number in range(60)]
    changes = [number % 3 for number, place in enumerate(places) if place.part.change]
    assert len(changes) == 20
    assert {*changes} == {1, 2}
    for rollout in range(20):
        one, two, three = places[3 * rollout : 3 * rollout + 3]
        assert [place.changed for place in (one, two, three)] == [False, bool(two.part.change), True]
    assert all(place.part.recent_frames == 4 for place in places)  # anchor, window and chunk are read again
    assert len({place.part for place in places}) == 4  # programs: another one where all is read again
    assert place_of(3, config, stream, 7) == Place(places[0].part, 0, 1, 3)


def test_updates_are_numbered_both_ways():
    for ratio in (1, 2, 5):
        config = DistillConfig(critic_ratio=ratio)
        for iteration in range(12):
            for name, number in config.update_numbers(iteration).items():
                assert config.update_of(number) == (iteration, ("student", "critic").index(name))


@pytest.mark.parametrize("transition", ["recache", "renew", "reset_state"])
def test_a_change_of_prompt_reads_the_cache_again(transition):
    """The window (or the state) is that of the new prompt, from the frames that were generated; then the segment."""
    config, student, text = long_tuning(prompt_change=transition), network(0), texts(1)
    place = next(p for n in range(60) if (p := place_of(n, config, STREAM, 0)).part.change and p.chunk == 5)
    carried = empty_carried(TINY, config, STREAM, LATENT_SHAPE)
    carried = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), carried)

    text = student.text_keys_values(text)
    changed = change_prompt(student, carried, text, STREAM, place.part.change)
    assert changed.recent is carried.recent
    before = jax.tree.map(np.asarray, changed.cache)
    if transition == "reset_state":
        np.testing.assert_array_equal(before.window.key, carried.cache.window.key)
        tokens = before.anchor.num_tokens
        np.testing.assert_array_equal(before.anchor.key, before.window.key[:, :, -tokens:])
        return
    if transition == "recache":  # of a window and a chunk, beside the anchor, which stays
        np.testing.assert_array_equal(before.anchor.key, carried.cache.anchor.key)
    else:  # the first frames of those that are read are the anchor
        recent, layout = carried.recent[:, 1:], consecutive(0, 0, 0, 3)
        _, fresh = denoise(student, recent, 0.0, text, layout, None)
        tokens = before.anchor.num_tokens
        np.testing.assert_allclose(before.anchor.key, fresh.key[:, :, :tokens], atol=1e-5)
        np.testing.assert_allclose(before.window.key, fresh.key[:, :, tokens:], atol=1e-5)
    assert not np.allclose(before.window.key, carried.cache.window.key, atol=1e-2)


def test_a_segment_on_eight_devices():
    """A segment behind a change of prompt equals that of one device; the rollout lies in parts, before and after."""
    sizes = dataclasses.replace(TINY, num_heads=4)
    config, shape = long_tuning(prompt_change="recache"), (4, 8, 4)  # eight tokens a frame
    student = make_dit(sizes, 0)
    scores = [Opinion(jax.random.normal(jax.random.key(i), (3, *shape))) for i in (1, 2)]
    place = next(p for n in range(99) if (p := place_of(n, config, STREAM, 0)).chunk == 5 and p.part.change)

    def step(states, text):
        draws = draw_update(KEY, 2, config, STREAM, shape, place.part, jnp.int32(5), KEY)
        return student_segment_step(states, *scores, text, NULL_TEXT, jnp.int32(0), draws, config, STREAM)

    def run_on(mesh):
        with jax.set_mesh(mesh):
            state = create_state(student, OPTIMIZER, True)
            carried = empty_carried(sizes, config, STREAM, shape)
            carried = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), carried)
            like = with_carried_shardings(jax.eval_shape(lambda: carried), mesh)
            places = tree_shardings(state, mesh), jax.tree.map(lambda x: x.sharding, like)
            states = jax.device_put((state, carried), places)
            return jax.jit(step, out_shardings=(places, None))(states, shard_batch(texts(0), mesh))

    one, eight = run_on(make_mesh(devices=jax.devices()[:1])), run_on(make_mesh(fsdp=2, model=2, context=2))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5, rtol=1e-4)
    (_, carried), _ = eight
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in jax.tree.leaves(carried.cache))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout_frames": 21, "scored_frames": 24}, "scored_frames 24 are more than rollout_frames 21"),
        ({"scored_frames": -3}, "scored_frames, scored_every and overlap_frames must not be negative"),
        ({"scored_every": 3}, "scored_every 3 is for windows: set scored_frames, or leave it"),
        (
            {"continue_rollout": True, "rollout_frames": 39, "scored_frames": 21, "scored_every": 3},
            "scored_every 3 is for windows",
        ),
        (
            {"rollout_frames": 30, "scored_frames": 21, "scored_every": 12},
            "scored_every 12 leaves the first window alone of rollout_frames 30",
        ),
        ({"overlap_frames": 3}, "overlap_frames 3 is for rollouts that go on: set continue_rollout"),
        ({"prompt_change": "recache"}, "prompt_change recache is for rollouts that go on"),
        (
            {"continue_rollout": True, "rollout_frames": 240, "scored_frames": 21, "overlap_frames": 3},
            "the first of 21 frames and later ones of 18: set it to 237 or 255",
        ),
        (
            {"continue_rollout": True, "scored_frames": 6, "overlap_frames": 6},
            "overlap_frames 6 leave nothing new of 6",
        ),
        ({"continue_rollout": True, "prompt_change": "recache"}, "prompt_change needs a rollout of at least two"),
        (
            {"continue_rollout": True, "scored_frames": 7, "prompt_change": "blend"},
            "prompt_change must be empty or one of switch, recache, renew, reset_state, got 'blend'",
        ),
    ],
)
def test_parts_that_a_rollout_has_not_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**fields)


@pytest.mark.parametrize(
    ("stream", "fields", "message"),
    [
        (StreamConfig(), {"scored_frames": 7}, r"distill\.scored_frames 7 are no whole number of chunks of 3 frames"),
        (
            *(StreamConfig(), {"scored_frames": 6, "scored_every": 4}),
            r"distill\.scored_every 4 are no whole number of chunks of 3 frames",
        ),
        (
            StreamConfig(),
            {"scored_frames": 15, "overlap_frames": 9, "continue_rollout": True, "rollout_frames": 21},
            None,
        ),
        (
            StreamConfig(3, 3, make_anchor("ping_pong", 15)),
            {"rollout_frames": 12, "scored_frames": 6},
            r"distill\.rollout_frames 12 are fewer than the anchor's 15",
        ),
        (
            StreamConfig(3, 3, make_anchor("static")),
            {"scored_frames": 3, "continue_rollout": True, "prompt_change": "reset_state"},
            r"distill\.prompt_change reset_state needs an adaptive anchor",
        ),
        (StreamConfig(3, 3, make_anchor("restart")), {"scored_frames": 3}, "ends where it restarts"),
    ],
)
def test_parts_that_a_stream_has_not_are_refused(stream, fields, message):
    config = DistillConfig(**fields)
    if message is None:
        require_parts(config, stream)
        return
    with pytest.raises(ValueError, match=message):
        require_parts(config, stream)
