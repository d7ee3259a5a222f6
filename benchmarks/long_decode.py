"""Whether decoding a long stream stays constant: time per chunk, peak memory and cache of decoders of random weights.

python -m benchmarks.long_decode --frames=501
"""

import argparse
import time

import jax
import numpy as np
from flax import nnx

from adastate_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from adastate_jax.models.vae import VAE, VAEConfig
from adastate_jax.models.video_coding import decode, decoder_cache
from benchmarks.long_stream import peak_mebibytes

CHUNK = 3  # latent frames


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=501, help="latent frames; each but the first shows four")
    parser.add_argument("--height", type=int, default=16, help="of the video")
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    print(f"{options.frames} latents of {options.height}x{options.width} pixels on {jax.devices()[0].device_kind}")
    decoders = {
        "tiny": lambda: TinyVAE(TinyVAEConfig(), rngs=nnx.Rngs(0)),
        "wan": lambda: VAE(VAEConfig(), rngs=nnx.Rngs(0), parts=("decoder",)),
    }
    for name, make in decoders.items():
        measure(name, jax.jit(make)(), options)


def measure(name: str, decoder, options: argparse.Namespace) -> None:
    height, width = options.height // 8, options.width // 8
    cache = decoder_cache(decoder, 1, height, width)
    step = jax.jit(decode, static_argnames="first", donate_argnames="cache")
    step.clear_cache()  # programs are counted per function, whatever wraps it
    rng, seconds, peaks, sizes = np.random.default_rng(0), [], [], set()
    for chunk in range(options.frames // CHUNK):
        latents = rng.standard_normal((1, CHUNK, height, width, 16), np.float32)
        start = time.perf_counter()
        video, cache = step(decoder, latents, cache, first=chunk == 0)
        video.block_until_ready()
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_mebibytes())
        sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(cache)))
    early = len(peaks) // 5
    (size,) = sizes  # one size throughout
    print(
        f"{name}: cache {size / 2**20:.2f} MiB, chunk {np.median(seconds[early:]) * 1e3:.1f} ms (p90 "
        f"{np.percentile(seconds[early:], 90) * 1e3:.1f}), {step._cache_size()} programs, peak {peaks[early]:.1f} MiB "
        f"after {early + 1} chunks, {peaks[-1]:.1f} MiB at the end ({peaks[-1] / peaks[early] - 1:+.2%})"
    )


if __name__ == "__main__":
    main()
