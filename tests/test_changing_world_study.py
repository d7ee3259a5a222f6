"""The second study: its instruments on rendered truth, the rules by which it decides, and the order of its runs."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from adastate_jax.config.files import parse_config, save_config
from adastate_jax.errors import UserError
from studies import runs
from studies.changing_world import STARTS, contents, gates, plan, start_of
from studies.changing_world import train as training
from studies.changing_world.gates import GATES, check_teacher, found_in
from studies.changing_world.measure import measure_videos, measure_visits
from studies.changing_world.memory import half_life, mean_memory, returns
from studies.changing_world.report import report, told_apart
from studies.changing_world.worlds import colours_of, worlds_of_each_caption
from studies.rows import columns_of, write_rows
from studies.statistics import holm, significance

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT}/configs/changing_world.py"


@pytest.fixture(scope="module")
def config():
    return parse_config([f"{CONFIG}:teacher"]).data.worlds


@pytest.fixture(scope="module")
def truth(config):
    worlds = worlds_of_each_caption(config, 126, 2)
    return worlds, np.stack([world.video for world in worlds])


def visits_of(entries, exits=None, arm="x", frame=0):
    """Columns of visits: a row of colours for each video; the same at its exit unless told."""
    exits = entries if exits is None else exits
    rows = [
        {"arm": arm, "seed": 0, "noise": 0, "video": video, "number": number, "frame": frame + 16 * number, "since": 0}
        | {"entry": entry, "exit": last}
        for video, (of_video, last_of) in enumerate(zip(entries, exits, strict=True))
        for number, (entry, last) in enumerate(zip(of_video, last_of, strict=True))
    ]
    return columns_of([{name: str(value) for name, value in row.items()} for row in rows])


def test_each_caption_has_as_many_true_videos(config, truth):
    captions = [world.caption for world in truth[0]]
    assert [len(list(group)) for _, group in itertools.groupby(captions)] == [2] * 16
    assert set(config.withheld) < set(captions)


def test_the_truth_moves_as_its_caption_says(config, truth):
    worlds, videos = truth
    rows = list(measure_videos(videos, colours_of(videos, config), worlds, config))
    assert {row["horizon"] for row in rows} == {1.0, 2.5, 6.0}
    for name in ("pan", "hue"):
        values = np.array([row[name] for row in rows])
        assert abs(values.mean() - 1) < 0.05
        assert values.min() > 0.7
    assert np.mean([row["landscape"] for row in rows]) > 0.95


def test_the_truth_comes_back_as_it_was_last_and_not_first(config, truth):
    worlds, videos = truth
    found = colours_of(videos, config)
    rows = [{"arm": "truth", "seed": "0", "noise": "0", **row} for row in measure_visits(found)]
    back = returns(columns_of([{name: str(value) for name, value in row.items()} for row in rows]))
    assert back["was_last"].mean() > 0.99
    for replaced in (1, 2, 3):
        here = told_apart(back, replaced)
        assert here.sum() > 5
        assert back["was_first"][here].max() == 0
    # How often a colour was replaced is that of the rendered worlds.
    for video, world in enumerate(worlds):
        of_video = back["video"] == video
        changes = np.array([frame for frame, _ in world.changes])
        for frame, replaced in zip(back["frame"][of_video], back["replaced"][of_video], strict=True):
            assert replaced == (changes < frame).sum()


def test_memory_tells_the_last_the_first_and_no_memory_apart():
    rng = np.random.default_rng(0)
    count, first = 400, rng.integers(3, size=400)
    second = (first + 1) % 3
    exits = np.stack([second, second], axis=1)  # the first ball is replaced in view

    def back_in(colours):
        return returns(
            visits_of(np.stack([first, colours], axis=1), np.where([[True, False]], exits, colours[:, None]))
        )

    last, stale, guessed = back_in(second), back_in(first), back_in(rng.integers(3, size=count))
    every = np.ones(count, bool)
    assert mean_memory(last, "last", every) == mean_memory(stale, "first", every) == 1
    assert mean_memory(last, "first", every) < -0.3
    assert abs(mean_memory(guessed, "last", every)) < 0.1
    assert told_apart(last, 1).all()
    assert not told_apart(last, 0).any()
    # Who shows one colour alone says nothing.
    assert np.isnan(mean_memory(returns(visits_of(np.zeros((9, 2), int))), "last", np.ones(9, bool)))


def test_replacements_are_counted_in_view_and_an_age_begins_with_each():
    entries = [[0, 1, 1, 2, 2], [0, 0, 1, 1, 1]]
    exits = [[1, 1, 2, 2, 2], [0, 0, 1, 1, 1]]  # the second forgets, which is no replacement
    back = returns(visits_of(entries, exits))
    assert back["replaced"].tolist() == [1, 1, 2, 2, 0, 0, 0, 0]
    assert back["age"].tolist() == [1, 2, 1, 2, 1, 2, 3, 4]
    assert back["was_last"].tolist() == [1, 1, 1, 1, 1, 0, 1, 1]
    assert back["was_origin"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert back["was_first"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_a_half_life_is_that_of_a_forgetful_walk():
    rng = np.random.default_rng(0)
    colours = rng.integers(3, size=(512, 1))
    for _ in range(12):  # at each return a tenth of them takes any colour
        drawn = np.where(rng.random(512) < 0.1, rng.integers(3, size=512), colours[:, -1])
        colours = np.concatenate([colours, drawn[:, None]], axis=1)
    back = returns(visits_of(colours))
    lasted, is_gone = half_life(back, np.ones(len(back["age"]), bool))
    assert is_gone
    assert abs(lasted - np.log(0.5) / np.log(0.9)) < 1.0
    kept, is_gone = half_life(returns(visits_of(np.repeat(colours[:, :1], 13, axis=1))), np.ones(512 * 12, bool))
    assert (kept, is_gone) == (12, False)


def test_a_change_in_view_is_dated():
    found = np.full((2, 30), -1)
    found[0, 0:2], found[0, 2:5], found[0, 18:21] = 1, 2, 2
    found[1, 0:5], found[1, 18:20] = 0, 0
    assert [x.tolist() for x in contents.since_change(found, 4)] == [[4, -1], [1, -1]]  # frame 2 is of chunk 0
    found[1, 20] = 1
    assert [x.tolist() for x in contents.since_change(found, 7)] == [[7, 1], [1, 0]]


def test_rendered_truth_passes_the_gates_and_what_forgets_does_not(config, truth, tmp_path, monkeypatch):
    worlds = worlds_of_each_caption(config, 21, 4)
    monkeypatch.setattr(gates, "NOISE_SEEDS", (0,))
    monkeypatch.setattr(gates, "PER_CAPTION", 4)
    monkeypatch.setattr(gates, "worlds_of_each_caption", lambda *_: worlds)
    (tmp_path / "teacher").mkdir()
    save_config(parse_config([f"{CONFIG}:teacher"]), tmp_path / "teacher" / "config.json")
    (tmp_path / "teacher.seconds").write_text("1 1\n")
    videos = np.stack([world.video for world in worlds])

    def spoiled(end):
        """From frame `end` on, another video's frames: of the caption, so that all else is right."""
        other = np.arange(64).reshape(16, 4)[:, [1, 2, 3, 0]].ravel()
        return np.concatenate([videos[:, :end], videos[other, end:]], axis=1)

    monkeypatch.setattr(gates, "roll_out_teacher", lambda folder, prompts, noise: spoiled(10))
    with pytest.raises(UserError, match=r"no arm is distilled from it .*needed: last after a change between 0.8"):
        check_teacher(tmp_path)
    assert not (tmp_path / "teacher.gates").exists()
    monkeypatch.setattr(gates, "roll_out_teacher", lambda folder, prompts, noise: videos)
    check_teacher(tmp_path)
    assert (tmp_path / "teacher.gates").exists()
    frozen = found_in(np.repeat(videos[::4, :1], 21, axis=1), worlds[::4], config)
    assert frozen["pan"] == 0
    assert set(frozen) == set(GATES)
    assert np.isnan(frozen["last without one"])


def test_every_arm_of_the_plan_is_a_configuration_of_its_own():
    arms = [*plan.SCREENING, *plan.longer(plan.CLAIMED)]
    configs = {arm: parse_config([f"{CONFIG}:{arm}"]) for arm in (*STARTS, *arms)}
    assert len(set(configs.values())) == len(STARTS) + len(arms) == len(configs)
    assert all(Path(config.start_from).name == start_of(arm) for arm, config in configs.items())
    state = configs["recurrent/adaptive/state_2/rollout_4"].distill
    assert (state.cache_gradient_chunks, state.rollout_frames, state.scored_frames) == (2, 84, 21)
    assert configs["anchored/none_long"].stream.past_frames == 18
    steps = configs["anchored/adaptive/updates_3000"].distill
    assert steps.steps // steps.critic_ratio == 3000
    with pytest.raises(UserError, match="unknown arm 'anchored/statc'"):
        parse_config([f"{CONFIG}:anchored/statc"])


def test_the_rule_keeps_the_best_of_each_kind_and_what_claims_are_of():
    memory = dict.fromkeys(plan.SCREENING, 0.1)
    motion = {arm: dict.fromkeys(("pan", "hue", "brightness", "saturation", "contrast"), 1.0) for arm in memory}
    memory |= {"anchored/ema": 0.5, "recurrent/adaptive/state_4": 0.7, "recurrent/adaptive/state_2": 0.9}
    memory |= {"unanchored/none_long": 0.2, "anchored/none": float("nan")}
    motion["recurrent/adaptive/state_2"]["hue"] = 0.7  # stands still, nearly
    motion["anchored/ema"]["contrast"] = 1.3
    memory["unanchored/memory"] = 0.4
    assert plan.kept(memory, motion) == (
        *plan.CLAIMED,
        *("recurrent/adaptive/state_4", "unanchored/memory", "unanchored/none_long"),
    )
    assert plan.longer(plan.kept(memory, motion)) == (
        *("anchored/static/updates_1000", "anchored/adaptive/updates_1000"),
        *("recurrent/adaptive/state_4/updates_1000", "anchored/adaptive/updates_3000"),
    )


def test_runs_are_trained_after_what_they_start_from_and_behind_the_gates(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(training, "train_one", lambda config, workdir, overrides: trained.append(workdir.name))
    monkeypatch.setattr(training, "check_teacher", lambda folder: trained.append("gates"))
    training.train_runs(tmp_path, [("anchored_tenth/adaptive", 0), ("recurrent/adaptive", 1)], jobs=1)
    assert list(dict.fromkeys(trained)) == [
        *("teacher", "gates", "anchored", "anchored_tenth", "recurrent"),
        *("recurrent.adaptive-1", "anchored_tenth.adaptive-0"),
    ]
    ordered = training.starts_ahead([(arm, 0) for arm in plan.SCREENING])
    assert len(ordered) == len(plan.SCREENING) + len(STARTS) == len(set(ordered))
    assert ordered[:2] == [("anchored", 0), ("anchored/none", 0)]
    assert ordered.index(("unanchored", 0)) == ordered.index(("unanchored/none", 0)) - 4


def test_what_is_trained_longer_goes_on_from_what_is_trained(tmp_path, monkeypatch):
    trained = []

    def train(config, workdir, overrides):
        workdir.mkdir(exist_ok=True)
        trained.append((workdir.name, [path.name for path in workdir.iterdir()]))
        (workdir / workdir.name).touch()

    monkeypatch.setattr(training, "train_one", train)
    monkeypatch.setattr(training, "check_teacher", lambda folder: None)
    training.train_runs(tmp_path, [("anchored/adaptive/updates_3000", 0)], jobs=1)
    *_, (name, before), (longer, after) = trained
    assert (name, before) == ("anchored.adaptive.updates_1000-0", ["anchored.adaptive-0"])
    assert (longer, set(after)) == ("anchored.adaptive.updates_3000-0", {*before, name})
    assert [name for name, _ in trained][-3] == "anchored.adaptive-0"


def test_a_run_that_fails_keeps_no_other_from_being_trained():
    trained = []

    def train(run):
        trained.append(run)
        if run in "bd":
            raise runs.RunFailed(f"{run} failed")

    with pytest.raises(UserError, match="b failed"):
        runs.train_all("abcd", train, jobs=1)
    assert trained == ["a", "b", "c", "d"]


def test_a_runs_seconds_are_those_of_all_its_goes(tmp_path, monkeypatch):
    ends = iter([(143, 20.0, 10.0), (0, 5.0, 4.0)])
    monkeypatch.setattr(runs, "run_timed", lambda *_: next(ends))
    monkeypatch.setattr(runs, "_is_finished", lambda workdir: True)
    with pytest.raises(UserError, match="stopped before its end"):
        runs.train_one("file:arm", tmp_path / "arm")
    runs.train_one("file:arm", tmp_path / "arm")
    assert runs.done_file(tmp_path / "arm").read_text() == "25 14\n"


def test_many_comparisons_are_corrected():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, np.nan, 0.03])), [0.03, 0.06, np.nan, 0.06])
    assert significance(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.0742, abs=1e-4)  # t = 3.46 with 2 degrees
    assert significance(np.zeros(3)) == 1
    assert np.isnan(significance(np.ones(1)))


def test_tables_are_made_of_any_arms(config, truth, tmp_path):
    worlds, videos = truth[0][::6], truth[1][::6]  # of all landscapes
    found = colours_of(videos, config)
    kinds = {"videos": list(measure_videos(videos, found, worlds, config)), "visits": list(measure_visits(found))}
    trained = [("truth", 0), *(("anchored/static", seed) for seed in (0, 1)), ("anchored/adaptive", 0)]
    for kind, rows in kinds.items():
        rows = [{"arm": arm, "seed": seed, "noise": 0, **row} for arm, seed in trained for row in rows]
        write_rows(tmp_path / f"{kind}.csv.gz", rows)
    report(tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "| anchored/static | 1.0" in tables
    assert "| contents" not in tables
    assert (tmp_path / "memory.png").exists()
    dark = {row["landscape"] for row in measure_videos(videos[:1] // 2, found, worlds, config)}
    assert dark == {0.0}


def test_the_pages_numbers_are_of_the_rows_beside_it(tmp_path):
    page = (ROOT / "docs" / "changing_world.md").read_text().splitlines()
    shown = {line for line in page if line.startswith("| ") and re.search(r"\d\.\d\d( |$)", line)}
    results = ROOT / "docs" / "changing_world"
    if not results.exists():
        assert not shown
        return
    for rows in results.glob("*.csv.gz"):
        (tmp_path / rows.name).symlink_to(rows)
    report(tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert tables == (results / "tables.md").read_text()
    assert shown
    assert shown <= set(tables.splitlines())
