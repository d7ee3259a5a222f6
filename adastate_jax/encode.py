"""The encode command: a folder of videos into a data set of the latents of their clips, for training."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
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

from adastate_jax.console import CommandParser, Progress, progress, run_command, starting
from adastate_jax.data.encoded import CAPTIONS, latent_features, list_digest
from adastate_jax.data.folders import FileClips, scan_folder
from adastate_jax.data.footage import ClipConfig, read_clips
from adastate_jax.data.shards import Plan, write_data_set
from adastate_jax.errors import UserError
from adastate_jax.files import existing_name
from adastate_jax.generation.data_sets import add_options, check_options, devices_mesh, shard_bytes
from adastate_jax.generation.loading import encode_frames
from adastate_jax.interrupts import if_stopped
from adastate_jax.models.wan_codec import WanCodec
from adastate_jax.sharding import shard_batch
from adastate_jax.weights.converted import load_converted
from adastate_jax.weights.parts import fingerprint, part_config

_DESCRIPTION = """Encodes the clips of a folder of videos with a converted video autoencoder, once, into a data set for
training. Stopped or killed, the same command goes on with the shard it was at, and ends with the same bytes."""
_EXAMPLE = f"""example:
  python -m adastate_jax.encode --checkpoint=weights --videos=videos --output=data/clips
  python -m adastate_jax.embed --checkpoint=weights --prompts=data/clips/{CAPTIONS} --output=data/captions

--checkpoint is a folder with vae, which convert wrote. Clips are cut as train cuts them: each lies within one shot,
and is scaled and cropped to fit. Captions are NAME.txt beside each video, or captions.json in the folder."""


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m adastate_jax.encode", description=_DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of video files")
    for name, default, help in (
        ("height", 480, "of the clips in pixels"),
        ("width", 832, "of the clips in pixels"),
        ("frames", 81, "of a clip; one, and then whole latents of four"),
        ("fps", 16, "frames per second of the clips, whatever the files'"),
        ("stride", 0, "frames from one clip to the next; 0 is a whole clip"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the latents (default %(default)s)"
    )
    add_options(parser, "clips", batch_size=1)
    return parser


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


def _clip_config(options: argparse.Namespace, space: int, time: int) -> ClipConfig:
    """The clips that the options describe; raises UserError if latents do not tile them."""
    for name in ("height", "width"):
        if getattr(options, name) % space:
            raise UserError(f"--{name}={getattr(options, name)}: must be a multiple of {space}, the side of a latent")
    if (options.frames - 1) % time:
        nearest = 1 + time * max(round((options.frames - 1) / time), 0)
        raise UserError(f"--frames={options.frames}: must be 1 + {time} k, as a video's latents are; {nearest} is near")
    if options.stride < 0:
        raise UserError(f"--stride={options.stride}: must not be negative")
    return ClipConfig(options.height, options.width, options.frames, options.fps, options.stride)


def _plan(options: argparse.Namespace, clips: _Clips, shape: Sequence[int]) -> Plan:
    """The data set of all clips, whose latents are [N, H, W, C]."""
    count, clip_bytes = len(clips.places), math.prod(shape) * np.dtype(options.dtype).itemsize
    per_shard = max(shard_bytes(options) // clip_bytes, 1)
    full, rest = divmod(count, per_shard)
    return Plan(
        "latents",
        latent_features(shape, options.dtype),
        {
            "codec": fingerprint(options.checkpoint, "vae"),
            "dtype": options.dtype,
            "shape": list(shape),
            "clips": dataclasses.asdict(clips.config),
            "videos": {"count": len(clips.files), "sha256": clips.digest},
            "captions": {"count": len(clips.captions), "sha256": list_digest(clips.captions)},
        },
        {"train": [per_shard] * full + [rest] * bool(rest)},
        {CAPTIONS: "".join(json.dumps({"prompt": text}) + "\n" for text in clips.captions)},
    )


def encode(options: argparse.Namespace) -> None:
    """Makes the data set that the options name.

    Raises:
        UserError: bad input, or a disk that is full.
    """
    check_options(options, "height", "width", "frames", "fps")
    network = part_config(options.checkpoint, "vae")
    space, time = network.space_factor, network.time_factor
    config, mesh = _clip_config(options, space, time), devices_mesh(options)
    folder = existing_name(options.videos)
    clips = _Clips(folder, config, scan_folder(folder, config)[0])
    shape = (
        1 + (config.num_frames - 1) // time,
        config.height // space,
        config.width // space,
        network.latent_channels,
    )
    plan = _plan(options, clips, shape)
    count = len(clips.places)
    nbytes = count * math.prod(shape) * np.dtype(options.dtype).itemsize
    print(
        f"{count} clips of {len(clips.files)} videos, latents {list(shape)} each: {nbytes / 1e9:.3g} GB in "
        f"{len(plan.shards['train'])} shards",
        file=sys.stderr,
    )
    uncaptioned = sum(not file.caption for file in clips.files)
    if uncaptioned:
        print(f"note: {uncaptioned} videos have no caption; training gives them the empty prompt", file=sys.stderr)
    with progress("encode", count, unit="clip", compiles=True) as bar:
        make = _Encoder(options, clips, mesh, bar).make
        made = write_data_set(options.output, plan, make, nbytes, bar.update)
    print(f"{options.output}" + ("" if made else " is complete; nothing is left to do"), file=sys.stderr)


class _Encoder:
    """Clips through the autoencoder, which is loaded when the first shard is to be made."""

    def __init__(self, options: argparse.Namespace, clips: _Clips, mesh: jax.sharding.Mesh, bar: Progress):
        self._options, self._clips, self._mesh, self._bar = options, clips, mesh, bar
        self._numbers = {caption: number for number, caption in enumerate(clips.captions)}
        self._reading, self._next = iter(()), -1  # clips that are being read, and the number of the first that is not

    def make(self, split: str, first: int, count: int) -> Iterator[dict]:
        """The examples of a shard; one that follows the last goes on where that stopped in its video."""
        if first != self._next:
            self._reading = self._clips.read(first)
        self._next = first + count
        shard, size, before = itertools.islice(self._reading, count), self._options.batch_size, None
        while batch := list(itertools.islice(shard, size)):
            # The last clips fill up a short batch. While the device encodes one, the next one is read.
            videos = np.stack([batch[min(row, len(batch) - 1)][2] for row in range(size)])
            with jax.set_mesh(self._mesh):
                latents = encode_frames(self._codec, shard_batch(videos, self._mesh))
                latents = latents.astype(jnp.dtype(self._options.dtype))
            if before:
                yield from self._examples(*before)
            before = batch, latents
        if before:
            yield from self._examples(*before)

    def _examples(self, batch: Sequence[tuple[FileClips, float, np.ndarray]], latents: jax.Array) -> Iterator[dict]:
        for (file, start, _), encoded in zip(batch, np.asarray(latents), strict=False):
            if not np.isfinite(encoded).all():
                raise UserError(
                    f"{self._options.checkpoint / 'vae'}: gives numbers that are not finite for "
                    f"{self._clips.folder / file.name} at {start:.2f} s; convert it again, with --dtype=float32"
                )
            number = self._numbers.get(file.caption, -1)
            rest = {"caption": file.caption, "caption_number": number, "source": file.name, "start": start}
            yield {"latents": encoded, **rest}
            self._bar.update()

    @functools.cached_property
    def _codec(self) -> WanCodec:
        vae = load_converted(self._options.checkpoint / "vae", "vae", self._mesh)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(vae)) / 1e9
        self._bar.write(f"video autoencoder: {held:.3g} GB, computing in {vae.config.dtype}", file=sys.stderr)
        return WanCodec(vae, vae)


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and encodes."""
    options = _parser().parse_args(arguments)
    starting()
    with if_stopped("the same command goes on"):
        encode(options)
    return 0


if __name__ == "__main__":
    run_command(main)
