"""Measurements for people: one HTML page that refers to nothing else.

Motion stands beside drift everywhere: a frozen video drifts by nothing, and one that falls apart moves a lot.
"""

import base64
import html
import math
from collections.abc import Mapping, Sequence

from adastate_jax.evaluation import plots
from adastate_jax.evaluation.measure import METRICS, Settings
from adastate_jax.evaluation.summary import FEWEST, Summary, Video, by_group

_STRIPS = 8  # contact sheets per group
# Columns of the two tables by heading. Motion comes first in both, for it puts all the others into perspective.
_LOOK = {
    "Motion": ("motion", "motion_kept", "dynamic_radius", "dynamic_rule", "object_motion"),
    "Drift": ("luma_drift", "saturation_drift", "contrast_drift", "colourfulness_drift", "sharpness_drift"),
    "Lock": ("lock_histogram_end", "lock_ssim_end"),
}
_MOVEMENT = {
    "": ("motion",),
    "Camera": ("pan_x", "pan_y", "zoom", "roll", "camera_support"),
    "Flicker and smoothness": ("flicker_warped", "flicker_vbench", "interpolation_error", "acceleration_ratio"),
    "Seams": ("seam_ratio", "seam_ratio_warped", "seam_ratio_flow"),
}
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; margin: 24px auto; max-width: 1340px; padding: 0 20px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 30px 0 6px; }
p { max-width: 78em; margin: 6px 0; } .grey { color: #666; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; margin: 8px 0; }
th, td { padding: 3px 6px; text-align: right; white-space: nowrap; vertical-align: top; }
td { border-top: 1px solid #e4e4e4; } th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th small, td small { display: block; font-weight: 400; color: #777; font-size: 10.5px; }
th.section { text-align: center; border-bottom: 2px solid #bbb; }
th.start, td.start { border-left: 1px solid #ccc; padding-left: 10px; }
th.name, td.name { text-align: left; }
td.name { min-width: 10em; max-width: 28em; overflow-wrap: break-word; white-space: normal; }
td.beyond { background: #fde3d3; } .key { background: #fde3d3; padding: 0 4px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; }
img { max-width: 100%; } .strip { margin: 10px 0 14px; } .strip img { display: block; margin-top: 3px; }
.note { color: #a04000; } dt { font-weight: 600; float: left; clear: left; width: 15em; } dd { margin-left: 15em; }
"""


def report_page(
    videos: Sequence[Video],
    summaries: Mapping[str, Mapping[str, Summary]],
    skipped: Sequence[tuple[str, str]],
    settings: Settings,
    pictures: Mapping[str, bytes],
) -> str:
    """The page.

    Args:
        summaries: by group and metric.
        skipped: (file, reason).
        pictures: the plots, by file name, as PNGs.
    """
    colours = plots.group_colours(list(summaries))
    groups = by_group(videos)
    limits = ", ".join(_limit(name, metric) for name, metric in METRICS.items() if metric.limit is not None)
    group_rows = [
        (_dot(colours[group]) + html.escape(group), str(len(groups[group])), metrics)
        for group, metrics in summaries.items()
    ]
    video_rows = [
        (
            _dot(colours[video.group]) + html.escape(f"{video.group} / {video.name}"),
            f"{video.measurement.seconds:.1f} s",
            video.measurement.metrics,
        )
        for video in videos
    ]
    parts = [
        f"<h1>{len(videos)} video{'s'[: len(videos) != 1]} in {len(groups)} group{'s'[: len(groups) != 1]}</h1>",
        '<p class="grey">Measured without any downloaded network, from optical flow (DIS), colour and sharpness.'
        f" Chunks of {settings.chunk} frames, the first of {settings.first_chunk}.</p>",
        "<p>Read motion and drift together: a frozen video has no drift, no flicker and a perfect lock, and one that"
        f' falls apart moves a lot. <span class="key">Marked</span> values miss the usual aims ({limits}).</p>',
        "<h2>Groups</h2>",
        f'<p class="grey">Means over videos, with 95 % bootstrap intervals of the mean from {FEWEST} videos on. '
        "Marked by mean magnitude, |…|: drifts up and down do not cancel out.</p>",
        *[_table(("group", "videos"), columns, group_rows, _summary_cell) for columns in (_LOOK, _MOVEMENT)],
        "<h2>Over time</h2>",
        f'<p class="grey">{_lines_legend(groups)}</p>',
        _image(pictures["over_time.png"], "image/png", "motion, lock and drift over time"),
        "<h2>Lock against motion, and seams</h2>",
        '<p class="grey">Left: up is more motion, right a tighter lock; the lower right corner is a photograph. '
        "Right: a seamless stream is flat, and a peak at 0 is a seam between chunks.</p>",
        '<div style="display: flex; flex-wrap: wrap">',
        _image(pictures["lock_against_motion.png"], "image/png", "lock against motion", "49%"),
        _image(pictures["chunk_profiles.png"], "image/png", "flicker by position in the chunk", "49%"),
        "</div>",
        *_contact_sheets(groups, colours),
        "<h2>Videos</h2>",
        *[_table(("video", "length"), columns, video_rows, _value_cell) for columns in (_LOOK, _MOVEMENT)],
    ]
    if skipped:
        listed = "".join(f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in skipped)
        parts += ["<h2>Skipped files</h2>", f'<ul class="note">{listed}</ul>']
    definitions = "".join(
        f"<dt>{html.escape(metric.label)}</dt><dd>{html.escape(metric.text)}"
        f'{f" ({html.escape(metric.unit)})" if metric.unit else ""} <code class="grey">{name}</code></dd>'
        for name, metric in METRICS.items()
    )
    parts += ["<h2>What the numbers mean</h2>", f"<dl>{definitions}</dl>"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Video metrics</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _limit(name, metric):
    unit = metric.unit if metric.unit != "ratio" else ""
    bound = f"≥ {metric.limit:g}" if metric.at_least else f"≤ {metric.limit:g}"
    label = f"|{metric.label}|" if name.endswith("_drift") else metric.label
    return f"{label} {bound} {unit}".strip()


def _dot(colour):
    return f'<span class="dot" style="background: {colour}"></span>'


def _image(content, kind, text, width="100%"):
    data = base64.b64encode(content).decode()
    return f'<img alt="{text}" style="max-width: {width}" src="data:{kind};base64,{data}">'


def _table(titles, columns, rows, cell):
    """A table with the metrics in `columns` ({heading: names}); `rows` are (two cells as HTML, values by metric)."""
    sections = "".join(
        f'<th class="section start" colspan="{len(names)}">{title}</th>' for title, names in columns.items()
    )
    starts = {names[0] for names in columns.values()}
    shown = [name for names in columns.values() for name in names]
    heads = "".join(
        f'<th{" class=start" * (name in starts)} title="{html.escape(METRICS[name].text)}">'
        f"{html.escape(METRICS[name].label)}<small>{html.escape(METRICS[name].unit)}</small></th>"
        for name in shown
    )
    lines = "".join(
        f'<tr><td class="name">{first}</td><td>{second}</td>'
        f"{''.join(cell(name, values[name], name in starts) for name in shown)}</tr>"
        for first, second, values in rows
    )
    return (
        f'<div class="wide"><table><thead><tr><th class="name"></th><th></th>{sections}</tr>'
        f'<tr><th class="name">{titles[0]}</th><th>{titles[1]}</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _value_cell(name, value, is_start):
    return _table_cell(_number(name, value), is_start, METRICS[name].is_beyond(value))


def _summary_cell(name, summary, is_start):
    below = []
    is_beyond = METRICS[name].is_beyond(summary.magnitude)
    if is_beyond and not METRICS[name].is_beyond(summary.mean):
        below.append(f"|…| {summary.magnitude:.1f}")
    if math.isfinite(summary.low):
        below.append(f"{_number(name, summary.low)} … {_number(name, summary.high)}")
    if 0 < summary.count < summary.videos:
        below.append(f"{summary.count} of {summary.videos}")
    text = _number(name, summary.mean) + "".join(f"<small>{line}</small>" for line in below)
    return _table_cell(text, is_start, is_beyond)


def _table_cell(content, is_start, is_beyond):
    classes = [kind for kind, holds in (("start", is_start), ("beyond", is_beyond)) if holds]
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f"<td{attribute}>{content}</td>"


def _number(name, value):
    if not math.isfinite(value):
        return "n/a"
    if name == "flicker_vbench":
        return f"{value:.3f}"
    shares = METRICS[name].unit in ("share", "ratio")
    decimals = 2 if shares or abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return f"+{text}" if name.endswith("_drift") and value > 0 else text


def _lines_legend(groups):
    largest = max(map(len, groups.values()))
    if largest == 1:
        return "One line per video."
    return (
        "Thick: median of the group. Thin lines are its videos; where there are many, a band holds their middle half."
    )


def _contact_sheets(groups, colours):
    parts = ["<h2>Frames</h2>"]
    for group, videos in groups.items():
        shown = videos[:_STRIPS]
        of_all = f", the first {len(shown)} of {len(videos)}" if len(shown) < len(videos) else ""
        parts.append(f"<p>{_dot(colours[group])}<b>{html.escape(group)}</b>{of_all}</p>")
        for video in shown:
            values = video.measurement.metrics
            facts = ", ".join(
                f"{METRICS[name].label} {_number(name, values[name])} {METRICS[name].unit}".replace(" share", "")
                for name in ("motion", "luma_drift", "saturation_drift", "lock_histogram_end")
            )
            notes = "".join(f'<br><span class="note">{html.escape(note)}</span>' for note in video.measurement.notes)
            parts.append(
                f'<div class="strip">{html.escape(video.name)} <span class="grey">{facts}</span>{notes}'
                f"{_image(video.measurement.contact_sheet, 'image/jpeg', 'frames')}</div>"
            )
    return parts
