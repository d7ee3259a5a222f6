"""Plans: what is counted is what lies there, and what is proposed fits and can be typed."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import pytest
from small_targets import CONFIG, HOST, ROOT, SMALL, here

from adastate_jax import train
from adastate_jax.benchmarking import plan as planning
from adastate_jax.benchmarking.counting import COUNTED_SHARE, changes, count, fitting, programs_of, variants
from adastate_jax.benchmarking.plan import plan
from adastate_jax.benchmarking.workloads import make_workload
from adastate_jax.config.files import parse_config
from adastate_jax.errors import UserError
from adastate_jax.sharding import make_mesh

TEACHER = dataclasses.replace(CONFIG.model, dim=64, num_layers=3)


def configured(batch: int = 8, remat: str = "block", **mesh: int):
    return dataclasses.replace(
        CONFIG,
        distill=dataclasses.replace(CONFIG.distill, batch_size=batch),
        model=dataclasses.replace(CONFIG.model, remat=remat),
        mesh=dataclasses.replace(CONFIG.mesh, **mesh),
    )


def held(counted) -> int:
    """Bytes of what lies there between the steps."""
    lasting = ("weights", "moments")
    return sum(size for name, size in counted.parts.items() if any(word in name for word in lasting))


def with_adapters(config, rank: int = 2, dtype: str = "bfloat16"):
    """Adapters of student and critic; the weights that these are of lie there in `dtype`."""
    networks = {
        name: dataclasses.replace(
            getattr(config, name), param_dtype=dtype, lora=dataclasses.replace(config.student.lora, rank=rank)
        )
        for name in ("student", "critic")
    }
    return dataclasses.replace(config, **networks)


@pytest.mark.parametrize("program", ["critic", "student"])
def test_states_are_counted_to_the_byte(program):
    """As a compiler sees them, but for the key and the text, on eight devices and on one; adapters, too."""
    whole = configured(fsdp=4, model=2)
    for config in (configured(), whole, with_adapters(whole)):
        counted = count(program, config, TEACHER)
        workload = make_workload(program, config, TEACHER, make_mesh(**dataclasses.asdict(config.mesh)))
        own, _, _, *others = workload.arguments
        state = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((own, others))
        )
        assert held(counted) == state + workload.resident
        assert workload.donated < state


def test_more_devices_hold_less_each():
    one, four = (count("student", configured(fsdp=fsdp), TEACHER) for fsdp in (1, 4))
    assert held(one) / 4 < held(four) < held(one) / 3
    assert four.parts["rollout's keys and values"] * 4 == one.parts["rollout's keys and values"]
    assert four.flops == one.flops


def test_longer_rollouts_are_counted_and_can_be_compiled():
    """Their record is a part's, not the rollout's; what goes on is counted to the byte; the update can be traced."""
    config, record = configured(fsdp=4, model=2), "rollout's keys and values"
    whole, window, segments = (
        dataclasses.replace(config, distill=dataclasses.replace(config.distill, rollout_frames=15, **fields))
        for fields in (
            {},
            {"scored_frames": 6},
            {"scored_frames": 6, "continue_rollout": True, "overlap_frames": 3},
        )
    )
    # Adapters and the gradient through the state go with them.
    through = dataclasses.replace(segments.distill, cache_gradient="state", cache_gradient_chunks=1)
    segments = with_adapters(dataclasses.replace(segments, distill=through))
    counted = [count("student", each, TEACHER).parts for each in (whole, window, segments)]
    assert counted[2][record] < counted[1][record] < counted[0][record] / 2
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    workload = make_workload("student", segments, TEACHER, mesh)
    carried = jax.tree.leaves(workload.arguments[0][1])
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in carried)
    assert counted[2]["rollout that goes on"] == size
    with jax.set_mesh(mesh):
        own, _ = jax.eval_shape(workload.function, *workload.arguments)
    for made, given in zip(*map(jax.tree.leaves, (own, workload.arguments[0])), strict=True):
        assert (made.shape, made.dtype) == (given.shape, given.dtype)


DTYPES = ("float32", "bfloat16")


def test_adapters_alone_have_moments():
    """The weights that they are of are frozen, so that they may be of 16 bits; two thirds of the products remain."""
    config = configured(fsdp=4, model=2)
    for program in ("critic", "student"):
        whole = count(program, config, TEACHER)
        wide, narrow = (
            count(program, with_adapters(config, dtype=dtype), TEACHER) for dtype in ("float32", "bfloat16")
        )
        weights, adapters = whole.parts[f"{program}: weights"], narrow.parts[f"{program}: weights of adapters"]
        assert wide.parts[f"{program}: frozen weights"] == weights == 2 * narrow.parts[f"{program}: frozen weights"]
        moments = [counted.parts[f"{program}: moments and average"] for counted in (whole, narrow)]
        assert moments[1] / adapters == pytest.approx(moments[0] / weights, rel=0.01)
        assert narrow.parts["gradients"] == adapters < weights / 4
        assert narrow.flops.total < whole.flops.total


def test_the_gradient_through_the_state_is_counted():
    """Two more passes for every chunk that it goes back: what they keep, and what they compute."""
    config, counted = configured(fsdp=4, model=2, remat="none"), []
    for chunks in (8, 16):
        through = dataclasses.replace(config.distill, cache_gradient="state", cache_gradient_chunks=chunks)
        counted.append(count("student", dataclasses.replace(config, distill=through), CONFIG.model))
    sizes = [each.parts["kept for the backward pass (remat none)"] for each in counted]
    assert sizes[1] / sizes[0] == pytest.approx((1 + 2 * 16) / (1 + 2 * 8), rel=1e-3)
    assert counted[1].flops.total > counted[0].flops.total > count("student", config, CONFIG.model).flops.total


def test_the_programs_are_those_of_the_stages():
    counted = {
        "adastate_wan.py": {"critic": 1000, "student": 200},
        "wan_initialize.py": {"trajectories": 250, "initialize": 3000},
        "causal_forcing_wan.py:teacher": {"initialize": 2000},
    }
    for name, wanted in counted.items():
        assert programs_of(parse_config([f"--config={ROOT / 'configs' / name}"])) == wanted
    assert list(programs_of(CONFIG)) == ["critic", "student"]  # of no stages


CLIPS = [
    *SMALL,
    *("--config.data.kind=latents", "--config.data.latents=clips", "--config.data.captions=captions"),
    *("--config.data.clips.num_frames=33", "--config.initialize.batch_size=8", "--config.pretrain.batch_size=8"),
    *("--config.mesh.fsdp=4", "--config.mesh.model=2"),
]


@pytest.mark.parametrize(
    ("program", "fields", "lora"),
    [
        ("pretrain", [], 0),
        ("trajectories", [], 0),
        ("initialize", [], 0),
        ("initialize", ["targets=clips"], 2),
        ("initialize", ["targets=consistency"], 2),
    ],
)
def test_stages_before_distillation_are_planned(program, fields, lora):
    """What they hold to the byte; and they can be traced, to a state of the shapes of the one that was given."""
    config = parse_config([*CLIPS, *(f"--config.initialize.{field}" for field in fields)])
    config = with_adapters(config, lora) if lora else config
    counted = count(program, config, TEACHER)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    workload = make_workload(program, config, TEACHER, mesh)
    trees = [tree for tree in workload.arguments if not isinstance(tree, jax.ShapeDtypeStruct)]
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)
    )
    assert held(counted) == state
    assert counted.flops.total > 0
    assert counted.bytes > state
    with jax.set_mesh(mesh):
        made = jax.eval_shape(workload.function, *workload.arguments)
    if program == "trajectories":
        assert made.shape == (8, 3, 9, *config.latent_shape)
        return
    for found, given in zip(*map(jax.tree.leaves, (made[0], workload.arguments[0])), strict=True):
        assert (found.shape, found.dtype) == (given.shape, given.dtype)


def test_what_is_computed_again_is_not_kept():
    kept = {}
    for remat in ("none", "block", "attention"):
        parts = count("critic", configured(remat=remat), TEACHER).parts
        kept[remat] = next(size for name, size in parts.items() if name.startswith("kept"))
    assert kept["block"] < kept["attention"] < kept["none"]


def test_every_mesh_is_tried():
    """Every way to split eight devices over the axes, with four ways to recompute each; all different."""
    found = list(variants(configured(), 8))
    meshes = [variant.mesh for variant in found]
    assert len(found) == len({str(variant) for variant in found})
    assert all(math.prod(dataclasses.asdict(mesh).values()) == 8 for mesh in meshes)
    for mesh in ({"fsdp": 8}, {"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "model": 2}, {"fsdp": 4, "context": 2}):
        assert configured(**mesh).mesh in meshes
    assert {variant.model.remat for variant in found} == {"none", "block", "attention", "dots"}


@pytest.fixture
def chip(monkeypatch):
    """Sets the memory of the chips that a plan is for; nothing compiles for them."""

    def of(memory: float):
        monkeypatch.setattr(planning, "read_target", lambda name: (dataclasses.replace(HOST, memory=memory), [8]))
        monkeypatch.setattr(planning, "missing_compiler", lambda name: "libtpu is not installed")

    return of


def need(config) -> int:
    return max(count(program, config, TEACHER).bytes for program in ("critic", "student"))


def test_what_fits_is_left_as_it_is(chip, tmp_path):
    config = configured(fsdp=8)
    chip(need(config) / COUNTED_SHARE + 1)
    record = plan(config, TEACHER, "chip:8", 0.5, tmp_path)
    assert record["asked"]["fits"] == "yes"
    assert (record["nearest"], record["chosen"]) == (None, {})
    updates = record["asked"]["updates"]
    assert updates["student"]["seconds"] == pytest.approx(updates["student"]["tflop"] * 1e12 / (8 * HOST.flops * 0.5))
    settings = config.distill
    assert (settings.steps, settings.critic_ratio) == (100, 2)
    iterations = 100 * updates["critic"]["seconds"] + 50 * updates["student"]["seconds"]
    assert record["asked"]["device_hours"] == pytest.approx(iterations * 8 / 3600)
    assert "\ncounted, not compiled: libtpu is not installed\n" in planning.table(record)


def test_what_does_not_fit_gets_the_nearest_that_does(chip, tmp_path):
    """As flags, which make that configuration; with the largest parts of what was asked."""
    config = configured(fsdp=2, data=4, remat="none")
    memory = need(configured(fsdp=8)) / COUNTED_SHARE + 1
    assert need(config) > memory * COUNTED_SHARE
    chip(memory)
    record = plan(config, TEACHER, "chip:8", 0.5, tmp_path)
    assert record["asked"]["fits"] == "no"
    flags = [f"--{name}={value}" for name, value in record["nearest"]["changes"].items()]
    asked = ["--config.mesh.fsdp=2", "--config.mesh.data=4", "--config.model.remat=none"]
    nearest = parse_config([*SMALL, *asked, "--config.distill.batch_size=8", *flags])
    assert need(nearest) <= memory * COUNTED_SHARE
    assert math.prod(dataclasses.asdict(nearest.mesh).values()) == 8
    # Nothing that fits changes fewer fields.
    others = fitting(config, TEACHER, dataclasses.replace(HOST, memory=memory), 8)
    assert len(flags) == min(len(changes(config, variant)) for variant, _ in others)
    text = planning.table(record)
    assert " ".join(flags) in text
    parts = record["asked"]["updates"]["student"]["parts"]
    assert max(parts, key=parts.get) in text


def test_what_fits_nowhere_is_refused(chip, tmp_path):
    chip(1000.0)
    record = plan(configured(fsdp=8), TEACHER, "chip:8", 0.5, tmp_path)
    assert record["nearest"] is None
    assert "take more chips" in planning.table(record)


SIZES = {
    "peak_bytes": 2**30,
    "bound_bytes": 2**31,
    "resident_bytes": 2**30,
    "argument_bytes": 2**30,
    "output_bytes": 2**30,
    "alias_bytes": 3 * 2**28,
    "temp_bytes": 2**31,
}
EXCHANGE = {"kind": "all-reduce", "axes": "fsdp", "instructions": 1, "runs": 2, "bytes": 2e8, "received_bytes": 3e8}


def test_the_compilers_word_counts(monkeypatch, tmp_path):
    """What counting would let through is refused where the compiler refuses it; then come variants that hold less."""
    monkeypatch.setattr(planning, "read_target", lambda name: (HOST, [2]))
    monkeypatch.setattr(planning, "missing_compiler", lambda name: None)
    monkeypatch.setattr(planning, "find_target", lambda name: here(2))
    config = configured(batch=2, data=2)

    def compiler(fitting_meshes):
        asked = []

        def describe(workload, target, cache):
            asked.append((workload.name, dict(workload.mesh.shape)))
            if workload.mesh.shape in fitting_meshes:
                return {"fits": "tightly", "collectives": [EXCHANGE], "compile_seconds": 7.0, **SIZES}
            return {"fits": "no", "failure": "Used 2G of 1G hbm."}

        monkeypatch.setattr(planning.ahead, "describe", describe)
        record = plan(config, TEACHER, "cpu:2", 0.5, tmp_path)
        return record, asked

    record, asked = compiler([dataclasses.asdict(config.mesh)])
    assert [name for name, _ in asked] == ["critic", "student"]
    assert (record["asked"]["fits"], record["nearest"], record["missing"]) == ("tightly", None, None)
    text = planning.table(record)
    assert "GiB counted, 2.0 compiled (at most 3.0)" in text
    assert "GiB: arguments 1.00, results that take no argument's place 0.25, temporaries 2.00, other networks" in text
    assert "exchange at least 0.30 s, GB received: all-reduce along fsdp 0.3" in text
    assert "compiled in 7 s" in text
    settings = config.distill
    updates = settings.steps + settings.steps // settings.critic_ratio
    assert record["asked"]["exchange_device_hours"] == pytest.approx(0.3 * updates * 2 / 3600)

    record, asked = compiler([dataclasses.asdict(configured(fsdp=2).mesh)])
    assert record["asked"]["fits"] == "no"
    assert record["nearest"]["changes"] == {"config.mesh.data": 1, "config.mesh.fsdp": 2}
    assert "compiled: Used 2G of 1G hbm." in planning.table(record)

    record, asked = compiler([])
    assert record["nearest"] is None
    assert 2 < len(asked) <= 2 * (1 + 3)


def test_another_number_of_devices_is_refused(chip, tmp_path):
    chip(1e9)
    with pytest.raises(UserError, match=r"config.mesh: chip:8 has 8 devices; set fsdp"):
        plan(configured(fsdp=4), TEACHER, "chip:8", 0.5, tmp_path)
    with pytest.raises(UserError, match="2 prompts are not split over 8 devices"):
        plan(configured(batch=2, fsdp=8), TEACHER, "chip:8", 0.5, tmp_path)


def test_a_configuration_of_one_device_is_spread_over_all(chip, tmp_path):
    """On the mesh that changes nothing else, if it fits; where none does, on the one that holds least."""
    chip(need(configured(fsdp=8)) / COUNTED_SHARE + 1)
    record = plan(configured(), TEACHER, "chip:8", 0.5, tmp_path)
    assert record["asked"]["fits"] == "yes"
    assert math.prod(record["asked"]["mesh"].values()) == 8
    chosen = [f"--{name}={value}" for name, value in record["chosen"].items()]
    assert f"chosen by counting: {' '.join(chosen)}\n" in planning.table(record)
    typed = parse_config([*SMALL, "--config.model.remat=block", "--config.distill.batch_size=8", *chosen])
    assert dataclasses.asdict(typed.mesh) == record["asked"]["mesh"]
    assert (record["asked"]["remat"], record["asked"]["accumulate"]) == ("block", {"distill": 1})
    chip(1.0)
    record = plan(configured(), TEACHER, "chip:8", 0.5, tmp_path)
    assert (record["asked"]["fits"], record["nearest"]) == ("no", None)
    meshes = [configured(**mesh) for mesh in ({"fsdp": 8}, {"data": 8}, {"fsdp": 4, "context": 2})]
    assert record["asked"]["counted_bytes"] <= min(need(config) for config in meshes)


def test_no_device_is_looked_for():
    """A process that has planned has started none of JAX's platforms, not the host's either."""
    program = (
        "import sys; from adastate_jax import train; from jax._src import xla_bridge; "
        "code = train.main(sys.argv[1:]); print(sorted(xla_bridge._backends)); sys.exit(code)"
    )
    asked = [*SMALL, "--config.distill.batch_size=2", "--plan=h100:2"]
    done = subprocess.run(
        [sys.executable, "-c", program, *asked],
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr
    assert "h100:2 (NVIDIA H100 SXM x 2, 79.1 GiB each)" in done.stdout
    assert "plan: count meshes" in done.stderr


def test_the_command_plans_without_a_work_directory(chip, capsys):
    chip(2**40)
    assert train.main([*SMALL, "--config.distill.batch_size=8", "--plan=chip:8", "--share=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "chip:8 (this processor x 8, 1024.0 GiB each), times at 50 % of the data sheet's rate" in printed
    assert "device-hours" in printed
    with pytest.raises(UserError, match=r"--share=2\.0: must lie in"):
        train.main([*SMALL, "--plan=chip:8", "--share=2"])
    with pytest.raises(UserError, match="--workdir"):
        train.main(SMALL)
