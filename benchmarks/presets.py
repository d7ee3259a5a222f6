"""Whether every published method streams at constant cost: time per chunk, memory and compilations, preset by preset.

python -m benchmarks.presets --config=configs/tiny.py --chunks=200
"""

import argparse
import time

import jax
import numpy as np
from flax import nnx

from adastate_jax.config.files import parse_config
from adastate_jax.models.dit import DiT
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.presets import PRESETS
from adastate_jax.streaming.rollout import stream, stream_step
from adastate_jax.streaming.schedule import phase_of
from benchmarks.long_stream import peak_mebibytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, metavar="NAME")
    options = parser.parse_args()
    config = parse_config([f"--config={options.config}"])
    height, width = (size // config.codec.patch for size in config.data.size)
    latent_shape = (height, width, config.codec.channels)
    model = jax.jit(lambda: DiT(config.model, rngs=nnx.Rngs(0)))()
    text = model.text_keys_values(np.zeros((1, config.text.text_length, config.text.dim), np.float32))

    print(f"{options.chunks} chunks on {jax.devices()[0].device_kind}; ms per chunk behind the fill, and per frame")
    print("preset                     phases  compiled   first s   median ms   p90 ms  ms/frame   carry MiB   peak MiB")
    measured = {}
    for name in options.presets:
        settings = PRESETS[name].stream
        if settings in measured:
            print(f"{name:25}  as {measured[settings]}")
            continue
        measured[settings] = name
        phases = {phase_of(chunk, settings) for chunk in range(options.chunks)}
        stream_step.clear_cache()
        carry = initial_carry(config.model, settings, seed_keys(0, 1), height, width)
        seconds, sizes = [], []
        start = time.perf_counter()
        chunks = stream(model, carry, text, settings, latent_shape)
        for _ in range(options.chunks):
            carry, chunk = next(chunks)
            chunk.content.block_until_ready()
            seconds.append(time.perf_counter() - start)
            sizes.append(sum(x.nbytes for x in jax.tree.leaves(carry)))
            start = time.perf_counter()
        compiled = stream_step._cache_size()
        if compiled != len(phases) or len(set(sizes)) != 1:
            raise SystemExit(f"{name}: {compiled} programs for {len(phases)} phases, carries of {set(sizes)} bytes")
        warm = settings.num_fill_chunks + len(settings.cycle)
        steady = 1e3 * np.array(seconds[warm:])
        print(
            f"{name:25}  {len(phases):6d}  {compiled:8d}  {sum(seconds[:warm]):8.1f}  {np.median(steady):10.2f} "
            f"{np.percentile(steady, 90):8.2f}  {np.median(steady) / settings.chunk_frames:8.2f}  "
            f"{sizes[0] / 2**20:10.2f}  {peak_mebibytes():9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
