"""Rows of JSON files: streamed, counted where bad, refused where the file is damaged or of another kind."""

import json
import tracemalloc

import pytest

from bindllm.data import tables as json_lists
from bindllm.data.report import Skipped
from bindllm.data.tables import read_table
from bindllm.errors import InputError


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes, required=()):
        path, skipped = tmp_path / "t.json", Skipped()
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_table(path, required, skipped)), skipped.counts

    return read


ROWS = [
    {"image": f"{n}.png", "says": 'a "list" [of é] \n', "n": [n, {"x": -1.5e3}, None, True]}
    for n in range(40)
]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_all_rows_come_whatever_the_chunks_cut(read, monkeypatch, chunk, indent, ascii_only):
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    rows, counts = read("\ufeff" + json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only))
    assert rows == [(f"t.json row {n}", row) for n, row in enumerate(ROWS, start=1)]
    assert counts == {}


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_an_object_may_hold_one_list_of_rows_next_to_other_things(read, monkeypatch, chunk):
    monkeypatch.setattr(json_lists, "_CHUNK", chunk)
    whole = {
        "info": {"rows": [{"no": "row"}]},
        "names": ["cat", "dog"],
        "none": [],
        "annotations": ROWS,
        "n": 12345,
    }
    assert [row for _, row in read(json.dumps(whole))[0]] == ROWS


def test_bad_rows_are_counted_and_their_neighbours_kept(read):
    rows, counts = read(
        b'[{"image": "a"}, 7, {"image": "\xff"}, ["b"], {"picture": "c"}, {"image": "d"}]', ("image",)
    )
    assert rows == [("t.json row 1", {"image": "a"}), ("t.json row 6", {"image": "d"})]
    assert counts == {
        "not a JSON object": 2,
        "not UTF-8 text": 1,
        "no column 'image'. Known: picture.": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "neither a JSON list of rows nor an object"),
        ("7", "neither a JSON list of rows nor an object"),
        ('[{"a": 1}', "the file ends before ','"),
        ('[{"a": 1}, {"a": "tex', "row 2 is not valid JSON .the file ends in the middle"),
        ('[{"a": 1}, {"a": }, {"a": 2}]' + " " * 50, "row 2 is not valid JSON .Expecting value"),
        ('[{"a": 1} {"a": 2}]', r"'{' instead of ','"),
        ("[" * 100_000, "row 1 is not valid JSON"),
        ('{"a": 1}\n{"a": 2}\n', "more than one JSON value; if each line is a row, call the file .jsonl"),
        ('{"a": [{"b": 1}]}\n{"a": [{"b": 1}]}\n', "more than one JSON value"),
        ('{"a": 1, "b": [1, 2]}', "the object holds no list of objects"),
        (
            '{"images": [{"a": 1}], "annotations": [{"b": 1}]}',
            "the object holds the lists images, annotations",
        ),
        ("{7: 1}", "'7' instead of a key in quotation marks"),
        ('{"a": 1,', "'' instead of a key in quotation marks"),
    ],
)
def test_files_that_cannot_be_read_say_where(read, content, message):
    with pytest.raises(InputError, match=message):
        read(content)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lists, "_CHUNK", 1 << 14)
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 2_000))
    tracemalloc.start()
    assert sum(1 for _ in read_table(path, ("text",), Skipped())) == 2_000
    # Of 2 MB: the buffer, what is read into it and their sum.
    assert tracemalloc.get_traced_memory()[1] < 2e5
    tracemalloc.stop()
