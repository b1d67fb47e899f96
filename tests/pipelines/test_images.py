"""Files as the web has them: what can be put right is put right, what cannot says why. One test per probe."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from x2i.pipelines.images import BadImage, decode, encode, fit, read_header, resize, upright
from x2i.pipelines.quickstart import HTML, bomb, photographs, trouble


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    return photographs() | trouble()


def pixels_of(data: bytes) -> np.ndarray:
    return decode(data, read_header(data))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def near(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())


def test_plain_photographs_decode_as_pillow_decodes_them(photos: dict[str, bytes]) -> None:
    for name in ("flower.jpg", "retina.jpg", "astronaut.png", "camera.png"):
        expected = np.asarray(Image.open(io.BytesIO(photos[name])).convert("RGB"))
        assert near(pixels_of(photos[name]), expected) < 0.5, name
        assert read_header(photos[name]).plain, name


def test_a_real_adobe_rgb_photograph_is_converted(photos: dict[str, bytes]) -> None:
    """rocket.jpg carries an Adobe RGB profile: taken as sRGB, its colours would be dull."""
    header = read_header(photos["rocket.jpg"])
    assert "Adobe RGB" in str(header.icc)
    as_stored = np.asarray(Image.open(io.BytesIO(photos["rocket.jpg"])))
    converted = decode(photos["rocket.jpg"], header)
    assert np.ptp(converted, axis=2).mean() > np.ptp(as_stored, axis=2).mean()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # a TIFF is turned by Pillow itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(photos: dict[str, bytes], orientation: int, kind: str) -> None:
    image = Image.open(io.BytesIO(photos["coffee.png"])).resize((60, 40))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Pillow transpose that lays it down so
    stored = image if orientation == 1 else image.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, kind, exif=exif)
    header = read_header(data)
    assert (header.orientation, header.width, header.height) == (orientation, 60, 40)
    assert np.array_equal(decode(data, header), np.asarray(image))
    assert header.plain == (orientation == 1 and kind == "PNG")


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}])
def test_a_reduced_decode_is_the_same_picture(photos: dict[str, bytes], orientation: int, options: dict) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {k: v for k, v in options.items() if k != "mode"}
    image = Image.open(io.BytesIO(photos["astronaut.png"])).convert("RGB").resize((1041, 683))
    data = saved(image.convert(options.get("mode", "RGB")), "JPEG", exif=exif, quality=90, **more)
    header = read_header(data)
    full, small = decode(data, header), decode(data, header, 300)
    assert full.shape == (header.height, header.width, 3)
    assert small.shape == (-(-header.height // 2), -(-header.width // 2), 3)
    assert near(resize(full, small.shape[1], small.shape[0]), small) < 3
    for cut in (data[: len(data) // 2], data[: len(data) * 9 // 10]):
        for size in (None, 300):
            with pytest.raises(BadImage) as bad:
                decode(cut, header, size)
            assert bad.value.reason == "truncated"


@pytest.mark.parametrize(
    ("kind", "start", "reason"),
    [("PNG", 29, "corrupt"), ("JPEG", 0, "not_an_image"), ("EPS", None, "not_an_image")],
)
def test_a_header_that_makes_no_sense(photos: dict[str, bytes], kind: str, start: int | None, reason: str) -> None:
    """A damaged image is told from what never was one, and PostScript starts no program."""
    data = bytearray(saved(Image.open(io.BytesIO(photos["coffee.png"])).resize((60, 40)), kind))
    if start is not None:
        data[start] ^= 0xFF
    with pytest.raises(BadImage) as bad:
        read_header(bytes(data))
    assert bad.value.reason == reason


def test_upright_agrees_with_pillow() -> None:
    from PIL import ImageOps

    grid = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    for orientation in range(1, 9):
        image = Image.fromarray(grid)
        image.getexif()[0x0112] = orientation
        assert np.array_equal(upright(grid, orientation), np.asarray(ImageOps.exif_transpose(image)))


def test_cmyk_jpeg_becomes_rgb(photos: dict[str, bytes]) -> None:
    china = np.asarray(Image.open(io.BytesIO(photos["china.jpg"])))
    assert read_header(photos["trouble_cmyk.jpg"]).mode == "CMYK"
    assert near(pixels_of(photos["trouble_cmyk.jpg"]), china[:, 320:]) < 6


def test_sixteen_bits_keep_their_brightness(photos: dict[str, bytes]) -> None:
    moon = np.asarray(Image.open(io.BytesIO(photos["moon.png"])))[100:340, 100:420]
    header = read_header(photos["trouble_16bit.png"])
    assert (header.mode, header.bits) == ("I;16", 16)
    assert np.array_equal(decode(photos["trouble_16bit.png"], header)[..., 0], moon)


def test_sixteen_bit_colour_is_not_passed_on_as_eight() -> None:
    import cv2

    wide = np.full((8, 8, 3), 40_000, np.uint16)
    data = cv2.imencode(".png", wide)[1].tobytes()
    header = read_header(data)
    assert header.bits == 16
    assert not header.plain
    assert abs(int(decode(data, header)[0, 0, 0]) - 40_000 // 257) <= 1


def test_transparency_is_flattened_on_white(photos: dict[str, bytes]) -> None:
    flat = pixels_of(photos["trouble_palette_alpha.png"])
    assert (flat[0, 0] == 255).all()
    assert (flat[-1, -1] == 255).all()
    flower = np.asarray(Image.open(io.BytesIO(photos["flower.jpg"])))[60:390, 150:480]
    assert near(flat[120:210, 120:210], flower[120:210, 120:210]) < 16  # 256 colours


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_alpha_channels_of_every_kind(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    data = saved(image, "TIFF" if mode == "PA" else "PNG")
    assert (pixels_of(data) == 255).all()


def test_a_transparent_colour_counts_as_alpha() -> None:
    data = saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert not read_header(data).plain
    assert (pixels_of(data) == 255).all()


def test_icc_profile_is_applied() -> None:
    """A profile with other primaries moves the colours; one that is sRGB leaves every value alone."""
    patch = Image.new("RGB", (16, 16), (200, 60, 60))
    swapped = _profile_with_red_and_blue_swapped()
    header = read_header(saved(patch, "PNG", icc_profile=swapped))
    assert header.icc == "swapped"
    assert not header.plain
    r, g, b = (int(v) for v in pixels_of(saved(patch, "PNG", icc_profile=swapped))[0, 0])
    assert b > 150
    assert r < 100, (r, g, b)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_header(saved(patch, "PNG", icc_profile=srgb)).plain
    assert pixels_of(saved(patch, "PNG", icc_profile=srgb))[0, 0].tolist() == [200, 60, 60]


def _profile_with_red_and_blue_swapped() -> bytes:
    """The sRGB profile, its red and blue primaries exchanged in the tag table, its name changed."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    where = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    data[where[b"rXYZ"] : where[b"rXYZ"] + 4], data[where[b"bXYZ"] : where[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    name = "sRGB built-in".encode("utf-16-be")
    at = data.find(name)
    assert at > 0
    data[at : at + len(name)] = "swapped".ljust(len(name) // 2, "\0").encode("utf-16-be")
    return bytes(data)


def test_a_broken_profile_does_not_cost_the_picture() -> None:
    data = saved(Image.new("RGB", (16, 16), (200, 60, 60)), "PNG", icc_profile=b"nonsense")
    assert pixels_of(data)[0, 0].tolist() == [200, 60, 60]


def test_an_html_page_is_named_for_what_it_is() -> None:
    with pytest.raises(BadImage) as bad:
        read_header(HTML)
    assert bad.value.reason == "not_an_image"
    assert "HTML" in bad.value.detail


def test_a_bomb_is_refused_from_its_header() -> None:
    import tracemalloc

    data = bomb(30_000)
    assert len(data) < 200_000
    tracemalloc.start()
    with pytest.raises(BadImage) as bad:
        read_header(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bad.value.reason == "too_many_pixels"
    assert "30000x30000" in bad.value.detail
    assert peak < 20e6


@pytest.mark.parametrize("name", ["retina.jpg", "astronaut.png"])
def test_truncated_files_say_so(photos: dict[str, bytes], name: str) -> None:
    data = photos[name][: len(photos[name]) // 2]
    with pytest.raises(BadImage) as bad:
        pixels_of(data)
    assert bad.value.reason == "truncated"


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), c) for c in ("red", "green", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    header = read_header(data)
    assert header.frames == 3
    assert not header.plain
    assert decode(data, header)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_formats_beside_jpeg_and_png(photos: dict[str, bytes], kind: str) -> None:
    image = Image.open(io.BytesIO(photos["chelsea.png"])).convert("RGB").resize((64, 48))
    assert near(pixels_of(saved(image, kind)), np.asarray(image)) < 8


def test_random_damage_never_raises_anything_but_bad_image(photos: dict[str, bytes]) -> None:
    rng = np.random.default_rng(0)
    reasons: set[str] = set()
    for name in ("rocket.jpg", "page.png", "trouble_palette_alpha.png", "trouble_exif_rotated.jpg"):
        for _ in range(40):
            data = bytearray(photos[name])
            for at in rng.integers(0, min(len(data), 3000), 6):
                data[at] = rng.integers(256)
            try:
                out = pixels_of(bytes(data))
            except BadImage as bad:
                reasons.add(bad.reason)
            else:
                assert out.dtype == np.uint8
                assert out.shape[2] == 3
    assert reasons <= {"not_an_image", "corrupt", "truncated", "too_many_pixels", "unsupported_mode"}


def test_fit_keeps_the_aspect_and_never_enlarges() -> None:
    assert fit(1000, 800, 512) == (640, 512)
    assert fit(300, 200, 512) == (300, 200)
    assert fit(3000, 3000, None, 1_000_000) == (1000, 1000)


def test_encoding_is_repeatable_and_png_is_exact(photos: dict[str, bytes]) -> None:
    chelsea = pixels_of(photos["chelsea.png"])
    assert encode(chelsea, "jpg") == encode(chelsea, "jpg")
    assert np.array_equal(pixels_of(encode(chelsea, "png")), chelsea)
    assert near(pixels_of(encode(chelsea, "jpg", 95, "444")), chelsea) < 2
    assert resize(chelsea, 100, 60).shape == (60, 100, 3)
