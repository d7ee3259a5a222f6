"""Laws of the procedural worlds: deterministic, truthful about their motion, and cached by configuration."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.palettes import PALETTES
from adastate_jax.data.worlds import DIRECTIONS, MOTIONS, WorldConfig, captions, render_world, worlds
from adastate_jax.errors import UserError
from adastate_jax.evaluation.small_world import subject_colours

LARGE = WorldConfig(height=192, width=176, num_frames=5, fps=32)


def test_a_world_is_a_function_of_seed_and_index():
    config = WorldConfig()
    first, again = render_world(config, 3, 5), render_world(config, 3, 5)
    np.testing.assert_array_equal(first.video, again.video)
    assert dataclasses.replace(first, video=None) == dataclasses.replace(again, video=None)
    assert first.video.shape == (15, 32, 32, 3)
    assert first.video.dtype == np.uint8
    for seed, index in ((3, 6), (4, 5)):
        assert not np.array_equal(first.video, render_world(config, seed, index).video)


def test_a_longer_video_begins_with_the_shorter_one():
    for motion in ("pan left", "follow up"):
        short = WorldConfig(motions=(motion,))
        long = dataclasses.replace(short, num_frames=40)
        np.testing.assert_array_equal(render_world(short, 0, 1).video, render_world(long, 0, 1).video[:15])


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if "zoom" not in motion])
def test_content_moves_against_the_camera_by_the_stated_amount(motion):
    world = render_world(dataclasses.replace(LARGE, motions=(motion,)), 7, 2)
    kind, way = motion.split()
    assert np.sign([world.pan_x, world.pan_y]).tolist() == list(DIRECTIONS[way])
    true = -np.array([world.pan_x * LARGE.width, world.pan_y * LARGE.height]) / LARGE.fps
    # A followed subject stands still in the frame: look at a strip along the motion that it does not reach.
    strip = np.s_[:, :36] if way in ("left", "right") else np.s_[:, :, :36]
    measured = _median_shift(world.video[strip] if kind == "follow" else world.video)
    np.testing.assert_allclose(measured, true, atol=0.35)  # pixels, of 3 to 6
    moving = (world.pan_x, world.pan_y) if kind == "follow" else (0.0, 0.0)
    assert (world.subject_x, world.subject_y) == moving


def _median_shift(video):
    """Content motion (x, y) in pixels per frame by phase correlation."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in video]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    return np.median([cv2.phaseCorrelate(a, b, window)[0] for a, b in itertools.pairwise(grey)], axis=0)


@pytest.mark.parametrize("motion", ["zoom in", "zoom out"])
def test_content_scales_by_the_stated_amount(motion):
    world = render_world(dataclasses.replace(LARGE, motions=(motion,), palettes=("ocean",)), 1, 4)
    assert np.sign(world.zoom) == {"zoom in": 1, "zoom out": -1}[motion]
    rates = world.zoom + np.linspace(-0.6, 0.6, 25)
    errors = [_error_after_scaling(world.video[0], world.video[3], rate * 3 / LARGE.fps) for rate in rates]
    assert rates[np.argmin(errors)] == pytest.approx(world.zoom, abs=0.11)


def _error_after_scaling(before, after, log_scale):
    """Mean difference in the middle of the frame between `after` and `before` scaled about the centre."""
    height, width, _ = before.shape
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), 0.0, float(np.exp(log_scale)))
    scaled = cv2.warpAffine(before, matrix, (width, height), flags=cv2.INTER_LINEAR)
    difference = np.abs(scaled.astype(np.float32) - after)
    return difference[height // 4 : -height // 4, width // 4 : -width // 4].mean()


def test_the_camera_can_travel_for_minutes_without_the_picture_going_flat():
    for motion in ("pan right", "zoom in", "zoom out"):
        config = WorldConfig(height=16, width=16, num_frames=200, fps=2, motions=(motion,), palettes=("moon",))
        contrast = render_world(config, 0, 0).video[::40].std(axis=(1, 2)).mean(axis=-1)
        assert contrast.min() > 12
        assert contrast[-1] > contrast[0] / 3


def test_a_widely_spaced_subject_leaves_and_comes_back_in_its_colour():
    config = WorldConfig(
        num_frames=96, motions=("pan left",), palettes=("moon",), colours=("red",), speed=(1, 1), subject_spacing=3.0
    )
    world = render_world(config, 0, 0)
    red = (world.video[..., 0].astype(int) - world.video[..., 1] > 90).sum(axis=(1, 2))
    seen = red > 10
    assert seen[0]
    runs = [(value, len(list(group))) for value, group in itertools.groupby(seen)]
    assert [value for value, _ in runs][:3] == [True, False, True]
    assert runs[1][1] >= 16  # out of sight for a second
    assert world.pan_x == -1.0


def test_the_caption_tells_motion_landscape_and_subject():
    for index, motion in enumerate(MOTIONS):
        world = render_world(WorldConfig(height=8, width=8, num_frames=1, motions=(motion,)), 0, index)
        kind, way = motion.split()
        for word in (kind, way, world.shape, world.colour, PALETTES[world.palette].landscape):
            assert word in world.caption
        assert world.colour not in PALETTES[world.palette].avoid
    plain = render_world(WorldConfig(height=8, width=8, num_frames=1, name_colour=False, shapes=("ball",)), 0, 0)
    assert " a ball" in plain.caption


def test_a_coarser_landscape_is_the_same_at_any_resolution():
    """With its finest detail three times as large, a frame of three times the size shrinks to the small one."""
    fields = {"num_frames": 2, "motions": ("pan left",), "palettes": ("clay",), "shapes": ("ball",), "speed": (0, 0)}
    small = render_world(WorldConfig(height=16, width=16, **fields), 0, 0).video.astype(float)
    large = render_world(WorldConfig(height=48, width=48, finest=9.0, **fields), 0, 0).video.astype(float)
    shrunk = large.reshape(2, 16, 3, 16, 3, 3).mean(axis=(2, 4))
    fine = render_world(WorldConfig(height=48, width=48, **fields), 0, 0).video.astype(float)
    fine = fine.reshape(2, 16, 3, 16, 3, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - small).mean() < 0.5 * np.abs(fine - small).mean()


def hue_turns(frames):
    """Hue of the mean colour of frames [F, ..., 3], in turns from red through yellow and green."""
    colour = frames.reshape(len(frames), -1, 3).astype(float).mean(axis=1)
    red, green, blue = colour.T
    return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)


def test_the_hue_turns_as_the_caption_says():
    config = WorldConfig(num_frames=17, motions=("follow left",), palettes=("clay",), hue_turn=(0.25, 0.25))
    starts = []
    for index in range(6):
        world = render_world(config, 0, index)
        hue = hue_turns(world.video[:, :4])  # the top rows, away from the subject
        forwards = world.caption.endswith("while the colours turn forwards")
        assert forwards or world.caption.endswith("while the colours turn backwards")
        assert world.hue_turn == (0.25 if forwards else -0.25)
        turned = np.diff(hue[[0, 16]])[0]  # over one second
        assert abs((turned - world.hue_turn + 0.5) % 1 - 0.5) < 0.05
        starts.append(hue[0])
    assert np.ptp(starts) > 0.2  # and it begins anywhere
    config = WorldConfig(**{**vars(config), "hue_start": 0.0})
    alike = np.concatenate([hue_turns(render_world(config, 0, index).video[:1, :4]) for index in range(6)])
    assert np.ptp(alike) < 0.05


def test_subjects_without_scatter_stand_in_a_row_at_even_distances():
    config = WorldConfig(
        height=32, width=32, num_frames=65, motions=("pan right",), palettes=("moon",), colours=("red",),
        shapes=("ball",), speed=(2.0, 2.0), subject_spacing=2.0, subject_scatter=0.0, subject_radius=(0.2, 0.2),
    )  # fmt: skip
    video = render_world(config, 0, 0).video.astype(int)
    red = video[..., 0] - video[..., 1] > 90
    rows = np.flatnonzero(red.any(axis=(0, 2)))
    assert (rows[0] + rows[-1] + 1) / 2 == 16  # about the middle
    assert abs(len(rows) - 2 * 0.2 * 32) <= 2  # as large as its radius says
    seen = red.any(axis=(1, 2))
    period = 16  # frames to travel 2 widths at 2 widths a second
    np.testing.assert_array_equal(seen[:-period], seen[period:])


CHANGING = WorldConfig(
    height=16, width=16, num_frames=60, motions=("pan left", "pan up"), palettes=("clay",), shapes=("ball", "box"),
    colours=("yellow", "cyan", "magenta"), speed=(3.0, 3.0), subject_spacing=3.1, subject_scatter=0.0,
    subject_radius=(0.2, 0.2), name_colour=False, hue_turn=(1.0, 1.0), colour_change=0.5,
)  # fmt: skip


def test_a_subject_takes_another_colour_in_view_and_comes_back_in_the_last_one():
    drawn = [render_world(CHANGING, 2, index) for index in range(64)]
    wrong = seen = 0
    for world in drawn:
        video = world.video[None] if world.motion == "pan left" else world.video[None].transpose(0, 1, 3, 2, 4)
        found = subject_colours(video, CHANGING.colours, 0.2)[0]
        names = [world.colour] * 60
        for frame, colour in world.changes:
            assert found[frame] >= 0  # in view
            assert colour != names[frame]
            names[frame:] = [colour] * (60 - frame)
        true = np.array([CHANGING.colours.index(name) for name in names])
        wrong, seen = wrong + (found != true)[found >= 0].sum(), seen + (found >= 0).sum()
        assert np.ptp(np.flatnonzero(found >= 0)) > 40  # they come back
    assert wrong < 0.01 * seen
    changing = [world for world in drawn if world.changes]
    assert 24 <= len(changing) <= 40
    assert all(world.changes[0][0] < 4 for world in changing)  # the first one that is seen changes in any of them
    assert 0.3 < np.mean([any(16 <= frame < 22 for frame, _ in world.changes) for world in changing]) < 0.7
    steady = dataclasses.replace(CHANGING, colour_change=0.0)
    still = next(index for index, world in enumerate(drawn) if not world.changes)
    np.testing.assert_array_equal(render_world(steady, 2, still).video, drawn[still].video)


def test_withheld_captions_are_of_no_video():
    known = captions(CHANGING)
    assert len(known) == 8
    held = known[:5]
    config = dataclasses.replace(CHANGING, num_frames=1, withheld=held)
    assert {render_world(config, 0, index).caption for index in range(64)} == set(known) - set(held)


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"colour_change": 1.5, "name_colour": False}, "colour_change is 1.5"),
        ({"colour_change": 0.5}, "name_colour"),
        ({"colour_change": 0.5, "name_colour": False, "colours": ("red",), "palettes": ("moon",)}, "two colours"),
        ({"withheld": ("a zebra",)}, "a zebra"),
        ({"height": 4}, "height"),
        ({"num_frames": 0}, "num_frames"),
        ({"speed": (1.0, 0.5)}, "speed"),
        ({"motions": ("pan sideways",)}, "pan sideways"),
        ({"palettes": ()}, "palettes"),
        ({"colours": ("white",)}, "snow"),
        ({"subject_spacing": 0.1}, "subject_spacing"),
        ({"subject_scatter": 1.5}, "subject_scatter"),
        ({"finest": 2.0}, "finest"),
        ({"finest": 20.0}, "finest"),
        ({"hue_start": 2.0}, "hue_start"),
        ({"subject_radius": (0.0, 0.1)}, "subject_radius"),
    ],
)
def test_a_senseless_configuration_is_named(fields, culprit):
    with pytest.raises(UserError, match=culprit):
        WorldConfig(**fields)


def test_the_dataset_holds_the_rendered_worlds(tmp_path):
    config = WorldConfig(height=8, width=16, num_frames=3)
    dataset = worlds(config, num_train=5, num_validation=2, seed=9)
    train, validation = open_source(dataset, tmp_path, "train"), open_source(dataset, tmp_path, "validation")
    assert (len(train), len(validation)) == (5, 2)
    for source, index, number in ((train, 4, 4), (validation, 1, 6)):
        world = render_world(config, 9, number)
        batch = read_batch(source, np.array([index]))
        np.testing.assert_array_equal(batch["video"][0], world.video)
        assert batch["caption"] == [world.caption]
        assert batch["motion"]["palette"] == [world.palette]
        assert batch["motion"]["pan_x"] == np.float32(world.pan_x)


def test_configurations_never_share_a_directory(tmp_path):
    base = {"world": WorldConfig(), "num_train": 2, "num_validation": 1, "seed": 0}
    variants = [base, base | {"seed": 1}, base | {"num_train": 3}, base | {"num_validation": 2}]
    variants += [base | {"world": WorldConfig(speed=(0.5, 0.9))}, base | {"world": WorldConfig(shapes=("ball",))}]
    directories = {str(worlds(**variant)(data_dir=tmp_path).data_dir) for variant in variants}
    assert len(directories) == len(variants)
    listed = WorldConfig(speed=[0.5, 1.0], motions=list(MOTIONS))  # as a configuration file would give them
    assert str(worlds(**base | {"world": listed})(data_dir=tmp_path).data_dir) in directories


def test_building_and_reading_never_import_tensorflow(tmp_path):
    program = """
import sys
from adastate_jax.data.batches import open_source, read_batch
from adastate_jax.data.worlds import WorldConfig, worlds
source = open_source(worlds(WorldConfig(height=8, width=8, num_frames=2), 2, 1, 0), sys.argv[1], "train")
assert read_batch(source, [0, 1])["video"].shape == (2, 2, 8, 8, 3)
assert "tensorflow" not in sys.modules, "tensorflow was imported"
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # standard output belongs to the commands
