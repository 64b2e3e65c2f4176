import json
import os

import pytest
from PIL import Image

from bindllm.data.formats import clean_caption
from bindllm.data.source_config import Columns, EpisodeConfig, SourceConfig
from bindllm.data.sources import hashed_split, read_source
from bindllm.errors import InputError
from tiny import color_images


@pytest.fixture
def folder(tmp_path):
    """Images a.png to f.png, without captions."""
    for letter in "abcdef":
        Image.new("RGB", (2, 2)).save(tmp_path / f"{letter}.png")
    return tmp_path


def write_rows(folder, *rows: dict, name: str = "captions.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def captions_of(folder) -> dict[str, list[str]]:
    return all_captions(folder)[0]


def all_captions(folder):
    """The captions of each image by its path in the folder, and the report."""
    rows, report = read_source(SourceConfig(str(folder)))
    found = {}
    for row in [row for part in rows.values() for row in part]:
        root = folder if folder.is_dir() else folder.parent
        found.setdefault(os.path.relpath(row.media[0].source, root), []).append(row.references)
    return {key: list(same[0]) for key, same in found.items()}, report


def test_rows_become_conversations_with_prompt_answer_and_references(folder):
    write_rows(folder, {"image": "a.png", "caption": ["a cat", "one cat"], "split": "test"})
    rows, report = read_source(SourceConfig(str(folder), prompt="What?"), 3)
    assert (len(rows["train"]), len(rows["validation"]), len(rows["test"])) == (0, 0, 2)
    first, second = rows["test"]
    assert [(m.role, m.text) for m in first.conversation.messages] == [
        ("user", "What?"),
        ("assistant", "a cat"),
    ]
    assert [media.source for media in first.media] == [str(folder / "a.png")]
    assert second.conversation.messages[1].text == "one cat"
    assert first.references == second.references == ("a cat", "one cat")
    assert (first.name, first.source) == ("captions.jsonl line 1", 3)
    assert (report.num_media, report.num_rows, report.skipped.total) == (1, 2, 0)


def test_repeated_rows_of_an_image_are_joined(folder):
    write_rows(
        folder,
        {"image": "a.png", "caption": "one"},
        {"image": "b.png", "caption": "two"},
        {"image": "./a.png", "caption": ["three", "one"]},
    )
    assert captions_of(folder) == {"a.png": ["one", "three"], "b.png": ["two"]}


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "other.csv"])
def test_other_tables(folder, name):
    delimiter = "\t" if name.endswith("tsv") else ","
    rows = ["image,caption,split", "a.png,red,train", "b.png,blue,"]
    (folder / name).write_text("\n".join(rows).replace(",", delimiter))
    path = folder / name if name.startswith("other") else folder
    assert captions_of(path) == {"a.png": ["red"], "b.png": ["blue"]}


PROMPTS = {"en": "What is this?", "zh-CN": "这是什么"}


def in_languages(folder, *rows: dict, prompts=PROMPTS, **options):
    return read_source(SourceConfig(str(write_rows(folder, *rows)), prompts=prompts, split="test", **options))


def test_the_language_of_a_row_chooses_its_prompt(folder):
    found, report = in_languages(
        folder,
        {"image": "a.png", "caption": "taxi", "language": "EN"},
        {"image": "a.png", "caption": ["出租车", "taxi"], "language": "zh_cn"},
        {"image": "b.png", "caption": "cafe\u0301", "language": " en"},
    )
    rows = found["test"]
    assert [(row.conversation.messages[0].text, row.language) for row in rows] == [
        ("What is this?", "en"),
        ("这是什么", "zh-CN"),
        ("这是什么", "zh-CN"),
        ("What is this?", "en"),
    ]
    # References of one language; a name may be the same in two.
    assert [row.references for row in rows] == [("taxi",), ("出租车", "taxi"), ("出租车", "taxi"), ("café",)]
    assert report.num_media == 2
    assert not report.skipped.counts


def test_a_row_without_a_prompt_in_its_language_is_counted(folder):
    found, report = in_languages(
        folder,
        {"image": "a.png", "caption": "cat", "language": "en"},
        {"image": "b.png", "caption": "猫", "language": "zh"},
        {"image": "c.png", "caption": "貓", "language": "zh-Hant-TW"},
        {"image": "d.png", "caption": "gato"},
        {"image": "e.png", "caption": "Hund", "language": " "},
        {"image": "f.png", "caption": "chat", "language": ["fr"]},
        {"image": "f.png", "caption": " ", "language": "en"},
        {"image": "f.png", "caption": "cat", "language": 5},
    )
    assert [row.references for row in found["test"]] == [("cat",)]
    assert set(report.skipped.counts) == {
        "no prompt for the language 'zh'. Did you mean 'zh-CN'? Known: en, zh-CN.",
        "no prompt for the language 'zh-Hant-TW'. Known: en, zh-CN.",
        "no column 'language'. Known: caption, image.",
        "nothing in column 'language'",
        "column 'language' does not hold a text",
        "empty caption",
        "no prompt for the language '5'. Known: en, zh-CN.",
    }


def test_an_image_is_in_one_split_in_all_languages(folder):
    rows = [
        {"image": "a.png", "caption": "cat", "language": "en", "split": "train"},
        {"image": "a.png", "caption": "猫", "language": "zh", "split": "test"},
    ]
    found, report = read_source(SourceConfig(str(write_rows(folder, *rows))))
    assert [row.language for row in found["train"]] == ["en"]
    assert report.skipped.counts == {"this image is in another split already": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": {}}, "prompts must name a text for each language"),
        ({"prompts": {False: "Hva er dette?"}}, "YAML reads no without quotes as false"),
        ({"prompts": {"en": " "}}, "prompts must name a text"),
        ({"prompts": {"": "What?"}}, "prompts must name a text"),
        ({"prompts": {"zh-CN": "a", "zh_cn": "b"}}, "prompts name one language twice: zh-CN, zh_cn"),
        ({"prompts": PROMPTS, "prompt": "What?"}, "give prompt or prompts, not both"),
        ({"prompts": PROMPTS, "format": "llava"}, "prompts belong to format: caption, minigpt4 or vqa"),
        ({"prompts": PROMPTS, "episodes": EpisodeConfig()}, "without episodes"),
    ],
)
def test_prompts_that_no_row_can_use_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SourceConfig("x", **options)


def test_questions_have_a_frame_in_their_language(folder):
    rows = [
        {"image": "a.png", "question": "Color?", "answer": "red", "language": "en"},
        {"image": "b.png", "question": "颜色", "answer": "红色", "language": "zh-cn"},
    ]
    frames = {"en": "{question} One word.", "zh-CN": "{question}用一个词回答。"}
    found, _ = in_languages(folder, *rows, prompts=frames, format="vqa")
    assert [(row.conversation.messages[0].text, row.language) for row in found["test"]] == [
        ("Color? One word.", "en"),
        ("颜色用一个词回答。", "zh-CN"),
    ]


def test_folder_of_images_with_text_files(folder):
    (folder / "a.txt").write_text("a cat\n\n one  cat \n", encoding="utf-8-sig")
    (folder / "deep").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "deep" / "x.JPG")
    (folder / "deep" / "x.txt").write_text("a dog")
    (folder / "b.txt").write_text(" \n")
    (folder / "c.txt").write_bytes(b"\xff")
    captions, report = all_captions(folder)
    assert captions == {"a.png": ["a cat", "one cat"], "deep/x.JPG": ["a dog"]}
    assert report.skipped.counts == {
        "empty caption": 1,
        "not UTF-8 text": 1,
        "no text file of the same name": 3,
    }


def test_a_folder_for_each_class_names_its_images(tmp_path):
    for name in ("dax/1.png", "dax/deep/2.jpg", "red_wug/1.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    # Such files are common next to the classes.
    (tmp_path / "README.txt").write_text("Photographs")
    (tmp_path / "dax" / "notes.csv").write_text("x")
    captions, report = all_captions(tmp_path)
    assert captions == {"dax/1.png": ["dax"], "dax/deep/2.jpg": ["dax"], "red_wug/1.png": ["red wug"]}
    assert report.skipped.counts == {"no text file of the same name, and not in the folder of a class": 1}
    # A text file for one image: the folders do not name the others.
    (tmp_path / "dax" / "1.txt").write_text("a dax")
    assert all_captions(tmp_path)[0] == {"dax/1.png": ["a dax"]}


def test_folders_of_classes_may_be_in_folders_of_splits(tmp_path):
    for name in ("train/dax/1.png", "val/dax/2.png", "test/wug/3.png", "test/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    rows, report = read_source(SourceConfig(str(tmp_path)))
    found = {split: [row.references for row in part] for split, part in rows.items()}
    assert found == {"train": [("dax",)], "validation": [("dax",)], "test": [("wug",)]}
    assert report.skipped.counts == {"no text file of the same name, and not in the folder of a class": 1}
    rows, _ = read_source(SourceConfig(str(tmp_path), columns=Columns(split=None), held_out=0.0))
    assert len(rows["train"]) == 3


def test_text_files_next_to_files_that_are_not_read_as_images_are_counted(folder):
    (folder / "a.txt").write_text("a cat")
    (folder / "phone.HEIC").write_bytes(b"x")
    (folder / "phone.txt").write_text("a dog")
    captions, report = all_captions(folder)
    assert captions == {"a.png": ["a cat"]}
    assert report.skipped.counts["a text file without an image of the same name"] == 1


def test_packed_shards_say_how_to_unpack_them(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"not a table.*Shards are uncompressed tar files: unpack it to \.tar"
    ):
        read_source(SourceConfig(str(tmp_path / "0.tar.gz")))


def test_column_names_can_be_chosen(folder):
    write_rows(folder, {"file": "a.png", "text": "x", "part": "validation"})
    rows, _ = read_source(SourceConfig(str(folder), columns=Columns("file", "text", "part")))
    assert len(rows["validation"]) == 1


def test_bad_rows_are_counted_with_reasons_and_examples(folder):
    write_rows(
        folder,
        {"image": "a.png", "caption": "good", "split": "train"},
        {"image": "missing.png", "caption": "x"},
        {"image": "x" * 5000, "caption": "x"},
        {"image": "", "caption": "x"},
        {"image": None, "caption": "x"},
        {"image": ".", "caption": "x"},
        {"image": "b.png", "caption": None},
        {"image": "b.png", "caption": []},
        {"image": "b.png", "caption": 7},
        {"image": "c.png", "caption": " \t\x07\u200b "},
        {"image": "a.png", "caption": "good ", "split": "train"},
        {"image": "a.png", "caption": "other", "split": "test"},
        {"image": "d.png", "caption": "x", "split": "held"},
        {"image": "e.png"},
    )
    rows, report = read_source(SourceConfig(str(folder)))
    assert [row.references for split in rows.values() for row in split] == [("good",)]
    assert report.skipped.counts == {
        "no such image file": 3,
        "no path to the image file": 2,
        "nothing in column 'caption'": 2,
        "the caption is not a text": 1,
        "empty caption": 1,
        "same image and caption as an earlier row": 1,
        "this image is in another split already": 1,
        "unknown split 'held'. Known: test, train, validation.": 1,
        "no column 'caption'. Known: image.": 1,
    }
    assert report.skipped.examples["no such image file"][0] == "captions.jsonl line 2: missing.png"
    assert report.skipped.total == 13


def test_source_whose_rows_are_all_bad_is_an_error_with_reasons(folder):
    write_rows(folder, {"image": "no.png", "caption": "x"}, {"image": "a.png", "caption": ""})
    with pytest.raises(
        InputError, match=r"no row that can be used: 1 x no such image file \(.*no\.png\); 1 x empty"
    ):
        read_source(SourceConfig(str(folder)))


def test_empty_table_is_an_error(folder):
    write_rows(folder)
    with pytest.raises(InputError, match="it is empty"):
        read_source(SourceConfig(str(folder)))


def test_paths_that_cannot_be_a_source(tmp_path, folder):
    with pytest.raises(InputError, match=r"nowhere does not exist\.$"):
        read_source(SourceConfig(str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no table captions\.\* .* and no images"):
        read_source(SourceConfig(str(tmp_path / "empty")))
    write_rows(folder)
    write_rows(folder, name="captions.csv")
    with pytest.raises(InputError, match="captions.jsonl and captions.csv; give the path"):
        read_source(SourceConfig(str(folder)))


def test_missing_folder_of_the_embedded_default_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run: bindllm fetch openmoji"):
        read_source(SourceConfig("data/openmoji"))


@pytest.mark.parametrize(
    ("raw", "clean", "had_control"),
    [
        (" a\tred\n square\u00a0", "a red square", False),
        ("a\x00b\x1b[0m", "ab[0m", True),
        ("\ufeffcat", "cat", True),
        ("cafe\u0301", "café", False),
        ("half \ud83d pair", "half pair", True),
        ("日本の城", "日本の城", False),
        # The joiner inside an emoji sequence and in Persian stays.
        ("👩‍🚒 می‌خواهم", "👩‍🚒 می‌خواهم", False),
    ],
)
def test_clean_caption(raw, clean, had_control):
    assert clean_caption(raw) == (clean, had_control)


def test_captions_with_control_characters_are_counted(folder):
    write_rows(folder, {"image": "a.png", "caption": ["a\x07b", "c"], "split": "train"})
    rows, report = read_source(SourceConfig(str(folder)))
    assert rows["train"][0].references == ("ab", "c")
    assert report.remarks.counts == {"a caption with control characters, removed": 1}


def test_hashed_split_is_stable_and_has_the_right_shares():
    keys = [f"images/{number}.png" for number in range(4000)]
    splits = [hashed_split(key, 0.16) for key in keys]
    assert abs(splits.count("test") / 4000 - 0.08) < 0.015
    assert abs(splits.count("validation") / 4000 - 0.08) < 0.015
    # Written down once: an image must never change sides between versions.
    assert [hashed_split(key, 0.5) for key in keys[:6]] == [
        "train",
        "train",
        "validation",
        "train",
        "train",
        "validation",
    ]
    assert {hashed_split(key, 0.0) for key in keys} == {"train"}
    # What a smaller share holds out, a larger one holds out too.
    assert all(hashed_split(key, 0.3) != "train" for key in keys if hashed_split(key, 0.1) != "train")


def test_captions_of_one_image_never_straddle_the_split(folder):
    write_rows(folder, *({"image": f"{x}.png", "caption": f"{x}{n}"} for n in range(5) for x in "abcdef"))
    rows, _ = read_source(SourceConfig(str(folder), held_out=0.5))
    where = {row.media[0].source: split for split, found in rows.items() for row in found}
    assert len(where) == 6
    assert {split: len(found) for split, found in rows.items()} == {
        split: 5 * list(where.values()).count(split) for split in rows
    }


def test_whole_source_into_one_split(folder):
    write_rows(folder, {"image": "a.png", "caption": "x", "split": "val"}, {"image": "b.png", "caption": "y"})
    rows, _ = read_source(SourceConfig(str(folder), split="validation"))
    assert len(rows["validation"]) == 2


def test_limit_takes_images_with_all_their_captions_from_everywhere(tmp_path):
    color_images(tmp_path, per_color=10)
    rows, report = read_source(SourceConfig(str(tmp_path), limit=12))
    again, _ = read_source(SourceConfig(str(tmp_path), limit=12))
    assert rows == again
    assert report.num_media == 12
    assert len({reference for found in rows.values() for row in found for reference in row.references}) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight must be finite and above 0"),
        ({"weight": float("nan")}, "weight must be finite and above 0"),
        ({"held_out": 1.0}, "held_out must be"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"format": "captions"}, "Did you mean 'caption'"),
        ({"split": "valid"}, "Did you mean 'validation'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SourceConfig("x", **options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_text_file_without_permission_is_reported(folder):
    (folder / "a.txt").write_text("x")
    (folder / "b.txt").write_text("y")
    (folder / "a.txt").chmod(0)
    captions, report = all_captions(folder)
    assert list(captions) == ["b.png"]
    assert report.skipped.counts["the text file cannot be read (Permission denied)"] == 1
