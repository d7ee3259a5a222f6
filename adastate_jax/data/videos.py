"""A folder of real videos as a data set of clips: each file is scanned, then read into the examples of a TFDS build."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable

import av
import numpy as np
import tensorflow_datasets as tfds

from adastate_jax.data.builder import Examples, SequentialBuilder, named_configuration
from adastate_jax.data.folders import list_files, scan_folder, walk_files
from adastate_jax.data.footage import ClipConfig, read_clips
from adastate_jax.errors import UserError
from adastate_jax.files import existing_name


@dataclasses.dataclass
class VideosConfig(tfds.core.BuilderConfig):
    """A dataset of the clips in `folder`; `files` is (name, bytes, modification time in ns) of all that is in it."""

    folder: str = ""
    clips: ClipConfig | None = None
    validation_fraction: float = 0.0
    files: tuple[tuple[str, int, int], ...] = ()


class Videos(SequentialBuilder):
    """TFDS builder of real clips; make one with `videos`.

    Features: `video` uint8 `[F, H, W, 3]`, `caption`, `source` (the file's name in the folder) and `start`, seconds
    into that file. Splits: `train`, and `validation` if asked for.
    """

    VERSION = tfds.core.Version("1.1.0")  # raise it when the clips cut from the same file change

    def _info(self):
        clips = self.builder_config.clips
        shape = (clips.num_frames, clips.height, clips.width, 3)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Clips of real videos.",
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes"),
                    "caption": tfds.features.Text(),
                    "source": tfds.features.Text(),
                    "start": tfds.features.Scalar(np.float32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        config = self.builder_config
        files, _ = scan_folder(config.folder, config.clips)
        splits = {"train": files}
        if config.validation_fraction:
            splits = _split_files(files, config.validation_fraction, config.folder)
        return {
            name: Examples(sum(len(file.starts) for file in part), self._generate_examples(part))
            for name, part in splits.items()
        }

    def _generate_examples(self, files):
        config = self.builder_config
        for file in files:
            path = pathlib.Path(config.folder) / file.name
            clips = read_clips(path, file.frames, config.clips.height, config.clips.width)
            try:
                for start, video in zip(file.starts, clips, strict=True):
                    example = {"video": video, "caption": file.caption, "source": file.name, "start": start}
                    yield f"{file.name}:{start:.4f}", example
            except (av.FFmpegError, ValueError) as error:
                raise UserError(f"video {path} changed while it was read ({error}): run again") from error


def _split_files(files, fraction, folder):
    """Whole files go to either split, by the hash of their names: clips of one file look alike, so validation on files
    seen in training would flatter the model."""
    if len(files) < 2:
        raise UserError(f"video folder {folder} has one usable file: validation needs two, or validation_fraction 0")
    shuffled = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    count = min(max(1, round(fraction * len(files))), len(files) - 1)
    held_out = {file.name for file in shuffled[:count]}
    return {
        "train": [file for file in files if file.name not in held_out],
        "validation": [file for file in files if file.name in held_out],
    }


def videos(folder: str | os.PathLike, clips: ClipConfig, validation_fraction: float = 0.0) -> Callable[..., Videos]:
    """A dataset of all clips in a folder and its subfolders, for `open_source`.

    `validation_fraction` of the files, at least one if it is above 0, go to the split `validation`. A folder in which a
    file's name, size or modification time changed is another dataset, so it is built anew. Raises `UserError` if
    the folder is missing or holds nothing.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: give a fraction from 0 up to below 1")
    folder = existing_name(folder).absolute()
    list_files(folder)
    paths = [path for path in (folder / name for name in walk_files(folder)) if path.is_file()]
    status = [(path, path.stat()) for path in paths]
    files = tuple((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in status)
    label = f"{clips.height}x{clips.width}x{clips.num_frames}"
    fields = {"folder": str(folder), "clips": clips, "validation_fraction": validation_fraction, "files": files}
    return functools.partial(Videos, config=named_configuration(VideosConfig, label, fields))
