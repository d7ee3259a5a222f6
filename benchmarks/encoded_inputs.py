"""What embeddings and latents take: bytes on disk, time to read a batch, memory of the programs that make them.

python -m benchmarks.encoded_inputs
python -m benchmarks.encoded_inputs --memory

The data sets are of random numbers, at Wan2.1's sizes. Memory is counted by the compiler, for the device that is here.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from adastate_jax.data.batches import read_examples
from adastate_jax.data.encoded import embedding_features, latent_features
from adastate_jax.data.shards import Plan, open_data_set, write_data_set
from adastate_jax.generation.loading import encode_frames
from adastate_jax.models.text import TextConfig, TextEncoder, encode_tokens
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.models.wan_codec import WanCodec

DIM, CLIP, FPS = 4096, (21, 60, 104, 16), 16  # UMT5-XXL's width; a clip of 81 frames of 480×832
BATCH = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[50, 100, 200, 512], help="of a prompt")
    parser.add_argument("--examples", type=int, default=200, help="of each data set that is written")
    parser.add_argument("--memory", action="store_true", help="compile the encoders instead")
    options = parser.parse_args()
    if options.memory:
        count_memory()
        return
    for tokens in options.tokens:
        nbytes = tokens * DIM * 2
        print(
            f"prompts of {tokens} tokens: {1000 * nbytes / 1e9:.3g} GB per 1,000; {measured(tokens, options.examples)}"
        )
    clips = 3600 * FPS / 81
    nbytes = clips * np.prod(CLIP) * 2
    print(
        f"clips: {nbytes / 1e9:.3g} GB per hour of video ({clips:.0f} clips); {measured(None, options.examples // 4)}"
    )


def measured(tokens: int | None, count: int) -> str:
    """Writes a data set of prompts of so many tokens, or of clips, and reads batches of it."""
    rng = np.random.default_rng(0)
    shape = CLIP if tokens is None else (tokens, DIM)
    values = rng.standard_normal((8, *shape), np.float32).astype(ml_dtypes.bfloat16)

    def make(split, first, count):
        for number in range(first, first + count):
            if tokens is None:
                rest = {"caption": "", "caption_number": -1, "source": "", "start": 0.0}
                yield {"latents": values[number % 8], **rest}
            else:
                yield {"prompt": "", "embedding": values[number % 8]}

    features = latent_features(shape, "bfloat16") if tokens is None else embedding_features(DIM, "bfloat16")
    kind = "latents" if tokens is None else "embeddings"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / kind
        write_data_set(path, Plan(kind, features, {}, {"train": [count]}), make, 0, lambda count: None)
        size = sum(file.stat().st_size for file in path.glob("*array_record*")) / (count * values[0].nbytes)
        source = open_data_set(path, kind).splits["train"]
        start = time.perf_counter()
        for _ in range(count // BATCH):
            read_examples(source, rng.integers(0, count, BATCH))
        seconds = (time.perf_counter() - start) / (count // BATCH)
    return f"normal numbers take {size:.2f} of that on disk, a batch of {BATCH} is read in {seconds * 1e3:.0f} ms"


def count_memory() -> None:
    """What the compiler gives the encoders' programs, in bfloat16 and, of the autoencoder, in float32."""
    print(f"on {jax.devices()[0].device_kind}")
    half = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
    encoder = jax.eval_shape(lambda: TextEncoder(TextConfig(**half), rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32), jax.ShapeDtypeStruct((8, 512), jnp.bool_)
    report("UMT5-XXL, 8 prompts of 512 tokens, bfloat16", encode_tokens.lower(encoder, *tokens))
    video = jax.ShapeDtypeStruct((1, 81, 480, 832, 3), jnp.uint8)
    for name, settings in (("bfloat16", half), ("float32", {})):
        vae = jax.eval_shape(functools.partial(lambda config: VAE(config, rngs=nnx.Rngs(0)), VAEConfig(**settings)))
        report(
            f"Wan2.1's autoencoder, a clip of 81 frames of 480x832, {name}",
            encode_frames.lower(WanCodec(vae, vae), video),
        )


def report(name: str, lowered) -> None:
    memory = lowered.compile().memory_analysis()
    weights, temporary = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    print(f"{name}: {weights:.3g} GB of weights and inputs, {temporary:.3g} GB while it runs")


if __name__ == "__main__":
    main()
