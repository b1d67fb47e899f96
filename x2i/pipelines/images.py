"""Images as they come, made into pixels as they should be: upright, 8-bit sRGB, no alpha, RGB.

The header is checked before anything is decoded, so that a small file that unpacks to gigapixels costs
nothing. Whatever cannot be used raises `BadImage` with a reason; what can be put right (orientation,
CMYK, 16 bit, palette, ICC, alpha) is put right.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

cv2.setNumThreads(1)  # processes are the unit of parallelism; threads on top of them only fight

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of EXIF that is broken

Image.MAX_IMAGE_PIXELS = None  # our own limit acts, from the header, with a reason; Pillow's would raise or warn

#: Most pixels that are decoded, unless a recipe says otherwise: Pillow's own limit (a quarter of 2 GiB of RGB).
MAX_PIXELS = 178_956_970

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
#: Formats whose orientation Pillow itself applies, to the size in the header as well.
_UPRIGHT = ("TIFF",)

#: Formats that Pillow hands to another program (Ghostscript); bytes from anywhere do not start programs.
_PROGRAMS = ("EPS", "WMF")

#: How files begin that are images, whatever their header then says.
_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\x01\0": "ICO",
}

_SRGB = ImageCms.createProfile("sRGB")


class BadImage(Exception):
    """Bytes that give no picture. `reason` is a snake_case word, `detail` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Header:
    """What a file's header says. Sizes in pixels, after the EXIF orientation (1..8) is applied."""

    format: str
    width: int
    height: int
    mode: str
    bits: int
    orientation: int
    frames: int
    icc: str | None  # the profile's description, if it is not sRGB

    @property
    def plain(self) -> bool:
        """Whether the file shows what decoding gives: nothing has to be put right."""
        return (
            self.format in _EXTENSIONS
            and self.mode in ("RGB", "L")
            and self.bits == 8
            and self.orientation == 1
            and self.frames == 1
            and self.icc is None
        )

    @property
    def extension(self) -> str:
        """The extension under which a plain file's bytes are stored."""
        return _EXTENSIONS[self.format]


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Read a file's header without decoding a pixel.

    Raises:
        BadImage: `empty_file`, `not_an_image`, `corrupt` (a header that makes no sense), `too_many_pixels`.
    """
    if not data:
        raise BadImage("empty_file", "the file has no bytes")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(
            "too_many_pixels", f"{width}x{height} = {width * height / 1e6:.0f} megapixels, limit {max_pixels / 1e6:.0f}"
        )
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        frames = getattr(image, "n_frames", 1)
    except Exception:  # noqa: BLE001 - EXIF is decoration: a picture with a broken tag is still a picture
        orientation, frames = 1, 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = 1
    if orientation >= 5 and image.format not in _UPRIGHT:
        width, height = height, width
    if image.format == "MPO":
        frames = 1  # the further pictures of an MPO are previews or the other eye, not an animation
    return Header(
        image.format or "", width, height, _mode(image), _bits(image, data), orientation, frames, _profile_name(image)
    )


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        for start, name in _BEGINNINGS.items():
            if data.startswith(start):
                raise BadImage("corrupt", f"begins as {name}, but its header makes no sense") from None
        raise BadImage("not_an_image", _sniff(data)) from None
    except Exception as error:  # noqa: BLE001 - decoders of untrusted bytes raise anything, struct.error to KeyError
        raise BadImage("corrupt", f"{type(error).__name__}: {error}") from None
    if image.format in _PROGRAMS:
        raise BadImage("not_an_image", f"{image.format}, a program that draws, which has no pixels of its own")
    return image


def _sniff(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith((b"<?xml", b"<svg")):
        return "XML or SVG, which has no pixels of its own"
    if start.startswith((b"{", b"[")):
        return "looks like JSON"
    if data[4:8] == b"ftyp":
        return (
            f"{data[8:12].decode('ascii', 'replace').strip()} (HEIC, AVIF or a video), damaged or not to be read here"
        )
    if not any(data[:512]):
        return "begins with zero bytes only"
    return f"no known image format begins with {data[:8].hex(' ')}"


def _mode(image: Image.Image) -> str:
    """Pillow's mode, with A added where a transparent colour stands in for an alpha channel."""
    return f"{image.mode}A" if image.mode in ("L", "RGB") and "transparency" in image.info else image.mode


def _bits(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG" and len(data) > 24:
        return data[24] if data[24] >= 8 else 8  # IHDR's bit depth: Pillow hides 16 behind mode RGB
    return {"1": 8, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}.get(image.mode, 8)


def _profile_name(image: Image.Image) -> str | None:
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc))).strip()
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None  # an unreadable profile says nothing: the pixels are taken as sRGB
    return None if "srgb" in name.lower() else name or "unnamed"


def decode(data: bytes, header: Header, shorter_side: int | None = None) -> np.ndarray:
    """Decode to pixels: uint8 [height, width, 3], RGB, sRGB, upright, alpha flattened on white.

    Args:
        shorter_side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size (scaled DCT, a fraction of the cost) as long
            as its shorter side keeps this many pixels; None decodes in full. Other formats have no such scale.

    Raises:
        BadImage: `truncated`, `corrupt`, or `unsupported_mode`.
    """
    size = reduced(header, shorter_side)
    if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L") and header.icc is None:
        try:
            width, height = size or (0, 0)
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", fastdct=False, fastupsample=False, min_width=width, min_height=height
            )
        except ValueError:  # strict about every oddity; Pillow tells the harmless ones from the cut-off ones
            pixels = np.asarray(_rgb(_load(data, size)))
        return upright(pixels, header.orientation)
    image = _load(data, size)
    return upright(np.asarray(_rgb(image)), 1 if header.format in _UPRIGHT else header.orientation)


def reduced(header: Header, shorter_side: int | None) -> tuple[int, int] | None:
    """The size at which a JPEG is decoded, as stored (before its orientation is applied); None: in full."""
    if shorter_side is None or header.format not in ("JPEG", "MPO"):
        return None
    width, height = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    for scale in (8, 4, 2):
        if -(-min(width, height) // scale) >= shorter_side:
            return -(-width // scale), -(-height // scale)
    return None


def luma(data: bytes, header: Header) -> np.ndarray:
    """A JPEG's own luma at full size and upright: uint8 [height, width]; of other files, that of their pixels."""
    if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L"):
        try:
            return upright(simplejpeg.decode_jpeg(data, "GRAY")[..., 0], header.orientation)
        except ValueError:
            pass
    return cv2.cvtColor(decode(data, header), cv2.COLOR_RGB2GRAY)


def _load(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    image = _open(data)
    try:
        if size is not None:
            image.draft(None, (size[0] - 1, size[1] - 1))  # Pillow would have it smaller than asked for, or whole
        image.load()
    except Exception as error:  # noqa: BLE001 - as above
        text = str(error).lower()
        cut = isinstance(error, EOFError) or any(word in text for word in ("truncated", "unexpected end", "incomplete"))
        raise BadImage("truncated" if cut else "corrupt", f"{type(error).__name__}: {error}") from None
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("unsupported_mode", "floating-point samples have no agreed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.info = image.info
        flat = Image.alpha_composite(white, image)
        return _to_srgb(flat.convert("RGB"), image.info.get("icc_profile"))
    if image.mode in ("1", "P", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    return _to_srgb(image, image.info.get("icc_profile"))


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc and image.mode in ("RGB", "L", "CMYK"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if "srgb" not in ImageCms.getProfileDescription(profile).lower():
                converted = ImageCms.profileToProfile(image, profile, _SRGB, outputMode="RGB")
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            pass  # a profile for other channels, or a broken one: the pixels are taken as sRGB
    return image.convert("RGB")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8) to [height, width, channels]."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize with area averaging when shrinking, cubic when enlarging. uint8 in, uint8 out."""
    if pixels.shape[1::-1] == (width, height):
        return pixels
    shrinks = width * height < pixels.shape[0] * pixels.shape[1]
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def fit(width: int, height: int, shorter_side: int | None, max_pixels: int | None = None) -> tuple[int, int]:
    """The size to which a picture is shrunk so that it keeps both limits; never enlarged. Aspect is kept."""
    scale = 1.0
    if shorter_side is not None:
        scale = min(scale, shorter_side / min(width, height))
    if max_pixels is not None:
        scale = min(scale, (max_pixels / (width * height)) ** 0.5)
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode(pixels: np.ndarray, kind: Literal["jpg", "png"], quality: int = 95, subsampling: str = "420") -> bytes:
    """Encode uint8 [height, width, 3] RGB, or [height, width] grey. The same pixels give the same bytes."""
    if kind == "jpg":
        if pixels.ndim == 2:
            return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[..., None]), quality, "GRAY", "GRAY")
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", subsampling, fastdct=False)
    ok, out = cv2.imencode(".png", pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if not ok:
        raise ValueError(f"PNG encoder refused an array of shape {pixels.shape}")
    return out.tobytes()
