"""Measurements for programs: JSON, and tables in CSV."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from adastate_jax.evaluation.measure import METRICS, Settings
from adastate_jax.evaluation.summary import Summary, Video


def metrics_json(
    videos: Sequence[Video],
    summaries: Mapping[str, Mapping[str, Summary]],
    skipped: Sequence[tuple[str, str]],
    settings: Settings,
) -> bytes:
    """Everything, with the definitions of the metrics; null for what cannot be measured."""
    content = {
        "settings": dataclasses.asdict(settings),
        "definitions": {
            name: {"label": metric.label, "unit": metric.unit, "text": metric.text} for name, metric in METRICS.items()
        },
        "groups": {
            name: {metric: dataclasses.asdict(summary) for metric, summary in metrics.items()}
            for name, metrics in summaries.items()
        },
        "videos": [
            {
                "name": video.name,
                "group": video.group,
                "frames": video.measurement.num_frames,
                "seconds": video.measurement.seconds,
                "fps": video.measurement.fps,
                "height": video.measurement.height,
                "width": video.measurement.width,
                "metrics": video.measurement.metrics,
                "chunk_profile": video.measurement.chunk_profile.tolist(),
                "notes": list(video.measurement.notes),
            }
            for video in videos
        ],
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
    }
    return json.dumps(_null_for_nan(content), indent=1, allow_nan=False).encode()


def _null_for_nan(value):
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return text.getvalue().encode()


def _cell(value):
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""


def videos_csv(videos: Sequence[Video]) -> bytes:
    """A row per video and a column per metric."""
    rows = (
        [
            video.group,
            video.name,
            video.measurement.num_frames,
            video.measurement.fps,
            *video.measurement.metrics.values(),
            "; ".join(video.measurement.notes),
        ]
        for video in videos
    )
    return _csv(["group", "name", "frames", "fps", *METRICS, "notes"], rows)


def groups_csv(summaries: Mapping[str, Mapping[str, Summary]]) -> bytes:
    """A row per group and metric."""
    fields = [field.name for field in dataclasses.fields(Summary)]
    rows = (
        [group, name, *dataclasses.astuple(summary)]
        for group, metrics in summaries.items()
        for name, summary in metrics.items()
    )
    return _csv(["group", "metric", *fields], rows)


def timeline_csv(videos: Sequence[Video]) -> bytes:
    """A row per video and frame; what is measured between two frames stands at the later one."""
    series = list(videos[0].measurement.series)

    def rows():
        for video in videos:
            columns = video.measurement.series
            times = columns["luma"][0]
            aligned = [np.append([math.nan] * (len(times) - len(values)), values) for _, values in columns.values()]
            for row in zip(times, *aligned, strict=True):
                yield [video.group, video.name, *map(float, row)]

    return _csv(["group", "name", "seconds", *series], rows())
