"""A Wan2.1-like model of a few thousand weights on disk: published files, converted by the command, and a tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

from adastate_jax import convert
from adastate_jax.config.run import Config, DataConfig
from adastate_jax.data.videos import ClipConfig
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.text import TextConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig
from adastate_jax.weights.kinds import KINDS

WORDS = ("a", "red", "fox", "runs", "through", "snow", "&", "café")
CONFIG = Config(
    stages=(),
    text=TextConfig(
        vocab_size=40, dim=12, dim_attention=8, ffn_dim=16, num_heads=2, num_layers=2, num_buckets=8, text_length=70
    ),
    decoder="wan",
    vae=VAEConfig(dim=4, dim_multipliers=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True)),
    tiny_vae=TinyVAEConfig(widths=(6, 4, 2)),
    model=DiTConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=12, text_length=70, freq_dim=16),
    data=DataConfig(kind="none", clips=ClipConfig(height=16, width=24, num_frames=9)),
)
TINY_DECODER = dataclasses.replace(
    CONFIG, decoder="tiny", data=DataConfig(kind="none", clips=ClipConfig(height=32, width=48, num_frames=9))
)
_PARTS = {
    "transformer": (CONFIG.model, ["--set=num_heads=2"]),
    "text_encoder": (CONFIG.text, []),
    "vae": (CONFIG.vae, []),
    "tiny_vae": (CONFIG.tiny_vae, []),
}


def write_tokenizer(path: Path, words=WORDS) -> Path:
    """A tokenizer.json of UMT5's make: pieces of a unigram model, <pad> = 0, an end token 1 after every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words), ("▁", -3.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))
    return path


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that neither damp nor blow up what passes through them; gains and biases around one half."""
    inputs = np.prod(shape[1:])
    noise = rng.standard_normal(shape) / np.sqrt(inputs)
    return (noise if inputs > 1 else 0.5 + 0.3 * noise).astype(np.float32)


def write_network(folder: Path, kind: str, config: Any, rng: np.random.Generator, *options: str) -> Path:
    """A converted network, from a published file of random tensors."""
    tensors = {name: _draw(rng, slot.shape) for name, slot in KINDS[kind].slots(config).items()}
    file = folder.parent.with_name(f"{folder.name}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    convert.main([f"--source={file}", f"--output={folder}", *options])
    return folder


def write_model(folder: Path) -> Path:
    """The folder of converted networks that `CONFIG` and `TINY_DECODER` describe."""
    rng = np.random.default_rng(0)
    for kind, (config, options) in _PARTS.items():
        write_network(folder / kind, kind, config, rng, *options)
    write_tokenizer(folder / "tokenizer.json")
    return folder
