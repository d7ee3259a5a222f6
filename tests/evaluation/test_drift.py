"""Drift and lock against frames whose look is known exactly."""

import math

import cv2
import numpy as np
import pytest
from evaluation.clips import brightened, still

from adastate_jax.evaluation.drift import (
    DriftMeter,
    colour_histogram,
    end_windows,
    frame_look,
    histogram_similarity,
    structural_similarity,
    summarize_drift,
    theil_sen_slope,
)

FRAMES = 40
WINDOW = FRAMES // 4  # of a video shorter than 20 s
RAMP = np.arange(FRAMES)


def measure_drift(frames, fps=16):
    meter = DriftMeter()
    for number, frame in enumerate(frames):
        meter.add(number / fps, frame)
    return summarize_drift(meter.result())


@pytest.fixture(scope="module")
def scene():
    return still(36, 64, FRAMES)


def test_a_ramp_of_brightness_is_measured(scene):
    measured = measure_drift(brightened(scene, RAMP - 20), fps=16)
    assert measured["luma_slope"] == pytest.approx(16 * 60, rel=0.03)
    assert measured["luma_drift"] == pytest.approx(FRAMES - WINDOW, rel=0.03)
    assert measured["contrast_drift"] == pytest.approx(0, abs=0.3)
    assert measured["luma_jitter"] < 0.05


def test_a_loss_of_contrast_is_measured(scene):
    strength = 1 - RAMP / FRAMES / 2
    faded = 128 + (scene - 128.0) * strength[:, None, None, None]
    measured = measure_drift(np.round(faded).astype(np.uint8))
    relative = measured["contrast_drift"] / measured["contrast_first"]
    assert relative == pytest.approx(strength[-WINDOW:].mean() / strength[:WINDOW].mean() - 1, rel=0.03)
    assert abs(measured["luma_drift"]) < 1


def test_saturation_and_colourfulness_are_measured():
    colours = np.zeros((FRAMES, 16, 16, 3), np.uint8)
    colours[..., 0], colours[..., 1:] = 200, (150 - 2 * RAMP)[:, None, None, None]
    measured = measure_drift(colours)
    saturation = 255 * (1 - (150 - 2 * RAMP) / 200)
    truth = saturation[-WINDOW:].mean() - saturation[:WINDOW].mean()
    assert measured["saturation_drift"] == pytest.approx(truth, rel=0.03)
    assert measured["colourfulness_drift"] > 10
    # A flat colour: 0.3 times the length of (R − G, (R + G) / 2 − B).
    assert frame_look(colours[0])["colourfulness"] == pytest.approx(0.3 * math.hypot(50, 25), rel=1e-4)


def test_flicker_shows_as_jitter_of_luma(scene):
    assert measure_drift(brightened(scene, 3 * (-1) ** RAMP))["luma_jitter"] == pytest.approx(12, rel=0.03)


def test_sharpness_falls_with_blur(scene):
    def drift(most):
        blurred = [cv2.GaussianBlur(frame, (0, 0), 0.3 + most * n / FRAMES) for n, frame in enumerate(scene)]
        return measure_drift(np.stack(blurred))["sharpness_drift"]

    none, little, much = drift(0.0), drift(0.7), drift(2.0)
    assert abs(none) < 1e-6
    assert much < little < -0.1


def test_clipped_pixels_are_counted():
    frame = np.full((10, 10, 3), 128, np.uint8)
    frame[:3], frame[3:5] = 0, 255
    assert frame_look(frame)["clipped"] == pytest.approx(50)


@pytest.mark.parametrize(("seconds", "share"), [(4, 1.0), (60, 5.0)])
def test_the_ends_are_a_quarter_but_at_most_five_seconds(seconds, share):
    times = np.arange(seconds * 16) / 16
    first, last = end_windows(times)
    assert first.sum() == last.sum() == share * 16
    assert first[0]
    assert last[-1]


def test_the_slope_withstands_outliers_and_length():
    times = np.arange(5000) / 16
    values = 3 * times
    values[::5] += 400
    assert theil_sen_slope(times, values) == pytest.approx(3, rel=0.01)
    values = 3 * times[:200]
    values[::5] += 400
    assert theil_sen_slope(times[:200], values) == pytest.approx(3, rel=0.01)
    assert math.isnan(theil_sen_slope([0.0], [1.0]))


# --- lock ---------------------------------------------------------------------------------------------------------


def test_structural_similarity_of_flat_pictures_is_known():
    first, second = np.full((30, 40), 100.0), np.full((30, 40), 50.0)
    light = (0.01 * 255) ** 2
    truth = (2 * 100 * 50 + light) / (100**2 + 50**2 + light)
    assert structural_similarity(first, second) == pytest.approx(truth, rel=1e-6)
    assert structural_similarity(first, first) == pytest.approx(1)


def test_histogram_similarity_is_one_minus_the_hellinger_distance():
    red, blue = (np.full((8, 8, 3), colour, np.uint8) for colour in ((220, 20, 20), (20, 20, 220)))
    half = red.copy()
    half[:4] = blue[:4]
    similar = histogram_similarity(colour_histogram(red), colour_histogram(half))
    assert similar == pytest.approx(1 - math.sqrt(1 - math.sqrt(0.5)), rel=0.01)
    assert histogram_similarity(colour_histogram(red), colour_histogram(blue)) == pytest.approx(0, abs=1e-6)
    assert histogram_similarity(colour_histogram(half), colour_histogram(half)) == pytest.approx(1, abs=1e-6)


def flat(*colour):
    return colour_histogram(np.full((8, 8, 3), colour, np.uint8))


def test_the_hue_of_grey_is_no_colour():
    assert histogram_similarity(flat(129, 128, 128), flat(128, 128, 129)) == pytest.approx(1, abs=1e-6)


def test_hue_is_a_circle():
    # Reds a little towards yellow and towards magenta, one bin apart, against red and yellow.
    assert histogram_similarity(flat(220, 10, 0), flat(220, 0, 10)) > 0.2
    assert histogram_similarity(flat(220, 10, 0), flat(220, 220, 0)) == pytest.approx(0, abs=1e-6)


def test_lock_ranks_frozen_over_changed_over_replaced(scene):
    other = still(36, 64, FRAMES, seed=9)
    turned = np.stack([np.roll(frame, number, 1) for number, frame in enumerate(scene)])
    frozen, panned = measure_drift(scene), measure_drift(turned)
    recoloured = measure_drift(np.concatenate([scene[:20], other[:20][..., ::-1] // 2]))
    for name in ("lock_histogram", "lock_histogram_end", "lock_ssim", "lock_ssim_end"):
        assert frozen[name] == pytest.approx(1)
    # A pan moves everything and changes no colour: that is what the histogram is there for.
    assert panned["lock_histogram_end"] == pytest.approx(1)
    assert panned["lock_ssim_end"] < 0.5
    assert recoloured["lock_histogram_end"] < 0.5


def test_a_black_video_is_measured_without_warnings():
    measured = measure_drift(np.zeros((FRAMES, 16, 16, 3), np.uint8))
    assert all(math.isfinite(value) for value in measured.values())
    assert measured["clipped_first"] == 100
    with pytest.raises(ValueError, match="no frames"):
        measure_drift(np.zeros((0, 16, 16, 3), np.uint8))
