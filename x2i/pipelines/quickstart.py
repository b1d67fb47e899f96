"""The demo's input: the photographs that scikit-image and scikit-learn carry, as a folder with sidecars.

Their texts are what those packages say about them. Beside them lies trouble, made from the same
photographs: copies, odd colour spaces, and files that are no pictures at all.
"""

from __future__ import annotations

import inspect
import io
import re
import struct
import zlib
from pathlib import Path

from PIL import Image

from x2i.base.files import atomic

COLOUR = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry")
GREY = ("camera", "cell", "clock", "coins", "grass", "gravel", "moon", "page", "text")

#: Files whose name is not the function's.
FILES = {"immunohistochemistry": "ihc", "clock": "clock_motion"}


def write_photographs(folder: str | Path) -> Path:
    """Write the demo's folder; files that are there with the same content are left alone. Returns the folder."""
    folder = Path(folder)
    for name, data in (photographs() | trouble()).items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            with atomic(path) as temporary:
                temporary.write_bytes(data)
    return folder


def photographs() -> dict[str, bytes]:
    """Eighteen photographs, byte for byte, and a `.txt` beside each: file name to content."""
    import skimage
    import sklearn.datasets

    carried = Path(skimage.__file__).parent / "data"
    files: dict[str, bytes] = {}
    for name in COLOUR + GREY:
        (path,) = (p for e in ("png", "jpg") if (p := carried / f"{FILES.get(name, name)}.{e}").exists())
        files[f"{name}{path.suffix}"] = path.read_bytes()
        files[f"{name}.txt"] = _docstring_text(inspect.getdoc(getattr(skimage.data, name)) or "").encode()
    images = Path(sklearn.datasets.__file__).parent / "images"
    readme = (images / "README.txt").read_text(encoding="utf-8")
    for name in ("china", "flower"):
        files[f"{name}.jpg"] = (images / f"{name}.jpg").read_bytes()
        files[f"{name}.txt"] = _readme_text(readme, name).encode()
    return files


def _docstring_text(doc: str) -> str:
    """What a docstring says of the picture: its summary and description, up to the numpydoc sections."""
    prose = re.split(r"\n\w[^\n]*\n-{3,}", doc)[0]
    paragraphs = [" ".join(p.split()) for p in prose.split("\n\n")]
    told = [p for p in paragraphs if p and not re.search(r"copyright|public domain|downloaded|CC0|^\.\.", p, re.I)]
    return re.sub(r"\s*\[\d+\]_|``", "", " ".join(told))


def _readme_text(readme: str, name: str) -> str:
    """The README's lines on one of scikit-learn's images, without the bracketed references."""
    block = re.split(r"^Image: ", readme, flags=re.M)
    (text,) = (b for b in block if b.startswith(f"{name}.jpg"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("[")]
    plain = [re.sub(r"\s*\[\d+\]", "", line).strip() for line in (f"Image: {lines[0]}", *lines[1:])]
    return " ".join(line.rstrip(".") + "." for line in plain)


def trouble() -> dict[str, bytes]:
    """Files that a heap from the web holds, made from the photographs: file name to content."""
    plain = photographs()
    chelsea, coffee, china = (Image.open(io.BytesIO(plain[n])) for n in ("chelsea.png", "coffee.png", "china.jpg"))
    flower, moon = (Image.open(io.BytesIO(plain[n])) for n in ("flower.jpg", "moon.png"))
    right_half = (china.width // 2, 0, china.width, china.height)
    pictures = {
        "trouble_exact_copy.jpg": (plain["rocket.jpg"], plain["rocket.txt"]),
        "trouble_recompressed.jpg": (_jpeg(china.resize((480, 320)), quality=60), plain["china.txt"]),
        "trouble_exif_rotated.jpg": (_sideways(coffee), plain["coffee.txt"]),
        "trouble_cmyk.jpg": (_jpeg(china.crop(right_half).convert("CMYK"), quality=92), plain["china.txt"]),
        "trouble_16bit.png": (_sixteen_bits(moon.crop((100, 100, 420, 340))), plain["moon.txt"]),
        "trouble_palette_alpha.png": (_palette(flower.crop((150, 60, 480, 390))), plain["flower.txt"]),
        "trouble_truncated.jpg": (plain["retina.jpg"][: len(plain["retina.jpg"]) // 3], plain["retina.txt"]),
        "trouble_html.jpg": (HTML, b"A page that says the picture is gone."),
        "trouble_bomb.png": (bomb(30_000), b"Thirty thousand pixels square, all of them black."),
        "trouble_no_text.jpg": (_jpeg(chelsea.crop((100, 20, 400, 260)), quality=90), None),
    }
    files = {name: data for name, (data, _) in pictures.items()}
    files |= {f"{name[: name.rindex('.')]}.txt": text for name, (_, text) in pictures.items() if text is not None}
    return files


HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>This image is no longer available.</body></html>\n"


def _jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def _sideways(image: Image.Image) -> bytes:
    """Stored turned by 90 degrees, with the EXIF orientation (6) that turns it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _jpeg(image.convert("RGB").transpose(Image.Transpose.ROTATE_90), quality=92, exif=exif)


def _sixteen_bits(image: Image.Image) -> bytes:
    import numpy as np

    values = np.asarray(image.convert("L")).astype(np.uint16) * 257
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def _palette(image: Image.Image) -> bytes:
    """A palette PNG whose corners are transparent."""
    import numpy as np

    rgba = image.convert("RGBA")
    y, x = np.mgrid[-1 : 1 : rgba.height * 1j, -1 : 1 : rgba.width * 1j]
    rgba.putalpha(Image.fromarray(((x**2 + y**2 < 1) * 255).astype(np.uint8)))
    out = io.BytesIO()
    rgba.quantize(256, method=Image.Quantize.FASTOCTREE).save(out, "PNG")
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black 1-bit pixels: a few kilobytes that unpack to gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
