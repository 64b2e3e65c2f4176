"""`generate_table`: every row of a table is in the output, in its place, with its answer or why it has none."""

import base64
import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bindllm import Media
from bindllm.cache.visual_cache import VisualCache
from bindllm.cli import main
from bindllm.data.source_config import SourceConfig
from bindllm.errors import InputError
from bindllm.evaluation.answering.log import AnswerLog
from bindllm.evaluation.answering.table import TableAnswers, generate_table
from bindllm.parallel import Processes, RunContext
from cache_parts import ALLOW, Multimodal, save_tiny_model
from tiny import color_images, save_tiny_decoder, tiny_model

SHORT = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and images."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_decoder(home / "decoder")
    color_images(home / "data", per_color=2)
    return home


@pytest.fixture
def model(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny_model(home / "decoder", encoders=[Multimodal()])


def rows(home):
    """Rows of every form, three of which have no answer."""
    image, pixels = str(home / "data/images/red0.png"), np.zeros((4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [
        {"id": "a", "image": image},
        {"image": image, "question": "Which color?", "answer": "red"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": uri}, "What?"]}]},
        {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "image": image},
        {"image": "missing.png"},
        {"caption": "nothing to ask"},
        {
            "conversations": [{"from": "human", "value": "<image>Go"}, {"from": "gpt", "value": "x"}],
            "image": image,
        },
        {"instruction": "Sum up.", "input": "One and two.", "output": "three"},
    ]


def write(home, lines):
    table = home / "table.jsonl"
    table.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return table


def bitmap(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "BMP")
    return buffer


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_rows_of_every_form_each_in_its_place(model, home):
    given = rows(home)
    table = write(home, [*given[:2], "{broken", *given[2:]])
    assert generate_table(model, table, "answers.jsonl", batch_size=3, **SHORT) == TableAnswers(9, 3)
    lines = read("answers.jsonl")
    assert [line["row"] for line in lines] == list(range(9))
    assert [line["name"] for line in lines] == [f"table.jsonl line {n}" for n in range(1, 10)]
    assert {line["row"]: line["error"] for line in lines if "error" in line} == {
        2: "not valid JSON",
        5: "no such image file: missing.png",
        6: "no question (prompt, question, instruction, messages) and no media: columns: 'caption'",
    }
    assert lines[0]["id"] == "a"
    prompts = [line.get("prompt") for line in lines]
    assert prompts[:4] == ["Describe this image.", "Which color?", None, "What?"]
    assert prompts[4] == "Question: Which?\nOptions: (A) red (B) blue"
    assert prompts[7:] == ["Go", "Sum up.\n\n### Input:\nOne and two."]
    # Each answer is that of the question alone.
    image = [Media.image(str(home / "data/images/red0.png"))]
    assert lines[1]["answer"] == model.generate("Which color?", image, **SHORT)
    assert lines[8]["answer"] == model.generate(prompts[8], **SHORT)


def test_the_prompt_is_that_of_the_source_and_of_the_language_of_a_row(home, model, tmp_path):
    table, image = tmp_path / "table.jsonl", str(home / "data/images/red0.png")
    asked = [{"image": image, "language": name} for name in ("ES", "en", "de")] + [{"image": image}]
    table.write_text("\n".join(map(json.dumps, asked)))
    source = SourceConfig(str(table), prompts={"en": "What?", "es": "¿Qué?"})
    assert generate_table(model, source, "a.jsonl", **SHORT) == TableAnswers(rows=4, errors=2)
    lines = read("a.jsonl")
    assert [line.get("prompt") for line in lines] == ["¿Qué?", "What?", None, None]
    assert "no prompt for the language 'de'" in lines[2]["error"]
    generate_table(model, SourceConfig(str(table), prompt="Which?"), "b.jsonl", **SHORT)
    assert {line["prompt"] for line in read("b.jsonl")} == {"Which?"}
    with pytest.raises(InputError, match="give prompt or prompts, not both"):
        generate_table(model, source, "c.jsonl", prompt="Which?", **SHORT)


def test_an_interrupted_table_resumes_and_gives_the_same_file(model, home, monkeypatch):
    given = [{"id": n, "question": f"{n} " * (n % 5 + 1)} for n in range(40)]
    options = {"batch_size": 4, "temperature": 2.0, "seed": 7, **SHORT}
    generate_table(model, given, "whole.jsonl", **options)
    append, calls = AnswerLog.append, []

    def interrupt(self, lines):
        if len(calls) == 3:
            # Half of a line is in the file.
            with self.own.open("a") as stream:
                stream.write('{"row": 1')
                stream.flush()
                # The cut is inside a character.
                stream.buffer.write("é".encode()[:1])
            raise KeyboardInterrupt
        calls.append(append(self, lines))

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate_table(model, given, "parts.jsonl", **options)
    asked, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda prompts, **more: asked.extend(prompts) or generate(prompts, **more)
    )
    assert generate_table(model, given, "parts.jsonl", **options) == TableAnswers(40, 0)
    assert len(asked) == 28
    assert Path("parts.jsonl").read_text() == Path("whole.jsonl").read_text()
    # Another seed gives other answers, so the rows were really sampled.
    generate_table(model, given, "other.jsonl", **{**options, "seed": 8})
    assert Path("other.jsonl").read_text() != Path("whole.jsonl").read_text()


def test_another_run_is_refused(model, home):
    given = [{"question": "Which?"}, {"question": "What?"}]
    generate_table(model, given, "answers.jsonl", **SHORT)
    with pytest.raises(InputError, match="was started with max_new_tokens 4 .now 5"):
        generate_table(model, given, "answers.jsonl", max_new_tokens=5)
    with pytest.raises(
        InputError, match="holds an answer to another question for row 1: the table or its media have changed"
    ):
        generate_table(model, [given[0], {"question": "Who?"}], "answers.jsonl", **SHORT)
    # Another image of the same size in bytes.
    images = [[{"image": {"bytes": content.getvalue()}}] for content in map(bitmap, ("red", "blue"))]
    generate_table(model, images[0], "bytes.jsonl", **SHORT)
    with pytest.raises(InputError, match="holds an answer about other media for row 0"):
        generate_table(model, images[1], "bytes.jsonl", **SHORT)
    # Another image at the same path.
    Path("image.bmp").write_bytes(bitmap("red").getvalue())
    generate_table(model, [{"image": "image.bmp"}], "file.jsonl", **SHORT)
    Path("image.bmp").write_bytes(bitmap("blue").getvalue())
    with pytest.raises(InputError, match="holds an answer about other media for row 0"):
        generate_table(model, [{"image": "image.bmp"}], "file.jsonl", **SHORT)
    Path("mine.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="exists already, and has no mine.jsonl.run.json"):
        generate_table(model, given, "mine.jsonl", **SHORT)
    with pytest.raises(InputError, match="expected another file than the table"):
        generate_table(model, given, "answers.csv", **SHORT)
    with pytest.raises(InputError, match="unknown option 'max_tokens'"):
        generate_table(model, given, "new.jsonl", max_tokens=3)
    # The options of loading change answers too.
    info = SimpleNamespace(fingerprint="0" * 64, count=4)
    model.cache = VisualCache(SimpleNamespace(info=info), weight=0.25)
    with pytest.raises(InputError, match="was started with cache None .now .CacheSettings.*weight=0.25"):
        generate_table(model, given, "answers.jsonl", **SHORT)


def test_options_in_columns_of_letters_and_paths_that_are_not_unicode(model, home):
    letters = {"A": "red", "B": "blue", "C": None}
    given = [
        {"question": "Which?", **letters},
        {"question": "Why?", "A": "", "B": None},
        {"image": "\ud800.png"},
    ]
    assert generate_table(model, given, "answers.jsonl", **SHORT) == TableAnswers(3, 1)
    lines = read("answers.jsonl")
    assert lines[0]["prompt"] == "Question: Which?\nOptions: (A) red (B) blue"
    assert lines[1]["prompt"] == "Why?"
    assert lines[2]["error"] == "no such image file: \ud800.png"


def test_a_repaired_file_is_tried_again(model, home):
    given = [{"image": "late.png"}, {"image": str(home / "data/images/red0.png")}]
    assert generate_table(model, given, "answers.jsonl", **SHORT).errors == 1
    Path("late.png").write_bytes(b"no image")
    # The media cannot be opened, and the other row of the batch keeps its answer.
    assert generate_table(model, given, "answers.jsonl", **SHORT).errors == 1
    assert "late.png" in read("answers.jsonl")[0]["error"]
    Path("late.png").write_bytes((home / "data/images/blue0.png").read_bytes())
    assert generate_table(model, given, "answers.jsonl", **SHORT).errors == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_that_names_the_file():
    full = Path("/dev/full")
    with pytest.raises(
        InputError, match="/dev/full cannot be written .No space left on device.* same command again"
    ):
        AnswerLog(full, full, full, ("table", "the table")).append([{"row": 0}])


def test_several_processes_share_the_rows(model, home):
    given = [{"question": f"{n}?"} for n in range(20)]
    generate_table(model, given, "one.jsonl", batch_size=3, **SHORT)
    barrier, counts = threading.Barrier(2), {}

    def work(rank):
        processes = Processes(rank, 2, gather=lambda value: [value] * (barrier.wait(60) >= 0))
        counts[rank] = generate_table(
            model, given, "two.jsonl", batch_size=3, context=RunContext(processes), **SHORT
        )

    # The model is shared, so the two must not generate at the same time.
    generate, lock = model.generate, threading.Lock()

    def alone(*args, **more):
        with lock:
            return generate(*args, **more)

    model.generate = alone
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts[0] == TableAnswers(20, 0)
    assert Path("one.jsonl").read_text() == Path("two.jsonl").read_text()
    assert not list(Path().glob(".*.part"))


def test_log_probabilities_and_several_answers(model, home):
    given = [{"question": "Which?"}, {"question": "What is it?"}]
    generate_table(model, given, "scored.jsonl", log_probability=True, **SHORT)
    for row, line in zip(given, read("scored.jsonl"), strict=True):
        assert line["log_probability"] == pytest.approx(
            model.log_probability(row["question"], line["answer"]), abs=1e-4
        )
    generate_table(model, given, "beams.jsonl", num_beams=2, num_return_sequences=2, **SHORT)
    assert [len(line["answer"]) for line in read("beams.jsonl")] == [2, 2]
    with pytest.raises(InputError, match="leave num_return_sequences out"):
        generate_table(model, given, "x.jsonl", log_probability=True, num_return_sequences=2, num_beams=2)
    with pytest.raises(InputError, match="leave min_probability out"):
        generate_table(model, given, "x.jsonl", log_probability=True, min_probability=0.5)


def test_the_command(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", home / "decoder")
    line = ["generate", "model", "--allow", ALLOW[0], "--max_new_tokens", "3"]
    table = ["--input", str(write(home, rows(home))), "--output", "answers.jsonl"]
    assert main([*line, *table, "--batch_size", "2"]) == 0
    assert capsys.readouterr().out == "answers.jsonl: 6 answers, 2 rows with an error\n"
    assert len(read("answers.jsonl")) == 8
    # Rows of a table that is not trusted may only name files next to it.
    inside = [
        "--input",
        str(write(home, [{"image": "/etc/passwd"}])),
        "--output",
        "inside.jsonl",
        "--inside_only",
    ]
    assert main([*line, *inside]) == 1
    assert "outside the folder of the source" in read("inside.jsonl")[0]["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input", "a.jsonl"], "--input needs a file for the answers"),
        (["--output", "a.jsonl"], "give --input TABLE"),
        (
            ["--input", "a.jsonl", "--output", "b.jsonl", "--image", "a.png"],
            "--input and --media cannot be given",
        ),
        (["--input", "a.jsonl", "--output", "b.jsonl", "--stream"], "--input and --stream cannot be given"),
    ],
)
def test_options_that_contradict_each_other(capsys, options, words):
    assert main(["generate", "folder", *options]) == 2
    assert words in capsys.readouterr().err
