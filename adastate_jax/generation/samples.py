"""Stage `sample`: the videos that a training run ends with."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence

import jax
import numpy as np

from adastate_jax import distributed
from adastate_jax.console import progress
from adastate_jax.errors import writing
from adastate_jax.files import write_text
from adastate_jax.generation.loading import load
from adastate_jax.generation.video_stream import stream_batch
from adastate_jax.media import VideoWriter, contact_sheet, loss_curves, side_by_side, write_image
from adastate_jax.sharding import make_mesh
from adastate_jax.training.metrics import read_metrics
from adastate_jax.training.stages.run import Run


def sample(run: Run) -> None:
    """Writes videos of several anchors, side by side and each by itself, a contact sheet and the loss curves.

    Of several processes, the first does so on its own devices, while the others wait.
    """
    if distributed.count() == 1:
        _sample(run)
        return

    def on_own_devices() -> None:
        with distributed.alone():
            devices = jax.local_devices()
            mesh = make_mesh(fsdp=len(devices), devices=devices)
            with jax.set_mesh(mesh):
                _sample(dataclasses.replace(run, mesh=mesh))

    distributed.from_first(on_own_devices)


def _sample(run: Run) -> None:
    settings = run.config.sample
    folder = run.workdir / "samples"
    model = load(run.workdir, mesh=run.mesh)
    prompts = list(settings.prompts) or _distinct(run.prompts, settings.count)
    num_frames = run.config.sample_frames
    streams = [stream_batch(model, prompts, settings.seed, num_frames, anchor) for anchor in settings.anchors]
    rows: dict[tuple[int, str], list[np.ndarray]] = {}
    paths = [folder / f"{index:02d}.mp4" for index in range(len(prompts))]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(path)) for path in paths]
        alone = {
            (index, name): stack.enter_context(VideoWriter(folder / name / path.name))
            for index, path in enumerate(paths)
            for name in settings.anchors
        }
        bar = stack.enter_context(progress("sample (compiling)", num_frames, unit="frame"))
        for panels in zip(*streams, strict=True):  # each [B, frames of a chunk, height, width, 3]
            for index, writer in enumerate(writers):
                named = {name: panel[index] for name, panel in zip(settings.anchors, panels, strict=True)}
                writer.write(side_by_side(named, settings.scale))
                for name, frames in named.items():
                    alone[index, name].write(frames)
                    rows.setdefault((index, name), []).append(frames)
            bar.update(panels[0].shape[1])
            bar.set_description("sample")
            run.refuse_removed()
    sheet = [(f"{name}: {prompts[index]}", np.concatenate(parts)) for (index, name), parts in rows.items()]
    with writing(folder / "contact_sheet.png"):
        write_image(folder / "contact_sheet.png", contact_sheet(sheet, max(settings.scale // 2, 1)))
    with writing(folder / "prompts.txt"):
        lines = (f"{path.name}\t{text}\n" for path, text in zip(paths, prompts, strict=True))
        write_text(folder / "prompts.txt", "".join(lines))
    metrics = run.workdir / "metrics.jsonl"
    if metrics.is_file():
        records = read_metrics(metrics)
        with writing(run.workdir / "loss_curves.png"):
            loss_curves(records, run.workdir / "loss_curves.png")
    print(f"videos: {folder}/*.mp4, {folder}/*/*.mp4, {folder}/contact_sheet.png", file=sys.stderr)


def _distinct(texts: Sequence[str], count: int) -> list[str]:
    """The first `count` different texts."""
    found: dict[str, None] = {}
    for text in texts:
        found.setdefault(text)
        if len(found) == count:
            break
    return list(found)
