"""Compiling ahead of time: the records, the cache, the command. The processor's compiler stands for the others."""

import dataclasses
import gzip
import json

import jax
import pytest
from flax import nnx
from small_targets import CONFIG, HOST, SMALL, here

from adastate_jax import bench
from adastate_jax.benchmarking import ahead, targets
from adastate_jax.benchmarking.targets import Chip
from adastate_jax.benchmarking.workloads import make_workload, mesh_over, wan_14b
from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiT, DiTConfig

PATCHES = ["--config.model.in_channels=48", "--config.model.out_channels=48"]  # what one of configs/tiny.py holds


def describe(program: str, devices: int = 1, config=CONFIG, chip: Chip = HOST, cache=None) -> dict:
    target = here(devices, chip)
    return ahead.describe(
        make_workload(program, config, config.model, mesh_over(config, target, program)), target, cache
    )


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> dict:
    return describe("stream", cache=tmp_path_factory.mktemp("cache"))


def test_a_stream_is_described(stream):
    """Every layer attends twice in every pass, by two products; the carry takes its own place."""
    passes, layers = 3, CONFIG.model.num_layers
    assert stream["fits"] == "yes"
    assert stream["attention"] == {"xla": passes * layers * 2}
    # Query, key, value and output, the cross-attention's query and output, two of the feed-forward; the attentions' own
    # two each; and those that rotate queries and keys.
    assert sum(stream["products"].values()) == passes * (layers * (8 + 4 + 2) + 1 + 3 + 1)
    assert list(stream["products"]) == ["f32 f32 -> f32 highest"]  # as float32 is meant everywhere here
    assert stream["alias_bytes"] == stream["donated_bytes"] > 0
    assert stream["bound_bytes"] == (
        stream["argument_bytes"] + stream["output_bytes"] - stream["alias_bytes"] + stream["temp_bytes"]
    )
    assert stream["resident_bytes"] > 0  # the decoder
    assert stream["kernel_bytes"] > passes * 4 * CONFIG.model.num_layers * 8 * CONFIG.model.dim**2 / 2
    assert stream["collectives"] == []
    assert stream["data_sheet_ms"] == pytest.approx(1e3 * stream["tflop"] * 1e12 / HOST.flops)


def test_a_program_is_known_again_in_another_process():
    """JAX writes the address of a Python object into a call that is split by a function of its own, as cuDNN's are."""
    call = '%1 = stablehlo.custom_call @CustomSPMDPartitioning(%0) {api_version = 2 : i32, backend_config = "{}"}\n'
    other = '%1 = stablehlo.custom_call @tpu_custom_call(%0) {backend_config = "{}"}'
    one, again, different = (
        ahead.without_addresses((call + other).replace("{}", address, 1).replace("{}", kernel))
        for address, kernel in (("139854089966352", "1"), ("140404166513424", "1"), ("140404166513424", "2"))
    )
    assert one == again != different


def test_heads_are_split_over_all_devices(stream):
    """And nothing else is exchanged but what that takes."""
    split = describe("stream", 2)
    assert split["mesh"] == {"model": 2}
    assert split["alias_bytes"] == split["donated_bytes"] < stream["donated_bytes"]
    assert {(row["kind"], row["axes"]) for row in split["collectives"]} <= {
        ("all-reduce", "model"),
        ("all-gather", "model"),
    }
    reduced = sum(row["runs"] for row in split["collectives"] if row["kind"] == "all-reduce")
    assert reduced >= 3 * CONFIG.model.num_layers * 3  # behind the two attentions and the feed-forward of each layer


def test_an_update_is_described():
    """Split over four devices along `fsdp`: weights are gathered, gradients reduced, what is donated is replaced."""
    config = dataclasses.replace(CONFIG, distill=dataclasses.replace(CONFIG.distill, batch_size=4))
    critic = describe("critic", 4, config)
    assert critic["mesh"] == {"fsdp": 4}
    assert critic["alias_bytes"] == critic["donated_bytes"]
    assert critic["resident_bytes"] > critic["donated_bytes"]  # the student's average and moments, and the teacher
    kinds = {row["kind"] for row in critic["collectives"] if row["axes"] == "fsdp"}
    assert {"all-gather", "all-reduce"} <= kinds
    assert critic["attention"]["xla"] > 0


@pytest.mark.parametrize("name", ["wan", "tiny"])
def test_a_decoder_is_described(name):
    record = describe(name)
    assert record["fits"] == "yes"
    assert record["alias_bytes"] == record["donated_bytes"] > 0
    assert record["resident_bytes"] > 0  # the transformer and its stream
    assert sum(record["products"].values()) > 10


def test_what_was_compiled_before_is_not_compiled_again(tmp_path, monkeypatch):
    first = describe("stream", cache=tmp_path)
    (stored,) = tmp_path.iterdir()
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    assert describe("stream", cache=tmp_path) == first
    assert list(tmp_path.iterdir()) == [stored]
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))
    with pytest.raises(TypeError):
        describe("stream", config=other, cache=tmp_path)
    assert ahead._kept(stored) is not None
    stored.write_bytes(stored.read_bytes()[:-9])  # is made again
    assert ahead._kept(stored) is None


def test_a_damaged_cache_is_made_again(tmp_path):
    first = describe("tiny", cache=tmp_path)
    (stored,) = tmp_path.iterdir()
    whole = stored.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], gzip.compress(b"[]"), gzip.compress(b'{"text": 1}')):
        stored.write_bytes(damaged)
        again = describe("tiny", cache=tmp_path)
        assert again | {"compile_seconds": 0} == first | {"compile_seconds": 0}
    assert len(stored.read_bytes()) > len(whole) // 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert describe("tiny", cache=tmp_path / "file" / "cache")["fits"] == "yes"
    assert "what was compiled is not kept" in capsys.readouterr().err


def test_what_the_chip_has_not_room_for_is_said(stream, monkeypatch):
    """By the sizes that the compiler gives, or by its own refusal, with its words."""
    held = stream["peak_bytes"] + stream["resident_bytes"]
    assert describe("stream", chip=dataclasses.replace(HOST, memory=held - 1))["fits"] in ("no", "tightly")
    assert describe("stream", chip=dataclasses.replace(HOST, memory=1))["fits"] == "no"

    def refuse(self, **_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 41.11G "
            "of 15.75G hbm. Exceeded hbm capacity by 25.37G.\n\n  1. Size: 6.64G\n     Operator: op\n     Shape: "
            "bf16[40,5120,13824]{2,1,0}\n     Unpadded size: 6.64G\n"
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    record = describe("stream")
    assert record["fits"] == "no"
    assert record["failure"] == (
        "Used 41.11G of 15.75G hbm. Exceeded hbm capacity by 25.37G. Largest: 6.64G bf16[40,5120,13824]"
    )
    text = ahead.table({"programs": [record], "skipped": []})
    assert record["failure"] in text


def test_two_runs_are_compared_line_by_line(stream):
    run = {"programs": [stream]}
    assert ahead.comparison(run, run) == "cpu:1 stream: the same"
    less = stream | {"kernel_bytes": stream["kernel_bytes"] / 2, "products": {"bf16 bf16 -> bf16": 3}, "fits": "no"}
    lines = ahead.comparison(run, {"programs": [less, stream | {"program": "wan"}]}).splitlines()
    assert any(line.endswith("(-50.0 %)") and "cpu:1 stream: kernel GB" in line for line in lines)
    assert "cpu:1 stream: fits yes -> no" in lines
    assert any("products {'f32 f32 -> f32 highest'" in line for line in lines)
    assert lines[-1] == "cpu:1 wan: was not compiled before"
    assert ahead.comparison(run, {"programs": []}) == "cpu:1 stream: is not compiled now"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_compiles_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ahead, "find_target", lambda name: here(1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    command = [*SMALL, "--compile-for", "cpu:1", "--programs", "tiny"]
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert bench.main([*command, f"--output={first}"]) == 0
    assert bench.main([*command, f"--output={second}", f"--against={first}"]) == 0
    assert "cpu:1 tiny: the same" in capsys.readouterr().out
    record = json.loads(second.read_text())
    assert [row["program"] for row in record["programs"]] == ["tiny"]
    assert record["teacher"]["dim"] == 5120
    assert len(list((tmp_path / "cache").rglob("*.json.gz"))) == 1


def test_what_cannot_be_split_is_left_out(tmp_path, monkeypatch, capsys):
    """The other programs are compiled all the same; where there is none, that is the answer."""
    monkeypatch.setattr(ahead, "find_target", lambda name: here(8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    output = tmp_path / "compiled.json"
    command = [*SMALL, "--compile-for", "cpu:8", f"--output={output}", "--programs"]
    with pytest.raises(UserError, match="cpu:8: 2 heads are not split over 8 devices"):
        bench.main([*command, "stream"])
    with pytest.raises(UserError, match="batch_size: 2 prompts are not split over 8 devices of the batch"):
        bench.main([*command, "critic", "student"])
    with pytest.raises(UserError, match=r"config.mesh: cpu:8 has 8 devices, not 2 \(data 1, fsdp 2, "):
        bench.main([*command, "stream", "--config.mesh.fsdp=2"])
    monkeypatch.setattr(ahead, "find_target", lambda name: here(1))
    with pytest.raises(UserError, match=r"--programs wan: config\.decoder is patch"):
        bench.main([*command, "wan", "--config.decoder=patch", *PATCHES])
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile-for", "v5p-16"], "v5p-16: name a chip and how many, .* v5p-16 has 8 chips: v5p:2x2x2"),
        (["--compile-for", "v5p-8"], "has 4 chips: v5p:2x2x1"),
        (["--compile-for", "v5litepod-64"], "has 64 chips: v5e:8x8"),
        (["--compile-for", "v6e-8"], "has 8 chips: v6e:2x4"),
        (["--compile-for", "v9:1"], "v9:1: name a chip and how many, .* known are v5e, v5p, v6e, h100, h200"),
        (["--compile-for", "v5e"], "v5e: name a chip and how many"),
        (["--compile-for", "h100:0"], "h100:0: name a chip and how many"),
        (["--compile-for", "v5e:1", "--programs", "all"], "--programs: invalid choice: 'all'"),
        (["--compile-for", "v5e:1", "--teacher=nowhere.py"], "--teacher=nowhere.py: no such file"),
        (["--compile-for", "v5e:1", "--against=nowhere.json"], "nowhere.json"),
        (["--compile-for", "v5e:1", "--teacher="], "--teacher=: no such file"),
        (["--compile-for", "v5e:1", f"--teacher={__file__}"], "--teacher=.*test_ahead.py: not a configuration file"),
        (["--compile-for", "v5e:1", "--against="], "cannot be read"),
        (["--compile-for", "v5e:1", "--config="], "--config=: no such file"),
        (["--compile-for", "v5e:1", "--until-ready"], "--until-ready: does not go with --compile-for"),
        (["--programs", "stream"], "--programs: goes with --compile-for"),
        (["--compile-for", "v5e:1", "--repeats=3"], "--repeats: does not go with --compile-for"),
        (["--compile-for", "v5e:1", "--only", "chunk"], "--only: does not go with --compile-for"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match=message):
        bench.main([*SMALL, *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ['{"measurements": []}', "[]", '{"programs": [{"program": "stream"}]}'])
def test_another_file_is_not_compared_with(text, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(text)
    with pytest.raises(UserError, match=r"other.json: not what bench --compile-for wrote"):
        bench.main([*SMALL, "--compile-for", "v5e:1", f"--against={other}"])


@pytest.mark.parametrize(("name", "extra"), [("v5e:1", r"jax\[tpu\]"), ("h100:1", r"jax\[cuda12\]")])
def test_what_is_not_installed_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=f'{name}: to compile for it, .* is not installed: pip install "{extra}=='):
        targets.find_target(name)


def test_wan_14b_has_its_published_size():
    """14.29 billion weights. Source: the safetensors index of Wan-AI/Wan2.1-T2V-14B, 57.2 GB in float32."""
    network = jax.eval_shape(lambda: DiT(wan_14b(DiTConfig()), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == pytest.approx(14.29e9, rel=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        {"mesh": 3},
        {"mesh": {"model": [2]}},
        {"program": None},
        {"peak_bytes": "1e9"},
        {"estimated_ms": float("nan")},
        {"temp_bytes": 10**400},
        {"collectives": {"bytes": 1}},
        {"copies": [{"bytes": 1}]},
    ],
)
def test_an_earlier_run_that_is_none_is_refused_before_anything_is_compiled(damage, stream, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"programs": [stream]}))
    assert bench._earlier(earlier)["programs"] == [stream]
    earlier.write_text(json.dumps({"programs": [stream | damage]}))
    with pytest.raises(UserError, match=r"--against=.*earlier\.json: not what bench --compile-for wrote"):
        bench._earlier(earlier)
