"""Motion metrics against clips whose motion is known: within 3 % of the truth, and in the right order elsewhere."""

import math
import weakref

import numpy as np
import pytest
from evaluation.clips import brightened, moving, still, waves

from adastate_jax.data.worlds import WorldConfig, render_world
from adastate_jax.evaluation.measure import Settings, measure_frames
from adastate_jax.evaluation.motion import (
    MotionMeter,
    chunk_borders,
    chunk_profile,
    moves_by_vbench_rule,
    seam_ratio,
    summarize_motion,
    within_shots,
)

HEIGHT, WIDTH, FRAMES = 192, 256, 7
CAMERAS = {
    "pan right": {"pan": (2.4, 0.0)},
    "pan left, slow": {"pan": (-0.4, 0.0)},
    "pan down": {"pan": (0.0, 1.3)},
    "pan up, fast": {"pan": (0.0, -9.0)},
    "zoom in": {"zoom": 0.005},
    "zoom out": {"zoom": -0.02},
    "zoom in, slow": {"zoom": 0.002},
    "roll clockwise": {"roll": math.radians(0.25)},
    "roll anticlockwise": {"roll": math.radians(-1.5)},
}


def measure_motion(frames, fps=16, first_chunk=9, chunk=12):
    meter = MotionMeter(fps)
    for number, frame in enumerate(frames):
        meter.add(number / fps, frame)
    return summarize_motion(meter.result(), first_chunk, chunk)


@pytest.mark.parametrize("name", CAMERAS)
def test_the_camera_is_within_3_percent(name):
    move = {"pan": (0.0, 0.0), "zoom": 0.0, "roll": 0.0} | CAMERAS[name]
    measured = measure_motion(moving(HEIGHT, WIDTH, FRAMES, **move), fps=16)
    truth = {
        "pan_x": 1600 * move["pan"][0] / WIDTH,
        "pan_y": 1600 * move["pan"][1] / HEIGHT,
        "zoom": 1600 * move["zoom"],
        "roll": 16 * math.degrees(move["roll"]),
    }
    for metric, value in truth.items():
        assert measured[metric] == pytest.approx(value, rel=0.03, abs=0.05), metric
    assert measured["camera_support"] > 0.95


@pytest.mark.parametrize("pan", [(2.4, 0.0), (-1.0, 3.0)])
def test_the_amount_of_motion_is_within_3_percent(pan):
    measured = measure_motion(moving(HEIGHT, WIDTH, FRAMES, pan=pan), fps=16)
    speed = math.hypot(*pan)
    assert measured["motion"] == pytest.approx(1600 * speed / HEIGHT, rel=0.03)
    assert measured["pan_speed"] == pytest.approx(1600 * speed / HEIGHT, rel=0.03)
    assert measured["dynamic_radius"] == pytest.approx(200 * speed / HEIGHT, rel=0.03)
    assert measured["object_motion"] < 0.05 * measured["motion"]


def test_the_frame_rate_sets_both_speed_and_sampling():
    frames = moving(HEIGHT, WIDTH, 10, pan=(1.5, 0.0))
    at_16, at_24 = measure_motion(frames, fps=16), measure_motion(frames, fps=24)
    assert at_24["motion"] == pytest.approx(1.5 * at_16["motion"])
    # Every third frame at 24, every second at 16: 1/8 s in both cases.
    assert at_24["dynamic_radius"] == pytest.approx(1.5 * at_16["dynamic_radius"], rel=0.03)


@pytest.mark.parametrize(("pan", "moves"), [(2.1, 0.0), (2.4, 1.0)])  # the threshold is 2.25 pixels a frame here
def test_dynamic_degree_follows_vbench_s_rule(pan, moves):
    assert measure_motion(moving(HEIGHT, WIDTH, 13, pan=(pan, 0.0)), fps=16)["dynamic_rule"] == moves


def test_vbench_s_rule_asks_for_a_quarter_of_the_pairs():
    fast, slow = 2.35, 2.33
    for pairs, needed in ((40, 10), (8, 2)):
        for number, expected in ((needed, True), (needed - 1, False)):
            radii = np.array([fast] * number + [slow] * (pairs - number))
            assert moves_by_vbench_rule(radii, pairs + 1, 16) is expected
    assert moves_by_vbench_rule(np.array([fast]), 2, 16) is None
    assert moves_by_vbench_rule(np.full(8, fast), 9, 4) is False  # below 8 frames per second a pair may move further


@pytest.mark.parametrize("pan", [0.0, 1.5])
def test_object_motion_is_within_3_percent(pan):
    # A river between still banks: its rows slide by up to 4 pixels, the more the farther from the banks.
    x, y = np.arange(WIDTH) - (WIDTH - 1) / 2, np.arange(HEIGHT)[:, None] - (HEIGHT - 1) / 2
    slide = 4 * np.clip(1 - (y / 30) ** 2, 0, None)
    frames = waves(HEIGHT, WIDTH, (x + pan * number - slide * number + 1j * y for number in range(FRAMES)))
    measured = measure_motion(frames)
    assert measured["object_motion"] == pytest.approx(1600 * slide.mean() / HEIGHT, rel=0.03)
    assert measured["pan_x"] == pytest.approx(1600 * pan / WIDTH, abs=1.0)


def test_a_subject_is_motion_that_the_camera_did_not_make():
    frames = still(HEIGHT, WIDTH, FRAMES)
    subject = moving(72, 72, 1, seed=5)[0]
    for number, frame in enumerate(frames):
        frame[50:122, 40 + 4 * number : 112 + 4 * number] = subject
    measured = measure_motion(frames)
    assert measured["object_motion"] == pytest.approx(1600 * 4 * (72 * 72) / (HEIGHT * WIDTH) / HEIGHT, rel=0.25)
    assert abs(measured["pan_x"]) + abs(measured["zoom"]) < 0.1


def test_flicker_is_measured_exactly_and_by_vbench_s_formula():
    flickering = brightened(still(HEIGHT, WIDTH, FRAMES), 3 * (-1) ** np.arange(FRAMES))
    measured = measure_motion(flickering)
    assert measured["flicker_warped"] == pytest.approx(6, rel=0.03)
    assert measured["flicker_vbench"] == pytest.approx(1 - 6 / 255, abs=1e-4)
    assert measured["motion"] < 0.3
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
    difference = np.abs(np.diff(noise.astype(float), axis=0)).mean((1, 2, 3)).mean()
    assert measure_motion(noise)["flicker_vbench"] == pytest.approx((255 - difference) / 255, abs=1e-9)


def test_motion_is_not_flicker():
    measured = measure_motion(moving(HEIGHT, WIDTH, FRAMES, pan=(3.0, 1.0)))
    assert measured["flicker_warped"] < 0.2 * 255 * (1 - measured["flicker_vbench"])


def test_a_stuttering_camera_is_less_smooth():
    steady = measure_motion(moving(HEIGHT, WIDTH, 9, pan=(2.0, 0.0)))
    every_other = moving(HEIGHT, WIDTH, 5, pan=(4.0, 0.0)).repeat(2, 0)[:9]
    stuttering = measure_motion(every_other)
    assert stuttering["motion"] == pytest.approx(steady["motion"], rel=0.05)
    assert steady["acceleration_ratio"] < 0.1
    assert stuttering["acceleration_ratio"] == pytest.approx(2, rel=0.1)  # from 0 to twice the mean and back
    assert stuttering["interpolation_error"] > 4 * steady["interpolation_error"]


# --- seams --------------------------------------------------------------------------------------------------------


def test_chunk_borders_follow_the_first_chunk():
    assert chunk_borders(46, 9, 12).tolist() == [9, 21, 33, 45]
    assert chunk_borders(9, 9, 12).tolist() == []


def test_a_step_of_brightness_at_the_borders_is_a_seam():
    steps = np.ones(21)
    steps[[4, 8, 12, 16]] = 3  # into the frames that begin a chunk: 5, 9, 13, 17
    frames = brightened(still(64, 96, 22), np.append(0, steps.cumsum()) - 14)
    measured = measure_motion(frames, first_chunk=5, chunk=4)
    assert measured["seam_ratio_warped"] == pytest.approx(3, rel=0.03)
    assert measured["seam_ratio"] == pytest.approx(3, rel=0.03)
    assert measure_motion(frames, first_chunk=6, chunk=4)["seam_ratio_warped"] == pytest.approx(1, rel=0.03)


def test_a_jump_at_the_borders_is_a_seam_of_the_flow():
    shift = np.cumsum([0, *(5.0 if number in (5, 9, 13) else 1.0 for number in range(1, 16))])
    pixels = np.arange(128) - 64 + 1j * (np.arange(128) - 64)[:, None]
    measured = measure_motion(waves(128, 128, (pixels + x for x in shift)), first_chunk=5, chunk=4)
    assert measured["seam_ratio_flow"] > 5
    assert measured["seam_ratio"] > 2
    assert measured["seam_ratio_warped"] < 2  # it compensates the jump


def test_seam_ratios_of_little_and_of_nothing():
    assert seam_ratio(np.full(20, 0.01), 5, 4, floor=0.25) == 1.0
    assert math.isnan(seam_ratio(np.ones(4), 9, 12, floor=0.25))
    values = np.ones(20)
    values[4] = math.nan
    assert seam_ratio(values, 5, 4, floor=0.25) == 1.0


def test_the_chunk_profile_puts_the_border_first():
    values = np.arange(19) % 4  # borders into frames 5, 9, ...: pairs 4, 8, ...
    np.testing.assert_array_equal(chunk_profile(values, 5, 4), [0, 1, 2, 3])
    assert np.isnan(chunk_profile(values[:3], 5, 4)).all()


# --- hard cases ---------------------------------------------------------------------------------------------------


def test_a_frozen_and_a_black_video_have_no_motion():
    frozen = measure_motion(still(96, 96, 20))
    black = measure_motion(np.zeros((20, 96, 96, 3), np.uint8))
    for measured in (frozen, black):
        assert measured["motion"] < 0.01
        assert measured["dynamic_rule"] == 0.0
        assert measured["flicker_warped"] == 0.0
        assert measured["acceleration_ratio"] < 0.01
        assert measured["seam_ratio"] == measured["seam_ratio_warped"] == measured["seam_ratio_flow"] == 1.0
    assert frozen["pan_speed"] == pytest.approx(0, abs=1e-3)
    assert math.isnan(black["pan_speed"])  # nothing to see of the camera


def test_a_shot_cut_is_found_and_is_no_motion():
    shots = [moving(96, 128, 6, pan=(1.0, 0.0), seed=seed) for seed in (1, 2)]
    meter = MotionMeter(16)
    for number, frame in enumerate(np.concatenate(shots)):
        meter.add(number / 16, frame)
    assert meter.result().cuts == (6,)
    measured = measure_motion(np.concatenate(shots))
    assert measured["cuts"] == 1
    assert measured["motion"] == pytest.approx(1600 / 96, rel=0.05)


def test_nothing_of_a_cut_between_still_shots_counts_but_by_vbench_s_formula():
    shots = [still(96, 128, 9, seed=seed) for seed in (1, 2)]
    measured = measure_frames(np.concatenate(shots), settings=Settings(9, 12)).metrics
    assert measured["cuts"] == 1
    for name in ("motion", "dynamic_radius", "interpolation_error", "luma_jitter", "acceleration_ratio"):
        assert measured[name] == pytest.approx(0, abs=1e-6), name
    assert measured["flicker_vbench"] < 0.999
    assert measured["seam_ratio"] > 5  # it is at a border


def test_the_change_of_velocity_after_a_cut_is_unknown():
    meter = MotionMeter(16)
    for number, frame in enumerate(np.concatenate([moving(96, 128, 5, pan=(1.0, 0.0), seed=seed) for seed in (1, 2)])):
        meter.add(number / 16, frame)
    pairs = within_shots(meter.result())
    assert list(np.flatnonzero(np.isnan(pairs["motion"]))) == [4]
    assert list(np.flatnonzero(np.isnan(pairs["flow_change"]))) == [0, 4, 5]  # the first has none before it


def test_without_a_camera_nothing_is_taken_for_an_object():
    """Too little texture to fit a camera to: what moves may be the camera or an object."""
    frames = np.full((4, 96, 128, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        frame[40:44, 30 + number : 34 + number] = 200
    measured = measure_motion(frames)
    assert math.isnan(measured["pan_x"])
    assert math.isnan(measured["object_motion"])


@pytest.mark.parametrize("size", [32, 48])
def test_small_frames_still_tell_the_pan(size):
    motions = ("pan left", "pan right", "pan up", "pan down")
    config = WorldConfig(height=size, width=size, num_frames=8, motions=motions)
    ratios = []
    for index in range(6):
        world = render_world(config, 1, index)
        measured = measure_motion(world.video)
        truth = np.array([world.pan_x, world.pan_y]) * 100
        ratios.append(np.array([measured["pan_x"], measured["pan_y"]]) @ truth / (truth @ truth))
    assert np.median(ratios) == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(ratios, 1, atol=0.06)


def test_too_few_frames_are_refused_and_two_suffice():
    with pytest.raises(ValueError, match="it has 1 frame, and motion needs two"):
        measure_motion(still(64, 64, 1))
    with pytest.raises(ValueError, match="it has 0 frames"):
        measure_motion(still(64, 64, 1)[:0])
    measured = measure_motion(moving(64, 64, 2, pan=(1.0, 0.0)))
    assert measured["pan_x"] == pytest.approx(25, rel=0.05)
    assert math.isnan(measured["dynamic_rule"])


def test_frames_too_small_to_follow_are_refused():
    with pytest.raises(ValueError, match="4 x 64 pixels"):
        measure_motion(np.zeros((3, 64, 4, 3), np.uint8))


def test_a_long_video_is_not_held():
    meter, alive = MotionMeter(16), weakref.WeakSet()

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    for number, pixels in enumerate(moving(32, 32, 12, pan=(0.5, 0.0))):
        frame = pixels.copy().view(Frame)
        alive.add(frame)
        meter.add(number / 16, frame)
        del frame
        assert len(alive) <= 2
