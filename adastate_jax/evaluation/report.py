"""Measurements as a folder: metrics.json, tables in CSV, pictures, and one HTML page that holds all of it."""

from collections.abc import Sequence
from pathlib import Path

from adastate_jax.evaluation.measure import METRICS, Settings
from adastate_jax.evaluation.summary import Video, by_group, summarize_group
from adastate_jax.evaluation.tables import groups_csv, metrics_json, timeline_csv, videos_csv
from adastate_jax.files import whole_folder

_PICTURES = ("over_time.png", "lock_against_motion.png", "chunk_profiles.png")
_FILES = {"metrics.json", "metrics.csv", "groups.csv", "timeline.csv", *_PICTURES, "report.html"}


def is_of_report(name: str) -> bool:
    """Whether a file's name is of a report, which another report may replace."""
    return name in _FILES


def write_report(
    folder: str | Path,
    videos: Sequence[Video],
    skipped: Sequence[tuple[str, str]],
    settings: Settings,
    replace: bool = True,
) -> None:
    """Makes `folder`, whole or not at all: metrics.json, metrics.csv, groups.csv, timeline.csv, plots, report.html.

    It takes the place of an older report, but of nothing else.

    Args:
        skipped: (file, reason).
        replace: whether an older report may go.

    Raises:
        OSError: the folder cannot be written, or holds other things than a report.
    """
    from adastate_jax.evaluation import plots  # here: drawing takes a second to import, and arguments may be wrong
    from adastate_jax.evaluation.page import report_page

    groups = {name: [video.measurement for video in members] for name, members in by_group(videos).items()}
    summaries = {
        name: {metric: summarize_group([one.metrics[metric] for one in members]) for metric in METRICS}
        for name, members in groups.items()
    }
    drawn = (plots.over_time(groups), plots.lock_against_motion(groups), plots.chunk_profiles(groups))
    pictures = dict(zip(_PICTURES, drawn, strict=True))
    files: dict[str, bytes] = {
        "metrics.json": metrics_json(videos, summaries, skipped, settings),
        "metrics.csv": videos_csv(videos),
        "groups.csv": groups_csv(summaries),
        "timeline.csv": timeline_csv(videos),
        **pictures,
        "report.html": report_page(videos, summaries, skipped, settings, pictures).encode(),
    }
    with whole_folder(folder, lambda name: replace and is_of_report(name)) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
