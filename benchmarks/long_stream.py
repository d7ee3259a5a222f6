"""Whether a long stream stays constant: time per chunk and peak memory along a stream of random weights.

python -m benchmarks.long_stream --config=configs/tiny.py --chunks=2000
"""

import argparse
import resource
import time

import jax
import numpy as np
from flax import nnx

from adastate_jax.config.files import parse_config
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.rollout import stream


def peak_mebibytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--chunks", type=int, default=2000)
    options = parser.parse_args()
    config = parse_config([f"--config={options.config}"])
    model = jax.jit(lambda: DiT(config.model, rngs=nnx.Rngs(0)))()
    text = model.text_keys_values(np.zeros((1, config.text.text_length, config.text.dim), np.float32))
    height, width = (size // config.codec.patch for size in config.data.size)
    latent_shape = (height, width, config.codec.channels)
    carry = initial_carry(config.model, config.stream, seed_keys(0, 1), height, width)

    seconds, peaks = [], []
    start = time.perf_counter()
    for _, chunk in stream(model, carry, text, config.stream, latent_shape, options.chunks):
        chunk.content.block_until_ready()
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_mebibytes())
        start = time.perf_counter()
    print(f"{options.chunks} chunks of {config.stream.chunk_frames} latent frames on {jax.devices()[0].device_kind}")
    print("chunks         median ms   p90 ms   peak MiB at the end")
    for first in range(100, options.chunks, max((options.chunks - 100) // 5, 1)):
        part = np.array(seconds[first : first + max((options.chunks - 100) // 5, 1)]) * 1e3
        last = min(first + len(part), options.chunks) - 1
        print(f"{first:5d}..{last:5d}   {np.median(part):9.2f} {np.percentile(part, 90):8.2f}   {peaks[last]:9.1f}")
    print(
        f"peak after chunk 100: {peaks[99]:.1f} MiB; at the end: {peaks[-1]:.1f} MiB ({peaks[-1] / peaks[99] - 1:+.2%})"
    )


if __name__ == "__main__":
    main()
