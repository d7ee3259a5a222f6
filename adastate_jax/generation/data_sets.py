"""What the commands embed and encode share: options, and where and how a data set is made; imported without JAX."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from adastate_jax.errors import UserError

if TYPE_CHECKING:
    import jax

_SHARD_MEGABYTES = 256


@dataclasses.dataclass(frozen=True)
class Job:
    """A data set that is to be made.

    Attributes:
        checkpoint: folder of converted networks.
        output: folder of the data set.
        batch_size: examples that are encoded at a time.
        devices: that weights and batches are split over.
        shard_bytes: of a file.
    """

    checkpoint: Path
    output: Path
    batch_size: int
    devices: int
    shard_bytes: int

    def mesh(self) -> "jax.sharding.Mesh":
        """The mesh of its devices; raises UserError if there are fewer."""
        from adastate_jax.sharding import make_mesh

        try:
            return make_mesh(fsdp=self.devices)
        except ValueError as error:
            raise UserError(f"--devices={self.devices}: {error}") from None


def add_options(parser: argparse.ArgumentParser, unit: str, batch_size: int) -> None:
    """Adds the options of a `Job`; `unit` is what its examples are called."""
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
        default=_SHARD_MEGABYTES,
        metavar="N",
        help="size of the files; a kill loses the work on one of them (default %(default)s)",
    )


def job_of(options: argparse.Namespace, *whole: str) -> Job:
    """The job that options describe; raises UserError if one of these, or of those named `whole`, makes no sense."""
    for name in ("batch_size", "devices", *whole):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: must be at least 1")
    if not 0 < options.shard_megabytes < 2**40:
        raise UserError(f"--shard-megabytes={options.shard_megabytes}: must be positive")
    if options.batch_size % options.devices:
        raise UserError(f"--batch-size={options.batch_size}: must be a multiple of --devices={options.devices}")
    if not options.checkpoint.is_dir():
        raise UserError(f"--checkpoint={options.checkpoint}: no such folder; name one with networks that convert wrote")
    shard_bytes = max(int(options.shard_megabytes * 2**20), 1)
    return Job(options.checkpoint, options.output, options.batch_size, options.devices, shard_bytes)
