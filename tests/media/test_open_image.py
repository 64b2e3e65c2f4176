"""Opening images of every kind, good and bad."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bindllm.media.images as images_module
from bindllm.errors import MediaError
from bindllm.media import MAX_PIXELS, Media, open_image
from bindllm.media.maps import open_thermal
from recordings import assert_refused, png

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def sample(width: int = 32, height: int = 24) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixel, expected, tolerance: int = 6) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def svg(body: str, attributes: str = 'viewBox="0 0 20 10"') -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{body}</svg>'.encode()


HALVES = '<rect width="10" height="10" fill="red"/><rect x="10" width="10" height="10" fill="blue"/>'


# --- formats and sources ---


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_from_path_and_bytes(kind, tmp_path):
    data = encoded(sample(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    # The content decides, so the wrong ending does no harm.
    path = tmp_path / "image.dat"
    path.write_bytes(data)
    for source in (path, str(path), data):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (32, 24))
        assert near(image.getpixel((2, 12)), RED)
        assert near(image.getpixel((29, 12)), BLUE)


@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (np.full((4, 6), 77, np.uint8), (77, 77, 77)),
        (np.full((4, 6, 3), (1, 2, 3), np.uint8), (1, 2, 3)),
        (np.full((4, 6, 4), (0, 0, 0, 0), np.uint8), WHITE),
    ],
)
def test_arrays(array, pixel):
    image = open_image(array)
    assert image.size == (6, 4)
    assert image.getpixel((0, 0)) == pixel


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 6, 3), np.float32),
        np.zeros((3, 4, 6), np.uint8),
        np.zeros((0, 6, 3), np.uint8),
        np.zeros(5, np.uint8),
    ],
)
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(MediaError, match="expected a filled array"):
        open_image(array)


def test_a_pillow_picture_without_pixels():
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(MediaError, match="pixels; expected at least one"):
            open_image(Image.new("RGB", size))


def test_an_endless_line_is_a_media_error():
    # Pillow would raise a MemoryError, which ends a run.
    for source in (np.zeros((1, 20_000_000, 3), np.uint8), encoded(Image.new("1", (20_000_000, 1)), "PNG")):
        with pytest.raises(MediaError, match="20000000 x 1 pixels; .* 10,000,000 on a side"):
            open_image(source)


def test_lazy_pillow_picture_keeps_size_and_hash():
    with Image.open(io.BytesIO(encoded(sample(1000, 800), "JPEG"))) as lazy:
        before = Media.image(lazy).content_hash()
        assert open_image(lazy, size=10).size == (1000, 800)
        assert Media.image(lazy).content_hash() == before


def test_truncated_pillow_picture():
    with (
        Image.open(io.BytesIO(encoded(sample(), "PNG")[:60])) as lazy,
        pytest.raises(MediaError, match="damaged or truncated"),
    ):
        open_image(lazy)


def test_pillow_picture_is_left_as_it_was():
    original = Image.new("RGBA", (5, 5), (0, 0, 0, 0))
    assert open_image(original).getpixel((0, 0)) == WHITE
    assert original.mode == "RGBA"


# --- modes ---


def test_cmyk_jpeg_has_the_right_colors():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert near(open_image(data).getpixel((4, 4)), RED)


def test_cmyk_tiff_is_not_inverted():
    data = encoded(Image.new("CMYK", (8, 8), (255, 255, 0, 0)), "TIFF")
    assert near(open_image(data).getpixel((4, 4)), BLUE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = open_image(encoded(Image.fromarray(values), kind))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_big_endian_16_bit_tiff():
    data = encoded(Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 32768, 65535)), "TIFF")
    assert [open_image(data).getpixel((x, 0))[0] for x in range(2)] == [128, 255]


def test_gray_whose_zero_is_white():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    inverted = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert [open_image(inverted).getpixel((x, 0))[0] for x in range(4)] == [255, 254, 127, 0]
    floats = encoded(Image.fromarray(values.astype(np.float32)), "TIFF", tiffinfo={262: 0})
    with pytest.raises(MediaError, match="32 bits whose 0 is white"):
        open_image(floats)
    # As an open Pillow image it counts as another one than the same numbers with 0 as black.
    plain = encoded(Image.fromarray(values), "TIFF")
    hashes = {Media.image(Image.open(io.BytesIO(data))).content_hash() for data in (inverted, plain)}
    assert len(hashes) == 2


def test_signed_eight_and_unsigned_32_bits():
    eight = encoded(Image.fromarray(np.uint8([[0, 255]])), "TIFF", tiffinfo={339: 2})
    with pytest.raises(MediaError, match="signed 8-bit values"):
        open_image(eight)
    large = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    wide = encoded(Image.fromarray(large.view(np.int32)), "TIFF")
    # Pillow writes signed ones only.
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, form) for form in (2, 1))
    assert signed in wide
    wide = wide.replace(signed, unsigned)
    np.testing.assert_allclose(open_thermal(wide), [[0, 0.5, 1]], atol=0.02)


def test_twelve_bit_tiff_is_scaled_by_its_own_range():
    # Pillow reads but does not write 12 bits: two pixels in three bytes, the high bits first.
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    data = b"II*\0" + struct.pack("<I", 12) + bytes([0x80, 0x0F, 0xFF, 0]) + directory
    assert [open_image(data).getpixel((x, 0))[0] for x in range(2)] == [128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 32768.0, 65535.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 1, 200]], np.int32), [0, 1, 200]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
    ],
)
def test_32_bit_tiff_by_the_range_of_its_values(values, expected):
    image = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize("value", [-1.0, 1e6, float("nan"), float("inf")])
def test_32_bit_values_without_a_known_range(value):
    data = encoded(Image.fromarray(np.array([[0.5, value]], np.float32)), "TIFF")
    with pytest.raises(MediaError, match="Scale the values first"):
        open_image(data)


def test_transparent_parts_become_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((255, 0, 0, 128), (4, 0, 8, 8))
    image = open_image(encoded(half, "PNG"))
    assert image.getpixel((1, 1)) == WHITE
    assert near(image.getpixel((6, 6)), (255, 127, 127))


@pytest.mark.parametrize("kind", ["palette", "gray with alpha", "color key", "one bit"])
def test_rarer_png_modes(kind):
    if kind == "palette":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([9, 9, 9, 0, 128, 0])
        image.putpixel((3, 3), 1)
        data, seen = encoded(image, "PNG", transparency=0), GREEN
    elif kind == "gray with alpha":
        image = Image.new("LA", (4, 4), (0, 0))
        image.putpixel((3, 3), (0, 255))
        data, seen = encoded(image, "PNG"), (0, 0, 0)
    elif kind == "color key":
        image = Image.new("RGB", (4, 4), (9, 9, 9))
        image.putpixel((3, 3), GREEN)
        data, seen = encoded(image, "PNG", transparency=(9, 9, 9)), GREEN
    else:
        image = Image.new("1", (4, 4), 1)
        image.putpixel((3, 3), 0)
        data, seen = encoded(image, "PNG"), (0, 0, 0)
    opened = open_image(data)
    assert opened.getpixel((0, 0)) == WHITE
    assert opened.getpixel((3, 3)) == seen


@pytest.mark.parametrize(
    ("bits", "kind", "line", "level", "seen"),
    [
        (1, 0, b"\x80", b"\0\0", 255),
        (2, 0, b"\x10", b"\0\0", 85),
        (2, 0, b"\x60", b"\0\1", 170),
        (4, 0, b"\x12", b"\0\1", 34),
        (8, 0, b"\1\2", b"\0\1", 2),
        (16, 0, b"\1\2\x80\0", b"\1\2", 128),
        (8, 2, b"\1\2\3\7\7\7", b"\0\1\0\2\0\3", 7),
        (16, 2, b"\1\0\2\0\3\0\7\0\7\0\7\0", b"\1\0\2\0\3\0", 7),
    ],
)
def test_a_transparent_gray_or_color_of_any_depth(bits, kind, line, level, seen):
    # The level counts in the bits of the file, while Pillow gives pixels of 8 bits.
    opened = open_image(png((2, 1), bits, kind, b"\0" + line, level))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [WHITE, (seen,) * 3]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, loop=0)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert near(open_image(data).getpixel((4, 4)), RED)


@pytest.mark.parametrize(
    ("orientation", "size", "top_left"),
    [(1, (32, 24), RED), (3, (32, 24), BLUE), (6, (24, 32), RED), (8, (24, 32), BLUE)],
)
def test_exif_orientation(orientation, size, top_left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(sample(), "JPEG", exif=exif, quality=95))
    assert image.size == size
    assert near(image.getpixel((2, 2)), top_left)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_hide_the_picture():
    data = encoded(sample(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert open_image(data).size == (32, 24)


# --- size ---


def test_large_jpeg_is_decoded_at_reduced_size():
    data = encoded(sample(1000, 800), "JPEG")
    assert open_image(data, size=100).size == (250, 200)
    assert open_image(data, size=448).size == (1000, 800)
    assert near(open_image(data, size=100).getpixel((10, 100)), RED)


def test_other_formats_keep_their_size():
    assert open_image(encoded(sample(1000, 800), "PNG"), size=100).size == (1000, 800)


def test_huge_picture_is_refused_by_its_header(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png((60_000, 60_000), 8, 2, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"bomb\.png: 60000 x 60000 pixels; at most 100,000,000"):
            open_image(path)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_on_the_side_of_the_picture_and_pillow_stays_quiet(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 32 * 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(encoded(sample(), "PNG")).size == (32, 24)
        with pytest.raises(MediaError, match="33 x 24 pixels"):
            open_image(encoded(sample(33), "PNG"))
        with pytest.raises(MediaError, match="33 x 24 pixels"):
            open_image(sample(33))
    assert MAX_PIXELS == 100_000_000


# --- files that are not images ---


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"just some words\n", "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"%PDF-1.7 ...", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated"),
        (b"\x1f\x8bnot gzip at all", "a damaged gzip file"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "a damaged or truncated image"),
    ],
)
def test_bad_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(open_image, content, tmp_path / "bad.png", reason)


def test_folder_is_not_a_picture(tmp_path):
    with pytest.raises(MediaError, match="this is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut.png"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"cut\.png: a damaged or truncated image"):
        open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_flipped_bytes_give_a_picture_or_a_media_error(kind):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 200), 3):
            damaged[at] = rng.integers(0, 256)
        # Whatever else escapes fails the test.
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except MediaError:
            refused += 1
    assert refused > 0


def test_no_file_handle_is_left_open(tmp_path, monkeypatch):
    opened = []
    original = Path.open

    def recording(self, *args, **kwargs):
        opened.append(original(self, *args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(Path, "open", recording)
    good, cut, drawn = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.svg"
    good.write_bytes(encoded(sample(), "PNG"))
    cut.write_bytes(encoded(sample(), "PNG")[:40])
    drawn.write_bytes(svg(HALVES))
    opened.clear()
    open_image(good)
    open_image(drawn)
    with pytest.raises(MediaError):
        open_image(cut)
    Media.image(good).content_hash()
    assert len(opened) == 4
    assert all(stream.closed for stream in opened)
