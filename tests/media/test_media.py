"""`Media`: what it accepts, what it is called, and when two of them have the same content."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm.errors import InputError, MediaError
from bindllm.media import MODALITIES, Media, open_image
from bindllm.media.audio import cut_audio
from bindllm.media.maps import open_depth, open_thermal
from bindllm.media.motion import open_imu
from bindllm.media.points import open_points
from bindllm.media.video import read_frames


def test_one_constructor_per_modality():
    for modality in MODALITIES:
        assert getattr(Media, modality)("source", 0.5) == Media(modality, "source", 0.5)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_bad_weights(weight):
    with pytest.raises(InputError, match=r"weight of cat\.png"):
        Media.image("cat.png", weight=weight)


def test_bad_modality_and_source():
    with pytest.raises(InputError, match=r"lower-case word, not 'Image'.*Did you mean 'image'"):
        Media("Image", "cat.png")
    for name in ("", "range doppler", "3d", None):
        with pytest.raises(InputError, match="a modality is a lower-case word"):
            Media(name, "cat.png")
    with pytest.raises(InputError, match="source of image media must be .* not list"):
        Media.image([1, 2])
    with pytest.raises(InputError, match="has a mask; fill it first"):
        Media.depth(np.ma.masked_equal(np.eye(2), 0))
    with pytest.raises(InputError, match="source of text media must be str, not bytes"):
        Media.text(b"words")


def test_a_list_of_samples_is_told_to_be_an_array():
    with pytest.raises(InputError, match=r"source of audio media must be .*ndarray.*, not list$"):
        Media.audio([0.0] * 9, sampling_rate=44_100)
    with pytest.raises(InputError, match="a.wav has a rate of its own"):
        Media.audio("a.wav", sampling_rate=44_100)


def test_numbers_of_numpy_are_weights():
    assert Media.image("cat.png", weight=np.float32(0.5)).weight == 0.5


def test_sources_that_are_not_paths_are_explained():
    for source, reason in (
        (
            "https://a.b/cat.png",
            "https://a.b/cat.png: cannot be opened .*; download it first and give its path",
        ),
        ("no.png", "no.png: cannot be opened .*; check the path"),
        ("", "an empty path; give the path of a file"),
        (
            base64.b64encode(bytes(9000)).decode(),
            r"^A{60}\.\.\.: no path; write data:image/png;base64, before base64",
        ),
    ):
        with pytest.raises(MediaError, match=reason):
            open_image(Media.image(source).source)


def test_any_lower_case_word_is_a_modality():
    radar = Media("radar", np.zeros((2, 3)), weight=0.5)
    assert repr(radar) == "Media('radar', '<array [2, 3] float64>', weight=0.5)"
    assert radar.content_hash() != Media("sonar", radar.source).content_hash()


def test_names_are_short():
    assert Media.image("a/cat.png").name == "a/cat.png"
    assert Media.image(b"x" * 1000).name == "<1000 bytes>"
    assert Media.image(np.zeros((4, 6, 3), np.uint8)).name == "<array [4, 6, 3] uint8>"
    assert Media.image(Image.new("L", (4, 6))).name == "<image 4x6 L>"
    assert len(Media.text("word " * 50).name) == 42
    assert repr(Media.image(b"x" * 1000, weight=0.5)) == "Media.image('<1000 bytes>', weight=0.5)"


def test_hash_is_of_modality_and_content(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    for path in (a, b):
        path.write_bytes(b"content")
    expected = hashlib.sha256(b"image\nfile\ncontent").hexdigest()
    assert Media.image(a).content_hash() == Media.image(str(b), weight=2).content_hash() == expected
    assert Media.image(b"content").content_hash() == expected
    assert Media.thermal(a).content_hash() != expected
    assert Media.text("content").content_hash() != expected


def test_hash_of_arrays_and_images():
    zeros = np.zeros((4, 6), np.uint8)
    hashes = [
        Media.image(source).content_hash()
        for source in (
            zeros,
            zeros.reshape(6, 4),
            zeros.view(np.int8),
            zeros + 1,
            Image.fromarray(zeros),
            Image.fromarray(zeros).convert("RGB"),
            zeros.tobytes(),
        )
    ]
    assert len(set(hashes)) == len(hashes)
    wide = np.arange(48, dtype=np.uint8).reshape(4, 12)
    assert Media.image(wide[:, ::2]).content_hash() == Media.image(wide[:, ::2].copy()).content_hash()


@pytest.mark.parametrize("modality", [name for name in MODALITIES if name != "text"])
def test_pipes_and_devices_are_refused_at_once(modality, tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "zeros.png"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    opened = {
        "image": open_image,
        "video": lambda source: list(read_frames(source, pick=lambda count, rate: [0])),
        "audio": lambda source: cut_audio(source, rate=16_000, cut=lambda length: [(0, length)]),
        "point": open_points,
        "depth": open_depth,
        "thermal": open_thermal,
        "imu": lambda source: open_imu(source, steps=5),
    }[modality]
    for source in (pipe, link, "/dev/null"):
        for action in (opened, lambda source: Media(modality, source).content_hash()):
            with pytest.raises(MediaError, match="a pipe, a socket or a device; expected a regular file"):
                action(source)


def test_hash_of_a_missing_file():
    with pytest.raises(MediaError, match=r"missing\.wav: cannot be opened"):
        Media.audio("missing.wav").content_hash()


def test_open_files_and_data_uris_are_the_bytes_of_the_file(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    content = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(content)
    # The buffer stands at its end, as after every `save`.
    sources = [buffer, memoryview(content), f"data:image/png;base64,{base64.b64encode(content).decode()}"]
    with (tmp_path / "a.png").open("rb") as stream:
        sources.append(stream)
        hashes = {Media.image(source).content_hash() for source in sources}
    assert hashes == {Media.image(content).content_hash()}
    assert Media.text("data:,x").source == "data:,x"
    # Half of a surrogate pair is no error of its own; the file then cannot be decoded.
    assert Media.image("data:,x\ud800").source == b"x\xed\xa0\x80"
    with pytest.raises(MediaError, match="has no data, or data that are not base64"):
        Media.image("data:image/png;base64,!!")
    with pytest.raises(InputError, match="open it with mode 'rb'"):
        Media.image(io.StringIO("x"))


def test_tensors_of_torch_are_arrays_with_the_channels_last():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (tensor, tensor / 255, (tensor / 255).bfloat16().float()):
        assert np.abs(np.int16(Media.image(given).source) - np.int16(pixels)).max() <= (given is not tensor)
    assert Media.video(tensor[None]).source.shape == (1, 2, 5, 3)
    assert Media.image(tensor[:1]).source.shape == (2, 5)
    assert Media.depth(torch.ones(1, 2, 5)).source.shape == (2, 5)
    assert Media.point(torch.ones(7, 3, dtype=torch.bfloat16)).source.dtype == np.float32
    with pytest.raises(InputError, match="undo its normalization"):
        Media.image(tensor.float() - 100)


def test_samples_with_their_rate():
    tone = np.sin(np.arange(44_100, dtype=np.float32) / 20)
    media = Media.audio(tone, sampling_rate=44_100)
    [values] = cut_audio(media.source, rate=16_000, cut=lambda length: [(0, length)])
    assert values.shape == (1, 16_000)
    # As datasets give them, and from torch.
    for other in (
        {"array": tone, "sampling_rate": 44_100},
        {"array": torch.from_numpy(tone), "sampling_rate": 44_100},
    ):
        assert Media.audio(other).content_hash() == media.content_hash()
    assert media.content_hash() != Media.audio(tone).content_hash()
    # A part has the rate of the whole, and so has a copy, such as that for another process.
    for other in (pickle.loads(pickle.dumps(media)), copy.deepcopy(media), Media.audio(media.source[:])):
        assert other.content_hash() == media.content_hash()
    assert Media.audio(tone, sampling_rate=16_000).content_hash() == Media.audio(tone).content_hash()
    for source, rate, words in (
        (tone, 0, "expected samples a second"),
        ("a.wav", 8_000, "has a rate of its own"),
        # Also the rate that arrays have by default.
        ("a.wav", 16_000, "has a rate of its own"),
        (media.source, 16_000, "have the rate 44100 already"),
    ):
        with pytest.raises(InputError, match=words):
            Media.audio(source, sampling_rate=rate)
    with pytest.raises(MediaError, match="samples a second"):
        cut_audio(Media.audio(tone, sampling_rate=10**6).source, rate=16_000, cut=lambda length: [(0, 1)])
