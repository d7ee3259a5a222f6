"""Our networks beside PyTorch's on the same random weights; the weights from there to here and back, bit for bit."""

import json

import jax
import numpy as np
import pytest

from adastate_jax import verify
from adastate_jax.convert import main
from adastate_jax.errors import UserError
from adastate_jax.models.video_coding import decode_clip, encode_clip
from adastate_jax.weights.converted import load_converted
from adastate_jax.weights.identify import identify
from adastate_jax.weights.safetensors_file import SafeTensors
from adastate_jax.weights.sources import open_source
from adastate_jax.weights.torch_file import load_torch_file

REASON = "the peers are not installed; see requirements-dev.txt"
torch = pytest.importorskip("torch", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

TOLERANCE = 5e-5


def randomized(model, seed, amount=0.05):
    """The model with noise on all of its parameters, also on those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def convert(source, output, *options):
    assert main([f"--source={source}", f"--output={output}", *options]) == 0
    return output


def close(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.1  # or agreement would mean little
    assert np.abs(ours - theirs).max() <= TOLERANCE


def round_trip(tmp_path, model, kind):
    """Their folder → ours; ours → their folder → a model of theirs with the same bits. Returns our network."""
    model.save_pretrained(tmp_path / "theirs")
    network = load_converted(convert(tmp_path / "theirs", tmp_path / "ours"), kind)
    back = convert(tmp_path / "ours", tmp_path / "back", "--to=safetensors", "--names=diffusers")
    returned = type(model).from_pretrained(back).eval()
    before, after = model.state_dict(), returned.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    config = json.loads((back / "config.json").read_text())
    for name, value in config.items():
        if name not in ("_class_name", "architectures", "dtype"):
            assert json.loads(json.dumps(getattr(model.config, name))) == value, name
    return network, returned


@pytest.mark.parametrize(
    ("sizes", "frames", "height", "width"),
    [
        ({"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32}, 3, 4, 6),
        ({"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1, "ffn_dim": 64, "eps": 1e-5}, 1, 2, 2),
        ({"num_attention_heads": 3, "attention_head_dim": 20, "num_layers": 3, "cross_attn_norm": False}, 2, 6, 2),
    ],
)
def test_transformer(tmp_path, sizes, frames, height, width):
    sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 10, "freq_dim": 16, "ffn_dim": 24} | sizes
    model = randomized(diffusers.WanTransformer3DModel(**sizes), 0)
    network, returned = round_trip(tmp_path, model, "transformer")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, frames, height, width, generator=generator)
    text = torch.randn(2, 7, 10, generator=generator)
    timesteps = torch.tensor([999.0, 312.5])
    with torch.no_grad():
        theirs = model(latents, timesteps, text, return_dict=False)[0]
        assert torch.equal(theirs, returned(latents, timesteps, text, return_dict=False)[0])

    @jax.jit
    def flow(network, latents, timesteps, text):
        return network(latents, timesteps, network.text_keys_values(text), np.arange(frames))[0]

    timesteps = np.repeat(timesteps.numpy()[:, None], frames, axis=1)
    ours = flow(network, np.moveaxis(latents.numpy(), 1, -1), timesteps, text.numpy())
    close(np.moveaxis(np.asarray(ours), -1, 1), theirs)


@pytest.mark.parametrize(
    "sizes",
    [
        {"base_dim": 6, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True]},
        {"base_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 2, "temperal_downsample": [True], "z_dim": 3},
    ],
)
def test_video_autoencoder(tmp_path, sizes):
    if "z_dim" in sizes:
        sizes = sizes | {"latents_mean": [0.5, -0.25, 0.0], "latents_std": [1.5, 2.0, 0.75]}
    model = randomized(diffusers.AutoencoderKLWan(**sizes), 0)
    network, returned = round_trip(tmp_path, model, "vae")
    config = network.config
    side = 2 * config.space_factor
    video = torch.rand(1, 3, 1 + 2 * config.time_factor, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        raw = model.encode(video).latent_dist.mode()
        decoded = model.decode(raw, return_dict=False)[0]
        assert torch.equal(decoded, returned.decode(raw, return_dict=False)[0])
    latents = jax.jit(encode_clip)(network, np.moveaxis(video.numpy(), 1, -1))
    theirs = (raw - mean) / std
    close(np.moveaxis(np.asarray(latents), -1, 1), theirs)
    ours = jax.jit(decode_clip)(network, np.moveaxis(theirs.numpy(), 1, -1))
    close(np.clip(np.moveaxis(np.asarray(ours), -1, 1), -1, 1), decoded)


@pytest.mark.parametrize(
    "sizes",
    [
        {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_heads": 3, "num_layers": 2},
        {"d_model": 24, "d_kv": 8, "d_ff": 20, "num_heads": 2, "num_layers": 1, "relative_attention_num_buckets": 8},
    ],
)
def test_text_encoder(tmp_path, sizes):
    sizes = sizes | {"relative_attention_max_distance": 32} if "relative_attention_num_buckets" in sizes else sizes
    config = transformers.UMT5Config(
        vocab_size=50, dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=True, **sizes
    )
    model = randomized(transformers.UMT5EncoderModel(config), 0)
    network, returned = round_trip(tmp_path, model, "text_encoder")
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(40)[None] < torch.tensor([[40], [9]])
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask.long()).last_hidden_state
        assert torch.equal(theirs, returned(ids, attention_mask=mask.long()).last_hidden_state)
    ours = jax.jit(type(network).__call__)(network, ids.numpy().astype(np.int32), mask.numpy())
    close(ours, theirs)


def test_the_fixtures_that_ship_are_these_networks_numbers(tmp_path):
    from peers import write_fixtures

    write_fixtures.write_all(tmp_path)
    for path in verify.SHIPPED.glob("*.safetensors"):
        shipped, fresh = SafeTensors(path), SafeTensors(tmp_path / path.name)
        assert [*shipped] == [*fresh]
        assert shipped.metadata["config"] == fresh.metadata["config"]
        for name in shipped:
            np.testing.assert_allclose(shipped[name], fresh[name], atol=1e-5, err_msg=name)
    for path in verify.SHIPPED.glob("*.json"):
        assert path.read_text() == (tmp_path / path.name).read_text()


# --- files of torch.save ----------------------------------------------------------------------------------------------

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


def as_numpy(tensor):
    """A tensor's elements; bfloat16 by way of float32, which holds all of its values."""
    tensor = tensor.detach()
    return tensor.float().numpy() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor.numpy()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_real_files(tmp_path, protocol):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {name: torch.randint(0, 2, (3, 4)).to(getattr(torch, name)) for name in DTYPES} | {
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "uint16": torch.arange(5).to(torch.uint16),
        "transposed": base.T,
        "part": base[1:, ::2],
        "row": base[2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    content = {
        "tensors": tensors,
        "state": network.state_dict(),
        "optimizer": torch.optim.AdamW(network.parameters()).state_dict(),
        "step": 3,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, pickle_protocol=protocol)
    found = load_torch_file(path)
    assert found["step"] == 3
    assert found["size"] == (1, 2)
    assert found["tensors"].keys() == tensors.keys()
    expected = {**tensors, **network.state_dict()}
    for name, tensor in {**found["tensors"], **found["state"]}.items():
        ours, theirs = tensor.read(), as_numpy(expected[name])
        assert ours.shape == theirs.shape
        assert np.array_equal(ours.astype(theirs.dtype), theirs), name


def test_real_files_that_are_refused(tmp_path):
    path = tmp_path / "x.pt"

    def refusal():
        with pytest.raises(UserError) as caught:
            load_torch_file(path)
        return str(caught.value)

    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal()
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in refusal()
    torch.save({"a": torch.ones(2).to_sparse()}, path)
    assert "_rebuild_sparse" in refusal()
    torch.save({"a": torch.ones(1).expand(1000)}, path)
    assert "does not fit" in refusal()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refusal()


def test_a_file_of_torch_save_fills_a_network(tmp_path):
    """The way of the official autoencoder and of Self-Forcing's generators: a `.pth` with official names."""
    config = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 32, "text_dim": 10}
    model = randomized(diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, freq_dim=16, **config), 0)
    model.save_pretrained(tmp_path / "theirs")
    official = convert(tmp_path / "theirs", tmp_path / "official", "--to=safetensors")
    tensors = {name: torch.from_numpy(t.read().copy()) for name, t in open_source(official).tensors.items()}
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "generator.pt")
    found = identify(open_source(tmp_path / "generator.pt"))
    assert all(np.array_equal(found.tensors[name].read(), tensor.numpy()) for name, tensor in tensors.items())
    convert(tmp_path / "generator.pt", tmp_path / "back", "--to=safetensors", "--names=diffusers")
    returned = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, returned[name]) for name, tensor in model.state_dict().items())
