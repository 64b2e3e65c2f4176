"""Layouts of published data sets: items that are read, files that are missing, and errors with their position."""

import json
import shutil

import numpy as np
import pytest

import tiny_layouts as tiny
from bindllm.errors import InputError
from bindllm.evaluation.layouts import Choice, Column, read_layout
from bindllm.evaluation.layouts.dataset import Files, clip_stems, read_classes
from bindllm.media.points import open_points
from tiny_layouts import write, write_json

CAPTIONED = {
    "audiocaps": tiny.audiocaps,
    "clotho": tiny.clotho,
    "coco": tiny.coco,
    "coco karpathy": tiny.coco_karpathy,
    "flickr30k": tiny.flickr30k,
    "flickr30k results.csv": tiny.flickr30k_csv,
    "flickr30k token": tiny.flickr30k_token,
}


def contents(dataset) -> list[tuple[str, tuple[int, ...]]]:
    """The content of each file, and its labels."""
    return [(open(item.media.source).read(), item.labels) for item in dataset.items]


def captions_of(dataset) -> dict[str, list[str]]:
    """The content of each file, and its captions."""
    return {open(item.media.source).read(): [text.source for text in item.targets] for item in dataset.items}


@pytest.mark.parametrize("write_it", [tiny.imagenet, tiny.imagenet_flat])
def test_imagenet(tmp_path, write_it):
    dataset = read_layout("imagenet", write_it(tmp_path))
    assert contents(dataset) == [("dog", (0,)), ("dog two", (0,)), ("cat", (0,)), ("cat", (1,))]
    assert dataset.classes == [("dog",), ("cat",), ("rain",), ("car",), ("chair",), ("lamp",)]
    assert (dataset.kind, dataset.modality, dataset.num_listed, dataset.skipped.total) == (
        "classify",
        "image",
        4,
        0,
    )


def test_missing_images_of_a_flat_imagenet_are_counted(tmp_path):
    tiny.imagenet_flat(tmp_path)
    (tmp_path / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_n000000011.JPEG").unlink()
    with (tmp_path / "LOC_val_solution.csv").open("a") as table:
        table.write("ILSVRC2012_val_9,\n")
    dataset = read_layout("imagenet", tmp_path)
    assert (len(dataset.items), dataset.num_listed) == (3, 4)
    assert dataset.skipped.counts == {"the file does not exist": 1, "no class": 1}
    assert dataset.skipped.examples["no class"] == ["LOC_val_solution.csv line 6"]


def test_class_names_from_custom_tables(tmp_path):
    tiny.imagenet(tmp_path)
    for name, content in (
        ("own.json", json.dumps({"n00000001": ["dog", "hound"], "n00000002": "cat"})),
        ("own.tsv", "n00000001\tdog\thound\nn00000002\tcat\n"),
    ):
        dataset = read_layout("imagenet", tmp_path, Choice(classes=write(tmp_path / name, content)))
        assert dataset.classes == [("dog", "hound"), ("cat",)]
    keras = {"0": ["n00000001", "golden_retriever"], "1": ["n00000002", "cat"]}
    assert read_classes(write_json(tmp_path / "index.json", keras)) == {
        "n00000001": ("golden retriever",),
        "n00000002": ("cat",),
    }


def test_esc50_and_its_folds(tmp_path):
    tiny.esc50(tmp_path)
    dataset = read_layout("esc50", tmp_path)
    assert contents(dataset) == [("dog", (0,)), ("sea wind", (1,)), ("rain", (0,)), ("rain", (2,))]
    assert dataset.classes == [("dog",), ("sea wind",), ("rain",)]
    second = read_layout("esc50", tmp_path, Choice(folds=(2,)))
    # The classes stay those of the whole set.
    assert (len(second.items), second.num_listed, len(second.classes)) == (2, 2, 3)
    with pytest.raises(InputError, match=r"esc50\.csv has no fold 7\. Known: 1, 2\."):
        read_layout("esc50", tmp_path, Choice(folds=(7,)))


@pytest.mark.parametrize("write_it", [tiny.modelnet, tiny.modelnet_resampled])
def test_modelnet(tmp_path, write_it):
    dataset = read_layout("modelnet40", write_it(tmp_path))
    assert contents(dataset) == [("chair", (0,)), ("lamp", (0,)), ("lamp", (1,)), ("desk", (2,))]
    assert (dataset.modality, dataset.classes) == ("point", [("chair",), ("lamp",), ("night desk",)])


def test_other_splits_of_modelnet(tmp_path):
    train = read_layout("modelnet40", tiny.modelnet(tmp_path / "meshes"), Choice(split="train"))
    assert contents(train) == [("lamp", (0,))]
    assert len(train.classes) == 3
    tiny.modelnet_resampled(tmp_path / "points")
    write(tmp_path / "points/modelnet40_train.txt", "lamp_0002\nchair_0001\n")
    train = read_layout("modelnet40", tmp_path / "points", Choice(split="train"))
    assert (contents(train), train.num_listed) == ([("lamp", (1,))], 2)
    assert list(train.skipped.lines()) == ["1 x the file does not exist (chair/chair_0001.txt)"]
    with pytest.raises(
        InputError, match=r"has no modelnet40_dev\.txt .* Did you mean 'modelnet40_test\.txt'\?"
    ):
        read_layout("modelnet40", tmp_path / "points", Choice(split="dev"))


def test_resampled_shapes_are_points_that_can_be_opened(tmp_path):
    tiny.modelnet_resampled(tmp_path)
    table = "0.5,-0.25,1.0,0,0,1\n0.1,0.2,0.3,1,0,0\n"
    write(tmp_path / "chair/chair_0002.txt", table)
    item = read_layout("modelnet40", tmp_path).items[0]
    points = open_points(item.media.source)
    np.testing.assert_allclose(points, [[0.5, -0.25, 1.0], [0.1, 0.2, 0.3]], atol=1e-6)


def test_audioset_has_several_labels_and_lost_clips(tmp_path):
    dataset = read_layout("audioset", tiny.audioset(tmp_path))
    assert contents(dataset) == [
        ("speech dog", (0, 1)),
        ("speech", (1,)),
        ("dog", (1,)),
        ("car", (0,)),
    ]
    assert dataset.classes == [("Speech",), ("Dog, domestic",), ("Car",)]
    assert (dataset.kind, dataset.num_listed) == ("tag", 5)
    assert list(dataset.skipped.lines()) == ["1 x the file does not exist (vanishedxxx from 0 s)"]


@pytest.mark.parametrize(
    "find", [lambda files: files.find("1.png"), lambda files: files.find_stem(["0", "1"])]
)
def test_one_of_several_files_of_one_name_is_not_taken_by_chance(tmp_path, find):
    for folder in ("train", "val"):
        write(tmp_path / folder / "1.png", "the same")
    assert find(Files(tmp_path, "image")) == str(tmp_path / "train" / "1.png")
    write(tmp_path / "val" / "1.png", "another")
    with pytest.raises(
        InputError, match=r"train/1.png and .*val/1.png have the same name and differ.* keep only the one"
    ):
        find(Files(tmp_path, "image"))
    files = Files(tmp_path, "image")
    # Below another folder, and below the given ones.
    assert files.find("./val/1.png", "images") == str(tmp_path / "val" / "1.png")
    assert files.find("1.png", "images", "val") == str(tmp_path / "val" / "1.png")
    assert files.find("2.png") is files.find_stem(["2"]) is None


def test_names_of_clips():
    assert "abc_30000_40000" in list(clip_stems("abc", 30, 40))
    assert "abc_30_40" in list(clip_stems("abc", 30, 40))
    # The exact name comes first: another clip of the same video may be in the folder.
    names = list(clip_stems("abc", 30.5))
    assert names.index("abc_30.5") < names.index("abc")


@pytest.mark.parametrize("name", CAPTIONED)
def test_captions(tmp_path, name):
    dataset = read_layout(name.split()[0], CAPTIONED[name](tmp_path))
    assert captions_of(dataset) == tiny.CLIPS
    assert (dataset.kind, dataset.target_modality) == ("retrieve", "text")
    assert dataset.modality == ("audio" if name in ("audiocaps", "clotho") else "image")
    assert dataset.num_listed == len(dataset.items) + (name == "audiocaps")


def test_only_the_first_captions(tmp_path):
    dataset = read_layout("clotho", tiny.clotho(tmp_path), Choice(captions=1))
    assert captions_of(dataset) == {"dog": ["a dog"], "rain": ["rain"]}


def test_clips_of_audiocaps_that_vanished_are_counted(tmp_path):
    dataset = read_layout("audiocaps", tiny.audiocaps(tmp_path))
    assert list(dataset.skipped.lines()) == ["1 x the file does not exist (vanishedxxx from 20 s)"]


def test_rows_that_cannot_be_used_are_counted_with_their_line(tmp_path):
    tiny.audiocaps(tmp_path)
    with (tmp_path / "test.csv").open("a") as table:
        # The published training table of version 2 has such a row: a caption that broke in two.
        table.write("the dog is whimpering\n105,vid-dogxxxx,nan,a dog\n106,vid-dogxxxx,30,\n")
    skipped = read_layout("audiocaps", tmp_path).skipped
    assert skipped.examples["not 4 fields as in the header"] == ["test.csv line 7"]
    assert skipped.examples["start_time is not a number"] == ["test.csv line 8"]
    assert skipped.examples["no caption"] == ["test.csv line 9"]


def test_rows_of_json_that_cannot_be_used_are_counted_with_their_position(tmp_path):
    tiny.coco(tmp_path)
    file = tmp_path / "annotations/captions_val2017.json"
    content = json.loads(file.read_text())
    content["images"].append({"id": 7})
    content["annotations"] += [{"image_id": 99, "caption": "of nothing"}, "not even an object"]
    content["annotations"].append({"image_id": 0, "caption": 5})
    write_json(file, content)
    dataset = read_layout("coco", tmp_path)
    assert captions_of(dataset) == tiny.CLIPS
    examples = dataset.skipped.examples
    assert examples["an image without id and file_name"] == [f"{file} images[2]"]
    assert examples["a caption without image_id and caption, or of an unknown image"] == [
        f"{file} annotations[4]",
        f"{file} annotations[5]",
    ]
    assert examples["no caption"] == [f"{file} annotations[6]"]


def test_karpathys_splits(tmp_path):
    file = tiny.flickr30k(tmp_path) / "dataset_flickr30k.json"
    content = json.loads(file.read_text())
    content["images"].append({"filename": "7.jpg", "split": "test"})
    write_json(file, content)
    dataset = read_layout("flickr30k", tmp_path, Choice(split="test"))
    assert captions_of(dataset) == tiny.CLIPS
    row = f"{file} images[{len(content['images']) - 1}]"
    assert dataset.skipped.examples == {"an image without filename, split and sentences": [row]}
    with pytest.raises(InputError, match="the file does not exist"):
        read_layout("flickr30k", tmp_path, Choice(split="train"))
    with pytest.raises(
        InputError, match=r"dataset_flickr30k\.json has no split 'tset'\. Did you mean 'test'\?"
    ):
        read_layout("flickr30k", tmp_path, Choice(split="tset"))
    tiny.coco(tmp_path / "coco")
    with pytest.raises(InputError, match="COCO's own are called val2017"):
        read_layout("coco", tmp_path / "coco", Choice(split="test"))


def test_a_table_without_splits_says_so(tmp_path):
    assert "has no splits" in read_layout("flickr30k", tiny.flickr30k_csv(tmp_path)).notes[0]


def test_a_folder_for_each_class(tmp_path):
    for name, words in {
        "val/red_dog/a.png": "dog",
        "val/cat/deep/b.JPG": "cat",
        "val/cat/notes.txt": "x",
    }.items():
        write(tmp_path / name, words)
    dataset = read_layout("folder", tmp_path, Choice(split="val"))
    assert (contents(dataset), dataset.classes) == ([("cat", (0,)), ("dog", (1,))], [("cat",), ("red dog",)])
    assert dataset.skipped.counts == {"not a file suffix of image": 1}
    sounds = write(tmp_path / "other/dog/a.wav", "dog").parents[1]
    with pytest.raises(InputError, match=r"other: the only class here is 'dog'; expected at least two"):
        read_layout("folder", sounds)
    write(tmp_path / "other/cat/a.wav", "cat")
    assert read_layout("folder", sounds).modality == "audio"
    for animal in ("dog", "cat"):
        write(tmp_path / f"npy/{animal}/a.npy", animal)
    with pytest.raises(InputError, match="give it with --modality"):
        read_layout("folder", tmp_path / "npy")
    assert read_layout("folder", tmp_path / "npy", Choice(modality="depth")).modality == "depth"


BAD_SPLIT = "unknown split 'tset'. Did you mean 'test'? Known: test, train, validation."


def pairs(folder):
    rows = [
        {"image": "a.png", "caption": ["a dog", "a hound"], "split": "test", "sound": "a.ogg"},
        {"image": "b.png", "caption": "a cat", "split": "test"},
        {"image": "c.png", "caption": "rain", "split": "train", "sound": "c.ogg"},
        {"image": "gone.png", "caption": "wind", "split": "test", "sound": "gone.ogg"},
        {"image": "a.png", "caption": "fog", "split": "tset", "sound": "a.ogg"},
        {"image": ["a.png", "b.png"], "caption": "both", "split": "test"},
    ]
    for name in "abc":
        write(folder / f"{name}.png", name)
        write(folder / f"{name}.ogg", f"sound {name}")
    write(folder / "captions.jsonl", "\n".join(map(json.dumps, rows)))
    return folder


def test_a_table_as_for_training(tmp_path):
    dataset = read_layout("table", pairs(tmp_path))
    assert captions_of(dataset) == {"a": ["a dog", "a hound"], "b": ["a cat"]}
    reasons = ["no such image file", "2 media in one row", BAD_SPLIT]
    assert dataset.skipped.counts == dict.fromkeys(reasons, 1)
    assert dataset.notes[-1] == "split test; 1 media are in other splits"
    assert len(read_layout("table", tmp_path / "captions.jsonl", Choice(split="all")).items) == 3
    one = read_layout("table", tmp_path, Choice(captions=1))
    assert captions_of(one)["a"] == ["a dog"]


def test_any_two_columns_of_a_table(tmp_path):
    choice = Choice(split="all", source=Column("audio", "sound"), target=Column("image", "image"))
    dataset = read_layout("table", pairs(tmp_path), choice)
    found = {item.media.source: [target.source for target in item.targets] for item in dataset.items}
    assert found == {str(tmp_path / f"{n}.ogg"): [str(tmp_path / f"{n}.png")] for n in "ac"}
    assert (dataset.modality, dataset.target_modality) == ("audio", "image")
    assert dataset.skipped.counts["the file does not exist"] == 1
    assert dataset.skipped.counts[BAD_SPLIT] == 1
    assert sum(dataset.skipped.counts.values()) == 4  # the two rows without a sound
    spoken = Choice(split="train", source=Column("audio", "sound"), target=Column("text", "caption"))
    assert captions_of(read_layout("table", tmp_path, spoken)) == {"sound c": ["rain"]}


def test_a_limit_takes_the_same_media_every_time_from_everywhere(tmp_path):
    for number in range(40):
        write(tmp_path / "ab"[number % 2] / f"{number}.png", "dog")
    dataset = read_layout("folder", tmp_path).limit(10)
    again = read_layout("folder", tmp_path).limit(10)
    assert [item.media for item in dataset.items] == [item.media for item in again.items]
    assert len(dataset.items) == dataset.num_listed == 10
    assert {item.labels for item in dataset.items} == {(0,), (1,)}
    assert "10 of 40 media" in dataset.notes[0]


NAMES, CAPTIONS = "LOC_synset_mapping.txt", "annotations/captions_val2017.json"
# What is done to a file of a data set: layout, writer, file, content ("+": added, None: removed), expected error.
BROKEN = [
    ("esc50", tiny.esc50, "meta/esc50.csv", None, r"has no meta/esc50\.csv and no esc50\.csv"),
    (
        *("esc50", tiny.esc50, "meta/esc50.csv", "filename,fold,category\n1-a.wav,1,dog\n"),
        r"esc50\.csv: no column 'target'\. Known: category, filename, fold",
    ),
    (
        *("esc50", tiny.esc50, "meta/esc50.csv", "+1-a.wav,1,0,hound,False,1,A\n"),
        r"esc50\.csv line 6: the target 0 is called 'hound' here, 'dog' above",
    ),
    (
        *("esc50", tiny.esc50, "meta/esc50.csv", "filename,fold,target,category\n"),
        "nothing to evaluate here: it is empty",
    ),
    (
        *("coco", tiny.coco, CAPTIONS, '{"images": [],\n"annotations": [}'),
        r"captions_val2017\.json cannot be read as JSON \(Expecting .*line 2",
    ),
    (
        *("coco", tiny.coco, CAPTIONS, '{"info": {}, "images": []}'),
        "lists under 'images' and 'annotations'; it contains info, images",
    ),
    (
        *("imagenet", tiny.imagenet, "val/n00000009/x.JPEG", "dog"),
        r"n00000009: the class 'n00000009' is not in .*LOC_synset_mapping\.txt",
    ),
    (
        *("imagenet", tiny.imagenet_flat, "LOC_val_solution.csv", "+ILSVRC2012_val_9,n00000008 1 2 3 4\n"),
        r"LOC_val_solution\.csv line 6: the class 'n00000008' is not in",
    ),
    ("imagenet", tiny.imagenet, NAMES, None, "names of the classes; or give your own table with --classes"),
    (
        *("imagenet", tiny.imagenet, NAMES, "+n00000002 feline\n"),
        r"LOC_synset_mapping\.txt line 7: the class 'n00000002' occurs twice",
    ),
    (
        *("audioset", tiny.audioset, "eval_segments.csv", '+eeeeeeeeeee, 0.000, 10.000, "/m/9"\n'),
        r"eval_segments\.csv line 9: the class '/m/9' is not in .*indices\.csv",
    ),
    (
        *("modelnet40", tiny.modelnet_resampled, "modelnet40_test.txt", "chair_0002\nsofa_0001\n"),
        r"modelnet40_test\.txt line 2: the class 'sofa' is not in .*names\.txt",
    ),
    ("modelnet40", tiny.esc50, "meta", None, r"neither <class>/test/\*\.off nor modelnet40_sh"),
    (
        *("audioset", tiny.audioset, "class_labels_indices.csv", "+3,/m/1,Again\n"),
        r"class_labels_indices\.csv line 5: the class '/m/1' occurs twice or has no name",
    ),
    (
        *("modelnet40", tiny.modelnet_resampled, "modelnet40_test.txt", "chair_\udcff\n"),
        r"modelnet40_test\.txt: not UTF-8 text",
    ),
    (
        *("flickr30k", tiny.flickr30k_csv, "results.csv", "image,comment\n"),
        r"results\.csv line 1: expected image_name\| comment_number\| comment",
    ),
    (
        *("audiocaps", tiny.audiocaps, "audio", None),
        r"nothing to evaluate here: 3 x the file does not exist \(vid-dogxxxx from 30 s",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("names.yaml", "a: b", r"names\.yaml: not a table of class names\. .*\.json"),
        ("names.tsv", "", "names.tsv: contains no class"),
        ("names.tsv", "n1\n", "line 1: expected the key of a class and at least one name"),
        ("names.json", "[]", "expected an object of class names, not list"),
        ("names.json", '{"n1": 7}', "the class 'n1' must have a name or a list of names, not 7"),
    ],
)
def test_broken_tables_of_names(tmp_path, name, content, expected):
    with pytest.raises(InputError, match=expected):
        read_classes(write(tmp_path / name, content))


@pytest.mark.parametrize(("layout", "write_it", "name", "content", "expected"), BROKEN)
def test_errors_name_the_position(tmp_path, layout, write_it, name, content, expected):
    file = write_it(tmp_path) / name
    if content is None:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    else:
        before = file.read_text() if content.startswith("+") else ""
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((before + content.removeprefix("+")).encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=expected):
        read_layout(layout, tmp_path)


def test_unknown_layouts_and_choices_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_layout("esc50", tmp_path / "nowhere")
    with pytest.raises(InputError, match="a.txt is a file; give the folder"):
        read_layout("imagenet", write(tmp_path / "a.txt", ""))
    with pytest.raises(InputError, match=r"unknown layout 'esc5'\. Did you mean 'esc50'\? Known: audiocaps"):
        read_layout("esc5", tmp_path)
    with pytest.raises(InputError, match="the layout clotho takes no folds; it takes split, captions"):
        read_layout("clotho", tmp_path, Choice(folds=(1,)))


TABLES = {
    tiny.imagenet_flat: ("LOC_val_solution.csv", "LOC_synset_mapping.txt"),
    tiny.esc50: ("meta/esc50.csv",),
    tiny.modelnet_resampled: ("modelnet40_test.txt", "modelnet40_shape_names.txt"),
    tiny.audioset: ("eval_segments.csv", "class_labels_indices.csv"),
    tiny.audiocaps: ("test.csv",),
    tiny.clotho: ("clotho_captions_evaluation.csv",),
    tiny.coco: ("annotations/captions_val2017.json",),
    tiny.coco_karpathy: ("dataset_coco.json",),
    tiny.flickr30k_csv: ("results.csv",),
    tiny.flickr30k_token: ("results_20130124.token",),
}


@pytest.mark.parametrize("write_it", TABLES, ids=lambda write_it: write_it.__name__)
def test_damaged_tables_give_a_dataset_or_one_error_that_names_a_file(tmp_path, write_it):
    layout = write_it.__name__.partition("_")[0].replace("modelnet", "modelnet40")
    write_it(tmp_path)
    random, messages = np.random.default_rng(0), []
    for name in TABLES[write_it]:
        whole = (tmp_path / name).read_bytes()
        for trial in range(40):
            damaged = bytearray(whole)
            for position in random.integers(0, len(whole), 3):
                damaged[position] = random.choice(
                    [0, 10, 34, 35, 44, 58, 91, 123, 124, 195, 255, damaged[position]]
                )
            (tmp_path / name).write_bytes(damaged[: random.integers(0, len(whole))] if trial % 2 else damaged)
            try:
                assert read_layout(layout, tmp_path).items
            except InputError as error:
                messages.append(str(error))
        (tmp_path / name).write_bytes(whole)
    assert messages
    assert [message for message in messages if str(tmp_path) not in message] == []
