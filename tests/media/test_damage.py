"""Damaged videos and pictures: each is refused with one line, or read to valid frames; nothing else may happen.

They are read in processes of their own, as a decoder that crashes or hangs would take the tests with it.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mutants
import numpy as np
import pytest

from adastate_jax.data.decoding import Unusable
from adastate_jax.data.folders import find_clips
from adastate_jax.data.footage import ClipConfig, read_clips
from adastate_jax.errors import UserError
from adastate_jax.evaluation.measure import METRICS, measure_video
from adastate_jax.media import read_image, read_last_frames, read_metadata

VIDEOS, MEASURED, PICTURES = 320, 64, 400  # how many of each; measuring takes longest
SECONDS = 60  # for one file, far above what any takes


def refusal(read, *arguments) -> str | None:
    """The line by which something is refused, or None where it was read; any other exception is a finding."""
    try:
        read(*arguments)
    except (UserError, Unusable) as refused:
        line = str(refused)
    else:
        return None
    assert "\n" not in line
    return line


def last_frames(path: Path) -> None:
    frames = read_last_frames(path, 3, 16, 24)
    assert frames.dtype == np.uint8
    assert frames.shape in ((1, 16, 24, 3), (2, 16, 24, 3), (3, 16, 24, 3))


def clips(path: Path) -> None:
    starts, frames = find_clips(path, ClipConfig(16, 24, 8))
    read = list(read_clips(path, frames, 16, 24))
    assert [clip.shape for clip in read] == [(8, 16, 24, 3)] * len(starts)


def metadata(path: Path) -> None:
    assert all(isinstance(text, str) for item in read_metadata(path).items() for text in item)


def measurement(path: Path) -> None:
    measured = measure_video(path)
    assert measured.num_frames > 1
    assert set(measured.metrics) == set(METRICS)


def picture(path: Path) -> None:
    image = read_image(path, 16, 24)
    assert image.dtype == np.uint8
    assert image.shape == (1, 16, 24, 3)


def examine(path: Path, readers: tuple) -> list[str | None]:
    """In a process of its own: what each reader made of the file; names the file in what it finds."""
    try:
        return [refusal(read, path) for read in readers]
    except Exception as error:
        raise AssertionError(f"{path.name}: {type(error).__name__} {error}") from error


def examine_all(paths: list[Path], readers_of) -> list[list[str | None]]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(examine, path, readers_of(number)) for number, path in enumerate(paths)]
        return [result.result(timeout=SECONDS) for result in results]


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    return tmp_path / "whole"


def test_what_the_mutants_are_made_of_can_be_read(whole):
    for path in mutants.make_videos(whole):
        assert [refusal(read, path) for read in (last_frames, clips, metadata)] == [None] * 3
        expected = mutants.pattern()[-1]
        found = read_last_frames(path, 1, *expected.shape[:2])[0]
        assert np.abs(found.astype(int) - expected).mean() < 32  # GIF's eight levels of red
    for path in mutants.make_pictures(whole):
        assert refusal(picture, path) is None


def test_damaged_videos(whole, tmp_path):
    (tmp_path / "damaged").mkdir()
    paths = list(mutants.mutants(mutants.make_videos(whole), tmp_path / "damaged", VIDEOS, seed=0))
    fast = (last_frames, clips, metadata)
    found = examine_all(paths, lambda number: (*fast, measurement) if number % (VIDEOS // MEASURED) == 0 else fast)
    assert len(found) == VIDEOS
    shares = [np.mean([results[reader] is None for results in found]) for reader in range(3)]
    assert all(0.1 < share < 0.9 for share in shares), shares  # the damage is neither harmless nor total
    for path, results in zip(paths, found, strict=True):
        assert results[0] is None or path.name in results[0]


def test_damaged_pictures(whole, tmp_path):
    (tmp_path / "damaged").mkdir()
    paths = list(mutants.mutants(mutants.make_pictures(whole), tmp_path / "damaged", PICTURES, seed=0))
    found = examine_all(paths, lambda number: (picture, metadata))
    assert len(found) == PICTURES
    assert 0.1 < np.mean([results[0] is None for results in found]) < 0.9
    for path, results in zip(paths, found, strict=True):
        assert results[0] is None or path.name in results[0]
