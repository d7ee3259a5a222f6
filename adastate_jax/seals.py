"""Seals: a file in a folder that lists size and CRC-32 of all others, so that what is read back is what was written.

A seal is written last: what has none was cut short. A folder within that has a seal of its own is listed by that seal
alone. Every file is listed; hidden ones, which file managers and network file systems leave, are not looked at.

What a run goes on changing, in the folder above, is not sealed. Instead, of

- `config.json`, every field is checked when it is read, and those that the training follows from must equal those of
  the call that goes on with it (`train._refuse_other_configuration`), or describe the arrays that are loaded;
- `data.json`, the names of the data sets, and of a teacher of others', must equal those of what is there now
  (`train._refuse_other_data`);
- `metrics.jsonl`, each line must be a record, but for those at its end that a kill cut; no step follows from any.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from adastate_jax.errors import UserError, reading
from adastate_jax.files import write_text

SEAL = "seal.json"

Fingerprint = tuple[int, int]


def is_sealed(folder: str | Path) -> bool:
    """Whether a seal lies in a folder."""
    return (Path(folder) / SEAL).is_file()


def fingerprint(file: Path) -> Fingerprint:
    """Size in bytes and CRC-32 of a file, read in pieces; raises OSError."""
    size = checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return size, checksum


def seal(folder: Path, known: Mapping[str, Fingerprint] = MappingProxyType({})) -> None:
    """Seals all that a folder holds; raises OSError.

    known: fingerprints that need not be taken again, by names relative to the folder.
    """
    write_seal(
        folder,
        {name: known[name] if name in known else fingerprint(folder / name) for name in sorted(_names(folder))},
    )


def fingerprints(folder: Path, pattern: str) -> dict[str, Fingerprint]:
    """Fingerprints of what lies in the folders within a folder that a glob pattern names, by names relative to it.

    Raises OSError.
    """
    parts = [part.relative_to(folder) for part in folder.glob(pattern)]
    return {f"{part}/{name}": fingerprint(folder / part / name) for part in parts for name in _names(folder / part)}


def write_seal(folder: Path, content: Mapping[str, Fingerprint]) -> None:
    """Writes a seal for files whose fingerprints are known; raises OSError."""
    write_text(folder / SEAL, json.dumps(content))


def read_seal(folder: Path, fix: str) -> dict[str, Fingerprint]:
    """What a folder's seal lists, by names relative to it.

    Args:
        fix: what to do about damage, for the message.

    Raises:
        UserError: there is no seal, or it is damaged.
    """
    file = folder / SEAL
    with reading(file, fix):
        text = file.read_bytes()
    try:
        content = {name: (size, checksum) for name, (size, checksum) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: damaged; {fix}") from None
    if not content:
        raise UserError(f"{file}: damaged, it lists nothing; {fix}")
    return content


def verify(folder: Path, fix: str, part: int = 0, parts: int = 1) -> None:
    """Checks a folder against its seal, reading all of it, or one of so many parts of its files.

    Raises:
        UserError: as `read_seal`; or a file is missing, damaged or not listed, and the message names it.
    """
    content = read_seal(folder, fix)
    for name, listed in list(content.items())[part::parts]:
        verify_file(folder / name, listed, fix)
    with reading(folder, fix):
        unlisted = [name for name in sorted(_names(folder)) if name not in content]
    if unlisted:
        raise UserError(f"{folder / unlisted[0]}: does not belong here, {folder / SEAL} does not list it; {fix}")


def verify_file(file: Path, listed: Fingerprint, fix: str) -> None:
    """Checks one file against what a seal lists of it; raises UserError as `verify`."""
    if not file.is_file():
        raise UserError(f"{file}: missing; {fix}")
    with reading(file, fix):
        # Another size says it without reading.
        if file.stat().st_size != listed[0] or fingerprint(file) != listed:
            raise UserError(f"{file}: damaged; {fix}")


def _names(folder: Path) -> Iterator[str]:
    """Names of the files to list, relative to the folder."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            if path.name != SEAL:
                yield path.name
        elif is_sealed(path):
            yield f"{path.name}/{SEAL}"
        else:
            yield from (f"{path.name}/{name}" for name in _names(path))
