"""What the bench command measures, section by section, and how it is written down."""

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from adastate_jax.benchmarking import machine, measure
from adastate_jax.benchmarking.measure import Measurement, Subject
from adastate_jax.benchmarking.sections import SECTIONS
from adastate_jax.config.run import Config
from adastate_jax.console import progress
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.models.attention import resolve_backend
from adastate_jax.sharding import make_mesh

DEFINITIONS = {
    "time": "from dispatch until the device is done; text embeddings are given, noise is drawn inside, batch 1",
    "start to ready": "from the start of a process until every program of a stream is compiled and has run once, with "
    "random weights; cold, and with the compiled programs on disk",
    "DiT pass": "one pass over the live frames of a steady chunk, state among them, against the cache",
    "chunk": "a steady chunk: all denoising steps and the clean pass",
    "decoder": "a steady chunk's latents into 8-bit images on the device",
    "end to end": "from the end of one steady chunk's writing into an mp4 file to the end of the next's",
    "first image": "from text embeddings to the first chunk's images on the host, everything compiled",
    "prompt switch": "from the last images of a prompt on the host to the first images of the next one, both chunks "
    "steady, the transition a switch",
    "training": "one update, without reading data or encoding text and video; a student's rollout draws how many "
    "denoising steps it takes, its operations are those of the mean",
    "percent_of_ceiling": "counted operations / median time / the square matrix product of the same dtype, "
    "float32 in full precision",
    "fps dit": "images of a chunk / its time",
    "fps with_decoder": "images of a chunk / (its time + the decoder's, one after the other)",
    "fps end_to_end": "images of the steady chunks / their time until the mp4 file is closed",
    "growth_mebibytes": "what peak memory grew by from the first repetition to the last",
    "peak_mebibytes": "so far, of the device where it tells, else of the process",
}


def _until_ready(arguments: Sequence[str], cache: str) -> Iterator[Measurement]:
    """Starts the command twice as a new process; the second finds the first's compiled programs in the cache."""
    command = [sys.executable, "-m", "adastate_jax.bench", *arguments, "--until-ready"]
    environment = os.environ | {f"JAX_{name.upper()}": str(value) for name, value in _caching(cache).items()}
    for name in ("cold", "cached"):
        start = time.perf_counter()
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            try:
                peak = process.stdout.readline()
                seconds = time.perf_counter() - start
                process.communicate()
            except BaseException:
                process.kill()
                raise
            log.seek(0)
            lines = log.read().strip().splitlines() or ["it said nothing"]
        if process.returncode:
            raise UserError(f"--only ready: a stream does not get ready: {lines[-1].removeprefix('error: ')}")
        yield Measurement(f"start to ready, {name}", (seconds,), peak_mebibytes=float(peak))


def _caching(cache: str) -> dict[str, Any]:
    """JAX's settings that keep all compiled programs in a folder."""
    return {
        "compilation_cache_dir": cache,
        "persistent_cache_min_compile_time_secs": 0,
        "persistent_cache_min_entry_size_bytes": 0,
    }


@contextlib.contextmanager
def _cached_programs(cache: str) -> Iterator[None]:
    """What other processes have compiled into a folder is not compiled again."""
    before = {name: getattr(jax.config, f"jax_{name}") for name in _caching(cache)}

    def configure(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(f"jax_{name}", value)
        compilation_cache.reset_cache()

    configure(_caching(cache))
    try:
        yield
    finally:
        configure(before)


def _measurements(subject: Subject, section: str, repeats: int) -> Iterator[Measurement]:
    """The rows of a section."""
    if section == "pass":
        yield measure.time_pass(subject, repeats)
    elif section == "chunk":
        yield measure.time_chunk(subject, repeats)
    elif section == "training":
        for stage in ("pretrain", "initialize", "distill"):
            if stage in subject.config.stages:
                yield from measure.time_training(subject, stage, repeats)
    else:
        function = {
            "decode": measure.time_decoder,
            "end_to_end": measure.time_end_to_end,
            "first_image": measure.time_first_image,
            "prompt_switch": measure.time_prompt_switch,
        }[section]
        for name in subject.codecs:
            yield function(subject, name, repeats)


def run(config: Config, chosen: Sequence[str], repeats: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures what was asked for; returns it as it is written to the file.

    Args:
        chosen: some of `SECTIONS`.
        repeats: repetitions behind each median.
        arguments: of a command that has the same configuration.

    Raises:
        UserError: the configuration needs other devices, or the stream of another process fails.
    """
    rows: list[Measurement] = []
    skipped: dict[str, str] = {}
    sections = [section for section in SECTIONS if section in chosen]
    with tempfile.TemporaryDirectory() as cache, progress("bench", len(sections) + 1, unit="section") as bar:
        if "ready" in sections:
            bar.set_description("bench: compiling and starting streams")
            rows += _until_ready(arguments, cache)
            sections.remove("ready")
            bar.update(1)
        mesh = mesh_of(config)
        with _cached_programs(cache), jax.set_mesh(mesh):
            bar.set_description("bench: weights")
            subject = measure.prepare(config, mesh) if sections else None
            for section in sections:
                bar.set_description(f"bench: compiling and timing {section}")
                try:
                    rows.extend(_measurements(subject, section, repeats))
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    skipped[section] = "out of memory"
                bar.update(1)
        bar.set_description("bench: machine")
        ceilings = machine.probe()  # last, because its arrays would count as peak memory
        bar.update(1)
    return _record(config, rows, skipped, ceilings)


def mesh_of(config: Config) -> jax.sharding.Mesh:
    """The mesh of a configuration; raises UserError where its devices are not here."""
    try:
        return make_mesh(**dataclasses.asdict(config.mesh))
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from None


def _record(
    config: Config, rows: Sequence[Measurement], skipped: Mapping[str, str], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    model = config.model
    devices = math.prod(dataclasses.astuple(config.mesh))
    named = {row.name: row for row in rows}
    images = config.stream.chunk_frames * config.time_factor
    fps: dict[str, Any] = {"images_per_chunk": images}
    if "chunk" in named:
        chunk = named["chunk"].median
        fps["dit"] = images / chunk
        fps["with_decoder"] = {
            name.removeprefix("decoder "): images / (chunk + row.median)
            for name, row in named.items()
            if name.startswith("decoder ")
        }
    fps["end_to_end"] = {
        name.removeprefix("end to end, "): row.images_per_second for name, row in named.items() if row.images_per_second
    }
    return {
        "device": machine.describe(),
        "devices_used": devices,
        "attention": resolve_backend(model.attention, jax.devices()[0], model.dtype, model.head_dim),
        "weights": "random",
        "size": list(config.data.size),
        "ceilings": {
            **{f"{dtype}_tflops": ceilings[dtype] / 1e12 for dtype in ("bfloat16", "float32")},
            "copy_gigabytes_per_second": ceilings["copy"] / 1e9,
        },
        "measurements": [_row_record(row, ceilings, devices) for row in rows],
        "skipped": dict(skipped),
        "fps": fps,
        "definitions": DEFINITIONS,
        "config": to_dict(config),
    }


def _row_record(row: Measurement, ceilings: Mapping[str, float], devices: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": row.name,
        "repeats": len(row.seconds),
        "median_ms": row.median * 1e3,
        "p90_ms": row.percentile(90) * 1e3,
        "p99_ms": row.percentile(99) * 1e3,
        "peak_mebibytes": row.peak_mebibytes,
    }
    if row.growth_mebibytes is not None:
        record["growth_mebibytes"] = row.growth_mebibytes
    if row.flops:
        rate = row.flops / row.median
        ceiling = "float32" if row.dtype == "float32" else "bfloat16"
        record["tflop"] = row.flops / 1e12
        record["tflops_per_second"] = rate / 1e12
        record["percent_of_ceiling"] = 100 * rate / (ceilings[ceiling] * devices)
        record["ceiling"] = ceiling
    return record


def table(record: Mapping[str, Any]) -> str:
    """The result for people: a line per measurement, then the three kinds of frames per second."""
    device, ceilings, fps = record["device"], record["ceilings"], record["fps"]
    height, width = record["size"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    lines = [
        f"{device['kind']} x {record['devices_used']}, {versions}, attention {record['attention']}, {height}x{width}",
        f"at best: bfloat16 {ceilings['bfloat16_tflops']:.4g} TFLOP/s, float32 {ceilings['float32_tflops']:.4g} "
        f"TFLOP/s, memory {ceilings['copy_gigabytes_per_second']:.4g} GB/s",
        "",
        f"{'':32}{'median ms':>12}{'p90 ms':>12}{'n':>5}{'TFLOP':>10}{'TFLOP/s':>10}{'% best':>8}{'peak MiB':>10}",
    ]
    for row in record["measurements"]:
        line = f"{row['name']:32}{row['median_ms']:12.2f}{row['p90_ms']:12.2f}{row['repeats']:5d}"
        counted = (
            f"{row['tflop']:10.4g}{row['tflops_per_second']:10.4g}{row['percent_of_ceiling']:8.1f}"
            if "tflop" in row
            else " " * 28
        )
        lines.append(f"{line}{counted}{row['peak_mebibytes']:10.0f}")
    lines += [f"{section}: {reason}" for section, reason in record["skipped"].items()]
    lines.append("")
    if "dit" in fps:
        lines.append(f"FPS, DiT only{'':17}{fps['dit']:10.2f}")
    for kind, title in (("with_decoder", "with decoder"), ("end_to_end", "end to end")):
        lines += [f"FPS, {title}, {name}".ljust(30) + f"{value:10.2f}" for name, value in fps.get(kind, {}).items()]
    return "\n".join(lines)
