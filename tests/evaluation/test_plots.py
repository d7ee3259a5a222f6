"""What the plots show: whole markers, ticks at whole frames, and a name for every kind of point."""

import numpy as np
import pytest
from evaluation.clips import moving, still
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adastate_jax.evaluation import attention_plot, plots
from adastate_jax.evaluation.attention_probe import ChunkShares
from adastate_jax.evaluation.measure import Settings, measure_frames


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of their pictures' bytes."""
    figures: list[Figure] = []
    original = plots.as_png

    def keep(figure):
        figures.append(figure)
        return original(figure)

    monkeypatch.setattr(plots, "as_png", keep)
    monkeypatch.setattr(attention_plot, "as_png", keep)
    return figures


def whole_ticks(axis):
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    return len(ticks) > 1 and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("chunk", [2, 3, 4, 12])
def test_a_frozen_video_is_a_whole_point_and_frames_are_whole_numbers(drawn, chunk):
    settings = Settings(3, chunk)
    frozen = measure_frames(still(48, 64, 27), settings=settings)
    pan = measure_frames(moving(48, 64, 27, pan=(1.0, 0.0)), settings=settings)
    groups = {"frozen": [frozen], "pan": [pan]}
    assert plots.lock_against_motion(groups).startswith(b"\x89PNG")
    assert plots.chunk_profiles(groups).startswith(b"\x89PNG")
    lock, profiles = drawn
    points = lock.axes[0].collections
    assert [offset[1] for offset in np.concatenate([found.get_offsets() for found in points])].count(0) == 2
    assert not any(found.get_clip_on() for found in points)
    assert whole_ticks(profiles.axes[0])
    (legend,) = profiles.legends
    assert [text.get_text() for text in legend.get_texts()] == ["frozen", "pan"]


def probed(chunk, roles):
    shares = np.random.default_rng(chunk).dirichlet(np.ones(len(roles)), (2, 3))
    return ChunkShares(chunk, (1.0, 0.5), roles, shares)


def test_every_point_of_the_probe_has_a_name(drawn):
    static = ("anchor", *["window"] * 3, "siblings")
    adaptive = ("anchor", "state", *["window"] * 6, "siblings")
    streams = {("static", 3): [probed(5, static), probed(20, static)], ("adaptive", 6): [probed(5, adaptive)]}
    assert attention_plot.attention_shares(streams).startswith(b"\x89PNG")
    (figure,) = drawn
    names = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]
    live = "live (the chunk's other frames together)"
    assert names == [["anchor", "window", live], ["anchor", "state", "window", live]]
    lines = [text.get_text() for text in figure.legends[0].get_texts()]
    assert lines == ["window of 3, chunk 5", "window of 3, chunk 20", "window of 6"]
    for axis, roles, count in zip(figure.axes, (static, adaptive), (2, 1), strict=True):
        assert whole_ticks(axis)
        named = {handle.get_label(): handle.get_marker() for handle in axis.get_legend().legend_handles}
        points = [line for line in axis.get_lines() if isinstance(line, Line2D) and len(line.get_xdata()) == 1]
        assert len(points) == count * len(roles)
        for point in points:
            role = roles[int(point.get_xdata()[0])]
            assert point.get_marker() == named[live if role == "siblings" else role]
