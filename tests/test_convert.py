"""Published weights in and out: exact both ways, in bounded pieces, and every kind of bad input refused in one line."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_files
from safetensors.numpy import save_file

from adastate_jax import convert
from adastate_jax.checkpoint import flatten, save_tree
from adastate_jax.config.files import default_config, from_config_dict, save_config
from adastate_jax.convert import main
from adastate_jax.errors import UserError
from adastate_jax.generation import conversion
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.text import TextConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig
from adastate_jax.sharding import make_mesh, tree_shardings
from adastate_jax.training.frozen import abstract_frozen
from adastate_jax.weights import converted
from adastate_jax.weights.converted import load_converted, open_converted
from adastate_jax.weights.dit import dit_name_to_diffusers
from adastate_jax.weights.identify import identify
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.slots import load_official
from adastate_jax.weights.sources import Source, open_source
from adastate_jax.weights.tensors import StoredTensor
from adastate_jax.weights.text import text_name_to_transformers

DIT = DiTConfig(dim=128, ffn_dim=48, num_heads=1, num_layers=3, in_channels=4, out_channels=4, text_dim=16, freq_dim=8)
CONFIGS = {
    "transformer": DIT,
    "text_encoder": TextConfig(
        vocab_size=19, dim=8, dim_attention=12, ffn_dim=16, num_heads=3, num_layers=2, num_buckets=8
    ),
    "vae": VAEConfig(dim=2, dim_multipliers=(1, 2, 4), num_res_blocks=1, temporal_downsample=(False, True)),
    "tiny_vae": TinyVAEConfig(widths=(6, 4, 2)),
}


GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def random_tensors(kind, dtype=np.float32, config=None):
    """Weights of a network under official names."""
    rng = np.random.default_rng(0)
    config = CONFIGS[kind] if config is None else config
    slots = KINDS[kind].slots(config)
    return {name: rng.standard_normal(slot.shape).astype(dtype) for name, slot in slots.items()}


def filled(kind, tensors, config=None):
    """The network of these weights, by the way that the fixtures verify."""
    config = CONFIGS[kind] if config is None else config
    return load_official(KINDS[kind].abstract(config), KINDS[kind].table(config), tensors, "tensors")


def equal(one, other):
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


def load(path, **options):
    """The network of a converted folder, whatever it is."""
    return load_converted(path, json.loads((path / "converted.json").read_text())["kind"], **options)


def read(path):
    """All tensors of an exported folder by name."""
    return {name: tensor.read() for name, tensor in open_source(path).tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on `tmp_path/source…` into a new folder, and returns it."""

    def run(source, *options):
        output = tmp_path / f"output{len(list(tmp_path.iterdir()))}"
        assert main([f"--source={source}", f"--output={output}", *options]) == 0
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        return output

    return run


@pytest.fixture
def refusal(tmp_path, capsys):
    """The one line with which the command refuses; it leaves nothing behind."""

    def refusal(source, *options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as caught:
            main([f"--source={source}", f"--output={tmp_path / 'refused'}", *options])
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refusal


# --- in and out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [pytest.param(kind, names, id=f"{kind}-{names}") for kind in KINDS for names in KINDS[kind].namings],
)
def test_every_kind_and_set_of_names_round_trips(tmp_path, run, kind, names):
    tensors = random_tensors(kind)
    save_file(tensors, tmp_path / "source.safetensors")
    named = run(tmp_path / "source.safetensors", "--to=safetensors", f"--names={names}")
    rename = KINDS[kind].namings[names].from_official
    assert same(read(named), {rename(name, CONFIGS[kind]): tensor for name, tensor in tensors.items()})

    for file in named.glob("*.json"):
        json.loads(file.read_text())
    folder = run(named)
    network = load(folder)
    assert network.config == CONFIGS[kind]
    assert equal(network, filled(kind, tensors))
    assert same(read(run(folder, "--to=safetensors")), tensors)
    assert same(read(run(folder, "--to=safetensors", f"--names={names}")), read(named))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_dtypes(tmp_path, run, dtype):
    tensors = random_tensors("text_encoder", dtype)
    save_file(tensors, tmp_path / "source.safetensors")
    folder = run(tmp_path / "source.safetensors")
    stored = ml_dtypes.bfloat16 if dtype == ml_dtypes.bfloat16 else np.float32
    config = dataclasses.replace(
        CONFIGS["text_encoder"], param_dtype=np.dtype(stored).name, dtype=np.dtype(stored).name
    )
    network = load(folder)
    assert network.config == config
    assert equal(network, filled("text_encoder", {k: v.astype(stored) for k, v in tensors.items()}, config))
    assert same(
        read(run(folder, "--to=safetensors", "--dtype=float32")),
        {k: v.astype(np.float32) for k, v in tensors.items()},
    )
    other = load(folder, dtype="bfloat16", param_dtype="float32")
    assert (other.config.param_dtype, other.config.dtype) == ("float32", "bfloat16")
    assert other.token_embedding[...].dtype == np.float32


def test_small_blocks_and_a_mesh_change_nothing(tmp_path, run, monkeypatch):
    """Tensors that are read a few rows at a time, into weights that are split over devices."""
    config = dataclasses.replace(DIT, dim=256, num_heads=2, num_layers=3, ffn_dim=64)
    source = random_tensors("transformer", config=config)
    save_file(source, tmp_path / "source.safetensors")
    monkeypatch.setattr("adastate_jax.weights.tensors._BLOCK_BYTES", 5000)
    largest = []
    original = StoredTensor.rows
    monkeypatch.setattr(
        StoredTensor,
        "rows",
        lambda tensor, start, stop: (largest.append((stop - start, tensor.shape)), original(tensor, start, stop))[1],
    )
    folder = run(tmp_path / "source.safetensors")
    for count, (_, *row) in largest:
        assert count == 1 or count * np.prod(row) * 4 <= 5000
    assert len(largest) > 10 * len(source)

    devices = make_mesh(data=2, fsdp=2, model=2)
    network = load(folder, mesh=devices)
    expected = filled("transformer", source, config)
    assert equal(network, expected)
    wanted = jax.tree.leaves(tree_shardings(expected, devices))
    for leaf, sharding in zip(jax.tree.leaves(network), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert same(read(run(folder, "--to=safetensors")), source)


def test_every_leaf_is_read_once(tmp_path, run, monkeypatch):
    save_file(random_tensors("vae"), tmp_path / "source.safetensors")
    folder = run(tmp_path / "source.safetensors")
    opened = []
    path_open, map_file = Path.open, np.memmap
    monkeypatch.setattr(
        Path, "open", lambda path, *mode, **options: (opened.append(path), path_open(path, *mode, **options))[1]
    )
    mapped = []
    monkeypatch.setattr(np, "memmap", lambda *arguments: (mapped.append(arguments), map_file(*arguments))[1])
    network = load(folder)
    assert len(mapped) == len(jax.tree.leaves(network))
    # The header alone is read in another way.
    assert opened.count(folder / "weights.safetensors") == 1


def test_loaded_weights_outlive_their_file(tmp_path, run):
    source = random_tensors("text_encoder")
    save_file(source, tmp_path / "source.safetensors")
    folder = run(tmp_path / "source.safetensors")
    network = load(folder)
    with (folder / "weights.safetensors").open("r+b") as stream:
        stream.write(bytes((folder / "weights.safetensors").stat().st_size))
    assert equal(network, filled("text_encoder", source))


def test_folders_of_many_files(tmp_path, run):
    """The layout of diffusers' large models: shards and an index."""
    source = {dit_name_to_diffusers(name): tensor for name, tensor in random_tensors("transformer").items()}
    folder = tmp_path / "transformer"
    folder.mkdir()
    files = [f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    for index, file in enumerate(files):
        save_file(dict([*source.items()][index::3]), folder / file)
    weight_map = {name: files[index % 3] for index, name in enumerate(source)}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    expected = filled("transformer", random_tensors("transformer"))
    assert equal(load(run(folder)), expected)
    assert equal(load(run(index)), expected)


# --- PyTorch files ----------------------------------------------------------------------------------------------------


def test_self_forcing_parts_and_wrappers(tmp_path, run, refusal):
    tensors = random_tensors("transformer")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    wrapped = {
        f"model._fsdp_wrapped_module.{name.replace('blocks.1.', 'blocks.1._checkpoint_wrapped_module.')}": tensor
        for name, tensor in other.items()
    }
    content = {
        "generator": torch_files.tensors({f"model.{name}": tensor for name, tensor in tensors.items()}),
        "critic": torch_files.tensors({"x": np.zeros(2, np.float32)}),
        "step": 600,
    }
    path = torch_files.save(tmp_path / "generator.pt", content)
    assert equal(load(run(path)), filled("transformer", tensors))
    path = torch_files.save(tmp_path / "ema.pt", content | {"generator_ema": torch_files.tensors(wrapped)})
    assert equal(load(run(path)), filled("transformer", other))
    assert equal(load(run(path, "--part=generator")), filled("transformer", tensors))
    assert "its parts are generator, critic, generator_ema" in refusal(path, "--part=student")
    assert "not a checkpoint of a known network" in refusal(path, "--part=critic")


def test_flat_files_and_transposed_tensors(tmp_path, run):
    tensors = random_tensors("vae")
    path = torch_files.save(tmp_path / "Wan2.1_VAE.pth", torch_files.tensors(tensors))
    assert equal(load(run(path)), filled("vae", tensors))

    tensors = random_tensors("text_encoder", ml_dtypes.bfloat16)
    values = torch_files.tensors(tensors)
    weight = tensors["blocks.0.attn.q.weight"]
    values["blocks.0.attn.q.weight"] = torch_files.Tensor(weight.T.copy(), weight.shape, (1, weight.shape[0]))
    path = torch_files.save(tmp_path / "umt5.pth", values)
    assert same(read(run(path, "--to=safetensors")), tensors)


def test_whole_umt5_with_a_tied_table(tmp_path, run, refusal):
    tensors = random_tensors("text_encoder")
    named = {text_name_to_transformers(name): tensor for name, tensor in tensors.items()}
    extra = {
        "encoder.embed_tokens.weight": named["shared.weight"],
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((2, 2), np.float32),
        "lm_head.weight": np.zeros((2, 2), np.float32),
    }
    save_file(named | extra, tmp_path / "source.safetensors")
    assert equal(load(run(tmp_path / "source.safetensors")), filled("text_encoder", tensors))
    save_file(named | {"encoder.embed_tokens.weight": named["shared.weight"] + 1}, tmp_path / "untied.safetensors")
    assert "differs" in refusal(tmp_path / "untied.safetensors")


def test_tiny_vae_with_more_frames_than_it_grows(tmp_path, run, refusal):
    tensors = random_tensors("tiny_vae")
    grown = dict(tensors)
    name = "decoder.7.conv.weight"
    grown[name] = np.concatenate([tensors[name] + 1, tensors[name]])
    save_file(grown, tmp_path / "source.safetensors")
    assert equal(load(run(tmp_path / "source.safetensors")), filled("tiny_vae", tensors))
    save_file(tensors | {name: np.zeros((), np.float32)}, tmp_path / "scalar.safetensors")
    assert f"{name} has shape []" in refusal(tmp_path / "scalar.safetensors")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_beside_the_weights(tmp_path, run):
    config = dataclasses.replace(DIT, dim=256, num_heads=8, text_length=7, eps=1e-5)
    tensors = random_tensors("transformer", config=config)
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {"_class_name": "WanModel", "num_heads": 8, "text_len": 7, "eps": 1e-5, "dim": "ignored"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert load(run(folder)).config == config
    assert load(run(folder, "--set", "num_heads=4")).config == dataclasses.replace(config, num_heads=4)
    (folder / "config.json").write_text(json.dumps(settings | {"_class_name": "AutoencoderKLWan"}))
    assert load(run(folder)).config == dataclasses.replace(config, num_heads=2, text_length=512, eps=1e-6)


def test_latent_statistics_come_from_the_settings(tmp_path, run, refusal):
    config = dataclasses.replace(
        CONFIGS["vae"], latent_channels=3, latents_mean=(0.5, 0.25, 0.0), latents_std=(1.0, 2.0, 3.0)
    )
    save_file(random_tensors("vae", config=config), tmp_path / "vae.safetensors")
    assert "--set" in refusal(tmp_path / "vae.safetensors")
    options = ("--set", "latents_mean=[0.5, 0.25, 0]", "--set", "latents_std=[1, 2, 3]")
    assert load(run(tmp_path / "vae.safetensors", *options)).config == config


def test_a_student_of_train_is_exported(tmp_path, run, refusal):
    values = default_config()
    for name, value in {"dim": 128, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "freq_dim": 16}.items():
        values.model[name] = value
    values.model.text_dim = values.text.dim = values.text.dim_attention = values.text.ffn_dim = 8
    values.text.num_heads = values.text.num_layers = 1
    values.text.vocab_size = 259
    values.model.in_channels = values.model.out_channels = values.codec.channels
    config = from_config_dict(values)
    workdir = tmp_path / "run"
    workdir.mkdir()
    save_config(config, workdir / "config.json")
    student = filled("transformer", random_tensors("transformer", config=config.model), config.model)
    save_tree(workdir / "initialize" / "7", {"ema": student, "step": np.zeros(1, np.int32)})
    frozen = abstract_frozen(config)
    save_tree(workdir / "frozen", jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), frozen))

    network = load(run(run(workdir, "--to=safetensors")))
    assert equal(network, student)
    assert network.config == config.model
    assert equal(load(run(workdir)), student)
    assert "only for published weights" in refusal(workdir, "--set", "num_layers=1")


# --- LoRA -------------------------------------------------------------------------------------------------------------

MODULES = ("blocks.0.self_attn.q", "blocks.2.ffn.0", "time_projection.1")


def diffusers_module(module):
    return dit_name_to_diffusers(f"{module}.weight").removesuffix(".weight")


@pytest.mark.parametrize(
    ("spell", "alpha"),
    [
        (lambda module: (f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"), None),
        (lambda module: (f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"), "config"),
        (
            lambda module: (f"diffusion_model.{module}.lora_down.weight", f"diffusion_model.{module}.lora_up.weight"),
            "key",
        ),
        (lambda module: tuple(f"transformer.{diffusers_module(module)}.lora_{x}.weight" for x in "AB"), "option"),
        (lambda module: tuple(f"lora_unet_{module.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")), None),
    ],
    ids=["peft", "named", "comfy", "diffusers", "kohya"],
)
def test_adapters_of_every_spelling_are_merged_in_float32(tmp_path, run, spell, alpha):
    rng = np.random.default_rng(1)
    tensors, rank = random_tensors("transformer", ml_dtypes.bfloat16), 4
    save_file(tensors, tmp_path / "base.safetensors")
    scale = {None: 1.0, "config": 2.0, "key": 0.5, "option": 3.0}[alpha]
    adapter, expected = {}, dict(tensors)
    for module in MODULES:
        weight = tensors[f"{module}.weight"]
        down = rng.standard_normal((rank, weight.shape[1])).astype(ml_dtypes.bfloat16)
        up = rng.standard_normal((weight.shape[0], rank)).astype(ml_dtypes.bfloat16)
        adapter |= dict(zip(spell(module), (down, up), strict=True))
        if alpha == "key":
            adapter[spell(module)[0].replace(".lora_down.weight", ".alpha")] = np.array(scale * rank, np.float32)
        change = np.float32(scale) * (up.astype(np.float32) @ down.astype(np.float32))
        expected[f"{module}.weight"] = weight.astype(np.float32) + change
    options = [f"--lora-alpha={scale * rank}"] if alpha == "option" else []
    if alpha == "config":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": scale * rank}))
    if alpha is None:
        lora = torch_files.save(tmp_path / "lora.pt", {"generator_lora": torch_files.tensors(adapter), "step": 1})
    else:
        lora = tmp_path / "lora.safetensors"
        save_file(adapter, lora)

    merged = load(run(tmp_path / "base.safetensors", f"--lora={lora}", "--dtype=float32", *options))
    wanted = filled("transformer", {name: tensor.astype(np.float32) for name, tensor in expected.items()})
    for (path, one), other in zip(jax.tree.leaves_with_path(merged), jax.tree.leaves(wanted), strict=True):
        assert np.allclose(one, other, rtol=1e-6, atol=1e-5), path
    exported = read(run(tmp_path / "base.safetensors", f"--lora={lora}", "--to=safetensors", *options))
    rounded = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in expected.items()}
    unchanged = [name for name in tensors if name.removesuffix(".weight") not in MODULES]
    assert same({n: exported[n] for n in unchanged}, {n: tensors[n] for n in unchanged})
    for module in MODULES:
        name = f"{module}.weight"
        assert np.allclose(exported[name].astype(np.float32), rounded[name].astype(np.float32), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda lora: lora.pop("blocks.0.self_attn.q.lora_B.weight"), "one factor without the other"),
        (lambda lora: lora.update({"blocks.9.ffn.0.lora_A.weight": np.zeros((2, 2), np.float32)}), "blocks.9.ffn.0"),
        (
            lambda lora: lora.update({"blocks.0.ffn.0.diff": np.zeros(2, np.float32)}),
            "the change of blocks.0.ffn.0's weight has shape [2], the base [48, 128]",
        ),
        (lambda lora: lora.update({"blocks.0.diff_b": np.zeros(2, np.float32)}), "blocks.0 has a change of its bias"),
        (lambda lora: lora.update({"blocks.0.k_img.diff": np.zeros(2, np.float32)}), "made for another network"),
        (lambda lora: lora.update({"blocks.0.ffn.0.dora_scale": np.zeros(2, np.float32)}), "not of a plain LoRA"),
        (lambda lora: lora.update({"blocks.0.ffn.0.hada_w1_a": np.zeros(2, np.float32)}), "not of a plain LoRA"),
        (lambda lora: lora.update({"blocks.0.ffn.0.weight": np.zeros(2, np.float32)}), "no changes of an adapter"),
        (lambda lora: lora.update({"blocks.0.ffn.0.alpha": np.ones(1, np.float32)}), "an alpha, but no factors"),
        (lambda lora: lora["blocks.0.self_attn.q.lora_A.weight"].fill(np.nan), "self_attn.q holds NaN or infinity"),
        (lambda lora: lora.update({"head.head.diff_b": np.full(16, np.inf, np.float32)}), "bias holds NaN or infinity"),
        (
            lambda lora: lora.update({"blocks.0.self_attn.q.lora_B.weight": np.zeros((128, 3), np.float32)}),
            "[128, 3] and [2, 128]",
        ),
        (
            lambda lora: lora.update({"blocks.0.self_attn.q.lora_A.weight": np.zeros((2, 128), np.int32)}),
            "a factor of blocks.0.self_attn.q has dtype int32",
        ),
        (
            lambda lora: lora.update({f"model.{name}": tensor for name, tensor in [*lora.items()]}),
            "twice",
        ),
        (lambda lora: lora.update({"blocks.0.self_attn.q.alpha": np.zeros(3, np.float32)}), "must be one number"),
    ],
)
def test_bad_adapters_are_refused(tmp_path, refusal, change, culprit):
    save_file(random_tensors("transformer"), tmp_path / "base.safetensors")
    module = "blocks.0.self_attn.q"
    lora = {
        f"{module}.lora_A.weight": np.zeros((2, 128), np.float32),
        f"{module}.lora_B.weight": np.zeros((128, 2), np.float32),
    }
    change(lora)
    save_file(lora, tmp_path / "lora.safetensors")
    message = refusal(tmp_path / "base.safetensors", f"--lora={tmp_path / 'lora.safetensors'}")
    assert culprit in message
    assert "lora.safetensors" in message


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop("blocks.1.ffn.0.bias"), "1 tensors are missing: blocks.1.ffn.0.bias"),
        (lambda t: t.pop("patch_embedding.weight"), "patch_embedding.weight is missing"),
        (lambda t: t.update(stray=np.zeros(2, np.float32)), "1 tensors belong to no known part: stray"),
        (
            lambda t: t.update({f"blocks.{i}.k_img.weight": np.zeros(2, np.float32) for i in range(12)}),
            "12 tensors belong to no known part: blocks.0.k_img.weight",
        ),
        (
            lambda t: t.update({"head.head.bias": np.zeros(3, np.float32)}),
            "head.head.bias has shape [3], this network needs [16]",
        ),
        (lambda t: t.update({"patch_embedding.weight": np.zeros((2, 2), np.float32)}), "it needs 5 axes"),
        (lambda t: t.update({"head.head.bias": np.zeros(16, np.int32)}), "head.head.bias has dtype int32"),
        (lambda t: t.update({"head.head.bias": np.full(16, np.nan, np.float32)}), "head.head.bias holds NaN"),
        (lambda t: t.update({"head.head.bias": np.full(16, 1e300)}), "head.head.bias holds NaN, infinity or numbers"),
        (lambda t: t.update({"blocks.0.ffn.0.weight": np.zeros((0, 128), np.float32)}), "none of size 0"),
        (lambda t: t.update({"blocks.999999999.norm3.bias": np.zeros(1, np.float32)}), "blocks.999999999.norm3.bias"),
        (
            lambda t: t.update({"blocks.999999999.self_attn.q.weight": np.zeros(1, np.float32)}),
            "are missing: blocks.3.",
        ),
        (lambda t: t.clear() or t.update(x=np.zeros(2, np.float32)), "not a checkpoint of a known network"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, refusal, change, culprit):
    tensors = random_tensors("transformer")
    change(tensors)
    save_file(tensors, tmp_path / "source.safetensors")
    message = refusal(tmp_path / "source.safetensors")
    assert culprit in message
    assert "source.safetensors" in message


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["--set", "num_heads=3"], "must be an even multiple of num_heads 3"),
        (["--set", "num_heads=0"], "num_heads must be at least 1"),
        (["--set", "num_heads=x"], "must be a number"),
        (["--set", "num_heads"], "must be NAME=VALUE"),
        (["--set", "num_heads=" + "9" * 5000], "--set num_heads=9999"),
        (["--set", "num_heads=" + "[" * 100_000], "must be a number"),
        (["--set", "eps=1e999"], "--set.eps: must be a finite number"),
        (["--set", "eps=NaN"], "--set.eps: must be a finite number"),
        (["--set", "eps=" + "9" * 400], "--set.eps: 9999"),
        (["--set", "num_layers=100000000000"], "num_layers 100000000000: its 96 tensors cannot be those of so many"),
        (["--set", "dim=128000000000"], "no Wan2.1 transformer has such sizes"),
        (["--set", 'param_dtype="float77"'], "param_dtype must be one of float32, bfloat16, float16, got 'float77'"),
        (["--set", "num_hads=2"], "--set.num_hads: unknown field; did you mean num_heads?"),
        (["--set", "dim=[1]"], "--set.dim: must be of type int"),
        (["--set", "num_layers=2"], "belong to no known part: blocks.2"),
        (["--part=generator"], "has no parts"),
        (["--names=diffusers"], "needs --to=safetensors"),
        (["--lora-alpha=2"], "needs --lora"),
        (["--lora=missing.pt"], "--lora=missing.pt: no such file"),
        (["--lora=missing.pt:0.5"], "--lora=missing.pt: no such file"),
        (["--lora=missing.pt:nan"], "--lora=missing.pt:nan: its strength must be a finite number"),
    ],
)
def test_wrong_options_are_named(tmp_path, refusal, options, culprit):
    save_file(random_tensors("transformer"), tmp_path / "source.safetensors")
    assert culprit in refusal(tmp_path / "source.safetensors", *options)


def test_wrong_files_are_named(tmp_path, refusal):
    assert "no such file or folder" in refusal(tmp_path / "missing.safetensors")
    path = tmp_path / "source.safetensors"
    save_file(random_tensors("transformer"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable .safetensors file" in refusal(path)
    path.write_bytes(whole)
    (tmp_path / "weights.gguf").write_bytes(b"x")
    assert "unknown kind of file" in refusal(tmp_path / "weights.gguf")
    (tmp_path / "weights.pt").write_bytes(b"x")
    assert "no zip archive" in refusal(tmp_path / "weights.pt")
    assert "holds several checkpoints (source.safetensors, weights.pt)" in refusal(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no weights" in refusal(empty)
    (empty / "model_index.json").write_text("{}")
    assert "a whole pipeline" in refusal(empty)
    save_file(random_tensors("transformer", config=dataclasses.replace(DIT, dim=96)), path)
    assert "--set num_heads=N" in refusal(path)
    save_file({"blocks.0.self_attn.q.lora_A.weight": np.zeros((2, 2), np.float32)}, path)
    assert "a LoRA; name it with --lora" in refusal(path)
    content = {"a": torch_files.tensors({"x": np.zeros(2, np.float32)}), "b": torch_files.tensors({"x": np.zeros(2)})}
    assert "Name one with --part=NAME: a, b" in refusal(torch_files.save(tmp_path / "parts.pt", content))
    assert "holds a list" in refusal(torch_files.save(tmp_path / "list.pt", [1]))


def test_wrong_indexes_are_named(tmp_path, refusal):
    folder = tmp_path / "shards"
    folder.mkdir()
    tensors = random_tensors("transformer")
    index = folder / "model.safetensors.index.json"
    save_file(tensors, folder / "one.safetensors")
    for weight_map, culprit in (
        ({"x": "two.safetensors"}, "two.safetensors: no such file"),
        ({"x": "../shards/one.safetensors"}, "not in the same folder"),
        ({"x": 3}, "no file names"),
        ({**dict.fromkeys(tensors, "one.safetensors"), "lost": "one.safetensors"}, "no file holds: lost"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert culprit in refusal(index)
    index.write_text("{}")
    assert "not a readable index" in refusal(folder)
    index.write_text("[" * 100_000)
    assert "index.json: is damaged; download it again" in refusal(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "one.safetensors")}))
    save_file(tensors, folder / "other.safetensors")
    assert "several checkpoints (model.safetensors.index.json, other.safetensors)" in refusal(folder)


def test_an_existing_output_is_not_touched(tmp_path, refusal):
    save_file(random_tensors("vae"), tmp_path / "source.safetensors")
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "precious.txt").write_text("mine")
    assert "exists; name another, or add --overwrite" in refusal(tmp_path / "source.safetensors")
    message = refusal(tmp_path / "source.safetensors", "--overwrite")
    assert "it holds 'precious.txt', which is of another kind" in message
    (tmp_path / "refused" / "precious.txt").unlink()
    (tmp_path / "refused" / "converted.json").mkdir()
    assert "which is of another kind" in refusal(tmp_path / "source.safetensors", "--overwrite")


def test_an_earlier_output_is_replaced_when_told(tmp_path, run):
    save_file(random_tensors("vae"), tmp_path / "source.safetensors")
    folder = run(tmp_path / "source.safetensors")
    changed = {name: tensor + 1 for name, tensor in random_tensors("vae").items()}
    save_file(changed, tmp_path / "source.safetensors")
    assert main([f"--source={tmp_path / 'source.safetensors'}", f"--output={folder}", "--overwrite"]) == 0
    assert equal(load(folder), filled("vae", changed))
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "source.safetensors"]


def test_two_processes_never_mix_their_outputs(tmp_path, refusal, monkeypatch):
    save_file(random_tensors("vae"), tmp_path / "source.safetensors")
    options = [f"--source={tmp_path / 'source.safetensors'}", f"--output={tmp_path / 'out'}"]
    original, refusals = conversion.write_converted, []

    def write(network, folder, advance):
        monkeypatch.setattr(conversion, "write_converted", original)
        with pytest.raises(UserError) as caught:
            main(options)
        refusals.append(str(caught.value))
        original(network, folder, advance)

    monkeypatch.setattr(conversion, "write_converted", write)
    assert main(options) == 0
    assert len(refusals) == 1
    assert "another process is writing it" in refusals[0]
    assert equal(load(tmp_path / "out"), filled("vae", random_tensors("vae")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.safetensors"]


def test_an_unwritable_output_is_named(tmp_path, monkeypatch, refusal):
    save_file(random_tensors("vae"), tmp_path / "source.safetensors")
    with pytest.raises(UserError, match="cannot be written"):
        main([f"--source={tmp_path / 'source.safetensors'}", f"--output={tmp_path / 'source.safetensors' / 'x'}"])

    def no_space(path, layout, blocks, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    # Before the source is looked at: these come first, however long reading that would take.
    for output in (tmp_path / "source.safetensors", Path("/proc/x"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="--output="):
            main([f"--source={tmp_path / 'missing.safetensors'}", f"--output={output}"])
    monkeypatch.setattr(converted, "write_safetensors", no_space)
    assert "No space left" in refusal(tmp_path / "source.safetensors")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    assert "0.0 GB are free" in refusal(tmp_path / "source.safetensors")


def test_damage_to_a_converted_folder_is_named(tmp_path, run):
    save_file(random_tensors("transformer"), tmp_path / "source.safetensors")
    folder = run(tmp_path / "source.safetensors")
    description = folder / "converted.json"
    good = description.read_text()

    def message(change, checked=False):
        values = json.loads(good)
        if not checked:  # as earlier versions wrote it
            del values["checksum"]
        change(values)
        description.write_text(json.dumps(values))
        with pytest.raises(UserError) as caught:
            load_converted(folder, "transformer")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for change in (lambda v: v["config"].update(eps=1e-5), lambda v: v.update(crc32=7), lambda v: v.update(more=1)):
        assert "damaged: does not match its checksum" in message(change, checked=True)
    assert "crc32" in message(lambda v: v.pop("crc32"))
    # What came before had one checksum of the whole file.
    assert message(lambda v: v.update(format=1, crc32=7)).endswith("convert it again")
    assert "describes another network" in message(lambda v: v.update(crc32=7))
    assert "describes another network" in message(lambda v: v["crc32"].popitem())
    assert "another version" in message(lambda v: v.update(format=99))
    assert "another version" in message(lambda v: v.update(kind="unet"))
    assert "another version" in message(lambda v: v.update(kind=["vae"]))
    assert "did you mean num_heads" in message(lambda v: v["config"].update(num_hads=2))
    assert "describes another network" in message(lambda v: v["config"].update(freq_dim=10))
    assert "describes another network" in message(lambda v: v["config"].update(param_dtype="bfloat16"))
    description.write_text(good)
    with pytest.raises(UserError, match=r"holds a Wan2.1 transformer, not a Wan2.1 video autoencoder"):
        load_converted(folder, "vae")
    file = folder / "weights.safetensors"
    whole = file.read_bytes()
    for tensor in SafeTensors(file).stored().values():
        damaged = bytearray(whole)
        damaged[tensor.offset + np.prod(tensor.shape) * tensor.dtype.itemsize - 1] ^= 1
        file.write_bytes(damaged)
        for read in (load, open_converted):
            with pytest.raises(UserError, match=r"weights.safetensors: damaged; convert it again"):
                read(folder)
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"not a readable .safetensors file"):
        load_converted(folder, "transformer")
    file.unlink()
    with pytest.raises(UserError, match=r"weights.safetensors: no such file"):
        load_converted(folder, "transformer")
    with pytest.raises(UserError, match="not a folder that convert wrote"):
        load_converted(tmp_path, "transformer")


def test_tensors_that_wrappers_would_give_one_name_are_refused(tmp_path):
    tensors = {"model.a": np.zeros(2, np.float32), "model._orig_mod.a": np.ones(2, np.float32)}
    save_file(tensors, tmp_path / "source.safetensors")
    with pytest.raises(UserError, match="under two names"):
        open_source(tmp_path / "source.safetensors")


def test_identify_reports_what_it_found(tmp_path):
    tensors = random_tensors("transformer")
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "source.safetensors"
    )
    found = identify(open_source(tmp_path / "source.safetensors"))
    assert (found.kind, found.title, found.config) == ("transformer", "Wan2.1 transformer", DIT)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden fixtures at {GOLDEN}")
@pytest.mark.parametrize(
    ("manifest", "kind", "sizes"),
    [
        ("wan_t2v_1.3B", "transformer", {}),
        ("wan_t2v_14B", "transformer", {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}),
        ("umt5_xxl", "text_encoder", {}),
        ("wan_vae", "vae", {}),
        ("taew2_1", "tiny_vae", {}),
    ],
)
def test_published_checkpoints_are_recognised_by_their_keys(manifest, kind, sizes):
    """The names and shapes of the real files, in every set of names, are the network of the published size."""
    content = json.loads((GOLDEN / f"manifest_{manifest}.json").read_text())
    official = content["official"]
    namings = [{name: name for name in official}]
    namings += [names for key, names in content.items() if key.endswith("_to_official")]
    assert len(namings) == len(KINDS[kind].namings)
    for names in namings:
        tensors = {
            name: StoredTensor.dense(Path(manifest), 0, np.dtype(np.float32), tuple(official[ours]))
            for name, ours in names.items()
        }
        found = identify(Source(Path(manifest), tensors, {}, {}))
        assert (found.kind, found.config) == (kind, KINDS[kind].config(**sizes))
        assert {name: list(slot.shape) for name, slot in found.slots.items()} == official
