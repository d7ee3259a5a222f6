"""Teacher, critic and student from wherever their weights lie: found, refused by name, read into place."""

import dataclasses
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, make_dit
from small_wan import write_network

from adastate_jax.checkpoint import save_tree
from adastate_jax.config.files import save_config
from adastate_jax.config.mesh import MeshConfig
from adastate_jax.config.networks import NetworkConfig
from adastate_jax.config.run import Config, DataConfig
from adastate_jax.config.stages import InitializeConfig
from adastate_jax.errors import UserError
from adastate_jax.models.patch_codec import PatchCodecConfig
from adastate_jax.models.quantized import quantize_network
from adastate_jax.models.text import TextConfig
from adastate_jax.sharding import make_mesh
from adastate_jax.texts import read_json
from adastate_jax.train import _refuse_other_data
from adastate_jax.training.networks import check_networks, find_weights, load_weights
from adastate_jax.training.stages.run import abstract_states
from adastate_jax.weights import converted
from adastate_jax.weights.parts import load_part
from adastate_jax.weights.slots import leaves

TEXT = TextConfig(vocab_size=259, dim=12, dim_attention=8, ffn_dim=16, num_heads=2, num_layers=1, text_length=16)
MODEL = dataclasses.replace(SMALL, text_length=16)
WIDE = {"dim": 64, "ffn_dim": 96, "num_heads": 4, "num_layers": 3}


def make_config(**fields) -> Config:
    settings = {"text": TEXT, "codec": PatchCodecConfig(patch=8, channels=4), "model": MODEL} | fields
    return Config(data=DataConfig(num_worlds=4), **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A wide teacher and a critic of `MODEL`'s sizes, converted from official names; and a run with two stages."""
    folder, rng = tmp_path_factory.mktemp("networks"), np.random.default_rng(0)
    weights, other_text = folder / "weights", dataclasses.replace(MODEL, text_dim=24)
    write_network(weights / "teacher", "transformer", dataclasses.replace(MODEL, **WIDE), rng, "--set=num_heads=4")
    write_network(weights / "critic", "transformer", MODEL, rng, "--set=num_heads=2")
    write_network(weights / "other_text", "transformer", other_text, rng, "--set=num_heads=2")
    write_network(weights / "text_encoder", "text_encoder", TEXT, rng)
    write_network(
        folder / "student" / "transformer", "transformer", MODEL, rng, "--set=num_heads=2", "--set=text_length=16"
    )
    run = folder / "run"
    run.mkdir()
    save_config(make_config(), run / "config.json")
    save_tree(run / "pretrain" / "7", {"ema": make_dit(MODEL, 1), "params": make_dit(MODEL, 2)})
    save_tree(run / "distill" / "3", {"student": {"ema": make_dit(MODEL, 3)}})
    return folder


def test_by_default_all_three_are_the_model():
    config = make_config()
    assert [config.network(name) for name in ("teacher", "critic", "student")] == [MODEL] * 3


def test_a_network_has_its_own_sizes_and_is_trained_in_float32():
    teacher = NetworkConfig(weights="elsewhere", param_dtype="bfloat16", dtype="bfloat16", quantization="int8", **WIDE)
    critic = NetworkConfig(weights="elsewhere", num_layers=1, remat="attention")
    config = make_config(stages=("distill",), teacher=teacher, critic=critic)
    found = config.network("teacher")
    assert {name: getattr(found, name) for name in WIDE} == WIDE
    assert (found.param_dtype, found.quantization, found.text_dim) == ("bfloat16", "int8", MODEL.text_dim)
    assert config.network("student") == MODEL
    states = abstract_states(config)
    assert states["distill"]["critic"].params.config == dataclasses.replace(MODEL, num_layers=1, remat="attention")
    assert states["pretrain"].params.config.dim == 64
    assert {leaf.dtype for leaf in jax.tree.leaves(states["pretrain"].params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": {"dim": 64}}, "critic.weights is '', a copy of the teacher, whose dim is 64 and not 32"),
        (
            {"student": {"num_layers": 1}, "critic": {}},
            "initialize.weights is '', a copy of the teacher",
        ),
        ({"teacher": {"num_heads": 5}}, "teacher: dim 32 must be an even multiple of num_heads 5"),
        (
            {"critic": {"param_dtype": "bfloat16"}},
            "critic.param_dtype: the critic is trained, in float32; leave it empty",
        ),
        ({"student": {"quantization": "int8"}}, "student.quantization: the student is trained"),
        (
            {"teacher": {"weights": "weights/teacher"}},
            "teacher.weights is 'weights/teacher', and stage pretrain",
        ),
        ({"critic": {"weights": "distill"}}, "critic.weights: stage distill of this run comes too late"),
        ({"initialize": "initialize"}, "initialize.weights: stage initialize of this run comes too late"),
    ],
)
def test_networks_that_cannot_be_are_refused_by_their_field(fields, message):
    made = {name: NetworkConfig(**value) if isinstance(value, dict) else value for name, value in fields.items()}
    if "initialize" in fields:
        made["initialize"] = InitializeConfig(weights=fields["initialize"])
    with pytest.raises(ValueError, match=message):
        make_config(**made)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"quantization": "int4"}, "quantization must be one of int8, float8, or empty"), ({"dim": -1}, "dim must be")],
)
def test_a_field_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**fields)


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        (
            "weights/nowhere",
            {},
            "config.teacher.weights=.*: no such network; make it with python -m",
        ),
        ("weights", {}, "weights: no such network"),
        ("run", {}, "is a whole run; name a stage of it, such as .*run/pretrain"),
        ("run/initialize", {}, "that run has no finished checkpoint of stage initialize"),
        ("weights/text_encoder", {}, "holds a UMT5 text encoder, not a Wan2.1 transformer"),
        ("weights/teacher", {}, "teacher: its dim is 64, config.teacher.dim is 32; set config.teacher.dim to it, or"),
        ("weights/teacher", WIDE | {"num_layers": 2}, "its num_layers is 3, config.teacher.num_layers is 2"),
        ("weights/other_text", {}, "its text_dim is 24, config.model.text_dim is 12; set config.model.text_dim to it"),
        ("run/pretrain", {"num_layers": 1}, "7: its num_layers is 2, config.teacher.num_layers is 1"),
    ],
)
def test_weights_that_are_not_there_or_of_another_network_are_one_line(folder, weights, sizes, message):
    teacher = NetworkConfig(weights=str(folder / weights), **sizes)
    critic = NetworkConfig(weights=str(folder / "weights" / "critic"))
    config = make_config(stages=("distill",), teacher=teacher, critic=critic, student=critic)
    with pytest.raises(UserError, match=message) as raised:
        check_networks(config, folder / "new")
    assert "\n" not in str(raised.value)


def test_a_teacher_that_is_swapped_between_two_calls_is_refused(folder, tmp_path):
    """Its path stays, its weights do not. A folder of an earlier version, which noted no teacher, takes it as it is."""
    teacher = tmp_path / "teacher"
    write_network(teacher, "transformer", MODEL, np.random.default_rng(1), "--set=num_heads=2")
    stage = NetworkConfig(weights=str(folder / "run" / "distill"))
    config = make_config(stages=("distill",), teacher=NetworkConfig(weights=str(teacher)), student=stage)
    workdir, names = tmp_path / "run", {"clips": "worlds/a"}
    workdir.mkdir()
    _refuse_other_data(workdir, names)
    for _ in range(2):
        found = check_networks(config, workdir)
        _refuse_other_data(workdir, names, found)
    assert read_json(workdir / "data.json", "") == {**names, **found}
    _refuse_other_data(workdir, names)  # stages that ask for no teacher
    assert read_json(workdir / "data.json", "") == {**names, **found}
    shutil.rmtree(teacher)
    write_network(teacher, "transformer", MODEL, np.random.default_rng(2), "--set=num_heads=2")
    with pytest.raises(
        UserError, match=r"its teacher\.weights have changed since it was begun: .transformer/\w+. is now"
    ):
        _refuse_other_data(workdir, names, check_networks(config, workdir))

    of_a_stage = dataclasses.replace(config, teacher=NetworkConfig(weights=str(folder / "run" / "pretrain")))
    assert check_networks(of_a_stage, workdir)["teacher.weights"].startswith("pretrain/7/")
    assert check_networks(dataclasses.replace(config, teacher=NetworkConfig()), folder / "run") == {}  # its own


def test_a_missing_weights_file_is_named(folder, tmp_path):
    write_network(tmp_path / "weights" / "critic", "transformer", MODEL, np.random.default_rng(0), "--set=num_heads=2")
    (tmp_path / "weights" / "critic" / "weights.safetensors").unlink()
    network = NetworkConfig(weights=str(tmp_path / "weights" / "critic"))
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        check_networks(make_config(stages=("distill",), teacher=network), tmp_path)


def test_a_stage_that_has_not_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"stage pretrain has not run; put it into config.stages before the later ones"):
        check_networks(make_config(stages=("distill",)), tmp_path)
    check_networks(make_config(), tmp_path)  # all of them are still to come


def test_the_critic_is_a_copy_of_the_teacher_and_the_student_of_the_last_stage(folder):
    config = make_config(stages=("distill",), student=NetworkConfig(weights=str(folder / "run" / "distill")))
    run, mesh = folder / "run", make_mesh()
    assert find_weights(config, run, "critic").path == run / "pretrain" / "7"
    for name, seed in (("teacher", 1), ("critic", 1), ("student", 3)):
        loaded = load_weights(config, run, name, mesh, trained=True)
        jax.tree.map(np.testing.assert_array_equal, loaded, make_dit(MODEL, seed))


def test_a_text_encoder_that_is_not_there_need_not_be_divided():
    """Where embeddings are read, no device of the mesh holds the text encoder."""
    text, mesh = dataclasses.replace(TEXT, ffn_dim=15), MeshConfig(model=2)
    with pytest.raises(ValueError, match=r"text\.ffn_dim 15 must be a multiple of mesh\.model = 2"):
        make_config(text=text, mesh=mesh)
    model = dataclasses.replace(MODEL, in_channels=16, out_channels=16)
    data = DataConfig(kind="none", embeddings="prompts")
    config = Config(text=text, mesh=mesh, model=model, data=data, decoder="wan", stages=("initialize", "distill"))
    assert config.mesh.model == 2


def test_a_teacher_of_a_stage_is_read_in_bfloat16_and_in_eight_bits(folder):
    for quantization in ("", "int8"):
        teacher = NetworkConfig(param_dtype="bfloat16", quantization=quantization)
        loaded = load_weights(make_config(teacher=teacher), folder / "run", "teacher", make_mesh(fsdp=2), trained=False)
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(loaded)}
        assert dtypes == ({"bfloat16", "int8", "float32"} if quantization else {"bfloat16"})
        kernel = make_dit(MODEL, 1).head.kernel[...].astype(jnp.bfloat16)
        np.testing.assert_array_equal(loaded.head.kernel[...], kernel)


def test_converted_weights_go_to_their_devices_part_by_part(folder, monkeypatch):
    """The host holds one device's part of one leaf at a time."""
    teacher = NetworkConfig(weights=str(folder / "weights" / "teacher"), param_dtype="bfloat16", **WIDE)
    critic = NetworkConfig(weights=str(folder / "weights" / "critic"))
    config = make_config(stages=("distill",), teacher=teacher, critic=critic)
    copied, copy = [], converted._copied

    def counted(array, dtype):
        copied.append(array.size * dtype.itemsize)
        return copy(array, dtype)

    monkeypatch.setattr(converted, "_copied", counted)
    network = load_weights(config, folder / "new", "teacher", make_mesh(fsdp=4, model=2), trained=False)
    parts = [part.data.nbytes for leaf in jax.tree.leaves(network) for part in leaf.addressable_shards]
    assert sorted(copied) == sorted(parts)
    assert max(copied) < max(leaf.nbytes for leaf in jax.tree.leaves(network)) / 2
    alone = load_weights(config, folder / "new", "teacher", make_mesh(), trained=False)
    for name, leaf in leaves(network).items():
        np.testing.assert_array_equal(leaf, leaves(alone)[name])
    assert network.blocks.ffn_in.kernel[...].sharding.shard_shape((3, 64, 96)) == (3, 16, 48)


def test_a_mapped_array_takes_no_memory_besides_the_parts(tmp_path):
    whole = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(8, 512, 1024))
    whole[:] = np.arange(1024)
    mesh = make_mesh(fsdp=4, model=2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp", "model"))
    tracemalloc.start()
    placed = converted._placed(whole, np.dtype(jnp.bfloat16), sharding)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole.nbytes / 32  # of Python and NumPy; parts are mapped memory
    np.testing.assert_array_equal(placed, whole.astype(jnp.bfloat16))


def test_a_network_to_generate_with_can_be_quantised_when_it_is_loaded(folder):
    mesh = make_mesh()
    plain = load_part(folder / "student", "transformer", MODEL, mesh)
    quantised = load_part(folder / "student", "transformer", dataclasses.replace(MODEL, quantization="float8"), mesh)
    assert quantised.config.quantization == "float8"
    jax.tree.map(np.testing.assert_array_equal, quantised, quantize_network(plain, "float8", mesh))
