"""Declared tools, the handles and references that a planner may write, and the tools that measure media."""

import wave
from functools import partial
from typing import Annotated, Literal

import numpy as np
import pytest

from bindllm import Media
from bindllm.errors import InputError
from bindllm.reasoning.measure import MEDIA_TOOLS, calculate, crop, depth_at, measure_audio, measure_points
from bindllm.reasoning.tools import Tool, check_tools, references, tool

IMAGE = Media.image(np.zeros((50, 100, 3), np.uint8))
HANDLES = {"image1": IMAGE, "image2": IMAGE, "audio1": Media.audio(np.zeros(100, np.float32))}


@tool
def find(image: Annotated[Media, "image"], thing: str, side: Literal["left", "right"] = "left") -> int:
    """Find a thing
    in an image.

    Not for the planner.

    Args:
        image: to search
        thing: its name,
            in one word
    """
    return len(thing)


def test_a_typed_function_is_one_record_for_all_forms():
    assert find(IMAGE, "cat") == 3
    function = find.for_openai(HANDLES)["function"]
    assert function["description"] == "Find a thing in an image."
    properties = function["parameters"]["properties"]
    # Handles of the right modality, and results; other modalities are not offered.
    assert properties["image"]["pattern"] == "^(image1|image2|result[1-9][0-9]{0,3})$"
    assert properties["thing"] == {"type": "string", "description": "its name, in one word"}
    assert properties["side"] == {"enum": ["left", "right"]}
    assert function["parameters"]["required"] == ["image", "thing"]
    assert find.parameters["properties"]["image"] == {
        "type": "string",
        "description": "to search",
    }
    assert (find.can_use(["audio"]), find.can_use(["audio", "image"]), calculate.can_use([])) == (
        False,
        True,
        True,
    )


def bare(a: int):
    return a


def untyped(a):
    """Do."""


def nested(a: dict):
    """Do."""


async def waits(a: int) -> int:
    """Do."""
    return a


def starred(*a: int):
    """Do."""


def unnamed(a: int, /):
    """Do."""


def unknown(a: "Unknown"):  # noqa: F821
    """Do."""


def of_bytes(a: Literal[b"x"]):
    """Do."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bare, "no docstring"),
        (untyped, "has the type None"),
        (nested, "expected str, int"),
        (waits, "is asynchronous"),
        (starred, r"\*a: int of the tool starred cannot be given by its name"),
        (unnamed, "a: int of the tool unnamed cannot be given by its name"),
        (unknown, "'Unknown' is not defined"),
        (of_bytes, "expected str, int"),
        (partial(bare, 1), "expected a function"),
        (int, "expected a function"),
        (5, "expected a function"),
        (lambda a: a, "no docstring"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused(function, message):
    with pytest.raises(InputError, match=message):
        tool(function)


def tight(a: int):
    """Do it
    at once.
    Args:
        a: first
    """


def sphinx(a: int):
    """Do it
    at once.
    :param a: first
    """


def numpy_style(a: int):
    """Do it
    at once.

    Parameters
    ----------
    a : int
        first
    """


@pytest.mark.parametrize("function", [tight, sphinx, numpy_style])
def test_a_description_ends_before_the_parameters(function):
    declared = tool(function)
    assert declared.description == "Do it at once."
    assert declared.parameters["properties"]["a"]["description"] == "first"


def test_names_and_schemas_are_checked():
    with pytest.raises(InputError, match="two tools have the name 'find'"):
        check_tools([find, find])
    with pytest.raises(InputError, match="letters, digits"):
        Tool("a.b", "", {"type": "object"}, print)
    with pytest.raises(InputError, match="not a JSON Schema of type object"):
        Tool("a", "", {"type": "string"}, print)
    with pytest.raises(InputError, match="are not a JSON Schema"):
        check_tools([Tool("a", "", {"type": "object", "properties": {"b": {"type": "tint"}}}, print)])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"image": "image1", "thing": "cat"}, ""),
        ({"image": "result7", "thing": "a {result2}"}, ""),
        (
            {"image": "image3", "thing": "cat"},
            "image is 'image3', expected a handle of image. Did you mean 'image2'",
        ),
        ({"image": "audio1", "thing": "cat"}, "Known: image1, image2"),
        ({"image": "/etc/passwd", "thing": "cat"}, "expected a handle"),
        ({"image": ["image1"], "thing": "cat"}, "expected a handle"),
        ({"image": "image1"}, "'thing' is a required property"),
        ({"image": "image1", "thing": 3}, "thing: 3 is not of type 'string'"),
        ({"image": "image1", "thing": "cat", "path": "x"}, "Additional properties are not allowed"),
        ({"image": "image1", "thing": "cat", "side": "up"}, "side: 'up' is not one of"),
    ],
)
def test_arguments_are_checked_before_a_call(arguments, problem):
    assert problem in find.problem(arguments, HANDLES)
    assert bool(problem) == bool(find.problem(arguments, HANDLES))


def test_a_schema_that_refers_to_an_address_opens_nothing():
    remote = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/schema"}}}
    assert "refers to" in Tool("remote", "", remote, print).problem({"a": 1}, {})


def test_references_become_results_and_handles_become_media():
    results = {1: IMAGE, 2: "dog", 3: 4, 4: ["é", True]}
    assert [*references({"a": "result2", "b": ["{result1}?", "result of 3"]})] == [2, 1]
    found = find.resolve({"image": "result1", "thing": "a {result2}, {result3} times"}, HANDLES, results)
    assert found == {"image": IMAGE, "thing": "a dog, 4 times"}
    assert find.resolve({"image": "image2", "thing": "result3"}, HANDLES, results)["thing"] == "4"
    assert calculate.resolve({"operation": "add", "a": "result3", "b": 1}, {}, results)["a"] == 4
    # As the planner reads them.
    for thing in ("result4", "{result4}"):
        assert find.resolve({"image": "image1", "thing": thing}, HANDLES, results)["thing"] == '["é", true]'
    with pytest.raises(InputError, match="a text cannot hold image"):
        find.resolve({"image": "image1", "thing": "a {result1}"}, HANDLES, results)
    wrong = {"image": {"image": "result2", "thing": ""}, "thing": {"image": "image1", "thing": "result1"}}
    for name, arguments in wrong.items():
        with pytest.raises(InputError, match=f"{name} is"):
            find.resolve(arguments, HANDLES, results)
    with pytest.raises(InputError, match="'dog' is not of type 'number'"):
        calculate.resolve({"operation": "add", "a": "result2", "b": 1}, {}, results)


def test_audio_is_measured(tmp_path):
    seconds = np.arange(32_000) / 16_000
    for pitch in (110, 440):
        tone = 0.5 * np.sign(np.sin(2 * np.pi * pitch * seconds)).astype(np.float32)
        found = measure_audio(Media.audio(tone))
        assert found["pitch_hz"] == pytest.approx(pitch, rel=0.01)
        assert (found["seconds"], found["loudness_db"]) == (2.0, -6.0)
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    assert measure_audio(Media.audio(noise))["pitch_hz"] is None
    # Files are decoded as anywhere else; only the first minute is heard, and the duration is that of the file.
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", ""))
        tone = np.sin(2 * np.pi * 220 * np.arange(8000 * 61) / 8000) * (np.arange(8000 * 61) < 8000 * 60)
        file.writeframes(np.repeat(tone * 16384, 2).astype("<i2").tobytes())
    found = measure_audio(Media.audio(tmp_path / "a.wav"))
    assert (found["seconds"], found["loudness_db"]) == (61.0, -9.0)
    assert found["pitch_hz"] == pytest.approx(220, rel=0.01)
    silent = measure_audio(Media.audio(np.zeros(10, np.float32)))
    assert (silent["loudness_db"], silent["pitch_hz"]) == (None, None)


def test_points_depth_images_and_numbers_are_measured():
    box = np.array([[0, 0, 0], [2, 3, 4], [1, 1, 1]], np.float32)
    found = measure_points(Media.point(box))
    assert found == {"points": 3, "extent": {"x": 2.0, "y": 3.0, "z": 4.0}, "box_volume": 24.0}
    depth = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    assert [depth_at(Media.depth(depth), x, y) for x, y in ((0, 0), (99, 0), (0, 100))] == [1.0, 2.0, 3.0]
    with pytest.raises(InputError, match="nothing was measured"):
        depth_at(Media.depth(depth), 100, 100)
    pixels = np.arange(40_000, dtype=np.uint32).view(np.uint8).reshape(100, 400, 4)[..., :3]
    part = crop(Media.image(pixels), 25, 50, 50, 60)
    assert np.array_equal(np.asarray(part.source), pixels[50:60, 100:200])
    for edges in ((50, 0, 50, 9), (-1, 0, 9, 9), (0, 0, 101, 9)):
        with pytest.raises(InputError, match="expected 0 <= left"):
            crop(IMAGE, *edges)
    assert [calculate(name, 7, 2) for name in ("subtract", "divide", "larger", "equal")] == [
        5,
        3.5,
        True,
        False,
    ]
    with pytest.raises(InputError, match="b is 0"):
        calculate("divide", 1, 0)
    assert len(check_tools(MEDIA_TOOLS)) == 5
