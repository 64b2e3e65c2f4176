"""Languages: every thing has images in all splits, and half of the things have training rows in English only."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml

from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.quickstart import ASSETS, assets_of, languages
from bindllm.quickstart.drawings import THINGS
from bindllm.quickstart.languages import ALL, ENGLISH, LANGUAGES
from scene_parts import read_rows, write_wheels

VIEWS = {"train": 2, "validation": 1, "test": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    wheels = write_wheels(tmp_path_factory.mktemp("wheels"), THINGS)
    folder = tmp_path_factory.mktemp("languages")
    return folder, languages.build(wheels, folder, views=VIEWS, threads=2)


def test_half_of_the_things_are_taught_in_english_only(made):
    folder, facts = made
    rows = read_rows(folder / "captions.jsonl")
    taught = defaultdict(set)
    for row in rows:
        taught[row["image"].split("/")[1], row["split"], row["subset"]].add(row["language"])
    for (_, split, subset), found in taught.items():
        assert found == ({"en"} if split != "test" and subset == ENGLISH else {*LANGUAGES})
    things = read_rows(folder / "names.jsonl")
    assert Counter(thing["subset"] for thing in things) == {ALL: len(THINGS) / 2, ENGLISH: len(THINGS) / 2}
    # A name that is the same in Spanish would not have to cross.
    assert {thing["name"]: thing["subset"] for thing in things}["pizza"] == ALL
    splits = defaultdict(set)
    for row in rows:
        splits[row["image"]].add(row["split"])
        assert (folder / row["image"]).is_file()
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) == len(THINGS) * sum(VIEWS.values())
    assert facts["captions.jsonl"]["test"] == len(THINGS) * len(LANGUAGES)


def test_names_are_read_in_every_language(made):
    folder, _ = made
    (cake,) = (thing for thing in read_rows(folder / "names.jsonl") if thing["name"] == "birthday cake")
    assert cake["names"] == {
        "en": "birthday cake",
        "es": "birthday cake:es",
        "ja": "birthday cake:ja",
        "zh": "birthday cake:zh",
    }


def test_the_recipe_has_a_prompt_for_every_language(made):
    recipe = yaml.safe_load(
        (Path(__file__).parents[2] / "recipes/languages.yaml").read_text(encoding="utf-8")
    )
    assert assets_of(recipe) == ["smollm2-135m-instruct", "efficientnet-lite0", "languages"]
    assert ASSETS["languages"].packages == ASSETS["openmoji"].packages
    (source,) = recipe["data"]["sources"]
    rows, report = read_source(SourceConfig(**{**source, "path": str(made[0])}))
    assert report.skipped.total == 0
    assert {row.language for row in rows["train"]} == {*LANGUAGES}
    asked = {row.language: row.conversation.messages[0].text for row in rows["test"]}
    assert asked == source["prompts"]
