"""What the commands embed and encode share: options of a data set, and the devices that make it."""

import argparse
from pathlib import Path

import jax

from adastate_jax.data.shards import SHARD_BYTES
from adastate_jax.errors import UserError
from adastate_jax.sharding import make_mesh


def add_options(parser: argparse.ArgumentParser, unit: str, batch_size: int) -> None:
    """Adds what a data set is made from and how; `unit` is what its examples are called."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of converted networks")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"{unit} at a time (default %(default)s)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="that weights and batches are split over (default 1)"
    )
    parser.add_argument(
        "--shard-megabytes",
        type=float,
        default=SHARD_BYTES / 2**20,
        metavar="N",
        help="size of the files; a kill loses the work on one of them (default %(default)g)",
    )


def check_options(options: argparse.Namespace, *whole: str) -> None:
    """Raises UserError if an option of `add_options`, or one of `whole`, is below one, or batches cannot be split."""
    for name in ("batch_size", "devices", *whole):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be at least 1")
    if not options.shard_megabytes > 0:
        raise UserError(f"--shard-megabytes={options.shard_megabytes}: must be positive")
    if options.batch_size % options.devices:
        raise UserError(f"--batch-size={options.batch_size}: must be a multiple of --devices={options.devices}")


def devices_mesh(options: argparse.Namespace) -> jax.sharding.Mesh:
    """The mesh of the option `--devices`; raises UserError if there are fewer."""
    try:
        return make_mesh(fsdp=options.devices)
    except ValueError as error:
        raise UserError(f"--devices={options.devices}: {error}") from None


def shard_bytes(options: argparse.Namespace) -> int:
    """Bytes of a shard by the option `--shard-megabytes`."""
    return int(options.shard_megabytes * 2**20)
