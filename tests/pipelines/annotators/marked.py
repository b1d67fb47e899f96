"""Real photographs with marks of rights in them, for tests: as Pillow writes them, or made by hand after the standards."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

from tests.pipelines.annotating import photo

NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "plus": "http://ns.useplus.org/ldf/xmp/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "cc": "http://creativecommons.org/ns#",
    "tdm": "http://www.w3.org/ns/tdmrep/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
}


def packet(attributes: str = "", elements: str = "", before: str = "") -> bytes:
    declared = " ".join(f'xmlns:{name}="{uri}"' for name, uri in NAMESPACES.items())
    return (
        f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{before}<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF {declared}><rdf:Description rdf:about="" {attributes}>{elements}</rdf:Description></rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def saved(kind: str, **marks: Any) -> bytes:
    """A real photograph as a file of this kind, marks written by Pillow."""
    out = io.BytesIO()
    Image.open(io.BytesIO(photo("chelsea"))).convert("RGB").resize((64, 48)).save(out, kind, **marks)
    return out.getvalue()


def with_segment(jpeg: bytes, marker: int, payload: bytes) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + jpeg[2:]


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png[:-12] + chunk + png[-12:]  # after the pixels, where Pillow does not look before it decodes


def iim(*sets: tuple[int, int, bytes]) -> bytes:
    return b"".join(struct.pack(">BBBH", 0x1C, r, n, len(v)) + v for r, n, v in sets)


def cbor(value: Any) -> bytes:
    """CBOR after RFC 8949, for texts, maps and lists."""

    def head(major: int, count: int) -> bytes:
        if count < 24:
            return bytes([major << 5 | count])
        return bytes([major << 5 | 24, count]) if count < 256 else bytes([major << 5 | 25]) + struct.pack(">H", count)

    if isinstance(value, dict):
        return head(5, len(value)) + b"".join(cbor(k) + cbor(v) for k, v in value.items())
    if isinstance(value, list):
        return b"\x9f" + b"".join(map(cbor, value)) + b"\xff"  # of indefinite length
    if isinstance(value, bytes):
        return head(2, len(value)) + value
    return head(3, len(value.encode())) + value.encode()


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def superbox(label: str, *boxes: bytes) -> bytes:
    return box(b"jumb", box(b"jumd", bytes(16) + b"\3" + label.encode() + b"\0") + b"".join(boxes))


def store(label: str, content: Any) -> bytes:
    assertion = superbox(label, box(b"cbor", cbor(content)))
    thumbnail = superbox("c2pa.thumbnail.claim.jpeg", box(b"bidb", bytes(150_000)))
    return superbox("c2pa", superbox("urn:uuid:1", superbox("c2pa.assertions", thumbnail, assertion)))


def jpeg_with(manifests: bytes) -> bytes:
    """JUMBF in APP11, in as many segments as it takes, each with the box's head; out of order."""
    data, head, size = saved("JPEG"), manifests[:8], 60_000
    parts = [manifests[8:][i : i + size] for i in range(0, len(manifests) - 8, size)]
    for number, part in enumerate(parts, 1):  # each goes in front of those before
        data = with_segment(data, 0xEB, b"JP" + struct.pack(">HI", 1, number) + head + part)
    return data


def webp_with(manifests: bytes) -> bytes:
    chunk = b"C2PA" + struct.pack("<I", len(manifests)) + manifests + b"\0" * (len(manifests) % 2)
    data = saved("WEBP") + chunk
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def avif_with(manifests: bytes) -> bytes:
    uuid = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
    return saved("AVIF") + box(b"uuid", uuid + bytes(4) + b"manifest\0" + bytes(8) + manifests)


FILES = {
    "JPEG": jpeg_with,
    "PNG": lambda manifests: with_chunk(saved("PNG"), b"caBX", manifests),
    "WEBP": webp_with,
    "AVIF": avif_with,
}
