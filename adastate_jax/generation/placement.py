"""Where a stream's networks lie, and how much memory they take there; without JAX until something is placed.

Heads are split over devices where they, and the feed-forward network's width, are divided by them (`mesh.model`); else
devices exchange tokens for heads (`mesh.context`, see `models/context_parallel.py`), and may fill heads up.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from adastate_jax.errors import UserError, shown

if TYPE_CHECKING:
    import jax

    from adastate_jax.config.run import Config
    from adastate_jax.models.dit import DiT

WEIGHTS = ("int8", "float8")  # those of models/quantized.py


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model is laid out to stream.

    Attributes:
        weights: of the transformer's blocks, `int8` or `float8`; None keeps what is stored.
        devices: how many the transformer is split over; None is what the configuration's mesh says, or one.
        decoder_device: the codec's, see `find_device`; None is the transformer's.
        low_memory: int8 weights if no others are named, one latent decoded at a time, and a text encoder that is let go
            as soon as it has encoded.

    Raises:
        UserError: a value is none of these.
    """

    weights: str | None = None
    devices: int | None = None
    decoder_device: str | None = None
    low_memory: bool = False

    def __post_init__(self):
        if self.weights is not None and self.weights not in WEIGHTS:
            raise UserError(f"weights must be {' or '.join(WEIGHTS)}, or None, got {shown(self.weights)}")
        if self.devices is not None and (type(self.devices) is not int or self.devices < 1):
            raise UserError(f"devices must be a whole number of at least 1, or None, got {shown(self.devices)}")
        if not isinstance(self.decoder_device, str | None):
            raise UserError(f"decoder_device must be a text such as cpu or 1, got {shown(self.decoder_device)}")

    @property
    def quantization(self) -> str | None:
        return self.weights or (WEIGHTS[0] if self.low_memory else None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a command that streams."""
    group = parser.add_argument_group("where it runs")
    group.add_argument(
        "--cache", type=Path, metavar="DIR", help="keeps compiled programs (default ~/.cache/adastate_jax/compiled)"
    )
    group.add_argument("--weights", choices=WEIGHTS, help="keeps the transformer's weights in eight bits each")
    group.add_argument("--devices", type=int, metavar="N", help="splits the transformer over N devices")
    group.add_argument(
        "--decoder-device",
        metavar="DEVICE",
        help="decodes on another device than the transformer's, while that goes on: its number, or cpu",
    )
    group.add_argument(
        "--low-memory",
        action="store_true",
        help="int8 weights, one latent decoded at a time, and the text encoder let go when it has encoded",
    )


def placement_of(options: argparse.Namespace) -> Placement:
    """What `add_arguments` found; raises UserError that names the option."""
    if options.devices is not None and options.devices < 1:
        raise UserError(f"--devices={options.devices}: must be at least 1")
    return Placement(options.weights, options.devices, options.decoder_device, options.low_memory)


def find_device(name: str) -> "jax.Device":
    """A device by its number among the default platform's (`1`), its platform (`cpu`, the first), or both (`cpu:1`).

    Raises:
        UserError: there is none; it lists those that are here.
    """
    import jax

    from adastate_jax.sharding import all_devices

    here = all_devices()
    platform, _, number = name.rpartition(":") if ":" in name or name.isdecimal() else (name, "", "0")
    try:
        if not name or not number.isdecimal():
            raise ValueError(name)
        return (jax.local_devices(backend=platform) if platform else here)[int(number)]
    except (RuntimeError, ValueError, IndexError):
        numbers = f"0 … {len(here) - 1}" if len(here) > 1 else "0"
        raise UserError(
            f"decoder_device {name}: no such device; of {here[0].platform} there are {numbers}, "
            "and cpu is the host's processor"
        ) from None


def stream_mesh(config: "Config", devices: int, trained_here: bool) -> "jax.sharding.Mesh":
    """A mesh of so many devices for the configuration's student.

    Args:
        trained_here: whether the text encoder lies on the same devices.

    Raises:
        UserError: there are fewer devices, or no axis of the mesh divides the network.
    """
    from adastate_jax.config.mesh import MeshConfig, require_divisible_network, require_divisible_text
    from adastate_jax.sharding import make_mesh

    network = config.network("student")
    tokens = network.frame_tokens(*config.latent_shape[:2])
    reasons = []
    for axis in ("model", "context"):
        split = MeshConfig(**{axis: devices})
        try:
            require_divisible_network(split, "student", network, tokens)
            if trained_here:
                require_divisible_text(split, config.text)
        except ValueError as error:
            reasons.append(str(error))
            continue
        try:
            return make_mesh(**dataclasses.asdict(split))
        except ValueError as error:
            raise UserError(f"devices {devices}: {error}") from None
    raise UserError(f"devices {devices}: cannot share this transformer: {'; '.join(reasons)}")


def spared(config: "Config") -> "Config":
    """A configuration whose decoders take as little memory as they can and be exact: a latent per call.

    Tiles would not help: what they share makes Wan2.1's cache larger by more than its features become smaller.
    """
    return dataclasses.replace(
        config,
        vae=dataclasses.replace(config.vae, latents_per_call=1),
        tiny_vae=dataclasses.replace(config.tiny_vae, latents_per_call=1),
    )


def in_eight_bits(student: "DiT", quantization: str, mesh: "jax.sharding.Mesh") -> "DiT":
    """The transformer with its blocks' weights in eight bits.

    Raises:
        UserError: they are in eight bits of another kind already.
    """
    from adastate_jax.models.quantized import quantize_network

    if student.config.quantization == quantization:
        return student
    if student.config.quantization:
        raise UserError(f"weights {quantization}: the configuration has them in {student.config.quantization} already")
    return quantize_network(student, quantization, mesh)
