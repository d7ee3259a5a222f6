"""Adapters of every make, merged as PyTorch merges them."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from adastate_jax.convert import main
from adastate_jax.models.adapters import LoRAConfig, create_adapters, merge
from adastate_jax.models.dit import DiTConfig
from adastate_jax.weights.dit import dit_name_to_diffusers, dit_table
from adastate_jax.weights.identify import identify
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.lora import merge_lora, published_factors
from adastate_jax.weights.slots import leaves, load_official
from adastate_jax.weights.sources import open_source

torch = pytest.importorskip("torch")

CONFIG = DiTConfig(
    dim=128, ffn_dim=48, num_heads=1, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=8
)
RANK, ALPHA = 4, 6.0
LINEAR = ("blocks.0.self_attn.q", "blocks.1.ffn.2", "time_projection.1", "head.head", "text_embedding.0")
CONV = "patch_embedding"
# What an adapter that was extracted from a distilled model changes besides: (parameter, how its change is called).
WHOLE = {
    "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
    "blocks.1.norm3.weight": "blocks.1.norm3.diff",
    "blocks.1.norm3.bias": "blocks.1.norm3.diff_b",
    "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
    "blocks.0.modulation": "blocks.0.diff_m",
    "head.modulation": "head.diff_m",
    "patch_embedding.bias": "patch_embedding.diff_b",
    "blocks.1.cross_attn.v.weight": "blocks.1.cross_attn.v.diff",
    "head.head.bias": "head.head.diff_b",
}


def draw(seed, shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def slots():
    return KINDS["transformer"].slots(CONFIG)


@pytest.fixture
def base(tmp_path):
    """Official weights of a network in a file, and as torch tensors."""
    tensors = {name: draw(seed, slot.shape) for seed, (name, slot) in enumerate(slots().items())}
    save_file({name: tensor.numpy() for name, tensor in tensors.items()}, tmp_path / "base.safetensors")
    return tensors


def pairs():
    """Factors of every linear module and of the patch embedding: (down, up)."""
    found = {}
    for seed, module in enumerate((*LINEAR, CONV)):
        outputs, *inputs = slots()[f"{module}.weight"].shape
        ones = [1] * (len(inputs) - 1)
        found[module] = draw(100 + seed, (RANK, *inputs)), draw(200 + seed, (outputs, RANK, *ones))
    return found


def with_factors(weight, down, up, scale):
    """W + scale · up ∘ down, in float64; the composition is that of convolutions where there are more axes."""
    if weight.ndim == 2:
        change = up.double() @ down.double()
    else:
        change = torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
    return weight.double() + scale * change


def differences():
    return {parameter: draw(300 + seed, slots()[parameter].shape) for seed, parameter in enumerate(WHOLE)}


def merged_by_torch(base, strength=1.0, scale=ALPHA / RANK, whole=True):
    """What every weight should be, in float64."""
    expected = {name: tensor.double() for name, tensor in base.items()}
    for module, (down, up) in pairs().items():
        expected[f"{module}.weight"] = with_factors(base[f"{module}.weight"], down, up, strength * scale)
    for parameter, difference in differences().items() if whole else ():
        expected[parameter] = expected[parameter] + strength * difference.double()
    return expected


def file_of(tmp_path, tensors, name="lora.safetensors", dtype=np.float32, metadata=None):
    # Contiguous copies: a slice of a larger array would be saved with the bytes of its neighbours.
    save_file({k: np.array(v, dtype, order="C") for k, v in tensors.items()}, tmp_path / name, metadata)
    return tmp_path / name


def underscores(module):
    return module.replace(".", "_")


def diffusers(module):
    return dit_name_to_diffusers(f"{module}.weight").removesuffix(".weight")


SPELLINGS = {
    "kohya": lambda module, side: f"lora_unet_{underscores(module)}.lora_{side}.weight",
    "kohya, two underscores": lambda module, side: f"lora_unet__{underscores(module)}.lora_{side}.weight",
    "comfy": lambda module, side: f"diffusion_model.{module}.lora_{side}.weight",
    "peft": lambda module, side: f"base_model.model.{module}.lora_{'A' if side == 'down' else 'B'}.weight",
    "peft, named": lambda module, side: f"{module}.lora_{'A' if side == 'down' else 'B'}.default.weight",
    "peft of diffusers": (
        lambda module, side: f"transformer.{diffusers(module)}.lora_{'A' if side == 'down' else 'B'}.weight"
    ),
    "diffusers": lambda module, side: f"transformer.{diffusers(module)}.lora.{side}.weight",
    "bare": lambda module, side: f"{module}.lora_{side}.weight",
    "DiffSynth": lambda module, side: f"pipe.dit.{module}.lora_{'A' if side == 'down' else 'B'}.default.weight",
}


def read(network):
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in network.tensors.items()}


def network_of(tmp_path):
    return identify(open_source(tmp_path / "base.safetensors"))


def assert_merged(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor.numpy(), rtol=2e-6, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_the_merge_of_torch(tmp_path, base, spelling):
    adapter = {}
    for module, (down, up) in pairs().items():
        adapter |= {spelling(module, "down"): down.numpy(), spelling(module, "up"): up.numpy()}
    merged = merge_lora(network_of(tmp_path), file_of(tmp_path, adapter), alpha=ALPHA)
    assert_merged(read(merged), merged_by_torch(base, whole=False))


def test_an_adapter_of_a_distilled_model_is_merged_whole(tmp_path, base):
    adapter = {f"diffusion_model.{WHOLE[name]}": change.numpy() for name, change in differences().items()}
    for module, (down, up) in pairs().items():
        name = f"diffusion_model.{module}"
        adapter |= {f"{name}.lora_down.weight": down.numpy(), f"{name}.lora_up.weight": up.numpy()}
        adapter[f"{name}.alpha"] = np.float32(ALPHA)
    path = file_of(tmp_path, adapter)
    assert_merged(read(merge_lora(network_of(tmp_path), path)), merged_by_torch(base))
    for strength in (0.5, 0.0, -1.0):
        assert_merged(read(merge_lora(network_of(tmp_path), path, strength=strength)), merged_by_torch(base, strength))


@pytest.mark.parametrize("prefix", ["", "lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_differences_alone_under_every_name(tmp_path, base, prefix, names):
    adapter = {}
    for parameter, change in differences().items():
        name = WHOLE[parameter]
        if names == "diffusers":
            module, _, leaf = dit_name_to_diffusers(parameter).rpartition(".")
            suffix = {"weight": "diff", "bias": "diff_b", "scale_shift_table": "diff_m"}[leaf]
            name = f"{module}.{suffix}" if module else "scale_shift_table.diff"
        module, _, suffix = name.rpartition(".")
        module = underscores(module) if prefix == "lora_unet_" and suffix != "diff_m" else module
        adapter[f"{prefix}{module}.{suffix}"] = change.numpy()
    expected = {name: tensor.double() for name, tensor in base.items()}
    for parameter, change in differences().items():
        expected[parameter] = expected[parameter] + change.double()
    assert_merged(read(merge_lora(network_of(tmp_path), file_of(tmp_path, adapter))), expected)


def test_factors_of_a_convolution_are_two_convolutions(tmp_path, base):
    down, up = pairs()[CONV]
    adapter = {f"{CONV}.lora_down.weight": down.numpy(), f"{CONV}.lora_up.weight": up.numpy()}
    merged = read(merge_lora(network_of(tmp_path), file_of(tmp_path, adapter)))["patch_embedding.weight"]
    video = draw(7, (1, 4, 3, 8, 8)).double()
    conv = lambda x, weight, stride: torch.nn.functional.conv3d(x, weight.double(), stride=stride)  # noqa: E731
    expected = conv(video, base["patch_embedding.weight"], (1, 2, 2)) + conv(conv(video, down, (1, 2, 2)), up, 1)
    torch.testing.assert_close(conv(video, torch.from_numpy(merged), (1, 2, 2)), expected, rtol=1e-5, atol=1e-4)


def test_several_adapters_add_up_in_float32_and_are_rounded_once(tmp_path, base):
    """The command, on a bfloat16 base: sums that bfloat16 between the adapters would have lost."""
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    held = {name: tensor.float().numpy().astype(ml_dtypes.bfloat16) for name, tensor in half.items()}
    save_file(held, tmp_path / "base.safetensors")
    module = "blocks.0.self_attn.q"
    small = {f"{module}.diff": np.full((128, 128), 2**-11, np.float32)}
    options = []
    for index in range(8):
        options += [f"--lora={file_of(tmp_path, small, f'small{index}:x.safetensors')}"]
    down, up = pairs()[module]
    factors = {f"{module}.lora_A.weight": down.numpy(), f"{module}.lora_B.weight": up.numpy()}
    options += [f"--lora={file_of(tmp_path, factors, 'style.safetensors')}:-0.25"]
    arguments = [f"--source={tmp_path / 'base.safetensors'}", f"--output={tmp_path / 'out'}", "--to=safetensors"]
    assert main([*arguments, *options]) == 0
    found = open_source(tmp_path / "out").tensors
    expected = with_factors(half[f"{module}.weight"].float() + 8 * 2**-11, down, up, -0.25).bfloat16().float().numpy()
    merged = found[f"{module}.weight"].read().astype(np.float32)
    # Float32 sums may fall on the other side of a bfloat16 rounding than float64 ones; few do.
    assert (merged == expected).mean() > 0.999
    np.testing.assert_allclose(merged, expected, rtol=2**-7)
    assert np.array_equal(found[f"{module}.bias"].read(), held[f"{module}.bias"])


@pytest.mark.parametrize("where", ["beside", "rslora", "header"])
def test_what_peft_says_of_alpha_counts(tmp_path, base, where):
    adapter = {}
    for module, (down, up) in pairs().items():
        adapter |= {SPELLINGS["peft"](module, "down"): down.numpy(), SPELLINGS["peft"](module, "up"): up.numpy()}
    settings, metadata, scale = {"r": RANK, "lora_alpha": ALPHA, "use_dora": False}, None, ALPHA / RANK
    if where == "rslora":
        settings["use_rslora"], scale = True, ALPHA / RANK**0.5
    if where == "header":
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    path = file_of(tmp_path, adapter, metadata=metadata)
    assert_merged(read(merge_lora(network_of(tmp_path), path)), merged_by_torch(base, scale=scale, whole=False))


def test_a_bias_beside_the_factors_is_scaled_with_them(tmp_path, base):
    module = LINEAR[0]
    down, up = pairs()[module]
    bias = draw(9, (128,))
    adapter = {
        f"{module}.lora_A.weight": down.numpy(),
        f"{module}.lora_B.weight": up.numpy(),
        f"{module}.lora_B.bias": bias.numpy(),
    }
    merged = read(merge_lora(network_of(tmp_path), file_of(tmp_path, adapter), alpha=ALPHA, strength=0.5))
    expected = {name: tensor.double() for name, tensor in base.items()}
    scale = 0.5 * ALPHA / RANK
    expected[f"{module}.weight"] = with_factors(base[f"{module}.weight"], down, up, scale)
    expected[f"{module}.bias"] = base[f"{module}.bias"].double() + scale * bias.double()
    assert_merged(merged, expected)


def test_rows_are_those_of_the_whole(tmp_path, base):
    down, up = pairs()[CONV]
    adapter = {
        f"{CONV}.lora_down.weight": down.numpy(),
        f"{CONV}.lora_up.weight": up.numpy(),
        f"{CONV}.diff": np.ones(slots()[f"{CONV}.weight"].shape, np.float32),
    }
    tensor = merge_lora(network_of(tmp_path), file_of(tmp_path, adapter)).tensors[f"{CONV}.weight"]
    whole = tensor.rows(0, 128)
    np.testing.assert_allclose(
        whole, with_factors(base[f"{CONV}.weight"], down, up, 1).numpy() + 1, rtol=1e-6, atol=1e-5
    )
    np.testing.assert_allclose(np.concatenate([tensor.rows(0, 5), tensor.rows(5, 128)]), whole, rtol=1e-6, atol=1e-6)
    assert dataclasses.replace(tensor, changes=()).rows(0, 128).tolist() == base[f"{CONV}.weight"].tolist()


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_adapters_that_were_trained_are_published_and_read_back(tmp_path, base, names):
    """Of every linear layer, the convolution of patches among them: read back, they are what a run merges."""
    adapters = create_adapters(CONFIG, LoRAConfig(RANK, ALPHA, (".*",)), jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + np.random.default_rng(1).standard_normal(x.shape, np.float32), adapters)
    adapter = file_of(tmp_path, published_factors(adapters, CONFIG, names))
    weights = {name: tensor.numpy() for name, tensor in base.items()}
    network = load_official(KINDS["transformer"].abstract(CONFIG), dit_table(CONFIG), weights, "base")
    expected = leaves(merge(network, adapters))
    found = leaves(load_official(network, dit_table(CONFIG), read(merge_lora(network_of(tmp_path), adapter)), "merged"))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-4, err_msg=name)
    changed = [name for name, leaf in leaves(network).items() if np.abs(found[name] - leaf).max() > 0.1]
    assert {name.removesuffix("/kernel") for name in changed} == {*adapters}
