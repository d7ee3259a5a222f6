"""The second study: its instruments on rendered truth, the rules by which it decides, and the order of its runs."""

import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_dit
from flax import nnx

from adastate_jax.checkpoint import save_tree
from adastate_jax.config.files import parse_config, save_config
from adastate_jax.errors import UserError
from adastate_jax.models.patch_codec import fit_patch_codec
from adastate_jax.models.text import TextEncoder
from adastate_jax.training.frozen import Frozen
from studies import runs
from studies.changing_world import STARTS, contents, gates, plan, start_of, windows
from studies.changing_world import train as training
from studies.changing_world.claims import CLAIMS, Measured, claims_table, verdict
from studies.changing_world.gates import GATES, check_teacher, found_in
from studies.changing_world.measure import measure_videos, measure_visits
from studies.changing_world.memory import (
    first_returns,
    half_life,
    half_life_interval,
    held,
    mean_memory,
    returns,
    strata,
)
from studies.changing_world.report import report
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
        here = first_returns(back, replaced, 3)
        assert here.sum() > 2
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
    assert first_returns(last, 1, 3).all()
    assert not first_returns(last, 0, 3).any()
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


def stale_walk(rate, count=256, balls=13):
    """Videos that keep their first ball's colour, come what may: half replace it in view, later ones at a rate."""
    rng = np.random.default_rng(0)
    first = rng.integers(3, size=(count, 1))
    entries = np.repeat(first, balls, axis=1)
    replaced = rng.random((count, balls)) < rate
    replaced[:, 0] = rng.random(count) < 0.5
    return entries, np.where(replaced, (entries + 1) % 3, entries)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_what_comes_back_stale_holds_nothing_that_is_new_however_seldom_it_is_asked(rate):
    entries, exits = stale_walk(rate)
    back = returns(visits_of(entries, exits))
    every = np.ones(len(back["age"]), bool)
    kept, renewed = strata(back)
    assert mean_memory(back, "origin", kept) == 1
    assert mean_memory(back, "origin", renewed) < 0
    assert held(back, every) < 0.5
    assert half_life(back, renewed)[0] < 1
    first = first_returns(back, 1, 3)
    assert first.sum() == len(np.unique(back["video"][renewed]))  # one for each video that replaces anything
    assert (back["was_last"][first].max(), back["was_first"][first].min()) == (0, 1)
    # The colour of the ball before is right for ever after, if none is replaced again.
    assert (mean_memory(back, "last", every) > 0.9) == (rate == 0.0)


def test_nothing_is_said_to_be_held_of_which_too_little_was_seen():
    back = returns(visits_of(np.arange(64)[:, None].repeat(4, axis=1) % 3))
    assert np.isnan(held(back, np.ones(len(back["age"]), bool)))  # no colour was ever replaced


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
    low, high = half_life_interval(back, np.ones(len(back["age"]), bool))
    assert low < lasted < high < low + 4


def test_an_age_is_of_the_time_that_passed_and_not_of_the_balls_that_came():
    visits = visits_of([[0, 0, 0]])
    visits["frame"] = np.array([0.0, 33.0, 100.0])  # every other ball, then two of three, is lost
    assert returns(visits)["age"].tolist() == [2, 6]


def test_a_change_in_view_is_dated():
    found = np.full((2, 30), -1)
    found[0, 0:2], found[0, 2:5], found[0, 18:21] = 1, 2, 2
    found[1, 0:5], found[1, 18:20] = 0, 0
    assert [x.tolist() for x in contents.since_change(found, 4)] == [[4, -1], [1, -1]]  # frame 2 is of chunk 0
    found[1, 20] = 1
    past = contents.PAST  # the next ball of the first video has come
    assert [x.tolist() for x in contents.since_change(found, 7)] == [[past, 1], [1, 0]]
    found[0, 18:] = -1  # it has not, and is overdue
    assert [contents.since_change(found, chunk)[0][0] for chunk in (5, 6)] == [5, past]


def test_attention_around_a_replacement_is_of_the_same_visits_at_every_chunk():
    found = np.full((3, 60), -1)
    for first, colours in ((3, (1, 1)), (20, (1, 2)), (36, (2, 2)), (52, (2, 1))):  # chunks 1, 6, 12 and 17
        found[0, first : first + 2] = colours
    shares = {chunk: {"anchor": np.full(3, chunk / 100)} for chunk in range(4, 20)}
    rows = list(contents._look(found, shares))
    assert {(row["changed"], row["chunks"], row["visits"]) for row in rows} == {
        (changed, chunks, 1) for changed in (0, 1) for chunks in contents.AROUND
    }
    assert [row["share"] for row in rows if row["chunks"] == 0] == [0.12, 0.07]


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
    arms = [*plan.SCREENING, *plan.longer({**plan.CLAIMED, "best state": "recurrent/adaptive"})]
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
    names = ("pan", "hue", "seen", "brightness", "saturation", "contrast")
    shown = {arm: dict.fromkeys(names, 1.0) for arm in memory}
    memory |= {"anchored/ema": 0.5, "recurrent/adaptive/state_4": 0.7, "recurrent/adaptive/state_2": 0.9}
    memory |= {"unanchored/none_long": 0.2, "anchored/none": float("nan"), "recurrent/adaptive": 0.8}
    shown["recurrent/adaptive/state_2"]["hue"] = 0.7  # stands still, nearly
    shown["anchored/ema"]["contrast"] = 1.3
    memory |= {"unanchored/memory": 0.4, "unanchored/ema": 0.6}
    shown["unanchored/ema"]["seen"] = 0.4
    roles = plan.kept(memory, shown)
    assert roles == {
        **plan.CLAIMED,
        **{"best state": "recurrent/adaptive", "best anchor": "unanchored/memory"},
        **{"best without": "unanchored/none_long", "crossing": "recurrent/adaptive/state_4"},
        "stopped": "recurrent/adaptive",
    }
    assert plan.longer(roles) == (
        *("anchored/static/updates_1000", "anchored/adaptive/updates_1000"),
        *("recurrent/adaptive/updates_1000", "anchored/adaptive/updates_3000"),
    )
    assert len(training.final_runs(roles)) == 3 * len(set(roles.values())) + 4
    longest = dict.fromkeys(plan.SCREENING, 0.0) | {"recurrent/adaptive/state_2/rollout_4": 0.9}
    assert plan.kept(longest, {arm: dict.fromkeys(names, 1.0) for arm in longest})["stopped"] in plan.SCREENING


def test_a_claim_is_judged_by_every_seed_and_not_by_the_one_that_chose_its_arm():
    claims = {claim.claim: claim for claim in CLAIMS}
    renewed, best = claims["an adaptive state is renewed"], claims["the best recipe with a state holds"]
    assert verdict(renewed, np.array([0.3, 0.4, 0.25])) == "yes"
    assert verdict(renewed, np.array([0.3, 0.4, 0.15])) == "undecided"
    assert verdict(renewed, np.array([0.1, 0.0, 0.15])) == "no"
    assert verdict(renewed, np.array([0.3, np.nan])) == "not told"
    assert verdict(claims["no gradient needs to cross chunks"], np.array([0.05])) == "yes, of one seed"
    entries, exits = stale_walk(0.05)
    shown = (entries[:, :1] + np.cumsum(entries != exits, axis=1)) % 3  # what is renewed each time
    renewing = visits_of(np.concatenate([entries[:, :1], shown[:, :-1]], axis=1), shown, arm="b/adaptive")
    visits = [visits_of(entries, exits, arm="a/static"), renewing]
    columns = {name: np.concatenate([x[name] for x in visits]) for name in visits[0]}
    seeds = [{**columns, "seed": np.full_like(columns["seed"], seed)} for seed in (0, 1, 2)]
    back = returns({name: np.concatenate([x[name] for x in seeds]) for name in columns})
    videos = {"arm": np.repeat(["a/static", "b/adaptive"], 3), "seed": np.tile([0.0, 1.0, 2.0], 2)}
    videos |= {"horizon": np.full(6, 20.0), "withheld": np.zeros(6, bool)}
    videos |= {name: np.full(6, 0.95) for name in ("pan", "hue", "saturation", "contrast")}
    lines = claims_table(
        Measured(videos, back, {}), {"static": "a/static", "adaptive": "b/adaptive", "best state": "b/adaptive"}
    )
    said = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in lines[4:]}
    assert said["a static anchor keeps what is stale"] == said["an adaptive state is renewed"] == "yes"
    assert said["an adaptive state moves"] == "yes"
    assert said["the state's content follows the scene"] == "not told"
    assert not {"without an anchor, the look drifts", "1,000 updates are enough"} & set(said)
    chosen = next(line for line in lines if line.startswith(f"| {best.claim} |"))
    assert re.search(r"\| \(\d\.\d\d\) \| \d\.\d\d \| \d\.\d\d \|", chosen)


def test_a_teacher_that_hears_no_noise_knows_every_window(tmp_path, monkeypatch):
    small = ("dim=16", "ffn_dim=16", "num_heads=1", "num_layers=1")
    config = parse_config([f"{CONFIG}:teacher", *(f"--config.model.{field}" for field in small)])
    worlds = worlds_of_each_caption(config.data.worlds, 60, 1)
    save_config(config, tmp_path / "config.json")
    codec = fit_patch_codec(config.codec, np.stack([world.video for world in worlds]))
    encoder = jax.jit(lambda: TextEncoder(config.text, rngs=nnx.Rngs(0)))()
    save_tree(tmp_path / "frozen", Frozen(codec, encoder))
    save_tree(tmp_path / "pretrain" / "1", {"ema": make_dit(config.model, 1)})
    monkeypatch.setattr(windows, "SIGMAS", (1e-3, 1.0))
    rows = list(windows.measure_windows(tmp_path, worlds))
    assert {(row["sigma"], row["start"]) for row in rows} == {(x, y) for x in (1e-3, 1.0) for y in range(0, 34, 3)}
    assert all((row["right"] > 0.8) == (row["sigma"] < 1) for row in rows)
    assert all((row["error"] < 0.01) == (row["sigma"] < 1) for row in rows)


def test_runs_are_trained_after_what_they_start_from_and_behind_the_gates(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(training, "train_one", lambda config, workdir, overrides: trained.append(workdir.name))
    monkeypatch.setattr(training, "check_teacher", lambda folder: trained.append("gates"))
    training.train_runs(tmp_path, [("anchored_tenth/adaptive", 0), ("recurrent/adaptive", 1)], jobs=1)
    assert list(dict.fromkeys(trained)) == [
        *("teacher", "gates", "anchored", "anchored_tenth", "recurrent-1"),
        *("recurrent.adaptive-1", "anchored_tenth.adaptive-0"),
    ]
    final = training.starts_ahead([(arm, seed) for seed in (0, 1) for arm in ("anchored/static", "anchored/none")])
    assert final[:2] == [("anchored", 0), ("anchored", 1)]
    ordered = training.starts_ahead([(arm, 0) for arm in plan.SCREENING])
    assert len(ordered) == len(plan.SCREENING) + len(STARTS) == len(set(ordered))
    assert ordered[:2] == [("anchored", 0), ("anchored/none", 0)]
    assert plan.recipe("anchored_tenth/adaptive") == {"anchored_tenth/adaptive", "anchored_tenth", "anchored"}
    assert plan.recipe("anchored/adaptive/updates_1000") == {
        *("anchored/adaptive/updates_1000", "anchored/adaptive", "anchored")
    }
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
    took = {"teacher": 600, "anchored": 60, "anchored/static": 120, "anchored/adaptive": 90}
    seconds = [{"arm": arm, "seed": 0, "seconds": x, "processor": x} for arm, x in took.items()]
    write_rows(tmp_path / "seconds.csv.gz", seconds)
    report(tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "| anchored/static | 1.0" in tables
    assert "| anchored/adaptive | 2.5 |" in tables  # minutes, with the start and without the teacher
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
