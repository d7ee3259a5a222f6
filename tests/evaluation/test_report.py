"""The report: complete, self-contained, the same numbers in every form, and motion always beside drift."""

import base64
import csv
import dataclasses
import html.parser
import json
import math

import cv2
import numpy as np
import pytest
from evaluation.clips import moving, still

from adastate_jax.evaluation.measure import METRICS, Settings, measure_frames
from adastate_jax.evaluation.page import _summary_cell
from adastate_jax.evaluation.report import write_report
from adastate_jax.evaluation.summary import Video, by_group, summarize_group

SETTINGS = Settings(3, 4)
FILES = {
    "metrics.json",
    "metrics.csv",
    "groups.csv",
    "timeline.csv",
    "over_time.png",
    "lock_against_motion.png",
    "chunk_profiles.png",
    "report.html",
}


@pytest.fixture(scope="module")
def videos():
    pans = [measure_frames(moving(48, 64, 12, pan=(speed, 0.0)), settings=SETTINGS) for speed in (1.0, 2.0)]
    frozen = measure_frames(still(48, 64, 12), settings=SETTINGS)
    return [
        Video("slow.mp4", "pan", pans[0]),
        Video("frozen <b>&.mp4", "frozen", frozen),
        Video("fast.mp4", "pan", pans[1]),
    ]


@pytest.fixture(scope="module")
def folder(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(folder, videos, [("broken.mp4", "it is empty (0 bytes)")], SETTINGS)
    return folder


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, its text, and its tables as rows of cells; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tables, self.text, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_files_are_there_and_nothing_unfinished(folder):
    assert {path.name for path in folder.iterdir()} == FILES


def test_json_and_csv_hold_the_same_numbers(folder, videos):
    content = json.loads((folder / "metrics.json").read_text())
    rows = read_csv(folder / "metrics.csv")
    assert len(rows) == len(content["videos"]) == len(videos)
    for video, row, entry in zip(videos, rows, content["videos"], strict=True):
        assert row["name"] == entry["name"] == video.name
        for name, value in video.measurement.metrics.items():
            if math.isnan(value):
                assert entry["metrics"][name] is None
                assert row[name] == ""
            else:
                assert entry["metrics"][name] == value
                assert float(row[name]) == pytest.approx(value, rel=1e-5, abs=1e-9)
    assert content["skipped"] == [{"name": "broken.mp4", "reason": "it is empty (0 bytes)"}]
    assert content["settings"] == {"first_chunk": 3, "chunk": 4}
    assert set(content["definitions"]) == set(METRICS)


def test_groups_are_summarised_over_their_videos(folder, videos):
    motions = [video.measurement.metrics["motion"] for video in videos if video.group == "pan"]
    content = json.loads((folder / "metrics.json").read_text())["groups"]
    assert content["pan"]["motion"]["mean"] == pytest.approx(np.mean(motions))
    row = next(row for row in read_csv(folder / "groups.csv") if (row["group"], row["metric"]) == ("pan", "motion"))
    assert float(row["mean"]) == pytest.approx(np.mean(motions), rel=1e-5)
    assert int(row["count"]) == 2
    assert [video.name for video in by_group(videos)["pan"]] == ["slow.mp4", "fast.mp4"]


def test_the_timeline_has_a_row_per_frame(folder, videos):
    rows = read_csv(folder / "timeline.csv")
    assert len(rows) == sum(video.measurement.num_frames for video in videos)
    first, second = rows[:2]
    assert first["motion"] == ""  # nothing moved before the first frame
    assert float(second["motion"]) == pytest.approx(videos[0].measurement.series["motion"][1][0], rel=1e-5)
    assert float(first["luma"]) == pytest.approx(videos[0].measurement.series["luma"][1][0], rel=1e-5)


def test_the_page_is_well_formed_and_needs_nothing_else(folder, videos):
    page = Page((folder / "report.html").read_text())
    pictures = []
    for reference in page.references:
        kind, data = reference.split(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        pictures.append(cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR))
    assert len(pictures) == 3 + len(videos)  # plots, and a contact sheet each
    assert all(picture is not None and picture.std() > 1 for picture in pictures)
    text = "".join(page.text)
    assert "frozen <b>&.mp4" in text
    assert "broken.mp4: it is empty (0 bytes)" in text
    assert "nearly still" in text


def test_motion_stands_beside_drift_in_every_table(folder):
    tables = Page((folder / "report.html").read_text()).tables
    assert len(tables) == 4  # two of groups, two of videos
    for table in tables:
        headings, *rows = table[1:]
        assert headings[2].startswith("motion")
        assert all(len(row) == len(headings) and row[2] not in ("", "n/a") for row in rows)
    assert sum("luma drift" in "".join(table[1]) for table in tables) == 2


def test_a_report_replaces_an_older_one_and_tells_what_it_leaves_out(videos, tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("older")
    many = [Video(f"{number}.mp4", "pan", videos[0].measurement) for number in range(13)]
    short = measure_frames(moving(32, 32, 2, pan=(1.0, 0.0)), settings=SETTINGS)  # no chunk to make a profile of
    write_report(tmp_path, [*many, Video("short.mp4", "short", short)], [], SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert all(path.read_bytes() != b"older" for path in tmp_path.iterdir())
    assert "the first 8 of 13" in "".join(Page((tmp_path / "report.html").read_text()).text)


def test_a_summary_leaves_out_what_is_unknown():
    values = [1.0, math.nan, 3.0, *[-2.0, 2.0] * 3]
    summary = summarize_group(values)
    assert (summary.mean, summary.median, summary.magnitude) == (0.5, 1.5, 2.0)
    assert (summary.count, summary.videos) == (8, 9)
    assert -2.0 < summary.low < 0.5 < summary.high < 3.0
    assert summarize_group(values) == summary
    few = summarize_group([5.0] * 7)
    assert (few.mean, few.count) == (5.0, 7)
    assert math.isnan(few.low)  # a bootstrap of so few is too sure
    nothing = summarize_group([math.nan])
    assert dataclasses.astuple(nothing)[-2:] == (0, 1)
    assert all(math.isnan(value) for value in dataclasses.astuple(nothing)[:-2])


def test_drifts_that_cancel_out_are_marked_and_missing_numbers_counted():
    def cell(name, values):
        return _summary_cell(name, summarize_group(values), False)

    assert cell("luma_drift", [30.0, -30.0]) == '<td class="beyond">0.00<small>|…| 30.0</small></td>'
    assert cell("luma_drift", [4.0, -4.0]) == "<td>0.00</td>"
    assert cell("motion_kept", [90.0, *[math.nan] * 9]) == "<td>90.0<small>1 of 10</small></td>"
    assert cell("motion_kept", [60.0]) == '<td class="beyond">60.0</td>'
