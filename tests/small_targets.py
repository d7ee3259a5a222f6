"""This processor as what programs are compiled for, and a configuration whose programs are small."""

import pathlib

import jax

from adastate_jax.benchmarking.targets import Chip, Target
from adastate_jax.config.files import parse_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = [
    f"--config={ROOT / 'configs' / 'tiny.py'}",
    *("--config.model.dim=32", "--config.model.num_heads=2", "--config.model.ffn_dim=32"),
    *("--config.model.num_layers=2", "--config.stream.denoising_steps=(1000.0, 500.0)"),
    *("--config.stages=()", "--config.decoder=wan", "--config.model.in_channels=16", "--config.model.out_channels=16"),
    *("--config.vae.dim=8", "--config.tiny_vae.widths=(8, 8, 8)", "--config.distill.batch_size=2"),
]
CONFIG = parse_config(SMALL)
HOST = Chip("this processor", memory=2**33, flops=1e11, bandwidth=1e10, exchange=1e9, clock=1e9)


def here(devices: int, chip: Chip = HOST) -> Target:
    """This processor's first devices as a target."""
    return Target(f"cpu:{devices}", chip, tuple(jax.devices()[:devices]))
