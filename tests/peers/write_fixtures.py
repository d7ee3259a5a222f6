"""Writes the fixtures that ship with the package: small networks of diffusers and transformers, and their numbers.

PYTHONPATH=. python tests/peers/write_fixtures.py adastate_jax/bundled/fixtures

The weights are random, the numbers PyTorch's in float32. `python -m adastate_jax.verify` compares ours with them.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from adastate_jax.weights.dit import dit_name_from_diffusers
from adastate_jax.weights.text import text_name_from_transformers
from adastate_jax.weights.vae import vae_name_from_diffusers

VERSIONS = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"


def randomized(model, seed):
    """The model with noise on all of its parameters, also on those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def write(folder, stem, reference, config, weights, inputs, outputs):
    """One fixture: what went into a network under `in.`, what came out under `out.`, its weights under `w.`."""
    tensors = {f"w.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"in.{name}": tensor for name, tensor in inputs.items()}
    tensors |= {f"out.{name}": tensor for name, tensor in outputs.items()}
    metadata = {"config": json.dumps(config), "reference": reference, "versions": VERSIONS}
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / f"{stem}.safetensors", metadata)


def write_names(folder, file, names):
    (folder / file).write_text(json.dumps(names, indent=1) + "\n")


def transformer(folder):
    sizes = {"num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 8, "out_channels": 8, "num_layers": 2}
    model = diffusers.WanTransformer3DModel(**sizes, text_dim=20, freq_dim=32, ffn_dim=64)
    weights = randomized(model, 0).state_dict()
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = {}, {}
    for case, (frames, height, width) in {"a": (3, 4, 6), "b": (5, 6, 4)}.items():
        latent = torch.randn(1, 8, frames, height, width, generator=generator)
        context = torch.randn(1, 8, 20, generator=generator)
        timestep = 1000 * torch.rand(1, generator=generator)
        inputs |= {f"{case}.latent": latent, f"{case}.context": context, f"{case}.timestep": timestep}
        outputs[f"{case}.flow"] = model(latent, timestep, context, return_dict=False)[0]
    kept = {name: value for name, value in model.config.items() if not name.startswith("_")}
    write(folder, "wan_dit_diffusers", "WanTransformer3DModel", kept, weights, inputs, outputs)
    write_names(folder, "wan_dit_names.json", {name: dit_name_from_diffusers(name) for name in weights})


def text_encoder(folder):
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 3}
    config = transformers.UMT5Config(**sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=True)
    model = randomized(transformers.UMT5EncoderModel(config), 2)
    names = {name: text_name_from_transformers(name) for name in model.state_dict()}
    weights = {names[name]: tensor for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    inputs, outputs = {}, {"relative_bucket": UMT5Attention(config)._relative_position_bucket(torch.arange(-200, 201))}
    for case, lengths in {"padded": (26, 9, 1), "long": (150,)}.items():
        ids = torch.randint(0, 97, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        embeddings = model(ids, attention_mask=mask).last_hidden_state
        inputs |= {f"{case}.ids": ids, f"{case}.mask": mask}
        outputs |= {f"{case}.embeddings": embeddings, f"{case}.zeroed": embeddings * mask[..., None]}
    official = {"vocab": 97, "dim": 32, "dim_attn": 24, "dim_ffn": 48, "num_heads": 3, "num_layers": 3}
    official |= {"num_buckets": config.relative_attention_num_buckets, "shared_pos": False}
    write(folder, "umt5", "UMT5EncoderModel", {"official": official}, weights, inputs, outputs)
    write_names(folder, "umt5_names.json", names)


def video_encoder(folder):
    model = diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    randomized(model, 4)
    blocks = model.config.num_res_blocks
    all_names = {name: vae_name_from_diffusers(name, blocks) for name in model.state_dict()}
    names = {name: to for name, to in all_names.items() if name.startswith(("encoder.", "quant_conv."))}
    weights = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (model.config.latents_mean, model.config.latents_std)
    )
    found, first = model.encode(video).latent_dist, model.encode(video[:, :, :1]).latent_dist
    outputs = {
        "encode.mu": (found.mean - mean) / deviation,
        "encode.mu_raw": found.mean,
        "encode.log_var_raw": found.parameters.chunk(2, dim=1)[1],
        "encode.first_frame_mu": (first.mean - mean) / deviation,
    }
    config = {
        "dim": model.config.base_dim,
        **{name: list(model.config[name]) for name in ("dim_mult", "temperal_downsample")},
        **{name: model.config[name] for name in ("z_dim", "num_res_blocks", "latents_mean", "latents_std")},
    }
    write(folder, "wan_vae_encode", "AutoencoderKLWan", config, weights, {"video": video}, outputs)
    write_names(folder, "wan_vae_names.json", all_names)


def write_all(folder):
    """Writes all fixtures; the same again on the same machine with the same versions."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for network in (transformer, text_encoder, video_encoder):
            torch.manual_seed(0)  # what the networks start from
            network(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files for nobody else


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
