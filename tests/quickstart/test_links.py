"""Links: the views of a drawing differ, and no drawing is in two splits."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bindllm.data.source_config import EpisodeConfig, SourceConfig
from bindllm.data.sources import read_source
from bindllm.quickstart import assets_of, links, openmoji
from bindllm.quickstart.drawings import THINGS, make_sprite
from bindllm.quickstart.scenes import BACKGROUNDS, SHADE, SIDE
from scene_parts import read_rows, write_wheels

VIEWS = {"train": 3, "validation": 3, "test": 5}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return write_wheels(tmp_path_factory.mktemp("wheels"), THINGS)


@pytest.fixture(scope="module")
def made(wheels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("links")
    return folder, links.build(wheels, folder, views=VIEWS, threads=2)


def test_each_drawing_has_its_views_in_its_split(made, wheels):
    folder, facts = made
    rows = read_rows(folder / "labels.jsonl")
    split = {row["caption"][0]: row["split"] for row in openmoji.rows_of(openmoji.read_wheels(wheels))}
    assert {row["label"]: row["split"] for row in rows} == split
    assert all(count == VIEWS[split[label]] for label, count in Counter(row["label"] for row in rows).items())
    assert facts["images"] == len(rows) == len({row["image"] for row in rows})
    assert sum(facts["drawings"].values()) == len(THINGS)
    assert f"{len(rows):,} images" in (folder / "README.md").read_text()


def test_no_two_views_are_the_same_and_nothing_is_cut(made):
    folder, _ = made
    digests, sizes = set(), []
    for row in read_rows(folder / "labels.jsonl")[:60]:
        pixels = np.asarray(Image.open(folder / row["image"]))
        assert pixels.shape == (SIDE, SIDE, 3)
        digests.add(hashlib.sha256(pixels.tobytes()).hexdigest())
        # The background is one color, at all edges.
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges == edges[0]).all()
        assert min(np.abs(edges[0] - np.array(color)).max() for color in BACKGROUNDS.values()) <= SHADE
        drawn = (pixels != edges[0]).any(-1)
        height, width = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
        sizes.append(max(np.ptp(height), np.ptp(width)))
    assert len(digests) == 60
    low, high = links.LENGTHS
    assert low * 0.8 < min(sizes) < max(sizes) < high * 1.4


def test_a_view_is_a_function_of_its_drawing_and_number(wheels):
    content = openmoji.read_wheels(wheels)
    sprite = make_sprite(openmoji.rows_of(content)[0], content)
    first, again, second = (links.draw_view(sprite, number).tobytes() for number in (0, 0, 1))
    assert first == again != second


def test_episodes_of_the_test_show_drawings_that_training_never_saw(made):
    config = EpisodeConfig(shots=2, test_shots=[4], count=1)
    rows, report = read_source(SourceConfig(str(made[0] / "labels.jsonl"), episodes=config))
    drawings = {
        split: {media.source for row in found for media in row.media} for split, found in rows.items()
    }
    names = {split: {row.references[0] for row in found} for split, found in rows.items()}
    assert report.skipped.total == 0
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert drawings[one].isdisjoint(drawings[other])
        assert names[one].isdisjoint(names[other])


def test_the_recipe_asks_for_no_more_views_than_there_are():
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes/links.yaml").read_text())
    (source,) = recipe["data"]["sources"]
    assert assets_of(recipe) == ["smollm2-135m-instruct", "efficientnet-lite0", "links"]
    assert max(source["episodes"]["shots"]) < links.VIEWS["train"]
    assert max(source["episodes"]["test_shots"]) < links.VIEWS["test"]
