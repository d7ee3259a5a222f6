"""Where a run's time goes, in spans of wall time that leave nothing out, and how fast its steps are."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

SPANS = {
    "start": "imports, finding the other processes, first or restored weights",
    "data": "making data sets, codec and trajectories; waiting for a batch while the devices have nothing to do",
    "compile": "tracing and compiling the training steps",
    "step": "training steps",
    "save": "checkpoints, as far as the steps wait for them",
    "profile": "beginning and writing a trace",
    "sample": "the stage of that name",
    "repeated": "steps that came after the last checkpoint when the run was cut, and were done again",
}


class Spans:
    """A clock whose time is credited, lap by lap, to the names of `SPANS`.

    begun: `time.monotonic()` when it began to run; by default now.
    """

    def __init__(self, begun: float | None = None) -> None:
        self._since = time.monotonic() if begun is None else begun
        self._seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Credits what has passed since the last lap to a name."""
        if name not in SPANS:
            raise ValueError(f"{name}: no span; {', '.join(SPANS)} are")
        now = time.monotonic()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds per name since the last call; what has passed since the last lap is not among them."""
        taken, self._seconds = self._seconds, {}
        return taken


@dataclasses.dataclass(frozen=True)
class Work:
    """What the steps of a run take, for their rate.

    Attributes:
        flops: (stage, step) → floating-point operations of the networks' arithmetic, on all devices together; None
            where nothing counts them.
        devices: how many compute; there may be more.
        peak: of one device, operations per second by its data sheet; None where it is not known.
    """

    flops: Callable[[str, int], int | None]
    devices: int
    peak: float | None

    def rates(self, stage: str, steps: list[int], seconds: float) -> dict[str, float]:
        """Of steps that took so many seconds: `tflops_per_second` of a device, and its `utilisation` in 0 … 1."""
        counted = [self.flops(stage, step) for step in steps]
        if not counted or None in counted or seconds <= 0:
            return {}
        rate = sum(counted) / seconds / self.devices
        return {"tflops_per_second": rate / 1e12, **({"utilisation": rate / self.peak} if self.peak else {})}


def is_busy(outputs: Mapping[str, jax.Array]) -> bool:
    """Whether the devices still compute what a step has given."""
    return not all(value.is_ready() for value in outputs.values())


def device_memory() -> dict[str, float]:
    """Peak memory of each of this process's devices so far, in GiB; nothing where the backend does not tell."""
    peaks = {str(device): (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()}
    return {name: peak / 2**30 for name, peak in peaks.items() if peak is not None}


def shares(seconds: Mapping[str, float]) -> str:
    """Seconds per span as percents of their sum, the largest first."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / total:.0%}" for name, value in ordered if value >= total / 200)


def summary(now: Mapping[str, float], records: list[Mapping[str, Any]], memory: Mapping[str, float]) -> list[str]:
    """What a run says of its time when it ends.

    Args:
        now: seconds per span of this call.
        records: of `metrics.jsonl`, those of times: of all calls with this work directory.
        memory: peak of every device, in GiB.
    """
    lines = []
    if sum(now.values()) > 0:
        lines.append(f"time: {sum(now.values()):.1f} s: {shares(now)}")
    whole: dict[str, float] = {}
    for name, value in ((name, value) for record in records for name, value in record.items()):
        if name.startswith("seconds_"):
            whole[name[8:]] = whole.get(name[8:], 0.0) + value
    if sum(whole.values()) > 1.001 * sum(now.values()):
        lines.append(f"time of all calls with this work directory: {sum(whole.values()):.1f} s: {shares(whole)}")
    for stage in dict.fromkeys(record["stage"] for record in records if "tflops_per_second" in record):
        rated = [record for record in records if record["stage"] == stage and "tflops_per_second" in record]
        timed = [(record.get("seconds_step") or record.get("seconds_repeated", 0.0), record) for record in rated]
        weight = sum(seconds for seconds, _ in timed)
        means = {
            name: sum(seconds * record[name] for seconds, record in timed) / weight
            for name in ("tflops_per_second", "utilisation")
            if all(name in record for record in rated)
        }
        used = f", {means['utilisation']:.1%} of its peak by the data sheet" if "utilisation" in means else ""
        lines.append(f"{stage}: steps at {means['tflops_per_second']:.3g} TFLOP/s of a device{used}")
    if memory:
        most, least = max(memory, key=memory.get), min(memory, key=memory.get)
        lines.append(f"memory: at most {memory[most]:.2f} GiB ({most}), at least {memory[least]:.2f} ({least})")
    return lines
