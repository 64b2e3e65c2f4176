"""Sources of every format but captions: tables, splits, limits and reports."""

import json
import os
import re
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bindllm.data.formats.media import FolderResolver
from bindllm.data.source_config import Columns, SourceConfig
from bindllm.data.sources import hashed_split, read_source
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.media.audio import cut_audio


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


def test_every_spelling_of_a_path_has_one_key_and_one_split(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "images").mkdir()
    (folder / "images/a b.png").write_bytes(b"picture")
    (folder / "link").symlink_to(folder / "images")
    (folder / "link.png").symlink_to(folder / "images/a b.png")
    absolute = str(folder / "images/a b.png")
    spellings = ["images/a b.png", "./images/a b.png", "images//a b.png", "link/../images/a b.png", absolute]
    spellings += [
        f"file://{absolute.replace(' ', '%20')}",
        "file:images/a%20b.png",
        "link/a b.png",
        "link.png",
    ]
    rows = [asked(0, image=name, caption=f"{n}") for n, name in enumerate(spellings)]
    store = EmbeddingStore(folder / "store", "0" * 64, 2)
    # The same from a table that is named by a relative path, and through a link to its folder.
    (folder.parent / "elsewhere").symlink_to(folder)
    write(folder / "x.jsonl", rows)
    for path in ("x.jsonl", str(folder / "x.jsonl"), str(folder.parent / "elsewhere/x.jsonl")):
        config = SourceConfig(path, "vqa")
        found = read_source(config)[0].values()
        media = [row.media[0] for part in found for row in part]
        assert {FolderResolver.of(config).key(one) for one in media} == {"images/a b.png"}
        assert sorted(map(len, found)) == [0, 0, len(spellings)]
        assert len({store.key_of(one) for one in media}) == 1
        # Captions of one image are joined.
        joined = [row for part in read_source(SourceConfig(path))[0].values() for row in part]
        assert {len(row.references) for row in joined} == {len(spellings)}


def test_rows_may_be_kept_inside_their_folder(folder):
    (folder / "qa").mkdir()
    (folder / "qa/in.png").write_bytes(b"inside")
    (folder / "qa/link.png").symlink_to(folder / "0.png")
    names = [
        "in.png",
        "../qa/in.png",
        str(folder / "qa/in.png"),
        "../0.png",
        "link.png",
        str(folder / "0.png"),
    ]
    names.append(f"file://{folder}/0.png")
    path = write(folder / "qa/x.jsonl", [asked(0, image=name) for name in names])
    assert sum(map(len, splits(path).values())) == len(names)
    inside = [name for names in splits(path, allow_outside=False).values() for name in names]
    assert sorted(inside) == ["1", "2", "3"]
    _, report = read_source(SourceConfig(path, "vqa", allow_outside=False))
    assert report.skipped.counts == {"image file outside the folder of the source": 4}
    assert sum(map(len, splits(path, allow_outside=False, media=str(folder)).values())) == 3


def test_rows_over_a_pool_of_media_are_reported_and_may_be_split_one_by_one(folder):
    pool = [asked(n, image=[f"{n % 9}.png", f"{(n * 5 + 1) % 9}.png"], question=f"{n}?") for n in range(40)]
    rows, report = read_source(SourceConfig(write(folder / "x.jsonl", pool), "vqa", held_out=0.4))
    assert sorted(map(len, rows.values()))[-1] >= 30
    assert re.match(r"\d\d of 40 rows share media, .* set split_by: row", report.warning)
    rows, report = read_source(
        SourceConfig(write(folder / "x.jsonl", pool), "vqa", held_out=0.4, split_by="row")
    )
    assert report.warning == ""
    assert [15 <= len(rows["train"]) <= 33, *map(bool, rows.values())] == [True] * 4
    # Rows of separate images, or with a split of their own, need no report.
    apart = [asked(n, question=f"{k}?") for n in range(10) for k in range(12)]
    for those in (apart, [{**row, "split": "train"} for row in pool]):
        assert read_source(SourceConfig(write(folder / "y.jsonl", those), "vqa"))[1].warning == ""


TEXTS = ["None", "NA", "nan", "null", "0", "N/A", "true", "-"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "arrow"])
def test_texts_that_look_like_nothing_are_texts_in_every_table(folder, kind):
    columns = ("question", "answer", "instruction", "output", "caption", "type", "A", "B")
    rows = [{"image": "0.png", **dict.fromkeys(columns, text), "B": "b"} for text in TEXTS]
    path = folder / f"x.{kind}"
    if kind in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join(mark.join(line) for line in [rows[0], *(row.values() for row in rows)]))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(path := folder / "set"))
    else:
        write(path, rows)
    options = {"split": "train", "media": str(folder), "columns": Columns(split=None)}
    for format in ("vqa", "alpaca", "caption", "choice"):
        found, report = read_source(SourceConfig(str(path), format, **options))
        answers = [row.conversation.messages[-1].text for row in found["train"]]
        assert answers == (["The answer is (A)."] * len(TEXTS) if format == "choice" else TEXTS)
        assert [row.type for row in found["train"]] == TEXTS
        assert report.skipped.total == 0
    assert [
        row.options[0] for row in read_source(SourceConfig(str(path), "choice", **options))[0]["train"]
    ] == TEXTS


def test_pipes_and_devices_are_not_read(folder):
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "zero.csv").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.csv"):
        for format in ("vqa", "caption"):
            with pytest.raises(InputError, match="not a regular file"):
                read_source(SourceConfig(str(folder / name), format))
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    path = write(folder / "x.jsonl", [asked(0), asked(0, image="pipe.png"), asked(0, image="zero.png")])
    assert read_source(SourceConfig(path, "vqa"))[1].skipped.counts == {"no such image file": 2}
    os.mkfifo(folder / "0.txt")
    (folder / "1.txt").write_text("red")
    rows, report = read_source(SourceConfig(str(folder)))
    assert [row.media[0].name for part in rows.values() for row in part] == [str(folder / "1.png")]
    assert report.skipped.counts == {"no text file of the same name": 59}


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv"])
def test_json_that_is_nested_too_deep_costs_its_row_or_its_file(folder, name):
    deep = "[" * 1_000_000
    row = {"question": "?", "choices": ["a", "b"], "answer": 0, "conversations": 0}
    if name == "x.csv":
        (folder / name).write_text(f"question,choices,answer,conversations\n?,{deep},0,{deep}\n")
    else:
        (folder / name).write_text(("[" if name == "x.json" else "") + json.dumps(row)[:-2] + deep)
    for format in ("choice", "llava", "vqa", "caption"):
        with pytest.raises(InputError, match=r"not valid JSON|not a list|hold a list|no column|has no row"):
            read_source(SourceConfig(str(folder / name), format))


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


def test_a_table_next_to_those_of_the_splits_is_counted(folder):
    (folder / "qa").mkdir()
    for n, name in enumerate(("train", "test", "more")):
        write(folder / "qa" / f"{name}.jsonl", [asked(n)])
    rows, report = read_source(SourceConfig(str(folder / "qa"), "vqa", media=str(folder)))
    assert list(map(len, rows.values())) == [1, 0, 1]
    assert report.skipped.counts == {"a table next to those of the splits": 1}


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


def test_a_folder_of_images_with_a_table_of_another_name_says_how_to_use_it(folder):
    write(folder / "metadata.jsonl", [{"file_name": "0.png", "text": "red"}])
    with pytest.raises(InputError, match=r"It holds the table metadata\.jsonl; give its path to use it"):
        read_source(SourceConfig(str(folder)))


def test_captions_that_cannot_be_used_get_no_hint_of_formats(folder):
    path = write(folder / "x.jsonl", [{"image": "gone.png", "caption": "red"}])
    with pytest.raises(InputError, match=r"1 x no such image file \(x.jsonl line 1: gone.png\)$"):
        read_source(SourceConfig(path))


def test_rationales_belong_to_questions():
    with pytest.raises(InputError, match="rationale belongs to format: choice or vqa, not to caption"):
        SourceConfig("x", "caption", rationale=True)
    with pytest.raises(InputError, match="rationale must be true, false, only or given, not 'gold'"):
        SourceConfig("x", "vqa", rationale="gold")
    with pytest.raises(InputError, match="rationales are not used with rationale: false"):
        SourceConfig("x", "vqa", rationales="answers.jsonl")


def test_decoded_audio_is_a_row_like_a_file(folder):
    tone = {"array": [0.0, 0.5, -0.5], "sampling_rate": 44_100}
    rows = [{"audio": tone, "question": f"{n}?", "answer": "red"} for n in range(2)]
    rows.append({"audio": {"array": [[[0.5]]]}, "question": "?", "answer": "red"})
    found, report = read_source(SourceConfig(write(folder / "x.jsonl", rows), "vqa", modality="audio"))
    # Rows that share it are in one split, as for a file.
    (own,) = [part for part in found.values() if part]
    assert len({row.media[0].content_hash() for row in own}) == 1
    assert len(own) == 2
    samples = Media.audio(np.array(tone["array"], np.float32), sampling_rate=44_100).source
    span = {"rate": 16_000, "cut": lambda length: [(0, length)]}
    assert np.array_equal(cut_audio(own[0].media[0].source, **span), cut_audio(samples, **span))
    assert sum(report.skipped.counts.values()) == 1
