"""Chips that need not be here: what they have, and how to compile programs for them.

Compilers take a description of the machine in place of the machine: `libtpu` that of a TPU slice, JAX's CUDA plugin
that of a GPU. Nothing can run so, but whether a program fits, what it holds, moves and exchanges is known.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies

from adastate_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: for people.
        memory: bytes that a program may use: of TPUs what the compiler says, of GPUs of the data sheet.
        flops: bfloat16 operations per second by the data sheet.
        bandwidth: bytes of memory per second by the data sheet.
        exchange: bytes per second that a chip receives of others of its slice or host, all of its links together, by
            the data sheet.
        clock: cycles per second that the compiler's estimates are turned into time with; None where it gives none.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    exchange: float
    clock: float | None = None

    @property
    def is_gpu(self) -> bool:
        return "NVIDIA" in self.name


CHIPS = {
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1640e9, 400e9, 1.75e9),
    "h100": Chip("NVIDIA H100 SXM", 79.1 * GIB, 989e12, 3350e9, 450e9),
    "h200": Chip("NVIDIA H200 SXM", 139.8 * GIB, 989e12, 4800e9, 450e9),
}

_GPUS_PER_HOST = 8

# Whether for GPUs → the module that compiles, what people call it, and what to install for it.
_COMPILERS = {
    False: ("libtpu", "libtpu", "jax[tpu]"),
    True: ("jax_cuda12_plugin", "JAX's plugin for CUDA", "jax[cuda12]"),
}

# What Google Cloud calls slices, and how many of what it counts make a chip: v5p-16 are 8 chips of two cores.
_CLOUD_KINDS = {"v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2)}

# What the CUDA compiler asks of a GPU: from the device descriptions that XLA prints on real ones.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""

# libtpu looks for a TPU's host unless it is told of one; any will do.
_NO_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process waits for the first one's lock, and gives up
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips to compile for.

    Attributes:
        name: as it was asked for, `v6e:2x2`.
        chip: each of them.
        devices: their descriptions, as a mesh takes them.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]

    @property
    def is_gpu(self) -> bool:
        return self.devices[0].platform == "gpu"


def find_target(name: str) -> Target:
    """The chips of a name, which is a TPU slice's shape or a number of GPUs: `v5e:1`, `v6e:2x2`, `v5p:2x2x2`, `h100:8`.

    Raises:
        UserError: the name is none, there is no such slice, or what compiles for it is not installed.
    """
    chip, sizes = read_target(name)
    topology = _gpus(name, chip, math.prod(sizes)) if chip.is_gpu else _tpus(name, sizes)
    return Target(name, chip, tuple(topology.devices))


def read_target(name: str) -> tuple[Chip, list[int]]:
    """The chip that a name is of, and the sides of the slice, without asking a compiler.

    Raises:
        UserError: it is none, or the slice has another number of sides, or the GPUs are no whole hosts.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", shape):
        raise UserError(
            f"{name}: name a chip and how many, for example v5e:1, v6e:2x2 or h100:8; known are {', '.join(CHIPS)}"
            + _named_in_the_cloud(name)
        )
    chip, sizes = CHIPS[kind], [int(size) for size in shape.split("x")]
    count, axes = math.prod(sizes), _sides(kind)
    if chip.is_gpu and count > _GPUS_PER_HOST and count % _GPUS_PER_HOST:
        raise UserError(f"{name}: a host has {_GPUS_PER_HOST} of them; name up to so many, or whole hosts")
    if not chip.is_gpu and count > 1 and len(sizes) != axes:
        raise UserError(f"{name}: a slice of {kind} has {axes} sides, for example {kind}:{'x'.join('2' * axes)}")
    return chip, sizes


def _named_in_the_cloud(name: str) -> str:
    """What to say of a name such as v5p-16, which counts cores or chips in place of sides."""
    found = re.fullmatch(r"(\w+)-([1-9]\d{0,4})", name)
    if not found or found[1] not in _CLOUD_KINDS:
        return ""
    kind, of_a_chip = _CLOUD_KINDS[found[1]]
    chips = int(found[2]) // of_a_chip
    sides = [1] * _sides(kind)
    while math.prod(sides) * 2 <= chips:  # the shortest first: slices are as square as they can be
        sides[sides.index(min(sides))] *= 2
    if math.prod(sides) != chips:
        return ""
    order = sorted(sides, reverse=kind == "v5p" and chips <= 4)  # one host is 2x2x1, more are 2x2x2, 2x2x4, …
    return f". {name} has {chips} chips: {kind}:{'x'.join(map(str, order))}"


def missing_compiler(name: str) -> str | None:
    """What would have to be installed to compile for a target, in a line; None if it is here.

    Raises:
        UserError: the name is none.
    """
    module, title, package = _COMPILERS[read_target(name)[0].is_gpu]
    if importlib.util.find_spec(module) is not None:
        return None
    version = ".".join(str(part) for part in jax.__version_info__)
    return f'{title} is not installed: pip install "{package}=={version}", or the extra compile of this package'


def _sides(kind: str) -> int:
    """How many sides a slice has."""
    return 3 if kind == "v5p" else 2


def _tpus(name: str, sizes: list[int]):
    _require(name)
    kind = name.partition(":")[0]
    if math.prod(sizes) == 1:
        sizes = [1] * _sides(kind)
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    os.environ |= {key: os.environ.get(key, value) for key, value in _NO_TPU_HOST.items()}
    return _topology(name, platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, sizes))}", **options)


def _gpus(name: str, chip: Chip, count: int):
    _require(name)
    hosts, each = max(count // _GPUS_PER_HOST, 1), min(count, _GPUS_PER_HOST)
    description = _GPU.format(bandwidth=int(chip.bandwidth), memory=int(chip.memory), name=chip.name)
    shape = f"1x{hosts}x{each}"
    return _topology(name, platform="cuda", topology_name=chip.name, target_config=description, topology=shape)


def _require(name: str) -> None:
    if missing := missing_compiler(name):
        raise UserError(f"{name}: to compile for it, no such chip need be here, but {missing}")


def _topology(name: str, **description):
    try:
        return topologies.get_topology_desc(**description)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{name}: there is no such slice ({str(error).strip().splitlines()[0]})") from None


@contextlib.contextmanager
def answering_for(target: Target) -> Iterator[None]:
    """While it lasts, JAX's looks at the local GPU before it lowers cuDNN's attention are answered for the target."""
    if not target.is_gpu:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as fused  # nothing public tells it

    answers = {
        "check_cudnn_version": lambda: 91000,
        "check_compute_capability": lambda wanted: float(wanted) <= 9.0,
        "is_cuda_compute_capability_equal": lambda wanted: wanted == "9.0",
    }
    before = {question: getattr(fused, question) for question in answers}
    for question, answer in answers.items():
        setattr(fused, question, answer)
    try:
        yield
    finally:
        for question, answer in before.items():
            setattr(fused, question, answer)


def make_target_mesh(target: Target, **extents: int) -> jax.sharding.Mesh:
    """A mesh of these extents over a target's chips.

    Raises:
        UserError: the target has another number of chips.
    """
    size = math.prod(extents.values())
    if size != len(target.devices):
        shape = ", ".join(f"{axis} {extent}" for axis, extent in extents.items())
        raise UserError(f"config.mesh: {target.name} has {len(target.devices)} devices, not {size} ({shape})")
    devices = np.array(target.devices).reshape(tuple(extents.values()))
    return jax.sharding.Mesh(devices, tuple(extents), axis_types=(jax.sharding.AxisType.Auto,) * len(extents))
