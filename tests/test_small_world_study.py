"""The study's instruments: what they say of the truth, of spoiled videos, and of an exchange whose effect is known."""

import dataclasses
import itertools
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from adastate_jax.config.files import parse_config, save_config
from adastate_jax.errors import UserError
from adastate_jax.generation.loading import load
from studies import runs
from studies.contents import last_seen, read_linearly
from studies.rows import read_columns, write_rows
from studies.small_world import arms, memory
from studies.small_world import measure as measuring
from studies.small_world import report as reporting
from studies.small_world import train as training
from studies.small_world.__main__ import main
from studies.small_world.report import (
    MEASURES,
    collapsed,
    compared_with_truth,
    paired_difference,
    report,
)
from studies.statistics import summarize, summary_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config():
    return parse_config([f"--config={ROOT}/configs/small_world.py:adaptive"])


@pytest.fixture(scope="module")
def truth(config):
    worlds = measuring.worlds_for(config.data.worlds, 53, 12)
    return worlds, np.stack([world.video for world in worlds])


def means(rows, horizon):
    rows = [row for row in rows if row["horizon"] == horizon]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: values[np.isfinite(values)].mean() for name, values in columns.items() if np.isfinite(values).any()}


def test_some_students_are_measured_with_the_streams_of_other_anchors(tmp_path):
    arms = {"teacher": "teacher", "unanchored": "unanchored", "unanchored_none-1": "unanchored_none"}
    for folder, arm in arms.items():
        (tmp_path / folder).mkdir()
        save_config(parse_config([f"--config={ROOT}/configs/small_world.py:{arm}"]), tmp_path / folder / "config.json")
    # The student of the teacher's run is initialised with the static anchor; window_9 is no other anchor.
    names = ["adaptive", "static", "none", "window_9", "unanchored_none"]
    for student, others in {
        "initialized": ("adaptive", "none"),
        "unanchored": (),
        "unanchored_none": ("adaptive", "static", "none"),  # of a shorter window
        "recurrent": (),
        "adaptive": (),
    }.items():
        found = measuring._streams(tmp_path, student, 1, names)
        assert found == [student, *(f"{student}:{other}" for other in others)]


def test_an_arm_is_trained_after_what_it_starts_from(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(training, "_train_run", lambda folder, name, seed: trained.append((name, seed)))
    monkeypatch.setattr(training, "check_teacher", lambda folder: None)
    training.train(tmp_path, ["none", "recurrent_start"], [0, 1, 1], jobs=1)
    assert trained == [
        *(("teacher", 0), ("recurrent", 0), ("unanchored", 0)),
        *(("none", 0), ("recurrent_start", 0), ("none", 1), ("recurrent_start", 1)),
    ]


def test_every_arm_is_a_configuration():
    configs = {arm: parse_config([f"--config={ROOT}/configs/small_world.py:{arm}"]) for arm in itertools.chain(*arms())}
    assert len(set(configs.values())) == len(configs)
    streams = {name: dataclasses.astuple(config.stream) for name, config in configs.items()}
    # One factor at a time: what is no anchor changes nothing else.
    assert streams["alpha_0"] == streams["alpha_4"] == streams["normalized"] == streams["adaptive"]


def test_the_truth_moves_turns_and_remembers(config, truth):
    worlds, videos = truth
    rows = list(measuring.measure_videos(videos, worlds, config.data.worlds, 21))
    for horizon in (1.0, 2.5):
        mean = means(rows, horizon)
        assert abs(mean["pan"] - 1) < 0.03
        assert abs(mean["hue"] - 1) < 0.06
        assert mean["identity"] > 0.98
        assert mean["seen"] > 0.3
    assert {row["horizon"] for row in rows} == {1.0, 2.5}  # the video is too short for more


def test_a_frozen_and_a_forgetful_video_are_told_apart(config, truth):
    worlds, videos = truth
    frozen = means(measuring.measure_videos(np.repeat(videos[:, :1], 21, axis=1), worlds, config.data.worlds, 21), 1.0)
    assert frozen["pan"] == frozen["hue"] == 0
    assert frozen["hue_lock"] > 0.99
    assert frozen["picture_lock"] > 0.99
    assert "identity" not in frozen  # nothing went and came back
    # The second half of every video is another's: its pan may be right, its subject's colour is that video's.
    same_way = np.array([next(j for j, w in enumerate(worlds) if w.colour != world.colour) for world in worlds])
    spliced = np.concatenate([videos[:, :21], videos[same_way, 21:]], axis=1)
    mean = means(measuring.measure_videos(spliced, worlds, config.data.worlds, 21), 2.5)
    assert mean["identity"] < 0.02
    assert mean["chance"] > mean["identity"] + 0.2  # nearer to the other videos than to their own


def test_one_colour_for_all_or_for_a_caption_is_no_memory():
    seen = [True] * 3 + [False] * 6 + [True] * 3
    colours, one_caption = np.array([0, 0, 1, 2]), np.zeros(4)
    found = np.where(seen, colours[:, None], -1)
    right = measuring._read_subjects(found, 0, one_caption)
    np.testing.assert_array_equal(right["identity"], 1)
    # Of the three others, one has the first video's colour; none has the third's.
    np.testing.assert_allclose(right["chance"], [1 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(right["variety"], 1 - right["chance"])
    same = measuring._read_subjects(np.where(seen, 0, found), 0, one_caption)
    np.testing.assert_array_equal(same["identity"], 1)
    np.testing.assert_array_equal(same["chance"], 1)
    np.testing.assert_array_equal(same["variety"], 0)
    by_caption = measuring._read_subjects(np.where(seen, [[0], [0], [1], [1]], -1), 0, np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(by_caption["identity"], 1)
    np.testing.assert_array_equal(by_caption["chance"], 1)
    forgotten = found.copy()
    forgotten[:, 9:] = np.array([1, 2, 0])
    np.testing.assert_allclose(measuring._read_subjects(forgotten, 0, one_caption)["identity"], 1 / 3)
    alone = measuring._read_subjects(found, 0, np.arange(4))
    assert np.isnan(alone["chance"]).all()  # nothing to compare with


def columns_of(arms, **values):
    """Columns of one horizon, a row per entry of `arms`; measures that are not told are 1."""
    count = len(arms)
    columns = {"arm": np.array(arms), "video": np.arange(count, dtype=float), "horizon": np.ones(count)}
    columns |= {name: np.zeros(count) for name in ("seed", "noise", "caption", "chance")}
    return columns | {name: np.ones(count) for name in MEASURES} | {k: np.array(v, float) for k, v in values.items()}


def test_memory_is_what_chance_leaves_open():
    found = compared_with_truth(columns_of(["truth"] * 4, identity=[1, 1, 0.5, 1], chance=[0.25, 0.75, 0.5, 1]))
    np.testing.assert_allclose(found["memory"], [1, 1, 0, np.nan])
    # In the mean: (0.75 + 0.25 + 0) / (0.75 + 0.25 + 0.5)
    assert summary_of(found, "memory", np.arange(4))[0] == pytest.approx(1 / 1.5)
    # Who shows fewer colours is not taken for forgetful.
    same = compared_with_truth(columns_of(["truth"] * 4, identity=[1] * 4, chance=[0.9, 0.8, 0.9, 0.99]))
    assert summary_of(same, "memory", np.arange(4))[0] == 1


def test_the_interval_of_variety_is_that_of_its_pairs():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(60):
        colours = rng.choice(3, size=(4, 32), p=(0.65, 0.25, 0.1))
        apart = (colours[:, :, None] != colours[:, None]).sum(axis=2) / 31
        columns = columns_of(["truth"] * 128, variety=apart.ravel(), caption=np.repeat(np.arange(4), 32))
        _, _, low, high = summary_of(
            {"variety": reporting._by_video(columns)} | {k: columns[k] for k in ("seed", "video")},
            "variety",
            np.arange(128),
        )
        means.append(apart.mean())
        errors.append((high - low) / 3.92)
        assert reporting._by_video(columns).mean() == pytest.approx(apart.mean())
    assert 0.75 < np.mean(errors) / np.std(means) < 1.3


def test_a_summary_knows_its_seeds_and_leaves_out_what_is_not_there():
    values = np.array([1.0, 3.0, 5.0, 7.0, np.nan])
    seeds, videos = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 2])
    mean, error, low, high = summarize(values, seeds, videos)
    assert mean == 4
    assert error == pytest.approx(np.std([2, 6], ddof=1) / np.sqrt(2))
    assert 1 <= low < 4 < high <= 7
    assert np.isnan(summarize(np.array([np.nan]), seeds[:1], videos[:1])).all()
    weighted = summarize(values, seeds, videos, np.array([3.0, 1.0, 1.0, 1.0, 1.0]))
    assert weighted[0] == pytest.approx((3 + 3 + 5 + 7) / 6)
    assert weighted[1] == pytest.approx(np.std([1.5, 6], ddof=1) / np.sqrt(2))
    difference = summarize(np.stack([values, values - 2 + seeds]), seeds, videos)
    np.testing.assert_allclose(difference, [1.5, 0.5, 1, 2])
    few = np.where(np.arange(100) < 10, 1.0, np.nan)
    assert np.isnan(summarize(few, np.zeros(100), np.arange(100))).all()


def test_differences_are_of_the_same_seed_noise_and_caption():
    rows = [
        *(
            ("adaptive", seed, noise, video, 10 * seed + 3 * noise + video + 0.5)
            for seed, noise, video in np.ndindex(3, 2, 4)
        ),
        *(("static", seed, noise, video, 10 * seed + 3 * noise + video) for seed, noise, video in np.ndindex(2, 2, 4)),
    ]
    names = ("arm", "seed", "noise", "video", "pan")
    columns = {name: np.array(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    columns["horizon"] = np.ones(len(rows))
    # A seed that one was not trained with is left out of both.
    np.testing.assert_allclose(paired_difference(columns, "static", "pan", 1.0), [0.5, 0, 0.5, 0.5])


def test_glimpses_show_the_first_and_the_last_training_length():
    video = np.broadcast_to(np.arange(53, dtype=np.uint8)[:, None, None, None], (53, 2, 2, 3))
    shown = measuring.glimpses(video, 21)[:, 0, 0, 0]
    assert list(shown) == [0, 3, 6, 9, 12, 15, 18, 255, 32, 35, 38, 41, 44, 47, 50]
    assert (measuring.glimpses(video[:21], 21)[7:] == 255).all()  # shown once


def test_a_hue_that_turns_against_the_caption_is_counted():
    columns = columns_of(["truth"] * 4, hue=[1.0, -0.9, 0.1, np.nan])
    np.testing.assert_array_equal(compared_with_truth(columns)["reversed"], [0, 1, 0, np.nan])


def test_a_collapsed_run_is_named():
    arms = ["truth", "good", "dark", "dark", "good:static", "dark:static"]
    columns = columns_of(arms, seed=[0, 0, 0, 1, 0, 0], brightness=[80, 88, 60, 72, 60, 80])
    gone = collapsed(compared_with_truth(columns))
    assert set(gone) == {("dark", 0)}  # a stream that is not its own is no collapse
    # And nothing is told of what it streams with another anchor.
    kept = reporting._without(columns, gone)
    assert list(zip(kept["arm"], kept["seed"], strict=True)) == [
        ("truth", 0),
        ("good", 0),
        ("dark", 1),
        ("good:static", 0),
    ]


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"arm": "none", "video": 1, "pan": 0.123456}, {"arm": "ema", "video": 2, "pan": float("nan")}]
    write_rows(tmp_path / "rows.csv.gz", rows)
    columns = read_columns(tmp_path / "rows.csv.gz")
    assert list(columns["arm"]) == ["none", "ema"]
    np.testing.assert_allclose(columns["pan"], [0.1235, np.nan])


def shaken(model):
    """A fresh network's last layer is zero, and its output the same whatever it reads: this one reads."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(model.student))))
    student = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), model.student)
    return dataclasses.replace(model, student=student)


def test_an_exchange_is_read_from_the_ball_that_comes_next(config, truth, monkeypatch):
    """With colours as if the anchor held them: a stream with another's anchor shows that one's colour."""
    monkeypatch.setattr(memory, "SWAP_CHUNK", 3)
    monkeypatch.setattr(memory, "SWAP_CHUNKS", 4)
    worlds = truth[0]
    other = memory.partners([world.caption for world in worlds])
    assert all(worlds[i].caption == worlds[j].caption for i, j in enumerate(other))
    first, held = np.arange(12) % 2, np.arange(12) % 3  # what it held last is not what it showed first

    def stream(next_ball):
        """Twelve frames: none for five, then the next ball for three, and one of another colour in the last."""
        return np.stack([*[np.full(12, -1)] * 5, *[next_ball] * 3, *[np.full(12, -1)] * 3, np.full(12, 3)], axis=1)

    before = np.stack([first, *[np.full(12, -1)] * 4, held, *[np.full(12, -1)] * 3], axis=1)
    shown = iter([before, stream(held), stream(held[other]), stream(held), stream(np.full(12, 3))])
    monkeypatch.setattr(memory.small_world, "subject_colours", lambda *_: next(shown))
    rows = list(memory.measure_swaps(shaken(load(config=config, random_weights=True)), worlds, 0))
    assert {row["video"] for row in rows} == set(np.flatnonzero(held != held[other]))
    means = {
        swap: np.mean([[row[x] for x in ("own_colour", "other_colour")] for row in rows if row["swap"] == swap], axis=0)
        for swap in ("own", "anchor", "window", "zeroed anchor")
    }
    assert {swap: list(x) for swap, x in means.items()} == {
        "own": [1, 0],
        "anchor": [0, 1],
        "window": [1, 0],
        "zeroed anchor": [0, 0],
    }
    for swap in ("anchor", "window", "zeroed anchor"):
        assert min(row["moved"] for row in rows if row["swap"] == swap) > 0


def test_a_video_that_shows_no_next_ball_is_not_compared():
    assert list(memory._next_ball(np.array([-1, -1, -1, -1, 2, 1, -1, 0]))) == [2, 1]
    assert list(memory._next_ball(np.array([0, -1, -1, -1, 2, 2]))) == []  # gone for three frames only
    assert list(memory._next_ball(np.array([-1, -1, -1, -1, -1, -1]))) == []


PARTS = ("caption", "window", "anchor")


def test_the_colour_is_read_from_the_anchor_that_holds_it_and_not_from_what_does_not(truth, monkeypatch):
    model = shaken(load(config=parse_config([f"--config={ROOT}/configs/small_world.py:static"]), random_weights=True))
    monkeypatch.setattr(memory, "READ_CHUNKS", range(4, 6))

    def left_or_right(videos, *_):
        """Two colours by which side of the first frame is the brighter, as if last seen in frame 8."""
        first = videos[:, 0].mean(axis=(1, 3))
        colour = (first[:, :8].mean(axis=1) > first.mean(axis=1)).astype(int)
        return np.pad(colour[:, None], ((0, 0), (8, videos.shape[1] - 9)), constant_values=-1)

    monkeypatch.setattr(memory.small_world, "subject_colours", left_or_right)
    rows = list(memory.measure_contents(model, truth[0] * 4))
    right = {part: [row["right"] for row in rows if (row["part"], row["unseen"]) == (part, 6)] for part in PARTS}
    assert np.mean(right["anchor"]) > 0.75  # a static anchor is the first frame
    assert 0.35 < np.mean(right["window"]) < 0.65
    assert 0.35 < np.mean(right["caption"]) < 0.65
    # Each of 48 videos is asked about in four streams, after two chunks, and nothing is in view.
    assert {(row["answers"], len(right["anchor"])) for row in rows if row["unseen"] == 6} == {(8, 48)}
    assert all(np.isnan(row["right"]) for row in rows if row["unseen"] != 6)


def test_what_the_caption_tells_is_not_lost_among_the_features():
    """Of many features that say nothing the classifier does not learn to contradict the caption."""
    rng = np.random.default_rng(0)
    captions, folds = np.arange(200) % 4, np.arange(200) // 100
    labels = np.where(rng.random(200) < 0.75, captions % 3, (captions + 1) % 3)
    by_caption = read_linearly(np.zeros((200, 0)), labels, captions, folds)
    assert (by_caption == captions % 3).all()
    noise = np.concatenate([np.eye(4)[captions], rng.standard_normal((200, 200))], axis=1)
    assert (read_linearly(noise, labels, captions, folds) == labels).mean() > 0.62
    # And what they do say is found.
    told = np.concatenate([np.eye(3)[labels], noise], axis=1)
    assert (read_linearly(told, labels, captions, folds) == labels).mean() > 0.8
    assert (read_linearly(told, labels, captions, np.zeros(200, int)) == -1).all()  # no others to learn from


def test_attention_is_measured_of_every_frame(config, truth, monkeypatch):
    model = load(config=config, random_weights=True)
    monkeypatch.setattr(memory, "PROBED_CHUNK", 3)
    rows = list(memory.measure_attention(model, truth[0]))
    assert [row["part"] for row in rows] == ["anchor", "state", "window", "window", "window", "chunk", "chunk"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_the_attention_table_tells_the_frames_of_a_part_apart(tmp_path):
    shares = {"anchor": [0.1, 0.3], "window": [0.04, 0.16], "chunk": [0.2, 0.2]}
    frames = [(part, share) for part, of_part in shares.items() for share in of_part]
    rows = [
        {"arm": arm, "seed": seed, "part": part, "frame": frame, "share": share * (1 + seed)}
        for arm, seed in (("ema", 0), ("ema", 1), ("dark", 0))
        for frame, (part, share) in enumerate(frames)
    ]
    write_rows(tmp_path / "attention.csv.gz", rows)
    columns = reporting._without(read_columns(tmp_path / "attention.csv.gz"), {("dark", 0): "too dark"})
    table = reporting._attention_table(columns)
    assert table[4:] == ["| ema | 0.30 ± 0.10 |  | 0.06 ± 0.02 | 0.24 ± 0.08 | 0.30 ± 0.10 |"]


def test_the_colour_last_seen():
    found = np.array([[0, -1, 2, -1, -1], [-1, 1, 1, 1, 1], [-1, -1, -1, -1, -1]])
    last, unseen = last_seen(found)
    assert list(last) == [2, 1, -1]
    assert list(unseen[:2]) == [2, 0]


def test_what_is_measured_is_not_measured_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "arms", lambda: (["none", "static"], []))
    (tmp_path / "teacher").mkdir()
    save_config(config, tmp_path / "teacher" / "config.json")
    for done in ("teacher.seconds", "none-1.seconds"):
        (tmp_path / done).write_text("1")
    (tmp_path / "measured").mkdir()
    row = {"arm": "truth", "seed": 0, "noise": 0, "video": 0, "pan": 1.5}
    for name in ("truth-0", "teacher-0", "initialized-0", "initialized:none-0", "initialized:static-0", "none-1"):
        write_rows(tmp_path / "measured" / f"{name}.videos.csv.gz", [{**row, "arm": name}])
        np.save(tmp_path / "measured" / f"{name}.npy", np.full((15, 16, 16, 3), len(name), np.uint8))
        write_rows(tmp_path / "measured" / f"{name}.attention.csv.gz", [{"arm": name, "part": "window"}])
    write_rows(tmp_path / "measured" / "none-1.swaps.csv.gz", [{"arm": "none-1", "swap": "window"}])
    measuring.measure(tmp_path, jobs=2, results=tmp_path / "results")
    columns = read_columns(tmp_path / "results" / "videos.csv.gz")
    assert list(columns["arm"]) == [
        *("truth-0", "teacher-0", "initialized-0", "initialized:none-0", "initialized:static-0"),
        "none-1",
    ]
    assert list(read_columns(tmp_path / "results" / "swaps.csv.gz")["swap"]) == ["window"]
    assert (tmp_path / "results" / "frames.png").exists()
    # Unless it was trained again since.
    later = (tmp_path / "measured" / "none-1.npy").stat().st_mtime + 10
    os.utime(tmp_path / "none-1.seconds", (later, later))
    assert measuring._is_measured(tmp_path, "none", 1) == (False, False)
    assert measuring._is_measured(tmp_path, "initialized:none", 0) == (True, True)


def test_an_anchor_need_not_be_among_what_is_measured(config, truth, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "arms", lambda: (["none"], []))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher.seconds").write_text("1")
    save_config(config, tmp_path / "teacher" / "config.json")
    (tmp_path / "measured").mkdir()
    worlds, videos = truth
    rows = list(measuring.measure_videos(videos, worlds, config.data.worlds, 21))
    for index, row in enumerate(rows):
        row["identity"], row["chance"] = (1.0, 0.5) if index % 2 else (float("nan"), float("nan"))
    for name in ("truth", "teacher", "initialized", "initialized:none"):
        write_rows(
            tmp_path / "measured" / f"{name}-0.videos.csv.gz", [{"arm": name, "seed": 0, "noise": 0, **r} for r in rows]
        )
        np.save(tmp_path / "measured" / f"{name}-0.npy", np.zeros((15, 16, 16, 3), np.uint8))
    for name in ("initialized", "initialized:none"):
        row = {"arm": name, "seed": 0, "part": "window", "frame": 0, "share": 1.0}
        write_rows(tmp_path / "measured" / f"{name}-0.attention.csv.gz", [row])
    measuring.measure(tmp_path, jobs=1, results=tmp_path / "results")
    report(tmp_path / "results")
    tables = (tmp_path / "results" / "tables.md").read_text()
    assert "| teacher | 1.00 [1.00, 1.00] |" in tables
    assert "| teacher | 1.00 [1.00, 1.00] of 50% |" in tables  # memory
    assert "| initialized:none |  |  | 1.00 | 1.00 |  |" in tables  # of attention
    assert "exchanging" not in tables
    assert "| minus |" not in tables


def test_the_tables_are_of_the_rows_beside_them(tmp_path):
    for name in ("videos.csv.gz", "swaps.csv.gz", "contents.csv.gz", "attention.csv.gz", "first"):
        (tmp_path / name).symlink_to(ROOT / "docs/small_world" / name)
    report(tmp_path)
    tables = (ROOT / "docs/small_world/tables.md").read_text()
    assert (tmp_path / "tables.md").read_text() == tables
    # The page's tables are those of the report.
    page = (ROOT / "docs/reproduction.md").read_text().splitlines()
    shown = [line for line in page if line.startswith("| ") and " ± " in line]
    assert len(shown) > 20
    assert set(shown) <= set(tables.splitlines())


@pytest.mark.parametrize("missing", [None, 1, 0])
def test_a_stopped_run_is_not_a_finished_one(missing, config, tmp_path, monkeypatch):
    step = None if missing is None else config.distill.steps - missing
    finished = missing == 0

    def run(command, log, environment):
        (tmp_path / "none-1").mkdir()
        save_config(config, tmp_path / "none-1" / "config.json")
        return (0 if finished else 143), 2.0, 1.0

    monkeypatch.setattr(runs, "run_timed", run)
    monkeypatch.setattr(runs, "latest_step", lambda folder: step if folder == tmp_path / "none-1" / "distill" else 999)
    for done in ("teacher.seconds", "unanchored.seconds"):
        (tmp_path / done).write_text("1")
    monkeypatch.setattr(training, "check_teacher", lambda folder: None)
    if finished:
        training.train(tmp_path, ["none"], [1], jobs=1)
    else:
        with pytest.raises(UserError, match="none-1: was stopped before its end"):
            training.train(tmp_path, ["none"], [1], jobs=1)
    assert (tmp_path / "none-1.seconds").exists() == finished


@pytest.mark.parametrize(
    ("code", "told"), [(130, "was stopped before its end"), (2, "training failed; the end of .*none-1.log")]
)
def test_a_run_that_fails_is_named(code, told, tmp_path, monkeypatch):
    for done in ("teacher.seconds", "unanchored.seconds"):
        (tmp_path / done).write_text("1")
    monkeypatch.setattr(training, "check_teacher", lambda folder: None)
    monkeypatch.setattr(runs, "run_timed", lambda command, log, environment: (code, 2.0, 1.0))
    with pytest.raises(UserError, match=f"none-1: {told}"):
        training.train(tmp_path, ["none"], [1], jobs=1)


@pytest.mark.parametrize(("share", "refused"), [(1.0, None), (0.5, "pan 0.5"), (0.0, "pan 0.0")])
def test_no_arm_is_distilled_from_a_teacher_that_hardly_moves(share, refused, config, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    save_config(config, tmp_path / "teacher" / "config.json")
    (tmp_path / "teacher.seconds").write_text("1")

    def videos(folder, prompts, noise):
        worlds = measuring.worlds_for(config.data.worlds, 21, 128)
        assert [world.caption for world in worlds] == prompts
        return np.stack([world.video[(share * np.arange(21)).astype(int)] for world in worlds])

    monkeypatch.setattr(measuring, "roll_out_teacher", videos)
    if refused:
        with pytest.raises(UserError, match=f"no arm is distilled from it .{refused}"):
            measuring.check_teacher(tmp_path)
    else:
        measuring.check_teacher(tmp_path)
        monkeypatch.setattr(measuring, "roll_out_teacher", None)
        measuring.check_teacher(tmp_path)  # looked at once
    assert (tmp_path / "teacher.gates").exists() == (not refused)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["measure", "--folder=nowhere"], "nowhere: no teacher is trained there"),
        (["report", "--results=nowhere"], "nowhere/videos.csv.gz: no such file"),
        (["train", "--jobs=0"], "--jobs=0: needs to be 1 or more"),
        (["train", "--arms", "adaptve"], "adaptve"),
    ],
)
def test_a_wrong_argument_is_named(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        main(arguments)
    assert not any(tmp_path.iterdir())
