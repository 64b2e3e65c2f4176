"""`LinearMap`: the fit against a plain solution, its folder, and other encoders and pipelines."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bindllm import Imagine, Media
from bindllm.encoders import ImageBind
from bindllm.errors import CheckpointError, InputError
from bindllm.testing import synthetic_media
from bindllm.unclip.images import PipelineImages
from bindllm.unclip.linear_map import LinearMap, MapFacts, fit_ridge
from imagebind_small import write_small_imagebind
from tiny import ColorEncoder, color_images
from unclip_parts import WIDTH, save_tiny_pipeline

RED = Media.image(np.full((40, 40, 3), (220, 20, 20), np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    color_images(folder / "colors", per_color=8)
    return folder


@pytest.fixture(scope="module")
def fitted(place, pipeline) -> LinearMap:
    return LinearMap.fit(
        place / "colors", ColorEncoder(), PipelineImages(str(pipeline)), store=place / "store"
    )


def rows(count: int, *, noise: float = 0.0, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)
    weight = torch.randn(width, 7, generator=generator)
    return inputs, inputs @ weight + 2 + noise * torch.randn(count, 7, generator=generator)


def test_a_linear_relation_is_found():
    inputs, targets = rows(40)
    found = fit_ridge(inputs, targets)
    torch.testing.assert_close(inputs @ found.weight + found.bias, targets, atol=1e-3, rtol=0)
    assert found.cosine > 0.9999 > found.mean_cosine


@pytest.mark.parametrize("count", [4, 30])
def test_the_leave_one_out_score_is_that_of_fits_without_the_row(count):
    """Also with fewer rows than numbers in a row."""
    inputs, targets = (x.double() for x in rows(count, noise=0.5))
    found = fit_ridge(inputs, targets)
    center = inputs.mean(0)
    penalty = found.ridge * torch.linalg.eigvalsh((inputs - center).T @ (inputs - center)).mean()
    cosines, means = [], []
    for row in range(count):
        others = torch.arange(count) != row
        x, y = inputs[others], targets[others]
        moved = x - x.mean(0)
        weight = torch.linalg.solve(moved.T @ moved + penalty * torch.eye(5), moved.T @ (y - y.mean(0)))
        predicted = (inputs[row] - x.mean(0)) @ weight + y.mean(0)
        cosines.append(torch.cosine_similarity(predicted, targets[row], dim=0))
        means.append(torch.cosine_similarity(y.mean(0), targets[row], dim=0))
    assert found.cosine == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)
    assert found.mean_cosine == pytest.approx(float(torch.stack(means).mean()), abs=1e-5)
    gains = torch.stack(cosines) - torch.stack(means)
    assert found.error == pytest.approx(float(gains.std() / count**0.5), abs=1e-5)


def test_more_noise_is_fitted_with_a_larger_penalty():
    quiet, loud = fit_ridge(*rows(30)), fit_ridge(*rows(30, noise=5))
    assert quiet.ridge < loud.ridge


def test_the_map_predicts_the_pipelines_own_embeddings(fitted, pipeline):
    own = PipelineImages(str(pipeline))
    encoder = ColorEncoder()
    found = fitted(encoder.embed("image", [encoder.prepare(RED)]))
    assert found.shape == (1, WIDTH)
    torch.testing.assert_close(found.norm(), torch.tensor(1.0))
    assert float((found * own.embed("image", [own.prepare(RED)])).sum()) > fitted.facts.mean_cosine
    assert 1 > fitted.facts.cosine > fitted.facts.mean_cosine
    assert fitted.facts.images == 32


def test_an_encoder_of_another_width_is_drawn_through_its_map(fitted, pipeline, tmp_path):
    fitted.save(tmp_path / "map")
    encoder = ColorEncoder()
    imagine = Imagine(pipeline, [encoder], linear_map=tmp_path / "map", device="cpu", dtype="float32")
    expected = fitted(encoder.embed("image", [encoder.prepare(RED)])) * fitted.facts.norm
    torch.testing.assert_close(imagine.embed([[RED]]), expected)
    [image] = imagine([RED], steps=1)
    assert image.facts["map"] == vars(fitted.facts)


def test_imagebind_hears_through_a_map(pipeline, tmp_path):
    encoder = ImageBind(str(write_small_imagebind(tmp_path / "imagebind")))
    # Its width is that of the pipeline, and its made-up weights have another space.
    with pytest.raises(CheckpointError, match="ImageBind embeds images in another space than tiny"):
        Imagine(pipeline, [encoder], device="cpu")
    prints = encoder.fingerprint(), PipelineImages(str(pipeline)).fingerprint()
    facts = MapFacts("ImageBind", prints[0], "tiny", prints[1], 9, 1.0, 0.9, 0.5, norm=2.0)
    turned = LinearMap(torch.eye(WIDTH).roll(1, 1), torch.zeros(WIDTH), facts)
    imagine = Imagine(pipeline, [encoder], linear_map=turned, device="cpu", dtype="float32")
    tones = synthetic_media("audio")
    heard = encoder.embed("audio", [encoder.prepare(tone) for tone in tones])
    torch.testing.assert_close(imagine.embed([[tone] for tone in tones]), 2 * heard.roll(1, 1))
    images = [next(imagine([tone], steps=1)) for tone in tones[:2]]
    assert images[0].image.tobytes() != images[1].image.tobytes()
    assert images[0].facts["license"]["encoders"] == ["CC-BY-NC 4.0 (no commercial use)"]


def test_maps_of_other_encoders_and_pipelines_are_refused(fitted, pipeline, tmp_path):
    with pytest.raises(CheckpointError, match="the map was fitted for the encoder tiny.ColorEncoder"):
        Imagine(pipeline, [ColorEncoder(grid=2)], linear_map=fitted, device="cpu")
    other = save_tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="the map was fitted for the pipeline tiny"):
        Imagine(other, [ColorEncoder()], linear_map=fitted, device="cpu")


def test_a_folder_gives_the_same_map(fitted, tmp_path):
    fitted.save(tmp_path / "map")
    loaded = LinearMap.load(tmp_path / "map")
    assert loaded.facts == fitted.facts
    assert torch.equal(loaded.weight, fitted.weight)
    assert torch.equal(loaded.bias, fitted.bias)
    # A second map replaces the first, and nothing else is replaced.
    fitted.save(tmp_path / "map")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").touch()
    with pytest.raises(InputError, match="is not a linear map"):
        fitted.save(tmp_path / "notes")


def damage_format(content: dict) -> None:
    content["format"] = 99


def damage_entry(content: dict) -> None:
    del content["ridge"]


def damage_type(content: dict) -> None:
    content["norm"] = "long"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_format, "upgrade bindllm"),
        (damage_entry, "not the description"),
        (damage_type, "not the description"),
    ],
)
def test_a_damaged_description_is_refused(fitted, tmp_path, damage, words):
    fitted.save(tmp_path / "map")
    content = json.loads((tmp_path / "map/map.json").read_text())
    damage(content)
    (tmp_path / "map/map.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        LinearMap.load(tmp_path / "map")


def test_exchanged_weights_and_missing_folders_are_refused(fitted, tmp_path):
    fitted.save(tmp_path / "map")
    file = tmp_path / "map/map.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="damaged or exchanged"):
        LinearMap.load(tmp_path / "map")
    with pytest.raises(CheckpointError, match="bindllm fit_map"):
        LinearMap.load(tmp_path / "nothing")


def test_images_without_information_give_no_map(pipeline, place, tmp_path):
    own, store = PipelineImages(str(pipeline)), tmp_path / "store"
    images = sorted((place / "colors/images").iterdir())
    shutil.copy(images[0], tmp_path / "copy.png")
    with pytest.raises(InputError, match="at least 3 and better thousands, not 2"):
        LinearMap.fit([*images[:2], tmp_path / "copy.png"], ColorEncoder(), own, store=store)
    with pytest.raises(InputError, match="have the same embedding"):
        fit_ridge(torch.ones(5, 4), torch.randn(5, 4))
    # Embeddings that have nothing to do with the images.
    noise = torch.Generator().manual_seed(0)
    own.embed = lambda _, inputs: torch.nn.functional.normalize(
        torch.randn(len(inputs), WIDTH, generator=noise)
    )
    with pytest.raises(InputError, match="predicts no better than their mean"):
        LinearMap.fit(images, ColorEncoder(), own, store=store)


def test_unreadable_images_are_skipped_with_a_warning(fitted, pipeline, place, tmp_path, caplog):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    images = [tmp_path / "broken.png", *sorted((place / "colors/images").iterdir())]
    again = LinearMap.fit(images, ColorEncoder(), PipelineImages(str(pipeline)), store=tmp_path / "store")
    assert "1 of 33 images cannot be read" in caplog.text
    assert again.facts == fitted.facts
