"""Sources of every format but captions: tables, splits, limits and reports."""

import json
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bindllm.data.source_config import Columns, SourceConfig
from bindllm.data.sources import hashed_split, read_source
from bindllm.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Sixty images, 0.png to 59.png."""
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(b"picture %d" % number)
    return tmp_path


def asked(number: int, **more) -> dict:
    return {"image": f"{number}.png", "question": "Which?", "answer": "red", **more}


def write(path, rows) -> str:
    path.write_text(
        json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def splits(path: str, format="vqa", **options) -> dict[str, list[str]]:
    """Names of the rows of each split."""
    rows, _ = read_source(SourceConfig(path, format, **options))
    return {split: [row.name.rsplit(" ")[-1] for row in found] for split, found in rows.items()}


def test_rows_carry_what_the_format_found(folder):
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "type": "letters", "split": "test"}
    rows, report = read_source(SourceConfig(write(folder / "x.jsonl", [row]), "choice"), 3)
    (found,) = rows["test"]
    assert (found.name, found.source, found.task) == ("x.jsonl line 1", 3, "answer")
    assert (found.type, found.options, found.references) == ("letters", ("a", "b"), ("The answer is (B).",))
    assert (report.format, report.num_media, report.num_rows, report.text_only) == ("choice", 0, 1, 1)
    pair = {"prompt": "?", "chosen": "a", "rejected": "b"}
    rows, _ = read_source(SourceConfig(write(folder / "y.jsonl", [pair]), "preference", split="train"))
    assert rows["train"][0].rejected.messages[-1].text == "b"
    labelled = {"prompt": "?", "completion": "a", "label": False}
    rows, _ = read_source(SourceConfig(write(folder / "z.jsonl", [labelled]), "preference", split="train"))
    assert rows["train"][0].desirable is False


def test_an_image_is_in_the_same_split_whatever_the_format(folder):
    numbers = range(60)
    path = write(
        folder / "x.jsonl", [asked(number) for number in numbers] + [asked(number) for number in numbers]
    )
    found = splits(path, held_out=0.5)
    for number in numbers:
        split = hashed_split(f"{number}.png", 0.5)
        assert {str(number + 1), str(number + 61)} <= set(found[split])
    captions = [{"image": f"./{number}.png", "caption": "red"} for number in numbers]
    assert splits(write(folder / "captions.jsonl", captions), "caption", held_out=0.5) == {
        split: [name for name in names if int(name) <= 60] for split, names in found.items()
    }


def test_rows_that_share_media_share_a_split_through_others_too(folder):
    rows = [asked(number) for number in range(60)]
    apart = {split for split, names in splits(write(folder / "x.jsonl", rows), held_out=0.5).items() if names}
    assert len(apart) == 3
    # A chain: 0 and 1, 1 and 2, ...
    chain = [asked(0, image=[f"{number}.png", f"{number + 1}.png"]) for number in range(59)]
    together = splits(write(folder / "y.jsonl", rows + chain), held_out=0.5)
    assert sorted(len(names) for names in together.values()) == [0, 0, 119]
    assert together[hashed_split("0.png", 0.5)]


def test_rows_without_media_go_by_their_question(folder):
    rows = [
        {"prompt": f"{number}?", "chosen": f"{n}", "rejected": "no"} for n in range(3) for number in range(40)
    ]
    found = splits(write(folder / "x.jsonl", rows), "preference", held_out=0.5)
    for number in range(40):
        names = {str(number + 1), str(number + 41), str(number + 81)}
        assert names <= set(found[hashed_split(f"{number}?", 0.5)])


def test_media_inside_a_table_go_by_their_content(folder):
    pictures = [b"one", b"two"] * 10
    rows = {"image": [{"bytes": p, "path": f"{n}.png"} for n, p in enumerate(pictures)]}
    rows |= {"question": ["Which?"] * 20, "answer": ["red"] * 20, "caption": [f"{n}" for n in range(20)]}
    pq.write_table(pa.table(rows), folder / "x.parquet")
    found = splits(str(folder / "x.parquet"), held_out=0.9)
    for first, picture in enumerate((b"one", b"two"), start=1):
        split = hashed_split(sha256(picture).hexdigest(), 0.9)
        assert {f"{number}" for number in range(first, 21, 2)} <= set(found[split])
    rows, report = read_source(SourceConfig(str(folder / "x.parquet"), "vqa"))
    assert report.num_media == 2
    assert {media.source for split in rows.values() for row in split for media in row.media} == {
        b"one",
        b"two",
    }
    # Captions of such a table are joined by their image as well.
    rows, report = read_source(SourceConfig(str(folder / "x.parquet")))
    assert (report.num_media, report.num_rows) == (2, 20)


def test_the_split_of_the_recipe_then_of_the_row_then_of_the_file(folder):
    (folder / "qa").mkdir()
    for split in ("train", "test"):
        write(folder / "qa" / f"{split}.jsonl", [asked(0), asked(1, split="validation")])
    path, options = str(folder / "qa"), {"media": str(folder)}
    rows, _ = read_source(SourceConfig(path, "vqa", **options))
    names = {split: [row.name for row in found] for split, found in rows.items()}
    assert names == {
        "train": ["train.jsonl line 1"],
        "validation": ["train.jsonl line 2", "test.jsonl line 2"],
        "test": ["test.jsonl line 1"],
    }
    assert list(map(len, splits(path, split="test", **options).values())) == [0, 0, 4]
    rows, _ = read_source(SourceConfig(path, "vqa", columns=Columns(split=None), **options))
    assert list(map(len, rows.values())) == [2, 0, 2]


@pytest.mark.parametrize("format", ["vqa", "caption"])
def test_other_names_of_validation(folder, format):
    (folder / "qa").mkdir()
    rows = [{**asked(n), "caption": "x", "split": name} for n, name in enumerate(["train", "val", "dev"])]
    path = write(folder / "qa" / "val.jsonl", rows)
    found = splits(path, format, media=str(folder))
    assert list(map(len, found.values())) == [1, 2, 0]
    write(folder / "qa" / "train.jsonl", [asked(3)])
    write(folder / "qa" / "val.jsonl", [asked(4)])
    found = splits(str(folder / "qa"), media=str(folder))
    assert list(map(len, found.values())) == [1, 1, 0]


def test_a_folder_with_one_table(folder):
    (folder / "image").mkdir()
    (folder / "image/2.jpg").touch()
    rows = {"annotations": [{"image_id": "2", "caption": "A rose."}]}
    path = write(folder / "filter_cap.json", rows)
    for named in (path, str(folder)):
        found, report = read_source(SourceConfig(named, "minigpt4", split="train"))
        assert [media.source for media in found["train"][0].media] == [str(folder / "image/2.jpg")]
        assert report.counted == "1 rows (minigpt4), 1 images"


def test_folders_that_do_not_say_which_table(folder):
    (folder / "none").mkdir()
    with pytest.raises(
        InputError, match=r"none holds no table \(\.jsonl, .*expected one, or one for each of train"
    ):
        read_source(SourceConfig(str(folder / "none"), "vqa"))
    (folder / "none/000.tar").touch()
    for format in ("vqa", "caption"):
        with pytest.raises(InputError, match=r"It holds tar shards.*: give them as .*none/\*\.tar"):
            read_source(SourceConfig(str(folder / "none"), format))
    for name in ("a.json", "b.jsonl"):
        write(folder / name, [asked(0)])
    with pytest.raises(
        InputError, match=r"holds the tables a\.json, b\.jsonl .*Give the path of the one to use"
    ):
        read_source(SourceConfig(str(folder), "vqa"))
    for name in ("train.json", "train.jsonl"):
        write(folder / name, [asked(0)])
    with pytest.raises(InputError, match="holds the tables a.json, b.jsonl, train.json, train.jsonl"):
        read_source(SourceConfig(str(folder), "vqa"))


def test_limit_takes_rows_by_hash_whatever_their_order(folder):
    rows = [asked(number) for number in range(60)]
    found = splits(write(folder / "x.jsonl", rows), limit=12, split="train")["train"]
    assert len(found) == 12
    assert found == sorted(found, key=int)
    assert int(found[-1]) > 30
    turned = splits(write(folder / "y.jsonl", rows[::-1]), limit=12, split="train")["train"]
    assert {61 - int(name) for name in turned} == set(map(int, found))


def test_media_are_looked_for_in_the_folder_that_the_recipe_names(folder):
    (folder / "tables").mkdir()
    path = write(folder / "tables/x.jsonl", [asked(0)])
    captions = write(folder / "tables/captions.jsonl", [{"image": "0.png", "caption": "red"}])
    for named, format in ((path, "vqa"), (captions, "caption"), (str(folder / "tables"), "caption")):
        with pytest.raises(InputError, match="1 x no such image file"):
            read_source(SourceConfig(named, format))
        rows, _ = read_source(SourceConfig(named, format, media=str(folder), split="train"))
        assert rows["train"][0].media[0].source == str(folder / "0.png")


def test_bad_rows_are_counted_by_reason_with_what_is_at_fault(folder):
    rows = [
        asked(0),
        asked(99),
        asked(98),
        asked(97),
        asked(96),
        asked(1, answer=""),
        {"frage": "?"},
        asked(2, split="held"),
    ]
    path = write(folder / "x.jsonl", rows)
    with open(path, "a") as stream:
        stream.write("[]\n{")
    _, report = read_source(SourceConfig(path, "vqa"))
    assert report.skipped.counts == {
        "no such image file": 4,
        "empty answer": 1,
        "no column 'question'. Known: frage.": 1,
        "unknown split 'held'. Known: test, train, validation.": 1,
        "not a JSON object": 1,
        "not valid JSON": 1,
    }
    assert report.skipped.examples["no such image file"] == [
        "x.jsonl line 2: 99.png",
        "x.jsonl line 3: 98.png",
        "x.jsonl line 4: 97.png",
    ]
    assert report.num_rows == 1


LLAVA = {
    "image": "0.png",
    "conversations": [{"from": "human", "value": "<image> ?"}, {"from": "gpt", "value": "red"}],
}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "captions.jsonl", "x.csv"])
def test_a_source_left_at_the_format_caption_names_what_it_looks_like(folder, name):
    if name == "x.csv":
        (folder / name).write_text("image,conversations\n0.png,[]\n")
    else:
        write(folder / name, [LLAVA])
    path = folder if name == "captions.jsonl" else folder / name
    with pytest.raises(InputError, match=r"no column 'caption'.*looks like llava; set format: llava"):
        read_source(SourceConfig(str(path)))


def test_a_folder_of_tables_left_at_the_format_caption_names_it_too(folder):
    (folder / "qa").mkdir()
    write(folder / "qa/train.jsonl", [asked(0)])
    with pytest.raises(InputError, match=r"no table captions\.\*.*looks like vqa; set format: vqa"):
        read_source(SourceConfig(str(folder / "qa")))


def test_captions_that_cannot_be_used_get_no_hint_of_formats(folder):
    path = write(folder / "x.jsonl", [{"image": "gone.png", "caption": "red"}])
    with pytest.raises(InputError, match=r"1 x no such image file \(x.jsonl line 1: gone.png\)$"):
        read_source(SourceConfig(path))


def test_rationale_belongs_to_multiple_choice():
    with pytest.raises(InputError, match="rationale belongs to format: choice, not to vqa"):
        SourceConfig("x", "vqa", rationale=True)
