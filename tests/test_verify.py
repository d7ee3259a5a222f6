"""The verify command: it passes on the official fixtures, and every kind of fault in a fixture makes it fail."""

import functools
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adastate_jax import verify
from adastate_jax.console import run_command
from adastate_jax.errors import UserError
from adastate_jax.verification.record import ARITHMETIC_TOLERANCE, NETWORK_TOLERANCE, Check
from adastate_jax.verification.training import RELEASED_TOLERANCE
from adastate_jax.weights.safetensors_file import SafeTensors

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")

NOT_CHECKED = {
    ("scheduler", "sigma_at_timestep"),
    ("dmd", "masked"),
}


@pytest.fixture
def run(capsys):
    """Runs the command: exit code, and (file, case) → result of each line of the table, "ok" or a longer one."""

    def run(folder, *options):
        code = verify.main([str(folder), *options])
        _, *lines, summary = capsys.readouterr().out.splitlines()
        results = {}
        for line in lines:
            stem, case, _, _, result = re.split(r" {2,}", line, maxsplit=4)
            results[stem, case] = result
        assert len(results) == len(lines)
        counts = [int(number) for number in re.findall(r"(\d+) (?:checks passed|failed|not checked)", summary)]
        kinds = [result.split(" (")[0] for result in results.values()]
        assert counts == [kinds.count("ok"), kinds.count("FAIL"), kinds.count("not checked")]
        return code, results

    return run


def copy(stem, folder, edit=lambda tensors: None):
    """Copies a fixture, its tensors edited in place."""
    source = SafeTensors(GOLDEN / f"{stem}.safetensors")
    tensors = {name: source[name].copy() for name in source}
    edit(tensors)
    save_file(tensors, folder / f"{stem}.safetensors", source.metadata)


# Of the largest magnitude in a tensor; for networks there is an absolute tolerance beside it.
LARGEST_TOLERANCE = {"train_step": RELEASED_TOLERANCE}


STATED = ("denoising_step_list", "timesteps", "sigmas")


def change_one_number(tensor, rng, tolerance=ARITHMETIC_TOLERANCE):
    """Moves a number anywhere in a tensor to twice what any check tolerates there."""
    place = rng.integers(tensor.size)
    whole = np.issubdtype(tensor.dtype, np.integer)
    largest = np.abs(tensor).max()
    tensor.flat[place] += 1 if whole else 2 * max(NETWORK_TOLERANCE, tolerance * largest)


def change_one_entry(entries, rng):
    """Changes one shape, name or number of a list or an object."""
    key = rng.choice(range(len(entries)) if isinstance(entries, list) else list(entries))
    entries[key] += {list: [2], str: "x", float: 1.0}[type(entries[key])]


def failures(results):
    return {key: result for key, result in results.items() if result.startswith("FAIL")}


def test_the_fixtures_that_ship_pass_and_one_changed_number_fails(capsys, tmp_path):
    assert verify.main([]) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith("14 checks passed, 0 failed, 0 not checked")
    shutil.copytree(verify.SHIPPED, tmp_path / "fixtures")
    source = SafeTensors(verify.SHIPPED / "umt5.safetensors")
    tensors = {name: source[name].copy() for name in source}
    tensors["out.long.zeroed"].flat[7] += 1e-4
    save_file(tensors, tmp_path / "fixtures" / "umt5.safetensors", source.metadata)
    assert verify.main([str(tmp_path / "fixtures"), "--only", "umt5"]) == 1
    assert capsys.readouterr().out.count("FAIL (in out.long.zeroed)") == 1


def test_every_fixture_has_a_function_that_checks_it():
    for name in verify.FIXTURES.values():
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"adastate_jax.verification.{module}"), function))


@needs_golden
def test_all_fixtures_pass(run):
    code, results = run(GOLDEN)
    assert not failures(results)
    assert code == 0
    assert {key for key, result in results.items() if result.startswith("not checked")} == NOT_CHECKED
    assert {stem for stem, _ in results} == set(verify.FIXTURES)


@needs_golden
def test_one_changed_number_in_every_tensor_fails_every_check(run, tmp_path):
    """Those that a fixture expects, and those that it states of a stream: its steps, as noise levels and timesteps."""
    rng = np.random.default_rng(0)

    def change(tensors, tolerance, stated):
        for name, tensor in tensors.items():
            if name.startswith("out.") or (stated and name.split(".")[-1] in STATED):
                change_one_number(tensor, rng, tolerance)

    for path in sorted(GOLDEN.glob("*.safetensors")):
        tolerance = LARGEST_TOLERANCE.get(path.stem, ARITHMETIC_TOLERANCE)
        stated = path.stem.startswith("anchor_")
        copy(path.stem, tmp_path, functools.partial(change, tolerance=tolerance, stated=stated))
    for path in sorted(GOLDEN.glob("*.json")):
        content = json.loads(path.read_text())
        if path.stem.startswith("manifest_"):
            for part in ("official", "state_dict", "diffusers_to_official", "transformers_to_official", "latents_mean"):
                if part in content:
                    change_one_entry(content[part], rng)
        else:
            for part in sorted({name.split(".")[0] for name in content}):  # encoder and decoder are checked apart
                of_part = {name: content[name] for name in content if name.split(".")[0] == part}
                change_one_entry(of_part, rng)
                content |= of_part
        (tmp_path / path.name).write_text(json.dumps(content))
    code, results = run(tmp_path)
    assert code == 1
    assert {stem for stem, _ in results} == set(verify.FIXTURES)
    of_headers = {("train_step", "order_of_updates")}  # no tensor says it
    assert results.keys() - failures(results).keys() == NOT_CHECKED | of_headers
    assert not any(case == "the rest of the file" for _, case in results)


@needs_golden
def test_every_number_of_the_trainer_is_looked_at_alone(run, tmp_path):
    """One changed number in a tensor fails its check and the L2 norm that it is part of, and nothing else."""
    cases = {
        "out.0.gradient.blocks.1.self_attn.k.weight": ["0.gradient", "0.gradient.relative_l2"],
        "out.0.gradient_stop.blocks.0.self_attn.norm_k.weight": ["0.gradient_stop"],
        "out.after1.critic.head.head.bias": ["after1.critic", "after1.critic.relative_l2"],
        "out.ema.text_embedding.2.weight": ["ema", "ema.relative_l2"],
        "out.1.latents": ["1.latents"],
    }

    def change(tensors):
        for name in cases:
            change_one_number(tensors[name], np.random.default_rng(1), 0.01)

    copy("train_step", tmp_path, change)
    _, results = run(tmp_path)
    expected = {("train_step", case) for changed in cases.values() for case in changed}
    assert failures(results).keys() == expected


@needs_golden
def test_timesteps_that_are_clipped_lie_off_the_grid(run, tmp_path):
    """The reference's losses for raw timesteps beyond both limits, retold in numpy: the grid's nearest level counts."""

    def change(tensors):
        def grid_sigma(shift):
            uniform = np.arange(1000, 0, -1) / 1000
            grid = shift * uniform / (1 + (shift - 1) * uniform)
            return grid[np.abs(1000 * grid - timestep[:, None]).argmin(axis=1)][:, None, None, None, None]

        def in_float32(x):  # what the checks after it start from
            return x.astype(np.float32).astype(np.float64)

        tensors["in.raw_timestep"][:] = 3, 998
        timestep = np.array([20.0, 980.0])
        given = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        clean, sigma, score_sigma = given["in.latent"], grid_sigma(5.0), grid_sigma(8.0)
        assert abs(1000 * sigma.flat[0] - 20) > 0.1  # on the grid the first would be no case
        out = {"timestep": np.repeat(timestep[:, None], clean.shape[1], axis=1)}
        out["noisy_latent"] = noisy = (1 - sigma) * clean + sigma * given["in.noise"]
        for case, network, text in (
            ("fake", "fake", "in.context"),
            ("real_cond", "real", "in.context"),
            ("real_uncond", "real", "in.null_context"),
        ):
            mixing, projection, slope = (given[f"w.{network}.{name}"] for name in "APu")
            bias = given[text].mean(axis=1) @ projection.T + slope * timestep[:, None] / 1000
            flow = np.einsum("dc,bfchw->bfdhw", mixing, noisy) + bias[:, None, :, None, None]
            out[f"flow_{case}"], out[f"x0_{case}"] = flow, in_float32(noisy - score_sigma * flow)
        conditional, unconditional = out["x0_real_cond"], out["x0_real_uncond"]
        out["x0_real_cfg"] = real = in_float32(conditional + 3 * (conditional - unconditional))
        out["grad_unnormalised"] = out["x0_fake"] - real
        out["normalizer"] = np.abs(clean - real).mean(axis=(1, 2, 3, 4), keepdims=True)
        out["grad"] = gradient = out["grad_unnormalised"] / out["normalizer"]
        out["gradient_norm_log"] = np.abs(gradient).mean()
        weight = 1 + 2 * np.arange(clean.shape[1]) / (clean.shape[1] - 1)
        for prefix, weights in (("", np.ones_like(weight)), ("horizon.", weight)):
            weights = weights[:, None, None, None]
            out[f"{prefix}loss"] = (weights * gradient**2 / 2).mean()
            out[f"{prefix}dloss_dlatent"] = weights * gradient / gradient.size
        for name, value in out.items():
            tensors[f"out.{name}"] = np.asarray(value).astype(tensors[f"out.{name}"].dtype)

    copy("dmd", tmp_path, change)
    code, results = run(tmp_path)
    assert not failures(results)
    assert code == 0


@needs_golden
@pytest.mark.parametrize(
    ("stem", "tensor", "amount", "case"),
    [
        ("wan_dit", "out.b.flow", 2e-4, "b.flow"),
        ("wan_dit", "w.blocks.1.self_attn.k.weight", 0.5, "a.flow"),
        ("scheduler", "out.step", 1e-5, "step"),
        ("scheduler", "in.x0", 1e-4, "add_noise"),
        ("dmd", "out.horizon.dloss_dlatent", 1e-6, "horizon.dloss_dlatent"),
        ("dmd", "w.fake.A", 1e-4, "flow_fake"),
        ("umt5", "out.relative_bucket", 1, "relative_bucket"),
        ("anchor_longlive", "out.longlive.kv_k", 2e-4, "longlive.kv_k"),
        ("anchor_longlive", "in.renoise", 0.1, "longlive.latents"),
        ("anchor_reward_forcing", "out.alpha0.9.slot_frames", 1, "alpha0.9.slot_frames"),
        ("anchor_memrope", "in.context", 0.1, "adaptive.memory_k"),
        ("anchor_rolling_sink", "in.noise", 0.1, "fresh_noise.latents"),
        ("anchor_rolling_forcing", "out.four.windows", 1, "four.windows"),
        ("train_step", "out.3.loss", 1e-3, "3.loss"),
        ("train_step", "in.6.renoise", 0.5, "6.loss"),
        ("train_step", "w.teacher.blocks.1.ffn.0.weight", 0.1, "0.gradient"),
    ],
)
def test_one_changed_number_fails(run, tmp_path, stem, tensor, amount, case):
    def change(tensors):
        place = np.random.default_rng(0).integers(tensors[tensor].size)
        tensors[tensor].flat[place] += amount

    copy(stem, tmp_path, change)
    for path in GOLDEN.glob("*_names.json"):
        shutil.copy(path, tmp_path)
    code, results = run(tmp_path, "--only", stem)
    assert code == 1
    assert (stem, case) in failures(results)
    if tensor.startswith("out."):
        assert failures(results).keys() == {(stem, case)}
        assert tensor in results[stem, case]


@needs_golden
def test_a_missing_tensor_fails(run, tmp_path):
    copy("wan_dit", tmp_path, lambda tensors: tensors.pop("out.a.flow"))
    code, results = run(tmp_path)
    assert code == 1
    assert results == {("wan_dit", "a.flow"): "FAIL (the file has no out.a.flow)", ("wan_dit", "b.flow"): "ok"}

    copy("wan_dit", tmp_path, lambda tensors: tensors.pop("in.b.latent"))
    code, results = run(tmp_path)
    assert code == 1
    assert failures(results) == {("wan_dit", "the rest of the file"): "FAIL (the file has no in.b.latent)"}

    copy("wan_dit", tmp_path, lambda tensors: tensors.pop("w.head.head.bias"))
    code, results = run(tmp_path)
    assert code == 1
    assert "head.head.bias" in results["wan_dit", "the rest of the file"]


@needs_golden
def test_a_tensor_that_nothing_checks_fails(run, tmp_path):
    copy("wan_dit", tmp_path, lambda tensors: tensors.update({"out.c.flow": tensors["out.a.flow"]}))
    code, results = run(tmp_path)
    assert code == 1
    assert failures(results) == {("wan_dit", "c.flow"): "FAIL (no check looks at this tensor)"}


@needs_golden
def test_a_missing_companion_fails_its_fixture_alone(run, tmp_path):
    copy("umt5", tmp_path)
    copy("scheduler", tmp_path)
    code, results = run(tmp_path)
    assert code == 1
    assert failures(results).keys() == {("umt5", "the rest of the file")}
    assert "umt5_names.json" in results["umt5", "the rest of the file"]
    assert results["scheduler", "step"] == "ok"


@needs_golden
@pytest.mark.parametrize(
    ("tensor", "fault"), [("out.add_noise", "the file's out.add_noise"), ("in.x0", "our out.add_noise")]
)
def test_a_nan_fails(run, tmp_path, tensor, fault):
    def spoil(tensors):
        tensors[tensor].flat[0] = np.nan

    copy("scheduler", tmp_path, spoil)
    code, results = run(tmp_path)
    assert code == 1
    assert results["scheduler", "add_noise"] == f"FAIL (NaN or infinity in {fault})"


@needs_golden
def test_unknown_files_fail_unless_others_are_asked_for(run, tmp_path):
    copy("scheduler", tmp_path)
    shutil.copy(GOLDEN / "scheduler.safetensors", tmp_path / "mystery.safetensors")
    (tmp_path / "manifest_mystery.json").write_text("{}")
    (tmp_path / "mystery_names.json").write_text("{}")
    code, results = run(tmp_path)
    assert code == 1
    assert failures(results) == {
        ("manifest_mystery", "everything"): "FAIL (unknown fixture)",
        ("mystery", "everything"): "FAIL (unknown fixture)",
    }
    code, _ = run(tmp_path, "--only", "scheduler")
    assert code == 0


@needs_golden
def test_a_manifest_with_another_shape_or_name_fails(run, tmp_path):
    name = "manifest_self_forcing_generator.json"
    manifest = json.loads((GOLDEN / name).read_text())
    manifest["state_dict"]["model.head.head.bias"] = [65]
    manifest["state_dict"]["model.extra"] = [1]
    (tmp_path / name).write_text(json.dumps(manifest))
    code, results = run(tmp_path)
    assert code == 1
    result = results["manifest_self_forcing_generator", "state_dict"]
    assert "head.head.bias has shape [65], this network needs [64]" in result
    assert "belong to no known part: extra" in result


@needs_golden
@pytest.mark.parametrize("name", ["dmd.safetensors", "manifest_wan_vae.json"])
def test_a_truncated_file_stops_the_command_before_anything_runs(tmp_path, capsys, name):
    copy("scheduler", tmp_path)
    content = (GOLDEN / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as exit_info:
        run_command(verify.main, [str(tmp_path)])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    started, error = captured.err.splitlines()
    assert started == "starting JAX"
    assert name in error


def test_bad_folders_and_options_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        verify.main([str(tmp_path / "absent")])
    with pytest.raises(UserError, match="holds no fixture"):
        verify.main([str(tmp_path)])
    (tmp_path / "dmd.safetensors").touch()
    with pytest.raises(UserError, match="unknown fixture, known are scheduler"):
        verify.main([str(tmp_path), "--only", "dmt"])
    with pytest.raises(UserError, match="--only umt5: not in"):
        verify.main([str(tmp_path), "--only", "umt5"])
    with pytest.raises(UserError, match="cudnn needs"):
        verify.main([str(tmp_path), "--attention=cudnn"])


def test_judging():
    def verdict(expected, actual, **options):
        return verify.judge(Check("case", (("out.x", np.asarray(expected), actual),), 0.1, **options))

    assert verdict([1.0, 2.0], np.array([1.05, 2.0])).fault is None
    assert verdict([1.0, 2.0], np.array([1.15, 2.0])).fault == "in out.x"
    relative = verdict([1.0, -20.0], np.array([2.5, -20.0]), relative=True)
    assert relative == verify.Verdict(1.5, 2.0)
    assert verdict([1.0, 2.0], np.array([1.0])).fault == "out.x has shape [2], ours [1]"
    assert "our out.x" in verdict([1.0], np.array([np.inf])).fault
    assert verdict([1], np.array([3]), note="a reason").fault == "a reason"
    assert verify.judge(Check("case", (("out.x", None, 0.0),), 0.1)).fault == "the file has no out.x"
    good, bad = ("out.x", np.zeros(2), np.zeros(2)), ("out.y", np.zeros(2), np.ones(2))
    assert verify.judge(Check("case", (good, bad, good), 0.1)).fault == "in out.y"


def test_weights_in_eight_bits_pass_at_their_own_tolerance(capsys):
    assert verify.main(["--only", "wan_dit_diffusers", "--weights=int8"]) == 0
    printed = capsys.readouterr().out
    assert "3 checks passed, 0 failed, 0 not checked (float32, int8 weights, xla attention" in printed
    errors = [float(line.split()[2]) for line in printed.splitlines() if ".flow" in line]
    assert len(errors) == 2
    assert min(errors) > 1e-4  # they are quantised indeed
