"""Files as ComfyUI and the tools around it pack them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_wan import CONFIG, KINDS, _draw

from adastate_jax import convert
from adastate_jax.errors import UserError
from adastate_jax.weights.identify import identify
from adastate_jax.weights.sources import open_source

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
CONFIGS = {"transformer": CONFIG.model, "text_encoder": CONFIG.text, "vae": CONFIG.vae}


def draw(kind, naming="official"):
    """Weights of a small network under the names of a set."""
    rng = np.random.default_rng(0)
    slots = KINDS[kind].slots(CONFIGS[kind])
    rename = KINDS[kind].namings[naming].from_official
    return {rename(name, CONFIGS[kind]): _draw(rng, slot.shape) for name, slot in slots.items()}


def opened(tmp_path, tensors, part="", overrides=None):
    save_file({name: np.asarray(tensor) for name, tensor in tensors.items()}, tmp_path / "packed.safetensors")
    return identify(open_source(tmp_path / "packed.safetensors", part), overrides)


def refusal(tmp_path, tensors, part=""):
    with pytest.raises(UserError) as caught:
        opened(tmp_path, tensors, part, {"num_heads": 2})
    assert "packed.safetensors" in str(caught.value)
    return str(caught.value)


def read(network):
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in network.tensors.items()}


def quantised(tensors, dtype=E4M3, rows=False, names=("scale_weight", "scale_input")):
    """The matrices in float8 with a scale each, or one per row, and what the others are."""
    packed, expected = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "embed" in name or "shared" in name or "relative" in name:
            packed[name] = expected[name] = tensor
            continue
        largest = float(ml_dtypes.finfo(dtype).max)
        scale = (np.abs(tensor).max(axis=1 if rows else None, keepdims=rows) / largest).astype(np.float32)
        packed[name] = (tensor / scale).astype(dtype)
        module = name.removesuffix(".weight")
        packed[f"{module}.{names[0]}"] = scale
        if not rows:
            packed[f"{module}.{names[1]}"] = np.float32(1.0)
        expected[name] = packed[name].astype(np.float32) * scale
    return packed, expected


def test_a_text_encoder_with_its_tokenizer(tmp_path):
    tensors = draw("text_encoder", "diffusers")
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    network = opened(tmp_path, {**half, "spiece_model": np.arange(100, dtype=np.uint8)})
    assert network.kind == "text_encoder"
    official = KINDS["text_encoder"].namings["diffusers"].to_official([*half])
    found = read(network)
    assert found.keys() == set(official.values())
    for name, ours in official.items():
        assert np.array_equal(found[ours], half[name])
    # A tensor of that name which is no tokenizer is none of ours to drop.
    assert "spiece_model" in refusal(tmp_path, {**half, "spiece_model": np.arange(100)})


def test_a_tokenizer_that_is_left_out_is_said(tmp_path, capsys):
    half = {name: tensor.astype(np.float16) for name, tensor in draw("text_encoder", "diffusers").items()}
    for name, content in (("plain", {}), ("packed", {"spiece_model": np.arange(100, dtype=np.uint8)})):
        save_file({**half, **content}, tmp_path / f"{name}.safetensors")
        assert convert.main([f"--source={tmp_path / name}.safetensors", f"--output={tmp_path / name}"]) == 0
        note = f"note: {tmp_path / name}.safetensors: its tokenizer (spiece_model) is left out"
        assert (note in capsys.readouterr().err) == bool(content)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")], ids=["earlier", "later"]
)
def test_scaled_float8_is_multiplied_out(tmp_path, dtype, rows, names):
    packed, expected = quantised(draw("text_encoder", "diffusers"), dtype, rows, names)
    marks = {"scaled_fp8": np.zeros(0, dtype)}
    if names[0] == "weight_scale":
        told = json.dumps({"format": f"float8_{'e4m3fn' if dtype == E4M3 else 'e5m2'}"}).encode()
        scales = [name for name in packed if name.endswith(".weight_scale")]
        marks = {name.replace("weight_scale", "comfy_quant"): np.frombuffer(told, np.uint8) for name in scales}
    network = opened(tmp_path, packed | marks)
    found = read(network)
    official = KINDS["text_encoder"].namings["diffusers"].to_official([*expected])
    assert found.keys() == set(official.values())
    for name, ours in official.items():
        np.testing.assert_array_equal(found[ours], expected[name])
        np.testing.assert_array_equal(network.tensors[ours].rows(1, 2), expected[name][1:2])
    assert network.config.param_dtype == "float32"


def test_plain_float8_is_what_it_is(tmp_path):
    tensors = {name: tensor.astype(E4M3) for name, tensor in draw("transformer").items()}
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    network = opened(tmp_path, prefixed, overrides={"num_heads": 2})
    assert network.config.param_dtype == "bfloat16"  # which holds all float8 numbers
    found = read(network)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name].astype(ml_dtypes.bfloat16), tensor.astype(ml_dtypes.bfloat16))


def test_what_cannot_be_right_is_refused(tmp_path):
    packed, _ = quantised(draw("text_encoder", "diffusers"))
    marked = packed | {"scaled_fp8": np.zeros(0, E4M3)}
    scales = [name for name in packed if name.endswith("scale_weight")]
    weight = scales[0].replace("scale_weight", "weight")
    bare = {name: tensor for name, tensor in marked.items() if name not in scales}
    assert "its float8 weights are scaled, but scales are missing" in refusal(tmp_path, bare)
    one = {name: tensor for name, tensor in packed.items() if name != scales[0]}
    assert f"scales are missing: {weight}" in refusal(tmp_path, one)
    assert "no float8 weights" in refusal(tmp_path, packed | {weight: packed[weight].astype(np.float32)})
    assert "has scales, but" in refusal(tmp_path, packed | {"stray.scale_weight": np.float32(1)})
    for scale in (np.float32(np.nan), np.float32(0), np.float32(-1), np.float32(np.inf)):
        assert "is no positive number" in refusal(tmp_path, packed | {scales[0]: scale})
    assert "has a scale of shape [3, 3]" in refusal(tmp_path, packed | {scales[0]: np.ones((3, 3), np.float32)})
    assert "and dtype int32" in refusal(tmp_path, packed | {scales[0]: np.int32(1)})
    name = scales[0].replace("scale_weight", "comfy_quant")
    for told in (b'{"format": "nvfp4"}', b"{", b"\xff", b"[" * 4000, b"[]", b"{}"):
        assert "says that weights are quantised as" in refusal(tmp_path, packed | {name: np.frombuffer(told, np.uint8)})


def test_a_whole_model_in_one_file(tmp_path):
    """What ComfyUI's node for saving checkpoints writes."""
    prefixes = {
        "transformer": "model.diffusion_model.",
        "text_encoder": "text_encoders.umt5xxl.transformer.",
        "vae": "vae.",
    }
    parts = {"transformer": "diffusion_model", "text_encoder": "text_encoder", "vae": "vae"}
    content = {"text_encoders.spiece_model": np.zeros(9, np.uint8), "text_encoders.umt5xxl.logit_scale": np.float32(1)}
    for kind, prefix in prefixes.items():
        naming = "diffusers" if kind == "text_encoder" else "official"
        content |= {f"{prefix}{name}": tensor for name, tensor in draw(kind, naming).items()}
    for kind, part in parts.items():
        overrides = {"num_heads": 2} if kind == "transformer" else {}
        for asked in (part, "") if kind == "transformer" else (part,):
            network = opened(tmp_path, content, asked, overrides)
            assert network.kind == kind
            found = read(network)
            assert all(np.array_equal(found[name], tensor) for name, tensor in draw(kind).items())
    assert "its parts are diffusion_model, text_encoder, vae" in refusal(tmp_path, content, "critic")
