"""The machine under test: what it is, what it can do at best, how long work takes, how much memory it took."""

import contextlib
import functools
import math
import platform
import resource
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.models.linear import stated_precision

_CHAIN = 8  # products or copies per timed call, so that a call's overhead does not count


def describe() -> dict[str, Any]:
    """The device and the versions that speed depends on."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    for distribution in ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[distribution] = metadata.version(distribution)
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "count": jax.device_count(),
        "host": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
        "runtime": device.client.platform_version.splitlines()[0],
        "versions": versions,
    }


def peak_mebibytes() -> float:
    """Peak memory so far: of the first device where it tells, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kibibytes on Linux


def timed(step: Callable[[], Any], repeats: int) -> tuple[float, ...]:
    """Seconds of each call, from its dispatch until its results are there; one call before them is not counted."""
    jax.block_until_ready(step())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)


@functools.partial(jax.jit, donate_argnums=0)
def _multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    precision = stated_precision(x.dtype)  # as the networks: a float32 ceiling of TF32 would be none of theirs
    return jax.lax.fori_loop(0, _CHAIN, lambda _, x: jnp.matmul(x, matrix, precision=precision), x)


@functools.partial(jax.jit, donate_argnums=0)
def _copy(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, _CHAIN, lambda _, x: x + 1, x)


def _best(function: Callable[..., jax.Array], x: jax.Array, *rest: jax.Array) -> float:
    """Seconds of one turn of the chain, the fastest of several."""

    def step():
        nonlocal x
        x = function(x, *rest)
        return x

    return min(timed(step, 5)) / _CHAIN


def probe() -> dict[str, float]:
    """What the default device reaches at best.

    Returns:
        `bfloat16` and `float32`: FLOP/s of square matrix products, float32 ones of that precision, as the
        networks'. `copy`: bytes read and written per second by adding one to a large array.
    """
    small = jax.devices()[0].platform == "cpu"
    side, length = (1024, 1 << 26) if small else (8192, 1 << 29)
    numbers = np.random.default_rng(0).standard_normal((side, side), np.float32)
    ceilings = {}
    for dtype in ("bfloat16", "float32"):
        matrix = jnp.asarray(numbers / math.sqrt(side), dtype)  # so that the products neither grow nor vanish
        ceilings[dtype] = 2 * side**3 / _best(_multiply, jnp.asarray(numbers, dtype), matrix)
    ceilings["copy"] = 2 * 4 * length / _best(_copy, jnp.zeros(length, jnp.float32))
    return ceilings
