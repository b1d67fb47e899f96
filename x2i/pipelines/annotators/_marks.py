"""Blocks of metadata in image files: EXIF, XMP, IPTC-IIM and C2PA, found without decoding a pixel.

JPEG (ITU-T T.81 markers; XMP in APP1, Photoshop's resources in APP13, JUMBF in APP11 after ISO 19566-5), PNG (chunks
eXIf, iTXt, zTXt, tEXt, caBX), WebP (chunks EXIF, XMP, C2PA), TIFF (tags 700, 33723, 34377, 52545), and ISO base media
files as AVIF (through Pillow; C2PA in a uuid box). Whatever is damaged counts as far as it can be read; nothing here
raises, and no block is unpacked to more than `MOST` bytes.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from x2i.pipelines.annotators._c2pa import boxes

#: Bytes of one block that are looked at. A manifest of C2PA with its thumbnails is some 100 kB.
MOST = 16 * 2**20

#: Segments, chunks or records that are looked at.
_MANY = 10_000

#: Bytes of a plain text that are read.
_TEXT = 10_000

_XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_PHOTOSHOP = b"Photoshop 3.0\0"
_PNG = b"\x89PNG\r\n\x1a\n"
#: The uuid box of C2PA in ISO base media files.
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")


@dataclass
class Blocks:
    """What a file holds: each block as it lies there, empty if there is none. `iim` are IPTC's data sets."""

    exif: bytes = b""
    xmp: bytes = b""
    iim: bytes = b""
    c2pa: bytes = b""  # JUMBF boxes
    texts: dict[str, str] = field(default_factory=dict)  # PNG's own keywords, Author and Copyright


def blocks(data: bytes) -> Blocks:
    """The metadata of an image file."""
    out = Blocks()
    if data[:2] == b"\xff\xd8":
        _jpeg(data, out)
    elif data[:8] == _PNG:
        _png(data, out)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _webp(data, out)
    else:
        if data[4:8] == b"ftyp":
            out.c2pa = _uuid_box(data)
        _others(data, out)
    return out


def _jpeg(data: bytes, out: Blocks) -> None:
    jumbf: dict[bytes, dict[int, bytes]] = {}
    resources = b""
    for marker, payload in _segments(data):
        if marker == 0xE1 and payload.startswith(b"Exif\0") and not out.exif:
            out.exif = payload
        elif marker == 0xE1 and payload.startswith(_XMP_JPEG) and not out.xmp:
            out.xmp = payload[len(_XMP_JPEG) :]
        elif marker == 0xED and payload.startswith(_PHOTOSHOP):
            resources += payload[len(_PHOTOSHOP) :]
        elif marker == 0xEB and payload[:2] == b"JP" and len(payload) > 16:
            (sequence,) = struct.unpack(">I", payload[4:8])
            jumbf.setdefault(payload[2:4], {}).setdefault(sequence, payload[8:])
    out.iim = _iim_of(resources)
    out.c2pa = b"".join(_joined([parts[n] for n in sorted(parts)]) for parts in jumbf.values())[:MOST]


def _joined(parts: list[bytes]) -> bytes:
    """A box from its segments, each of which repeats the head: size, kind, and a longer size where the first is 1."""
    head = parts[0][: 16 if parts[0][:4] == b"\0\0\0\1" else 8]
    return parts[0] + b"".join(p.removeprefix(head) for p in parts[1:])


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The segments of a JPEG before its first scan: marker's second byte, payload."""
    at = 2
    for _ in range(_MANY):
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] == b"\xff":
            at += 1  # fill bytes
        if len(data) < at + 4 or data[at] != 0xFF or data[at + 1] in (0xD9, 0xDA):
            return
        marker, length = struct.unpack(">xBH", data[at : at + 4])
        if length < 2:
            return
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length


def _png(data: bytes, out: Blocks) -> None:
    at = len(_PNG)
    for _ in range(_MANY):
        if len(data) < at + 8:
            return
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + min(length, MOST)]
        if kind == b"eXIf":
            out.exif = out.exif or body
        elif kind == b"caBX":
            out.c2pa = out.c2pa or body
        elif kind in (b"iTXt", b"zTXt", b"tEXt"):
            _png_text(kind, body, out)
        elif kind == b"IEND":
            return
        at += 12 + length


def _png_text(kind: bytes, body: bytes, out: Blocks) -> None:
    """XMP, and what ImageMagick keeps as hexadecimal digits under `Raw profile type`."""
    name, _, rest = body.partition(b"\0")
    own = name in (b"Author", b"Copyright")
    if name != b"XML:com.adobe.xmp" and not own and not name.startswith(b"Raw profile type "):
        return
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    text = rest[1:] if kind == b"zTXt" else rest
    if kind == b"iTXt":
        text = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if packed:
        text = _unpack(text)
    if own:
        out.texts.setdefault(name.decode(), text[:_TEXT].decode("utf-8" if kind == b"iTXt" else "latin-1", "replace"))
        return
    if name == b"XML:com.adobe.xmp":
        out.xmp = out.xmp or text
        return
    try:  # the profile's name, its length, then the digits
        profile = bytes.fromhex(b"".join(text.split()[2:]).decode("ascii"))
    except ValueError:
        return
    match name.split()[-1].lower():
        case b"exif" | b"app1":
            out.exif = out.exif or profile
        case b"xmp":
            out.xmp = out.xmp or profile
        case b"iptc" | b"8bim":
            out.iim = out.iim or _iim_of(profile)


def _unpack(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MOST)
    except zlib.error:
        return b""


def _webp(data: bytes, out: Blocks) -> None:
    at = 12
    for _ in range(_MANY):
        if len(data) < at + 8:
            return
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        body = data[at + 8 : at + 8 + min(length, MOST)]
        if kind == b"EXIF":
            out.exif = out.exif or body
        elif kind == b"XMP ":
            out.xmp = out.xmp or body
        elif kind == b"C2PA":
            out.c2pa = out.c2pa or body
        at += 8 + length + length % 2


def _uuid_box(data: bytes) -> bytes:
    """The manifests in a C2PA box: after the id a version and flags, a purpose, an offset of 8 bytes."""
    for kind, body in boxes(data):
        if kind == b"uuid" and body[:16] == _C2PA_UUID:
            return body[20:MOST].partition(b"\0")[2][8:]
    return b""


def _others(data: bytes, out: Blocks) -> None:
    """TIFF, AVIF and the rest, as far as Pillow shows their metadata."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            tags = getattr(image, "tag_v2", {})
            out.exif = image.info.get("exif") or (image.getexif().tobytes() if tags else b"")
            out.xmp = _bytes(image.info.get("xmp") or tags.get(700))
            out.iim = _bytes(tags.get(33723)) or _iim_of(_bytes(tags.get(34377)))
            out.c2pa = out.c2pa or _bytes(tags.get(52545))
    except Exception:  # noqa: BLE001 - metadata is decoration: readers of untrusted bytes raise anything
        return


def _bytes(value: object) -> bytes:
    return bytes(value)[:MOST] if isinstance(value, bytes | bytearray) else b""


def _iim_of(resources: bytes) -> bytes:
    """IPTC's data sets out of Photoshop's image resources: signature, id, padded name, size, padded content."""
    if resources[:1] == b"\x1c":
        return resources
    at = 0
    for _ in range(_MANY):
        if resources[at : at + 4] != b"8BIM" or len(resources) < at + 7:
            break
        (number,) = struct.unpack(">H", resources[at + 4 : at + 6])
        at += 6 + (resources[at + 6] + 2) // 2 * 2
        if len(resources) < at + 4:
            break
        (size,) = struct.unpack(">I", resources[at : at + 4])
        if number == 0x0404:
            return resources[at + 4 : at + 4 + size]
        at += 4 + size + size % 2
    return b""


def exif_texts(exif: bytes) -> dict[int, str]:
    """The texts of EXIF's first directory by their tags; of several parts (photographer, editor) the first is one."""
    try:
        found = Image.Exif()
        found.load(exif)
        return {tag: text for tag in list(found) if (text := _exif_text(tag, found.get(tag)))}
    except Exception:  # noqa: BLE001 - as above
        return {}


def _exif_text(tag: int, value: object) -> str:
    if isinstance(value, bytes):
        # Windows' own tags are UTF-16; text that is none of the old kind is UTF-8 as a rule
        value = value.decode("utf-16-le" if 0x9C9B <= tag <= 0x9C9F else "utf-8", "replace")
    elif isinstance(value, str):
        with contextlib.suppress(UnicodeError):  # Pillow reads ASCII as Latin-1; writers put UTF-8 there
            value = value.encode("latin-1").decode("utf-8")
    return value.replace("\0", " ").strip() if isinstance(value, str) else ""


def iim_texts(iim: bytes) -> dict[tuple[int, int], list[str]]:
    """The texts of IPTC's data sets by (record, number), e.g. (2, 116) for the copyright notice."""
    out: dict[tuple[int, int], list[str]] = {}
    at, charset = 0, "latin-1"
    for _ in range(_MANY):
        if iim[at : at + 1] != b"\x1c" or len(iim) < at + 5:
            break
        record, number, size = struct.unpack(">BBH", iim[at + 1 : at + 5])
        at += 5
        if size & 0x8000:  # a longer length, in so many bytes
            extra = size & 0x7FFF
            if extra > 4:
                break
            size = int.from_bytes(iim[at : at + extra], "big")
            at += extra
        value = iim[at : at + size]
        at += size
        if (record, number) == (1, 90):
            charset = "utf-8" if value == b"\x1b%G" else charset
            continue
        out.setdefault((record, number), []).append(_said(value, charset))
    return out


def _said(value: bytes, charset: str) -> str:
    """Many writers use UTF-8 without saying so."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode(charset, "replace")
