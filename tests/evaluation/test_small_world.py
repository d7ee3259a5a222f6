"""What is read back from a small world's pixels, beside what it was rendered with."""

import numpy as np
import pytest

from adastate_jax.data.worlds import WorldConfig, render_world
from adastate_jax.evaluation import small_world

COLOURS = ("white", "yellow", "cyan", "magenta")
WORLD = WorldConfig(
    height=16, width=16, num_frames=45, motions=("pan left", "pan right"), palettes=("clay",), shapes=("ball",),
    colours=COLOURS, speed=(3.0, 3.0), subject_spacing=3.1, subject_scatter=0.0, subject_radius=(0.2, 0.2),
    name_colour=False, hue_turn=(1.0, 1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def truth():
    worlds = [render_world(WORLD, 5, index) for index in range(24)]
    return worlds, np.stack([world.video for world in worlds])


def test_pan_is_read_with_its_sign(truth):
    worlds, videos = truth
    pixels = np.array([world.pan_x for world in worlds]) * 16 / 16  # widths a second → pixels a frame
    pan = small_world.pan_per_frame(videos, 6.0)
    assert set(np.sign(pixels)) == {-1, 1}
    assert np.abs(pan.mean(axis=1) / pixels - 1).max() < 0.03


@pytest.mark.parametrize("noise", [0, 6, 12])  # levels of 255; up to half of the contrast
@pytest.mark.parametrize("speed", [1.0, 1.5, 2.5, 3.0, 3.5, 4.0])
def test_pans_are_read_within_three_percent_in_spite_of_noise(speed, noise):
    config = WorldConfig(**{**vars(WORLD), "speed": (speed, speed)})
    worlds = [render_world(config, 6, index) for index in range(16)]
    videos = np.stack([world.video for world in worlds])
    grain = np.random.default_rng(0).normal(0, noise, (*videos.shape[:-1], 1))
    pan = small_world.pan_per_frame(np.clip(videos + grain, 0, 255), 6.0)
    assert abs((pan.mean(axis=1) / [world.pan_x for world in worlds]).mean() - 1) < 0.03


def test_a_frozen_video_neither_pans_nor_turns(truth):
    _, videos = truth
    frozen = np.repeat(videos[:, :1], 9, axis=1)
    assert np.abs(small_world.pan_per_frame(frozen, 6.0)).max() == 0
    assert np.abs(small_world.hue_per_frame(small_world.hue(frozen))).max() < 1e-9
    assert small_world.resemblance(frozen).min() > 0.999
    black = np.zeros_like(frozen)
    fading = black + np.arange(0, 180, 20, dtype=np.uint8)[:, None, None, None]
    assert np.abs(small_world.pan_per_frame(black, 6.0)).max() == 0
    assert np.abs(small_world.pan_per_frame(fading, 6.0)).max() == 0
    assert small_world.resemblance(black).max() == 0


def test_hue_turns_at_its_rate(truth):
    worlds, videos = truth
    turned = small_world.hue_per_frame(small_world.hue(videos)).mean(axis=1) * 16
    rates = np.array([world.hue_turn for world in worlds])
    assert set(rates) == {-1.0, 1.0}
    assert np.abs(turned / rates - 1).max() < 0.1
    assert abs((turned / rates).mean() - 1) < 0.03


def test_subjects_are_found_where_they_are_and_in_their_colour(truth):
    worlds, videos = truth
    found = small_world.subject_colours(videos, COLOURS, 0.2)
    own = np.array([COLOURS.index(world.colour) for world in worlds])[:, None]
    seen = found >= 0
    assert 0.3 < seen.mean() < 0.5  # a ball's middle is in the frame for 16 pixels of every 49.6
    assert (found == own)[seen].mean() > 0.99
    plain = render_world(WorldConfig(**{**vars(WORLD), "colours": ("white",), "subject_spacing": 9.0}), 5, 0)
    assert (small_world.subject_colours(plain.video[None, 12:24], COLOURS, 0.2) < 0).all()


def test_the_look_follows_brightness_saturation_and_contrast(truth):
    videos = truth[1].astype(np.float32)
    before = small_world.look(videos)
    grey = videos.mean(axis=-1, keepdims=True)
    assert np.allclose(small_world.look(0.5 * videos)["brightness"], 0.5 * before["brightness"], rtol=1e-4)
    paler = small_world.look(grey + 0.5 * (videos - grey))
    assert np.allclose(paler["saturation"], 0.5 * before["saturation"], rtol=1e-4)
    assert np.allclose(paler["contrast"], before["contrast"], rtol=1e-4)
    mean = grey.mean(axis=(2, 3), keepdims=True)
    flatter = small_world.look(videos - 0.5 * (grey - mean))
    assert np.allclose(flatter["contrast"], 0.5 * before["contrast"], rtol=1e-4)
