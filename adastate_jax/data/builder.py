"""A TFDS builder that writes examples one after the other, without TensorFlow and in bounded memory.

TFDS's own `GeneratorBasedBuilder` collects a split in memory to shuffle it, and beyond 1 GB spills to disk through
TensorFlow. Batches here are a permutation of random-access indices, so the order on disk does not matter and the
examples can go straight to their shards.
"""

import dataclasses
import hashlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

_SHARD_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a split, (key, example) pairs, and how many of them there will be."""

    count: int
    pairs: Iterator[tuple[Any, dict]]


class SequentialBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of our builders: ArrayRecord shards in the order of generation, one progress bar on stderr.

    Subclasses give `_info`, `_split_generators` (a dict of `Examples`) and `_generate_examples`, as any TFDS builder
    does. What `download_and_prepare` guarantees holds: it writes into a directory called `incomplete.…` and renames
    that at the end, so a directory under the final name is complete.
    """

    code_path = None  # where TFDS would look for checksums of downloads; there are none

    def __init__(self, **arguments):
        super().__init__(**{"file_format": "array_record", **arguments})

    def _create_builder_config(self, builder_config, version):
        del version
        return builder_config  # TFDS warns of any configuration that is not a class attribute; none of ours is

    def _make_download_manager(self, download_dir, download_config):
        """Nothing is ever downloaded; TFDS's own manager would leave empty folders for downloads behind."""
        return types.SimpleNamespace(downloaded_size=0)

    def _log_download_bytes(self):
        """TFDS prints to stdout, which belongs to the commands' own output."""

    _log_download_done = _log_download_bytes

    def _download_and_prepare(self, dl_manager, download_config):
        del download_config
        splits = self._split_generators(dl_manager)
        largest = sum(
            int(np.prod(feature.shape)) * np.dtype(feature.np_dtype).itemsize
            for feature in self.info.features.values()
            if isinstance(feature, tfds.features.Tensor) and None not in feature.shape
        )
        info = self._info()  # this one names the incomplete directory, `self.info` the final one
        writer = tfds.core.SequentialWriter(
            info, max_examples_per_shard=max(1, _SHARD_BYTES // max(largest, 1 << 10)), file_format="array_record"
        )
        writer.initialize_splits(list(splits))
        total = sum(examples.count for examples in splits.values())
        with tqdm.tqdm(total=total, desc=f"building {self.name}", unit="example", file=sys.stderr) as progress:
            for name, examples in splits.items():
                # The writer takes any iterable, and writes the metadata anew at every call: one call per split.
                writer.add_examples({name: _counted(examples, progress)})
        writer.close_all()
        self.info.set_splits(info.splits)


def _counted(examples, progress):
    for _, example in examples.pairs:
        yield example
        progress.update()


def named_configuration(kind: type, label: str, fields: Mapping[str, Any]) -> tfds.core.BuilderConfig:
    """A builder configuration whose name, hence directory, is `label` and a hash of all its fields.

    `kind` is a dataclass derived from `BuilderConfig`; `fields` hold dataclasses and JSON values. Two configurations
    that differ anywhere get different names.
    """
    plain = json.dumps(dict(fields), sort_keys=True, default=dataclasses.asdict)
    return kind(name=f"{label}-{hashlib.sha256(plain.encode()).hexdigest()[:16]}", **fields)
