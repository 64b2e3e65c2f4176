"""`Media`: what it accepts, what it is called, and when two of them have the same content."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
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
