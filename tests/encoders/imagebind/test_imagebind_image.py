"""ImageBind's images against the published pixels, and the recipes for depth and thermal maps."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm.encoders.imagebind.inputs import depth_input, image_input, thermal_input
from bindllm.errors import MediaError
from goldens import golden, make_image

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
DEVIATION = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
KINECT = {"baseline": 0.075, "focal": 500.0}


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def standardized(disparity: float) -> float:
    return (disparity / 75 - 0.0418) / 0.0295


@pytest.mark.parametrize("size", ["300x400", "517x333", "150x190", "224x224"])
@pytest.mark.parametrize("kind", ["array", "PNG", "BMP"])
def test_pixels_are_the_published_ones(size, kind):
    expected = golden("prep_image")
    height, width = map(int, size.split("x"))
    image = make_image(f"img_{size}", height, width)
    assert zlib.crc32(image.tobytes()) == expected[f"img_{size}/src_crc32"]
    pixels = image_input(image if kind == "array" else encoded(image, kind))
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.numpy(), expected[f"img_{size}/pixels"])
    tensor = (pixels / 255 - MEAN) / DEVIATION
    np.testing.assert_allclose(tensor[:, ::8, ::8].numpy(), expected[f"img_{size}/tensor_s8"], atol=2e-6)
    sums = [tensor.double().sum().item(), tensor.double().abs().sum().item()]
    np.testing.assert_allclose(sums, expected[f"img_{size}/tensor_sum"], rtol=1e-6)


def test_a_large_jpeg_is_decoded_in_full():
    noise = np.random.default_rng(0).integers(0, 255, (920, 940, 3), np.uint8)
    data = encoded(noise, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        whole = np.asarray(image.convert("RGB"))
    assert torch.equal(image_input(data), image_input(whole))


def test_upright_and_on_white():
    image = np.zeros((300, 300, 3), np.uint8)
    image[:150] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = image_input(encoded(image, "PNG", exif=exif))
    assert pixels[:, :100].max() < 10
    assert pixels[:, 124:].min() > 245
    assert (image_input(np.zeros((9, 9, 4), np.uint8)) == 255).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 50_000), (50_000, 1), (2, 9000), (223, 225)])
def test_any_shape_of_picture(shape):
    image = np.full((*shape, 3), 100, np.uint8)
    along = max(shape)
    middle = slice(along // 2 - 1, along // 2 + 2)
    image[middle if shape[0] == along else slice(None), middle if shape[1] == along else slice(None)] = 200
    pixels = image_input(image)
    assert pixels.shape == (3, 224, 224)
    assert pixels[:, 112, 112].float().mean() > 190


def test_of_a_very_long_picture_the_same_middle_is_taken():
    image = make_image("long", 40, 40 * 17)
    shorter = image[:, 40 : 40 * 16]
    assert (image_input(image).int() - image_input(shorter).int()).abs().max() <= 1


def test_svg():
    data = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><path fill="red" d="M0 0h4v2H0z"/></svg>'
    )
    assert image_input(data)[:, 112, 112].tolist() == [255, 0, 0]


def test_depth_is_standardized_disparity():
    meters = np.full((240, 320), 2.5, np.float32)
    depth = depth_input(meters, **KINECT)
    assert (depth.shape, depth.dtype) == ((1, 224, 224), torch.float32)
    assert depth.numpy() == pytest.approx(standardized(15.0), abs=1e-4)
    millimetres = encoded((meters * 1000).astype(np.uint16), "PNG")
    assert torch.allclose(depth_input(millimetres, **KINECT), depth, atol=1e-5)


def test_depth_is_clamped_and_what_was_not_measured_is_far():
    meters = np.full((224, 224), 0.001, np.float32)  # below 0.01 m: the largest disparity
    meters[:, 56:112] = 900  # beyond 50 m
    meters[:, 112:] = 0
    depth = depth_input(meters, **KINECT)[0, 100]
    assert depth[10] == pytest.approx(standardized(75), abs=1e-4)
    assert depth[80] == pytest.approx(standardized(0.75), abs=1e-4)
    assert depth[200] == pytest.approx(standardized(0), abs=1e-4)


def test_holes_in_depth_do_not_darken_what_is_around_them():
    meters = np.full((448, 448), 2.5, np.float32)
    meters[::2, ::4] = 0  # one in eight, and never half of a pixel
    assert depth_input(meters, **KINECT).numpy() == pytest.approx(standardized(15.0), abs=1e-3)


def test_the_middle_of_wide_maps_is_taken():
    meters = np.full((224, 448), 5.0, np.float32)
    meters[:, 112:336] = 1
    assert depth_input(meters, **KINECT).numpy() == pytest.approx(standardized(37.5), abs=1e-3)
    thermal = np.zeros((448, 224), np.uint8)
    thermal[112:336] = 255
    assert thermal_input(thermal).min() == 1


def test_thermal_is_brightness_without_overshoot():
    image = np.zeros((300, 400), np.uint8)
    image[:, 200:] = 255
    thermal = thermal_input(encoded(image, "PNG"))
    assert (thermal.shape, thermal.dtype) == ((1, 224, 224), torch.float32)
    assert (thermal.min(), thermal.max()) == (0, 1)
    assert thermal.mean() == pytest.approx(0.5, abs=0.01)
    # The same as resizing the 8-bit image, which rounds after each of two passes.
    gray = make_image("gray", 300, 400)[:, :, 0]
    assert (thermal_input(gray)[0] * 255 - image_input(gray)[0]).abs().max() <= 1.5


@pytest.mark.parametrize(
    "prepare", [image_input, thermal_input, lambda source: depth_input(source, **KINECT)]
)
def test_bad_files_are_media_errors_that_name_them(prepare, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(MediaError, match=r"bad\.png"):
        prepare(path)
