"""What a configuration may not say is refused when it is built, by the name of the field."""

import dataclasses
from pathlib import Path

import pytest

from adastate_jax.config.files import parse_config
from adastate_jax.config.run import Config, SampleConfig
from adastate_jax.errors import UserError
from adastate_jax.fields import build

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("dtype", ["float31", "bf16", "int32", "float64", ""])
@pytest.mark.parametrize("network", ["model", "text", "vae", "tiny_vae"])
@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
def test_unknown_dtypes_are_refused_with_the_known_ones(network, field, dtype):
    known = "float32, bfloat16, float16"
    with pytest.raises(ValueError, match=f"^{field} must be one of {known}, got '{dtype}'$"):
        dataclasses.replace(getattr(Config(), network), **{field: dtype})
    with pytest.raises(UserError, match=rf"^config\.{network}: {field} must be one of {known}"):
        build(Config, {network: {field: dtype}}, "config")


NUMBERS_THAT_MUST_BE_POSITIVE = {
    "model": ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "text_dim", "text_length", "freq_dim", "eps"),
    "text": ("vocab_size", "dim", "dim_attention", "ffn_dim", "num_heads", "num_layers", "num_buckets", "text_length"),
    "vae": ("dim", "latent_channels", "num_res_blocks"),
    "tiny_vae": ("latent_channels",),
    "codec": ("patch", "channels"),
    "stream": ("shift", "chunk_frames"),
    "pretrain": ("steps", "batch_size", "shift"),
    "initialize": ("steps", "batch_size", "trajectories", "ode_steps"),
    "distill": ("steps", "batch_size", "rollout_frames", "critic_ratio", "shift"),
    "sample": ("horizon", "count", "scale"),
    "mesh": ("data", "fsdp", "model"),
    "logging": ("log_every", "save_every", "keep"),
    "data": ("num_worlds",),
}


@pytest.mark.parametrize(
    ("group", "field"), [(group, field) for group, fields in NUMBERS_THAT_MUST_BE_POSITIVE.items() for field in fields]
)
def test_zero_and_negative_numbers_are_refused_by_name(group, field):
    kind = type(getattr(getattr(Config(), group), field))
    for value in (0, -3):
        with pytest.raises(UserError, match=rf"^config\.{group}: .*{field}\b.*{value}"):
            build(Config, {group: {field: kind(value)}}, "config")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(UserError, match=rf"^config: seed must lie in 0 … 4294967295, got {seed}"):
        build(Config, {"seed": seed}, "config")
    with pytest.raises(UserError, match=r"^config\.sample: seed must lie in"):
        build(Config, {"sample": {"seed": seed}}, "config")


def test_training_in_16_bit_weights_is_refused_by_name():
    narrow = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"model\.param_dtype is bfloat16, but stage pretrain trains the transformer"):
        build(Config, {"model": narrow}, "config")
    with pytest.raises(UserError, match=r"stage distill trains the transformer.*set it to float32"):
        build(Config, {"model": narrow, "stages": ("distill", "sample")}, "config")
    for stages in ((), ("sample",)):
        assert build(Config, {"model": narrow, "stages": stages}, "config").model.param_dtype == "bfloat16"
    assert build(Config, {"model": {"dtype": "bfloat16"}}, "config").model.dtype == "bfloat16"


def test_the_length_of_samples_in_frames_or_in_horizons():
    def frames(**fields):
        return dataclasses.replace(Config(), sample=SampleConfig(**fields)).sample_frames

    assert frames() == frames(horizon=3) == 63
    assert [frames(frames=number, horizon=9) for number in (1, 51, 120)] == [1, 51, 120]
    # With Wan's autoencoder every latent frame after the first is four frames.
    wan = parse_config([f"--config={CONFIGS / 'wan_1_3b.py'}", "--config.sample.frames=51"])
    assert wan.sample_frames == 201
    with pytest.raises(UserError, match=r"^config\.sample: frames must be at least 1, or 0 for the length in horizons"):
        build(Config, {"sample": {"frames": -1}}, "config")
