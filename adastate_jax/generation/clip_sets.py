"""A folder of videos → a data set of the latents of their clips; for the encode command."""

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np

from adastate_jax.console import Progress, progress
from adastate_jax.data.encoded import CAPTIONS, latent_features, list_digest
from adastate_jax.data.folders import FileClips, scan_folder
from adastate_jax.data.footage import ClipConfig, read_clips
from adastate_jax.data.shards import Plan, write_data_set
from adastate_jax.errors import UserError
from adastate_jax.files import existing_name
from adastate_jax.generation.data_sets import Job
from adastate_jax.generation.loading import encode_frames
from adastate_jax.models.vae import VAEConfig
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import shard_batch
from adastate_jax.weights.converted import load_converted
from adastate_jax.weights.parts import fingerprint, part_config


@dataclasses.dataclass(frozen=True)
class _Clips:
    """All clips of a folder, file after file, and the different captions that they have."""

    folder: Path
    config: ClipConfig
    files: Sequence[FileClips]

    @functools.cached_property
    def places(self) -> list[tuple[FileClips, int]]:
        return [(file, number) for file in self.files for number in range(len(file.starts))]

    @functools.cached_property
    def captions(self) -> list[str]:
        return list(dict.fromkeys(file.caption for file in self.files if file.caption))

    def read(self, first: int) -> Iterator[tuple[FileClips, float, np.ndarray]]:
        """File, start in seconds and pixels uint8 [F, H, W, 3] of clip `first` and all that follow."""
        for _, group in itertools.groupby(self.places[first:], lambda place: place[0].name):
            places = list(group)
            file, numbers = places[0][0], [number for _, number in places]
            path = self.folder / file.name
            videos = read_clips(path, file.frames[numbers], self.config.height, self.config.width)
            try:
                for number, video in zip(numbers, videos, strict=True):
                    yield file, float(file.starts[number]), video
            except (av.FFmpegError, ValueError) as error:
                raise UserError(f"video {path} changed while it was read ({error}): run again") from error

    @property
    def digest(self) -> str:
        """Stands for the files that clips are cut from: names, sizes, times and captions."""
        status = [(file, (self.folder / file.name).stat()) for file in self.files]
        return list_digest([f"{file.name} {stat.st_size} {stat.st_mtime_ns} {file.caption}" for file, stat in status])


def _latent_shape(config: ClipConfig, network: VAEConfig) -> tuple[int, int, int, int]:
    """(N, H, W, C) of a clip's latents; raises UserError if they do not tile it."""
    space, time = network.space_factor, network.time_factor
    for name in ("height", "width"):
        if getattr(config, name) % space:
            raise UserError(f"--{name}={getattr(config, name)}: must be a multiple of {space}, the side of a latent")
    frames, rest = divmod(config.num_frames - 1, time)
    if rest:
        near = 1 + time * frames
        raise UserError(f"--frames={config.num_frames}: must be 1 + {time} k, as latents are; {near} is the next below")
    return 1 + frames, config.height // space, config.width // space, network.latent_channels


def _plan(job: Job, clips: _Clips, shape: Sequence[int], dtype: str) -> Plan:
    """The data set of all clips, whose latents are [N, H, W, C]."""
    count, clip_bytes = len(clips.places), math.prod(shape) * np.dtype(dtype).itemsize
    per_shard = max(job.shard_bytes // clip_bytes, 1)
    full, rest = divmod(count, per_shard)
    origin = {
        "codec": fingerprint(job.checkpoint, "vae"),
        "dtype": dtype,
        "shape": list(shape),
        "clips": dataclasses.asdict(clips.config),
        "videos": {"count": len(clips.files), "sha256": clips.digest},
        "captions": {"count": len(clips.captions), "sha256": list_digest(clips.captions)},
    }
    captions = "".join(json.dumps({"prompt": text}) + "\n" for text in clips.captions)
    shards = {"train": [per_shard] * full + [rest] * bool(rest)}
    return Plan("latents", latent_features(shape, dtype), origin, shards, {CAPTIONS: captions})


def write_clip_set(job: Job, folder: Path, config: ClipConfig, dtype: str) -> None:
    """Encodes the clips of a folder of videos.

    Args:
        dtype: of the latents, bfloat16 or float32.

    Raises:
        UserError: bad input, or a disk that is full.
    """
    shape, mesh = _latent_shape(config, part_config(job.checkpoint, "vae")), job.mesh()
    folder = existing_name(folder)
    clips = _Clips(folder, config, scan_folder(folder, config)[0])
    plan, count = _plan(job, clips, shape, dtype), len(clips.places)
    nbytes = count * math.prod(shape) * np.dtype(dtype).itemsize
    print(
        f"{count} clips of {len(clips.files)} videos, latents {list(shape)} each: {nbytes / 1e9:.3g} GB in "
        f"{len(plan.shards['train'])} shards",
        file=sys.stderr,
    )
    uncaptioned = sum(not file.caption for file in clips.files)
    if uncaptioned:
        print(f"note: {uncaptioned} videos have no caption; training gives them the empty prompt", file=sys.stderr)
    with progress("encode", count, unit="clip", compiles=True) as bar:
        made = write_data_set(job.output, plan, _Encoder(job, clips, dtype, mesh, bar).make, nbytes, bar.update)
    if not made:
        print(f"{job.output} is complete; nothing is left to do", file=sys.stderr)
    print(job.output)


class _Encoder:
    """Clips through the autoencoder, which is loaded when the first shard is to be made."""

    def __init__(self, job: Job, clips: _Clips, dtype: str, mesh: jax.sharding.Mesh, bar: Progress):
        self._job, self._clips, self._dtype, self._mesh, self._bar = job, clips, dtype, mesh, bar
        self._numbers = {caption: number for number, caption in enumerate(clips.captions)}
        self._reading, self._next = iter(()), -1  # clips that are being read, and the number of the first that is not

    def make(self, split: str, first: int, count: int) -> Iterator[dict]:
        """The examples of a shard; one that follows the last goes on where that stopped in its video."""
        if first != self._next:
            self._reading = self._clips.read(first)
        self._next = first + count
        shard, size, before = itertools.islice(self._reading, count), self._job.batch_size, None
        while batch := list(itertools.islice(shard, size)):
            # The last clips fill up a short batch. While the device encodes one, the next one is read.
            videos = np.stack([batch[min(row, len(batch) - 1)][2] for row in range(size)])
            with jax.set_mesh(self._mesh):
                latents = encode_frames(self._codec, shard_batch(videos, self._mesh))
                latents = latents.astype(jnp.dtype(self._dtype))
            if before:
                yield from self._examples(*before)
            before = batch, latents
        if before:
            yield from self._examples(*before)

    def _examples(self, batch: Sequence[tuple[FileClips, float, np.ndarray]], latents: jax.Array) -> Iterator[dict]:
        for (file, start, _), encoded in zip(batch, np.asarray(latents), strict=False):
            if not np.isfinite(encoded).all():
                raise UserError(
                    f"{self._job.checkpoint / 'vae'}: gives numbers that are not finite for "
                    f"{self._clips.folder / file.name} at {start:.2f} s; convert it again, with --dtype=float32"
                )
            number = self._numbers.get(file.caption, -1)
            rest = {"caption": file.caption, "caption_number": number, "source": file.name, "start": start}
            yield {"latents": encoded, **rest}
            self._bar.update()

    @functools.cached_property
    def _codec(self) -> WanCodec:
        vae = load_converted(self._job.checkpoint / "vae", "vae", self._mesh)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(vae)) / 1e9
        self._bar.write(f"video autoencoder: {held:.3g} GB, computing in {vae.config.dtype}", file=sys.stderr)
        return WanCodec(vae, vae)
