"""`bindllm imagine` and `bindllm fit_map`: files in, PNG files out, and mistakes of the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bindllm import Media
from bindllm.cli import main
from bindllm.unclip.linear_map import LinearMap
from tiny import color_images
from unclip_parts import save_tiny_pipeline

OWN = ["--encoder", "unclip_parts.JointEncoder", "--encoder.pipeline", "tiny", "--device", "cpu"]
COLORS = ["--encoder", "tiny.ColorEncoder", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagine")
    save_tiny_pipeline(folder / "tiny")
    color_images(folder / "colors")
    Image.new("RGB", (40, 40), (220, 20, 20)).save(folder / "red.png")
    (folder / "rain.wav").write_bytes(b"RIFF rain")
    (folder / "chair.ply").write_bytes(b"ply chair")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    return folder


@pytest.fixture(autouse=True)
def _work(place, monkeypatch):
    monkeypatch.chdir(place)


def imagine(*words: str, encoder=OWN) -> int:
    return main(["imagine", "tiny", *words, "--steps", "1", "--dtype", "float32", *encoder])


def facts(file: str) -> dict:
    with Image.open(file) as opened:
        return json.loads(opened.text["bindllm"])


def test_files_of_several_modalities_become_images(capsys):
    shares = ["--weight", "1", "--weight", "3", "--weight", "2"]
    files = ["rain.wav", "red.png", "chair.ply"]
    assert imagine(*files, *shares, "--num_images", "2", "--seed", "7", "--output", "mixed.png") == 0
    printed = capsys.readouterr().out
    assert "mixed-1.png: 32 x 32 pixels, seed 7" in printed
    assert "mixed-2.png: 32 x 32 pixels, seed 8" in printed
    assert "license of the pipeline tiny: openrail++" in printed
    assert not Path("mixed.png").exists()
    made = facts("mixed-2.png")
    kinds = ("audio", "image", "point")
    hashes = [Media(kind, file).content_hash() for kind, file in zip(kinds, files, strict=True)]
    assert [(one["sha256"], one["weight"]) for one in made["media"]] == [*zip(hashes, (1, 3, 2), strict=True)]
    # The same command gives the same bytes, and only with leave.
    before = Path("mixed-1.png").read_bytes()
    assert imagine(*files, *shares, "--seed", "7", "--output", "mixed-1.png") == 1
    assert imagine(*files, *shares, "--seed", "7", "--output", "mixed-1.png", "--overwrite") == 0
    assert Path("mixed-1.png").read_bytes() == before


def test_a_map_is_fitted_and_used(capsys):
    assert main(["fit_map", "maps/colors", "tiny", "--images", "colors", "--store", "store", *COLORS]) == 0
    printed = capsys.readouterr().out
    fitted = LinearMap.load("maps/colors").facts
    assert "map maps/colors: 16 images, 16 to 32 numbers" in printed
    assert f"prediction: {fitted.cosine:.3f}; by the mean of the images: {fitted.mean_cosine:.3f}" in printed
    assert imagine("red.png", "--output", "plain.png", encoder=COLORS) == 1
    assert "--map: bindllm fit_map MAP tiny --images FOLDER" in capsys.readouterr().err
    assert imagine("red.png", "--map", "maps/colors", "--output", "plain.png", encoder=COLORS) == 0
    assert facts("plain.png")["map"]["images"] == 16


def test_the_cache_is_used(capsys):
    assert main(["index", "cache", "--images", "colors", "--store", "store", *OWN]) == 0
    assert imagine("rain.wav", "--output", "alone.png") == 0
    assert imagine("rain.wav", "--cache", "cache", "--cache_weight", "0.9", "--output", "near.png") == 0
    assert facts("near.png")["cache"]["weight"] == 0.9
    alone, near = (np.asarray(Image.open(file)) for file in ("alone.png", "near.png"))
    assert not np.array_equal(alone, near)
    assert imagine("rain.wav", "--cache_top_k", "3", "--output", "other.png") == 2
    assert "--cache_top_k needs a visual cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--output", "a.png"], 2, "required: files"),
        (["red.png"], 2, "required: --output"),
        (["nowhere.png", "--output", "a.png"], 1, "nowhere.png"),
        (["broken.png", "--output", "a.png"], 1, "broken.png"),
        (["red.png", "--output", "a.gif"], 1, "ends in .png"),
        (["red.png", "--output", "red.png"], 1, "red.png exists"),
        (["red.png", "--output", "rain.wav/a.png"], 1, "rain.wav"),
        (["red.png", "--output", "a.png", "--height", "20"], 1, "multiple of 8"),
        (["red.png", "--output", "a.png", "--weight", "1", "--weight", "2"], 2, "2 x --weight for 1 files"),
        (["red.png", "--output", "a.png", "--weight", "0"], 2, "--weight"),
        (["depth:red.png", "--output", "a.png"], 1, "no encoder serves the modality 'depth'"),
    ],
    ids=str,
)
def test_mistakes_are_named_and_nothing_is_written(words, code, message, capsys):
    before = sorted(Path().iterdir())
    assert imagine(*words) == code
    assert message in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_an_encoder_is_needed_for_a_map(capsys):
    assert main(["fit_map", "maps/none", "tiny", "--images", "colors"]) == 2
    assert "which encoder?" in capsys.readouterr().err
