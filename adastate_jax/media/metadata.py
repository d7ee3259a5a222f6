"""What a video or picture says of itself: named texts, in the way of each format.

An mp4 has tags and a PNG has texts, each with a name; a GIF has one comment and a WebP one description (XMP,
dc:description), which hold a JSON object of all names and texts.
"""

import json
import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import av
from PIL import Image

from adastate_jax.data.decoding import open_video
from adastate_jax.errors import UserError
from adastate_jax.files import existing_name

_OF_THE_CONTAINER = {"major_brand", "minor_version", "compatible_brands", "encoder"}
_XMP_NAMES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
}
_HAS_XMP = 0x04  # a flag of WebP's VP8X chunk


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that `open_writer` or `write_image` wrote into an mp4, GIF, WebP or PNG, or into a folder of PNGs.

    Those of other programs are read too, where they are kept in the same way; a file without any gives {}.

    Raises:
        UserError: the file is missing, or neither a picture nor a video.
    """
    path = existing_name(path)
    if path.is_dir():
        pictures = sorted(path.glob("*.png"))
        if not pictures:
            raise UserError(f"{path}: holds no PNG files")
        path = pictures[0]
    try:
        with path.open("rb") as file:
            start = file.read(12)
        if start.startswith((b"GIF8", b"\x89PNG")) or (start.startswith(b"RIFF") and start.endswith(b"WEBP")):
            return _of_picture(path)
        with open_video(path) as container:
            return {name: text for name, text in container.metadata.items() if name not in _OF_THE_CONTAINER}
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: neither a picture nor a video ({error.strerror}); name one that sample wrote"
        ) from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # on a damaged file, a decoder may fail in any way
        raise UserError(f"{path}: not a readable picture ({' '.join(str(error).split())})") from None


def _of_picture(path):
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=("GIF", "PNG", "WEBP")) as picture:
        if picture.format == "PNG":
            return {name: str(text) for name, text in picture.text.items()}
        kept = picture.info.get("comment", b"") if picture.format == "GIF" else _described(picture.info.get("xmp", b""))
    try:
        texts = json.loads(kept)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(texts, dict):
        return {}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _described(xmp):
    """The text of dc:description in an XMP packet; nothing where there is none."""
    try:
        return ElementTree.fromstring(xmp).findtext(".//dc:description/rdf:Alt/rdf:li", "", _XMP_NAMES)
    except ElementTree.ParseError:
        return ""


def gif_comment(metadata: Mapping[str, str]) -> bytes:
    """A comment extension (GIF89a, section 24) of plain ASCII, in blocks of at most 255 bytes."""
    text = json.dumps(dict(metadata)).encode("ascii")
    blocks = [text[begin : begin + 255] for begin in range(0, len(text), 255)]
    return b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def describe_webp(path: Path, metadata: Mapping[str, str], height: int, width: int) -> None:
    """Adds `metadata` to a WebP file of this size, in place.

    The container (RFC 9649) has a chunk VP8X in front once it holds anything but one picture, with a flag for XMP,
    whose chunk comes last.
    """
    xmp = _xmp(json.dumps(dict(metadata)))
    chunk = b"XMP " + struct.pack("<I", len(xmp)) + xmp + b"\0" * (len(xmp) % 2)
    with path.open("r+b") as file:
        head = bytearray(file.read(30))
        if head[12:16] == b"VP8X":
            head[20] |= _HAS_XMP
        else:
            rest = bytes(head[12:]) + file.read()
            size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            head[12:] = b"VP8X" + struct.pack("<II", 10, _HAS_XMP) + size
            file.seek(len(head))
            file.write(rest)
        file.seek(0, os.SEEK_END)
        file.write(chunk)
        head[4:8] = struct.pack("<I", file.tell() - 8)
        file.seek(0)
        file.write(head)


def _xmp(text):
    for prefix, address in _XMP_NAMES.items():
        ElementTree.register_namespace(prefix, address)
    named = {prefix: f"{{{address}}}" for prefix, address in _XMP_NAMES.items()}
    packet = ElementTree.Element(named["x"] + "xmpmeta")
    about = ElementTree.SubElement(packet, named["rdf"] + "RDF")
    about = ElementTree.SubElement(about, named["rdf"] + "Description", {named["rdf"] + "about": ""})
    choices = ElementTree.SubElement(ElementTree.SubElement(about, named["dc"] + "description"), named["rdf"] + "Alt")
    said = ElementTree.SubElement(
        choices, named["rdf"] + "li", {"{http://www.w3.org/XML/1998/namespace}lang": "x-default"}
    )
    said.text = text
    return ElementTree.tostring(packet)
