"""``bindllm datastore`` and ``bindllm generate --datastore``."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bindllm.cli import main
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.model.context import ContextConfig
from tiny import ColorEncoder, color_images, tiny_model


@pytest.fixture
def checkpoint(decoder, work):
    model = tiny_model(decoder, context=ContextConfig(latents=2, width=16))
    torch.nn.init.normal_(model.injection.context_gates, std=2.0)
    model.save_pretrained(work / "model")
    return Path("model")


def ask(checkpoint, capsys, *options):
    image = "data/images/red0.png"
    words = ["--image", image, "--max_new_tokens", "6", "--allow", "tiny.ColorEncoder", *options]
    code = main(["generate", str(checkpoint), "What?", *words])
    printed = capsys.readouterr()
    return (printed.out if code == 0 else printed.err), code


def test_a_datastore_is_built_from_a_table_and_swapped_at_generation(checkpoint, capsys):
    color_images(Path("data"))
    (Path("data/images") / "broken.png").write_bytes(b"not an image")
    with Path("data/captions.jsonl").open("a") as table:
        table.write(
            json.dumps({"image": "images/red1.png", "caption": "a second caption", "split": "validation"})
            + "\n"
        )
        table.write(json.dumps({"image": "images/broken.png", "caption": "broken"}) + "\n")
    build = ["datastore", "stores/all", "data", "--encoder", "tiny.ColorEncoder"]
    assert main(build) == 0
    printed = capsys.readouterr().out
    assert "16 records of 18 rows" in printed
    assert "broken.png" in printed
    store = Datastore.open("stores/all")
    assert {record.text for record in store.records} >= {"red square", "red square; a second caption"}
    assert main([*build[:1], "stores/test", *build[2:], "--split", "test"]) == 0
    assert len(Datastore.open("stores/test")) == 4
    # The media are not needed any more.
    shutil.rmtree("data/store")
    answer, code = ask(checkpoint, capsys)
    assert code == 1
    assert "--datastore FOLDER" in answer
    plain, code = ask(checkpoint, capsys, "--records", "0")
    assert code == 0, plain
    found, code = ask(checkpoint, capsys, "--datastore", "stores/all")
    assert code == 0, found
    assert found != plain
    stream, code = ask(checkpoint, capsys, "--datastore", "stores/all", "--stream")
    assert stream == found


def test_check_opens_the_datastore_of_a_checkpoint(checkpoint, capsys):
    words = ["check", "--folder", str(checkpoint), "--allow", "tiny.ColorEncoder"]
    assert main(words) == 1
    assert "the checkpoint has no datastore" in capsys.readouterr().out
    record = Record((), "red", "image", ("red",))
    Datastore(torch.ones(1, 16), [record], [ColorEncoder().fingerprint()]).save(checkpoint / "datastore")
    assert main(words) == 0
    Datastore(torch.ones(1, 16), [record], ["0" * 64]).save(checkpoint / "datastore")
    assert main(words) == 1
    assert "was built with the encoder" in capsys.readouterr().out


def test_vqa_rows_keep_their_questions(work, capsys):
    color_images(Path("data"))
    rows = [
        {"image": "images/red0.png", "question": "Which color?", "answer": "red"},
        {"image": "images/red0.png", "question": "Round?", "answer": "no"},
    ]
    Path("data/vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--format", "vqa", "--encoder", "tiny.ColorEncoder"]
    assert main(["datastore", "store", "data/vqa.jsonl", *words]) == 0
    (record,) = Datastore.open("store").records
    assert record.texts == ("Which color? red", "Round? no")


def test_rows_without_media_and_long_texts_are_counted(checkpoint, capsys):
    color_images(Path("data"))
    question = {"question": "Up?", "choices": ["yes", "no"], "answer": 0}
    rows = [question, {**question, "image": "images/red0.png", "question": "Is this red? " * 9}]
    Path("data/choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["datastore", "store", "data/choice.jsonl", "--format", "choice"]
    assert main([*words, "--checkpoint", str(checkpoint), "--allow", "tiny.ColorEncoder"]) == 0
    printed = capsys.readouterr().out
    assert "skipped: 1 x a row without media" in printed
    assert "note: 1 texts are cut to the 32 tokens that the model reads" in printed
    # The encoders are all that it needs; another model may read the datastore.
    manifest = json.loads((checkpoint / "bindllm.json").read_text())
    manifest["decoder"]["name"] = "nowhere"
    (checkpoint / "bindllm.json").write_text(json.dumps(manifest))
    assert main([*words, "--checkpoint", str(checkpoint), "--allow", "tiny.ColorEncoder"]) == 0
    assert "note: long texts were not counted" in capsys.readouterr().out


def test_unwanted_answers_are_not_records_and_are_counted(work, capsys):
    color_images(Path("data"))
    rows = [
        {
            "image": f"images/{color}0.png",
            "prompt": "Which color?",
            "completion": "red",
            "label": color == "red",
        }
        for color in ("red", "blue")
    ]
    Path("data/judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--format", "preference", "--encoder", "tiny.ColorEncoder"]
    assert main(["datastore", "store", "data/judged.jsonl", *words]) == 0
    (record,) = Datastore.open("store").records
    assert record.name.endswith("red0.png")
    assert "the answer is an unwanted one" in capsys.readouterr().out


def test_mistakes_are_found_before_anything_is_embedded(work, capsys):
    color_images(Path("data"))
    assert main(["datastore", "store", "data"]) == 2
    assert "which encoder" in capsys.readouterr().err
    assert main(["datastore", "data", "data", "--encoder", "tiny.ColorEncoder"]) == 1
    assert "is not a datastore" in capsys.readouterr().err
    assert not Path("data/store").exists()


def test_a_folder_for_each_class_and_rows_outside_of_an_untrusted_folder(work, capsys):
    color_images(Path("data"))
    for color in ("red", "blue"):
        Path("toys", f"{color}_thing").mkdir(parents=True)
        shutil.copy(f"data/images/{color}0.png", f"toys/{color}_thing")
    build = ["datastore", "stores/toys", "toys", "--encoder", "tiny.ColorEncoder"]
    assert main(build) == 0
    assert [record.text for record in Datastore.open("stores/toys").records] == ["blue thing", "red thing"]
    rows = [
        {"image": "../data/images/red1.png", "caption": "red"},
        {"image": "blue_thing/blue0.png", "caption": "blue"},
    ]
    Path("toys/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*build, "--inside_only"]) == 0
    assert [record.text for record in Datastore.open("stores/toys").records] == ["blue"]
    assert "outside" in capsys.readouterr().out
