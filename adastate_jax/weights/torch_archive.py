"""The archive that `torch.save` writes: an uncompressed zip of records, each found, bounded and checked here.

`torch_file.py` reads what the records say.
"""

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from adastate_jax.errors import UserError

# What `torch.save` wrote before version 1.6 starts with this number, pickled.
_LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclasses.dataclass(frozen=True)
class Record:
    """Bytes of the file, and their CRC-32 if the archive has one."""

    offset: int
    size: int
    checksum: int | None


def read_record(path: Path, record: Record, limit: int) -> bytes:
    """A record's bytes, compared with their checksum; raises UserError if they are more than `limit`, or damaged."""
    if record.size > limit:
        raise UserError(f"{path}: not a file of weights (a part of {record.size} bytes where {limit} are allowed)")
    with path.open("rb") as stream:
        stream.seek(record.offset)
        content = stream.read(record.size)
    if record.checksum is not None and zlib.crc32(content) != record.checksum:
        raise UserError(f"{path}: damaged: its index does not match its checksum; download or copy it again")
    return content


def read_directory(path: Path) -> tuple[dict[str, Record], str]:
    """Where each record of the archive lies, by name, and what all names start with.

    Raises:
        UserError: it is no such archive, cut short, damaged, or compressed.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(len(_LEGACY_START))
    if start == _LEGACY_START:
        raise UserError(
            f"{path}: written by PyTorch before 1.6; in a new one, torch.save(torch.load({path.name!r}, "
            "weights_only=True), FILE) turns it into a file that can be read"
        )
    if not start.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: not a file that torch.save wrote (no zip archive); name another or download it again")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            prefix = _prefix(path, archive.namelist())
            records: dict[str, Record] = {}
            # PyTorch leaves all of them zero where set_crc32_options(False) was called before saving.
            has_checksums = any(info.CRC for info in archive.infolist())
            for info in archive.infolist():
                if info.filename in records:
                    raise UserError(f"{path}: holds {info.filename!r} twice; download it again")
                offset = _locate(path, stream, info, archive.start_dir)
                records[info.filename] = Record(offset, info.file_size, info.CRC if has_checksums else None)
    # What zipfile raises depends on where the damage is; all of it means the same here.
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, IndexError) as error:
        raise UserError(f"{path}: cut short or damaged ({error}); download or copy it again") from None
    return records, prefix


def _prefix(path: Path, names: Sequence[str]) -> str:
    """What the names of all records start with."""
    indexes = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(indexes) != 1:
        raise UserError(f"{path}: not a file that torch.save wrote (it has {len(indexes)} parts named data.pkl)")
    prefix = indexes[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in names:
        raise UserError(f"{path}: a TorchScript program; save the weights alone: torch.save(model.state_dict(), FILE)")
    return prefix


def _locate(path: Path, stream, info: zipfile.ZipInfo, end: int) -> int:
    """Where a record's bytes begin. Records that are compressed, encrypted or elsewhere than they say are refused."""
    name = repr(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise UserError(f"{path}: {name} is compressed or encrypted, which torch.save never does; download it again")
    if not 0 <= info.header_offset <= end - _LOCAL_HEADER.size:
        raise UserError(f"{path}: cut short or damaged at {name}; download or copy it again")
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04" or stream.read(name_length) != info.orig_filename.encode(
        "utf-8" if info.flag_bits & 0x800 else "cp437"
    ):
        raise UserError(f"{path}: damaged at {name}; download or copy it again")
    offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + info.file_size > end:
        raise UserError(f"{path}: {name} reaches past the end of the data; download or copy it again")
    return offset
