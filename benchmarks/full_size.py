"""A Wan2.1-T2V-1.3B of random weights through `convert` and back, and one pass of ours beside one of diffusers'.

python -m benchmarks.full_size --folder=DIR     # 9 GB there, 8 GB of memory, requirements-dev.txt; some minutes

Each step is a process of its own, whose time and peak memory are printed. The last two steps run the network in float32
on three latent frames of 8 × 12: ours as the first chunk of a stream, which sees nothing before it, and diffusers' on
the weights that our export wrote. There both compute the same.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

STEPS = ("write", "convert", "export", "ours", "theirs")
SIGMA = 0.9375
TOLERANCE = 1e-4  # float32 sums in another order, through thirty blocks


def write(folder: Path) -> None:
    """Random bfloat16 weights of plausible sizes under official names."""
    from adastate_jax.models.dit import DiTConfig
    from adastate_jax.weights.kinds import KINDS
    from adastate_jax.weights.safetensors_file import write_safetensors
    from adastate_jax.weights.tensors import BFLOAT16

    slots = KINDS["transformer"].slots(DiTConfig())
    rng = np.random.default_rng(0)

    def blocks():
        for name, slot in slots.items():
            matrix = name.endswith("weight") and len(slot.shape) > 1
            scale = math.prod(slot.shape[1:]) ** -0.5 if matrix else 0.05
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            yield (mean + scale * rng.standard_normal(slot.shape, np.float32)).astype(BFLOAT16)

    write_safetensors(
        folder / "official.safetensors", {name: (BFLOAT16, slot.shape) for name, slot in slots.items()}, blocks(), {}
    )


def convert(folder: Path) -> None:
    """The command, from the official file."""
    from adastate_jax.convert import main

    main([f"--source={folder / 'official.safetensors'}", f"--output={folder / 'converted'}"])


def export(folder: Path) -> None:
    """The command, back to diffusers' names."""
    from adastate_jax.convert import main

    main(
        [
            f"--source={folder / 'converted'}",
            f"--output={folder / 'diffusers'}",
            "--to=safetensors",
            "--names=diffusers",
        ]
    )


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Noisy latents [1, 3, 8, 12, 16] and text embeddings [1, 512, 4096], zero past the prompt."""
    rng = np.random.default_rng(1)
    text = rng.standard_normal((1, 512, 4096), np.float32)
    text[:, 20:] = 0
    return rng.standard_normal((1, 3, 8, 12, 16), np.float32), text


def ours(folder: Path) -> None:
    """Clean estimate of a stream's first chunk after one step."""
    import jax

    from adastate_jax.streaming.carry import initial_carry, seed_keys
    from adastate_jax.streaming.denoising import denoise, read_context
    from adastate_jax.streaming.schedule import StreamConfig, layout_of, phase_of
    from adastate_jax.weights.converted import load_converted

    jax.config.update("jax_default_matmul_precision", "highest")
    latents, text = inputs()
    config = StreamConfig()
    layout = layout_of(phase_of(0, config), config)
    model = load_converted(folder / "converted", "transformer", dtype="float32")

    @jax.jit
    def first_step(model, latents, text):
        carry = initial_carry(model.config, config, seed_keys(0, 1), *latents.shape[2:4])
        context = read_context(model.config, carry.cache, config, layout, latents)
        return denoise(model, latents, SIGMA, model.text_keys_values(text), layout, context)[0]

    np.save(folder / "ours.npy", first_step(model, latents, text))


def theirs(folder: Path) -> None:
    """The same estimate from diffusers' bidirectional pass."""
    import diffusers
    import torch

    latents, text = inputs()
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "diffusers", torch_dtype=torch.float32)
    with torch.no_grad():
        channels_first = torch.from_numpy(np.moveaxis(latents, -1, 1).copy())
        flow = model(channels_first, torch.tensor([1000 * SIGMA]), torch.from_numpy(text), return_dict=False)[0]
    np.save(folder / "theirs.npy", latents - SIGMA * np.moveaxis(flow.numpy(), 1, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the files; made, and left there")
    parser.add_argument("--step", choices=STEPS, help="run this step alone, in this process")
    options = parser.parse_args()
    if options.step:
        globals()[options.step](options.folder)
        return
    options.folder.mkdir(parents=True)
    for step in STEPS:
        start = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.full_size", f"--folder={options.folder}", f"--step={step}"]
        child = subprocess.Popen(command)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            sys.exit(f"{step} failed")
        print(f"{step:8} {time.perf_counter() - start:7.1f} s, peak {usage.ru_maxrss / 1024:7.0f} MiB", flush=True)
    estimates = [np.load(options.folder / f"{name}.npy") for name in ("ours", "theirs")]
    error = np.abs(estimates[0] - estimates[1]).max()
    print(f"largest error {error:.2e} of values up to {np.abs(estimates[1]).max():.2f} (tolerance {TOLERANCE:g})")
    sys.exit(not error <= TOLERANCE)


if __name__ == "__main__":
    main()
