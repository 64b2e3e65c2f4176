"""EfficientNet-Lite0 with made-up weights, against numbers from the original implementation."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bindllm.encoders
from bindllm.encoders.efficientnet import EfficientNetLite, each_on_one_thread
from bindllm.errors import EncoderError, InputError, MediaError
from bindllm.media import Media
from bindllm.testing import check_encoder
from tiny import synthetic_efficientnet

GOLDEN = Path(__file__).parent / "golden" / "efficientnet_lite0.json"


def wavy_picture(seed: int = 0) -> np.ndarray:
    """A colorful picture [224, 224, 3] from a formula: smooth waves and a hard edge."""
    y, x, c = np.mgrid[0:224, 0:224, 0:3].astype(np.float64)
    waves = np.sin(x / (9 + c + seed)) + np.cos(y / (13 - 2 * c)) + (x > y + 20 * c)
    return np.round((waves + 2) * 51).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("efficientnet")
    save_file(synthetic_efficientnet(), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def encoder(folder) -> EfficientNetLite:
    return EfficientNetLite(str(folder))


def changed(folder: Path, target: Path, change) -> EfficientNetLite:
    """Write a changed copy of the weights and return an encoder for it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return EfficientNetLite(str(target))


def test_features_are_those_of_the_original_implementation(encoder):
    expected = torch.tensor(json.loads(GOLDEN.read_text())["features"])
    found = encoder.embed("image", [encoder.prepare(Media.image(wavy_picture()))])[0]
    assert found.shape == expected.shape == (1280,)
    # Both have unit norm, so this is the relative error.
    assert (found - expected).norm() < 1e-5


def test_keeps_the_contract(encoder):
    check_encoder(encoder)


def test_batches_of_every_size_equal_single_pictures(encoder):
    inputs = [encoder.prepare(Media.image(wavy_picture(seed))) for seed in range(10)]
    batch = encoder.embed("image", inputs)
    for row, one in zip(batch, inputs, strict=True):
        assert (encoder.embed("image", [one])[0] - row).abs().max() < 1e-5


def test_the_bits_depend_on_neither_threads_nor_batch(encoder):
    inputs = [encoder.prepare(Media.image(wavy_picture(seed))) for seed in range(5)]
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(encoder.embed("image", inputs))
            found.append(torch.cat([encoder.embed("image", [one]) for one in inputs]))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_the_embedding_is_the_mean_of_the_tokens(encoder):
    inputs = [encoder.prepare(Media.image(wavy_picture(seed))) for seed in range(3)]
    embeddings, tokens = encoder.embed("image", inputs, tokens=True)
    assert torch.equal(embeddings, encoder.embed("image", inputs))
    assert [each.shape for each in tokens] == [(7, 7, 1280)] * 3
    means = torch.stack([each.mean((0, 1)) for each in tokens])
    torch.testing.assert_close(torch.nn.functional.normalize(means, dim=-1), embeddings)


def test_nothing_is_loaded_before_the_first_embedding(tmp_path):
    encoder = EfficientNetLite(str(tmp_path / "nowhere"))
    assert encoder.prepare(Media.image(wavy_picture())).shape == (224, 224, 3)
    for use in (encoder.fingerprint, lambda: encoder.embed("image", [torch.zeros(224, 224, 3)])):
        with pytest.raises(EncoderError, match="bindllm fetch efficientnet-lite0"):
            use()


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(folder, tmp_path):
    def change(tensors):
        del tensors["_blocks.3._bn1.bias"]
        tensors["_blocks.16._bn1.bias"] = torch.zeros(3)
        tensors["_conv_head.weight"] = torch.zeros(1280, 320, 3, 3)

    with pytest.raises(EncoderError) as caught:
        changed(folder, tmp_path, change).embed("image", [torch.zeros(224, 224, 3)])
    for words in (
        "missing _blocks.3._bn1.bias",
        "unexpected _blocks.16._bn1.bias",
        "_conv_head.weight has shape [1280, 320, 3, 3], expected [1280, 320, 1, 1]",
    ):
        assert words in str(caught.value)


def test_damaged_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all.")
    with pytest.raises(EncoderError, match="not a readable safetensors file"):
        EfficientNetLite(str(tmp_path)).embed("image", [torch.zeros(224, 224, 3)])


def test_classifier_and_counters_may_be_there_or_not(folder, encoder, tmp_path):
    def change(tensors):
        tensors["_fc.weight"], tensors["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
        del tensors["_bn0.num_batches_tracked"]

    other = changed(folder, tmp_path, change)
    picture = encoder.prepare(Media.image(wavy_picture()))
    assert torch.equal(other.embed("image", [picture]), encoder.embed("image", [picture]))


def test_fingerprint_is_of_weights_and_preprocessing_not_of_the_path(folder, tmp_path):
    first = EfficientNetLite(str(folder)).fingerprint()

    def change(tensors):
        tensors["_bn0.bias"][0] += 1

    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    assert changed(folder, tmp_path / "same", lambda tensors: None).fingerprint() == first
    assert changed(folder, tmp_path / "other", change).fingerprint() != first
    assert EfficientNetLite(str(folder), fit="crop").fingerprint() != first


def green_red_green(*, upright: bool) -> Image.Image:
    """Three squares of 300 in a row, or on top of each other."""
    image = Image.new("RGB", (900, 300), (0, 255, 0))
    image.paste((255, 0, 0), (300, 0, 600, 300))
    return image.transpose(Image.Transpose.ROTATE_90) if upright else image


@pytest.mark.parametrize("upright", [False, True])
def test_whole_picture_on_white(encoder, upright):
    pixels = encoder.prepare(Media.image(green_red_green(upright=upright)))
    across = pixels[112] if not upright else pixels[:, 112]
    along = pixels[:, 112] if not upright else pixels[112]
    assert across[[3, 112, 220]].tolist() == [[0, 255, 0], [255, 0, 0], [0, 255, 0]]
    assert along[[3, 70, 80, 112, 143, 153, 220]].float().mean(1).tolist() == [255, 255, 85, 85, 85, 255, 255]


@pytest.mark.parametrize("upright", [False, True])
def test_crop_is_the_square_in_the_middle(folder, upright):
    pixels = EfficientNetLite(str(folder), fit="crop").prepare(Media.image(green_red_green(upright=upright)))
    assert (pixels[3:-3, 3:-3] == torch.tensor([255, 0, 0])).all()


def test_svg_is_drawn_at_the_size_that_is_needed(encoder):
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="1" height="1" fill="red"/></svg>'
    pixels = encoder.prepare(Media.image(svg))
    # 224 x 112 in the middle, its left half red: sharp edges, so nothing was resampled.
    expected = torch.full((224, 224, 3), 255, dtype=torch.uint8)
    expected[56:168, :112, 1:] = 0
    assert torch.equal(pixels, expected)


def test_unknown_fit(folder):
    with pytest.raises(InputError, match="unknown fit 'hole'. Did you mean 'whole'"):
        EfficientNetLite(str(folder), fit="hole")


@pytest.mark.parametrize("fit", ["whole", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (223, 225)])
def test_odd_sizes(folder, fit, size):
    encoder = EfficientNetLite(str(folder), fit=fit)
    assert encoder.prepare(Media.image(Image.new("RGB", size))).shape == (224, 224, 3)


def test_other_modalities_and_bad_files(encoder):
    with pytest.raises(InputError, match="not 'audio'"):
        encoder.embed("audio", [])
    with pytest.raises(MediaError, match=r"missing\.png"):
        encoder.prepare(Media.image("missing.png"))


def test_found_by_its_import_path():
    assert bindllm.encoders.EfficientNetLite is EfficientNetLite
    assert "EfficientNetLite" in dir(bindllm.encoders)
    with pytest.raises(AttributeError, match="it has Aligned, AudioTower"):
        _ = bindllm.encoders.EfficientNetLight


def test_the_fingerprint_covers_how_files_are_read(monkeypatch):
    before = bindllm.encoders.fingerprint({})
    monkeypatch.setattr(bindllm.encoders, "REVISION", "media of another time")
    assert bindllm.encoders.fingerprint({}) != before


def test_fingerprint_of_words_bytes_and_files(tmp_path):
    made = bindllm.encoders.fingerprint
    (tmp_path / "a").write_bytes(b"content")
    prints = [
        made({}),
        made({"a": 1}),
        made({}, "ab", "c"),
        made({}, "a", "bc"),
        made({}, "content"),
        made({}, b"content"),
        made({}, tmp_path / "a"),
    ]
    assert len(set(prints)) == len(prints)
    assert made({"a": 1, "b": 2}) == made({"b": 2, "a": 1})
    with pytest.raises(EncoderError, match="not plain JSON"):
        made({"a": {1, 2}})
    with pytest.raises(EncoderError, match="cannot be read"):
        made({}, tmp_path / "missing")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_calls_run_at_the_same_time_and_on_one_thread_each(two_threads):
    started: list[float] = []

    def work(item):
        started.append(time.monotonic())
        time.sleep(0.2)
        return item, torch.get_num_threads()

    assert each_on_one_thread(work, [1, 2, 3]) == [(1, 1), (2, 1), (3, 1)]
    assert started[1] - started[0] < 0.2 <= started[2] - started[0]
    assert torch.get_num_threads() == 2


def test_an_error_is_passed_on_and_the_threads_are_as_before(two_threads):
    with pytest.raises(ZeroDivisionError):
        each_on_one_thread(lambda item: 1 // item, [1, 0])
    assert torch.get_num_threads() == 2
