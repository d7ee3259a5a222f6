"""Data sets that take hours to make: written shard by shard, resumed after a kill to the same bytes, checked when read.

A folder of one is a TFDS data set of ArrayRecord shards, which `tfds.builder_from_directory` reads, too, and two files
of ours: `manifest.json` says all that it was made from, `seal.json` size and checksum of every file. While it is made
it is called NAME.incomplete; a folder under its own name is complete. ArrayRecord checks a hash of all that it reads.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from adastate_jax import seals
from adastate_jax.errors import UserError, reading, shown, writing
from adastate_jax.files import whole_file, write_text
from adastate_jax.texts import read_json

_FORMAT = 1
_MANIFEST = "manifest.json"
_INCOMPLETE = ".incomplete"
_DESCRIPTIONS = ("dataset_info.json", "features.json")  # TFDS's
# One record a group, so that reading one decodes no other; TFDS's own writer does the same.
_WRITER_OPTIONS = "group_size:1"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A data set before it is made.

    Attributes:
        kind: its TFDS name.
        features: of an example.
        origin: what it is made from, as JSON: two data sets of equal origins have equal contents.
        shards: how many examples each shard holds, by split.
        beside: text files to write beside them, by name.
    """

    kind: str
    features: tfds.features.FeaturesDict
    origin: Mapping[str, Any]
    shards: Mapping[str, Sequence[int]]
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def manifest(self) -> dict[str, Any]:
        shards = {split: list(lengths) for split, lengths in self.shards.items()}
        return {"format": _FORMAT, "kind": self.kind, **self.origin, "shards": shards}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A complete data set: its folder, its manifest and its splits for random access."""

    folder: Path
    manifest: Mapping[str, Any]
    splits: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """Kind, and a hash of all that it was made from."""
        plain = json.dumps(self.manifest, sort_keys=True)
        return f"{self.manifest['kind']}/{hashlib.sha256(plain.encode()).hexdigest()[:16]}"


def shard_lengths(sizes: Iterable[int], shard_bytes: int) -> list[int]:
    """How many examples of the given sizes in bytes each shard takes, in order: as many as fit, at least one."""
    lengths, filled = [], 0
    for size in sizes:
        if not lengths or filled + size > shard_bytes:
            lengths.append(0)
            filled = 0
        lengths[-1] += 1
        filled += size
    return lengths


def write_data_set(
    folder: Path,
    plan: Plan,
    make: Callable[[str, int, int], Iterable[Mapping[str, Any]]],
    nbytes: int,
    kept: Callable[[int], Any],
) -> bool:
    """Makes the shards of a data set that are not there yet.

    Args:
        folder: its final name. What is not complete is in `folder`.incomplete, also after an exception: the same call
            goes on there, and the end is the same to the byte.
        plan: what to make.
        make: split, number of the first example and how many → those examples; a function of its arguments.
        nbytes: about what all examples take on disk.
        kept: called with the number of examples of each shard that is there already.

    Returns:
        Whether anything was made; not where the folder holds this data set already.

    Raises:
        UserError: another data set is or was begun there, another process is at work, or the disk is full.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        _refuse_other(folder, open_data_set(folder, plan.kind).manifest, plan)
        return False
    incomplete = folder.with_name(folder.name + _INCOMPLETE)
    with writing(incomplete, RuntimeError), _only_process(incomplete):
        if os.path.lexists(folder):  # another process was done in between
            return write_data_set(folder, plan, make, nbytes, kept)
        _begin(incomplete, plan)
        sealed = seals.read_seal(incomplete, _fix(incomplete)) if seals.is_sealed(incomplete) else {}
        _refuse_full(incomplete, nbytes - sum(size for size, _ in sealed.values()))
        for split, lengths in plan.shards.items():
            first = 0
            for index, count in enumerate(lengths):
                file = incomplete / f"{plan.kind}-{split}.array_record-{index:05d}-of-{len(lengths):05d}"
                if file.name in sealed and file.is_file() and seals.fingerprint(file) == sealed[file.name]:
                    kept(count)
                else:
                    sealed[file.name] = _write_shard(file, plan.features, make(split, first, count), count)
                    seals.write_seal(incomplete, dict(sorted(sealed.items())))
                first += count
        _describe(incomplete, plan, sealed)
        for name, text in plan.beside.items():
            write_text(incomplete / name, text)
        for name in (*_DESCRIPTIONS, _MANIFEST, *plan.beside):
            sealed[name] = seals.fingerprint(incomplete / name)
        seals.write_seal(incomplete, dict(sorted(sealed.items())))
        incomplete.rename(folder)
    return True


def open_data_set(folder: Path, kind: str) -> DataSet:
    """Opens a complete data set of one kind.

    Its descriptions are compared with their checksums, its shards with their sizes; ArrayRecord checks what is read of
    them, see `read_examples`.

    Raises:
        UserError: it is missing, incomplete, damaged or of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.with_name(folder.name + _INCOMPLETE).is_dir():
            raise UserError(f"{folder}: is not complete; run the command that makes it again")
        raise UserError(f"{folder}: no such folder; make it with python -m adastate_jax.{_COMMANDS[kind]}")
    if not seals.is_sealed(folder) or not (folder / _MANIFEST).is_file():
        raise UserError(f"{folder}: is no data set that python -m adastate_jax.{_COMMANDS[kind]} wrote")
    sealed = seals.read_seal(folder, _fix(folder))
    for name, listed in sealed.items():
        file = folder / name
        if name.endswith((".json", ".jsonl")):
            seals.verify_file(file, listed, _fix(folder))
        elif not file.is_file():
            raise UserError(f"{file}: missing; {_fix(folder)}")
        elif file.stat().st_size != listed[0]:
            raise UserError(f"{file}: damaged, it has {file.stat().st_size} bytes of {listed[0]}; {_fix(folder)}")
    manifest = read_json(folder / _MANIFEST, _fix(folder))
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise UserError(f"{folder / _MANIFEST}: is of another version of this package; {_fix(folder)}")
    if manifest["kind"] != kind:
        raise UserError(f"{folder}: holds {shown(manifest['kind'])}, not {kind}; name another folder")
    with reading(folder, _fix(folder), Exception):
        builder = tfds.builder_from_directory(folder)
        splits = {split: builder.as_data_source(split=split) for split in builder.info.splits}
    return DataSet(folder, manifest, splits)


_COMMANDS = {"embeddings": "embed", "latents": "encode"}


def _fix(folder: Path) -> str:
    return f"copy it again, or remove {folder} and make it anew"


def _refuse_other(folder: Path, found: Mapping[str, Any], plan: Plan) -> None:
    """Raises UserError, naming what differs, where a manifest is not the plan's."""
    wanted = json.loads(json.dumps(plan.manifest))
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            now, then = shown(wanted.get(name)), shown(found.get(name))
            raise UserError(
                f"{folder}: was made with other input ({name} is {then} there, now it is {now}); name another folder "
                "or remove this one"
            )


def _begin(incomplete: Path, plan: Plan) -> None:
    """Notes in a new folder what will be in it, or checks that it is what an earlier call began there."""
    manifest = incomplete / _MANIFEST
    if not manifest.exists():
        write_text(manifest, json.dumps(plan.manifest, indent=1) + "\n")
        return
    found = read_json(manifest, _fix(incomplete))
    if not isinstance(found, dict):
        raise UserError(f"{manifest}: damaged; {_fix(incomplete)}")
    _refuse_other(incomplete, found, plan)


def _refuse_full(incomplete: Path, nbytes: int) -> None:
    free = shutil.disk_usage(incomplete).free
    if free < nbytes:
        raise UserError(f"{incomplete}: needs {nbytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there")


def _write_shard(
    file: Path, features: tfds.features.FeaturesDict, examples: Iterable[Mapping[str, Any]], count: int
) -> seals.Fingerprint:
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    with whole_file(file) as temporary:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), _WRITER_OPTIONS)
        written = 0
        try:
            for example in examples:
                writer.write(serialized(serializer, features.encode_example(example)))
                written += 1
        finally:
            writer.close()
        if written != count:
            raise ValueError(f"{file.name}: {written} examples were made, not {count}")
        return seals.fingerprint(temporary)


def serialized(serializer: tfds.core.example_serializer.ExampleSerializer, example: Mapping[str, Any]) -> bytes:
    """The record of an encoded example: TFDS's own, but for the order of its features, which TFDS leaves to chance."""
    return serializer.get_tf_example(example).SerializeToString(deterministic=True)


def _describe(incomplete: Path, plan: Plan, sealed: Mapping[str, seals.Fingerprint]) -> None:
    """Writes TFDS's own description of the data set."""
    splits = []
    for split, lengths in plan.shards.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=plan.kind, data_dir=incomplete, split=split, filetype_suffix="array_record"
        )
        nbytes = sum(size for name, (size, _) in sealed.items() if name.startswith(f"{plan.kind}-{split}."))
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=nbytes, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=incomplete, features=plan.features, split_infos=splits, check_data=False
    )


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Makes a folder if need be, and keeps other processes out of it while the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work there; wait for it") from None
        yield
    finally:
        os.close(lock)
