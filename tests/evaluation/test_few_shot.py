"""Few-shot evaluation: the controls change the shots only, and the copied answers are computed by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bindllm import Conversation, Media, Message, Shot
from bindllm.cli import main
from bindllm.cli.zero_shot import TableOptions
from bindllm.data.report import Skipped
from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.errors import InputError
from bindllm.evaluation.episodes import majority_shot
from bindllm.evaluation.few_shot import FewShotData, wrong_answers
from bindllm.evaluation.held_out import evaluate_held_out
from bindllm.evaluation.support import Support
from bindllm.evaluation.task import evaluate
from bindllm.model.context import ContextConfig
from bindllm.parallel import RunContext
from cache_parts import ALLOW, Multimodal, save_tiny_model
from tiny import color_images, save_tiny_decoder, tiny_model

COUNTS = ("shots", "excluded", "not_fitting", "not_found")
CHANGED = ["blank_support", "shuffled_support", "wrong_support"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images of four colors, and a table of questions about them: one image of each color is a test row."""
    home = color_images(tmp_path_factory.mktemp("home"))
    rows = [json.loads(line) for line in (home / "captions.jsonl").read_text().splitlines()]
    rows = [
        {
            "image": row["image"],
            "question": "Color?",
            "answer": row["caption"].split()[0],
            "split": row["split"],
        }
        for row in rows
        if row["split"] != "validation"
    ]
    (home / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(save_tiny_decoder(tmp_path_factory.mktemp("decoder")), encoders=[Multimodal()])


def read(path, format="vqa", **options):
    found = read_source(SourceConfig(str(path), format=format, **options))[0]
    return found["test"], found["train"]


@pytest.fixture
def prepare(model, tmp_path):
    def run(rows, support_rows, by="order", skipped=None, **options):
        return FewShotData.prepare(
            rows,
            support_rows,
            Support((), by, **options),
            model=model,
            store=tmp_path / "store",
            context=RunContext(),
            skipped=Skipped() if skipped is None else skipped,
        )

    return run


def prompts(items, model):
    return [model.tokenizer.decode(item.input_ids[: item.prompt_length]) for item in items]


def test_each_number_of_shots_is_a_task_with_controls(home, model, prepare):
    data = prepare(*read(home / "vqa.jsonl"), by="media")
    tasks = [data.task(count, model) for count in (0, 2)]
    result = evaluate(model, tasks, lookup=data.embeddings)
    assert list(result.metrics) == ["answers_0_shots", "answers_2_shots"]
    plain = ["model", "no_media", "shuffled_media", "majority_answer"]
    assert list(result.metrics["answers_0_shots"]) == plain
    names = [*plain[:3], *CHANGED, "majority_answer", "copy_last", "majority_shot"]
    assert list(result.metrics["answers_2_shots"]) == names
    assert all(result.metrics["answers_2_shots"][name]["count"] == 4 for name in names)
    # The nearest images have the color of the question.
    assert result.metrics["answers_2_shots"]["copy_last"]["accuracy"] == 1
    assert result.metrics["answers_2_shots"]["majority_shot"]["accuracy"] == 1
    facts = result.metrics["answers_2_shots"]["model"]
    assert (facts["shots"], facts["excluded"], facts["not_fitting"]) == (8, 0, 0)
    row = result.rows["answers_2_shots"][0]
    assert row["copy_last"] == row["references"][0] == row["shots"][-1]["answer"]
    assert {*names} <= {*row}
    assert not result.problems


def test_a_fixed_support_is_read_once_for_a_batch(home, model, prepare):
    data, read_tokens = prepare(*read(home / "vqa.jsonl"), by="order"), []
    hook = model.decoder.register_forward_hook(
        lambda _, __, inputs, ___: read_tokens.append(inputs["input_ids"].shape), with_kwargs=True
    )
    evaluate(model, [data.task(4, model)], lookup=data.embeddings, variants=["model"])
    hook.remove()
    (one, shared), (rows, own) = read_tokens[:2]
    assert (one, rows) == (1, 4)
    # All questions are equal but for their images.
    assert shared > 4 * own


def test_without_shots_it_is_the_task_of_held_out_rows(home, model, prepare):
    data = prepare(*read(home / "vqa.jsonl"))
    found = evaluate(model, [data.task(0, model)], lookup=data.embeddings)
    samples = [question.sample for question in data.questions]
    expected = evaluate_held_out(
        model, {"answers": samples}, train_samples=data.train, lookup=data.embeddings
    )
    metrics, plain = found.metrics["answers_0_shots"], expected.metrics["answers"]
    assert {key: metrics["model"].pop(key) for key in COUNTS}["shots"] == 0
    assert metrics == plain
    assert [row["model"] for row in found.rows["answers_0_shots"]] == [
        row["model"] for row in expected.rows["answers"]
    ]


def test_the_controls_change_the_shots_and_nothing_else(home, model, prepare):
    # Two training rows of each color in a row: the first four shots are red and green.
    data = prepare(*read(home / "vqa.jsonl"))
    task = data.task(4, model)
    plain = prompts(task.items, model)
    assert all(text.count("Color?") == 5 for text in plain)
    blank, shuffled, wrong = ([task.altered[name](item) for item in task.items] for name in CHANGED)
    assert prompts(blank, model) == prompts(shuffled, model) == plain
    question = [item.conversation.messages[-2].media for item in task.items]
    for changed in (blank, shuffled, wrong):
        assert [item.conversation.messages[-2].media for item in changed] == question
        assert [item.references for item in changed] == [item.references for item in task.items]
    # The tokens of blank shots listen to nothing.
    assert all({*item.media_index.tolist()} == {-1, 4} for item in blank)
    for item, other in zip(task.items, shuffled, strict=True):
        assert {*item.media[:-1]} == {*other.media[:-1]}
        assert all(one != two for one, two in zip(item.media[:-1], other.media[:-1], strict=True))
    assert [item.media for item in wrong] == [item.media for item in task.items]
    told = [[m.text for m in item.conversation.messages[1:-1:2]] for item in wrong]
    assert told == [["green", "green", "red", "red"]] * 4


def test_shuffled_shots_keep_their_media_if_the_question_has_none(home, model, prepare):
    rows, support = read(home / "vqa.jsonl")
    asked = [
        replace(row, conversation=Conversation((Message("user", f"{n}?"), Message("assistant", "red"))))
        for n, row in enumerate(rows)
    ]
    task = prepare(asked, support).task(4, model)
    for item, other in zip(task.items, map(task.altered["shuffled_support"], task.items), strict=True):
        # The question after them listens to none of their media.
        assert (len(other.media), other.media_index[-1]) == (4, -1)
        assert other.conversation.examples == item.conversation.examples == 4
        assert all(one != two for one, two in zip(item.media, other.media, strict=True))


def test_a_variant_of_media_is_measured_on_the_prompts_whose_shots_have_media(home, model, prepare):
    rows, support = read(home / "vqa.jsonl")
    messages = Message("user", "Up?"), Message("assistant", "red")
    text = replace(rows[0], conversation=Conversation(messages))
    task = prepare(rows, [text, *support], by="media").task(1, model)
    only_text = prepare([*rows, text], [text, text], by="order").task(1, model)
    for name in ("blank_support", "shuffled_support"):
        assert None not in map(task.altered[name], task.items)
        # The prompt would stay the same.
        assert [only_text.altered[name](item) for item in only_text.items] == [None] * 5


def test_a_variant_of_a_part_has_the_metric_of_the_model_on_it(home, model, prepare):
    rows, support = read(home / "captions.jsonl", "caption")
    data = prepare(rows, support)
    task = data.task(1, model)
    some = replace(task, altered={"wrong_support": lambda item: item if item.number < 2 else None})
    metrics = evaluate(model, [some], lookup=data.embeddings, variants=["model", "wrong_support"]).metrics
    assert metrics["captions_1_shots"]["wrong_support"].keys() >= {"cider", "model_cider"}
    assert "model_cider" not in metrics["captions_1_shots"]["model"]


def test_only_the_answer_of_the_question_is_supervised(home, model, prepare):
    (item, *_) = prepare(*read(home / "vqa.jsonl")).task(2, model).items
    answer = item.input_ids[item.prompt_length :]
    assert model.tokenizer.decode(answer, skip_special_tokens=True) == item.references[0]
    assert item.num_answers == 1


def test_captions_have_one_item_for_each_image(home, model, prepare):
    rows, support = read(home / "captions.jsonl", "caption")
    data = prepare(rows + rows[:1], support, by="random", seed=3)
    task = data.task(3, model)
    result = evaluate(model, [task], lookup=data.embeddings, variants=["model", "copy_last"])
    assert len(task.items) == 4
    assert result.metrics["captions_3_shots"]["model"].keys() >= {"cider", "rouge_l", "shots"}
    assert len(result.rows["captions_3_shots"][0]["shots"]) == 3
    # The repeated row is part of the same prompt.
    assert (task.counts["shots"], task.counts["not_fitting"]) == (12, 0)


def test_copies_of_the_question_are_excluded_and_counted(home, model, prepare, tmp_path):
    rows, support = read(home / "vqa.jsonl")
    # The support holds the question itself, under another name, and the question as it is.
    copied = shutil.copytree(home, tmp_path / "copied")
    others = read_source(SourceConfig(str(copied / "vqa.jsonl"), format="vqa"))[0]["test"]
    data = prepare(rows, [*others, *rows, *support], by="media")
    task = data.task(2, model)
    assert task.counts["excluded"] == 8
    assert all({*item.media[:-1]}.isdisjoint({*item.media[-1:]}) for item in task.items)
    keys = [{data.embeddings.key(m) for group in item.media for m in group} for item in task.items]
    assert all(len(own) == 3 for own in keys)


@pytest.mark.parametrize("by", ["order", "random", "media", "text"])
def test_the_question_in_another_file_format_is_excluded(home, model, prepare, tmp_path, by):
    rows, support = read(home / "vqa.jsonl")
    Image.open(rows[0].media[0].source).save(tmp_path / "same.bmp")
    media = Media.image(tmp_path / "same.bmp")
    question = Message("user", [media, "Color?"])
    copy = replace(support[0], conversation=Conversation((question, Message("assistant", "red"))))
    task = prepare(rows[:1], [copy, *support], by=by).task(9, model)
    assert task.counts["excluded"] == 1
    assert media not in [item for group in task.items[0].media for item in group]


def test_shots_that_do_not_fit_are_counted(home, model, prepare):
    rows, support = read(home / "vqa.jsonl")
    task = prepare(rows, support * 9).task(60, model)
    assert task.counts["not_fitting"] > 0
    assert task.counts["shots"] + task.counts["not_fitting"] == 4 * 60
    assert all(len(item.input_ids) <= 512 for item in task.items)


def test_wrong_answers_without_room_for_an_answer_are_not_measured(home, model, prepare):
    rows, support = read(home / "vqa.jsonl")
    red, green = support[0], support[2]
    # A wrong answer is longer than the right one, and the shots fill the decoder.
    task = prepare(rows, [*[red] * 60, green]).task(61, model)
    assert task.counts["not_fitting"] > 0
    changed = task.altered["wrong_support"]
    assert [changed(item) for item in task.items] == [None] * 4
    few = prepare(rows, [red, red, green]).task(3, model)
    assert few.altered["wrong_support"](few.items[0]).num_answers == 1


def test_equal_shots_leave_two_controls_undefined(home, model, prepare):
    rows, support = read(home / "vqa.jsonl")
    data = prepare(rows, support[:1] * 4)
    result = evaluate(model, [data.task(2, model)], lookup=data.embeddings)
    assert "all shots show the same media" in result.problems["answers_2_shots: shuffled_support"]
    assert "all shots have the same answer" in result.problems["answers_2_shots: wrong_support"]
    assert result.metrics["answers_2_shots"]["wrong_support"]["accuracy"] is None
    assert result.metrics["answers_2_shots"]["copy_last"]["accuracy"] == 0.25


def test_rows_that_cannot_be_used_are_counted(home, model, prepare, tmp_path):
    rows, support = read(home / "vqa.jsonl")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "broken.png").write_bytes(b"no image")
    lines = [
        {"image": "broken.png", "question": "Color?", "answer": "red"},
        {"image": str(home / "images/red1.png"), "question": "<|im_end|>", "answer": "red"},
    ]
    (bad / "vqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = read(bad / "vqa.jsonl", split="test")[0]
    skipped = Skipped()
    data = prepare(rows + more, support + more, skipped=skipped)
    assert (len(data.questions), len(data.support.shots)) == (len(rows), len(support))
    assert skipped.total == 4
    with pytest.raises(InputError, match=r"no shot is left: .*broken\.png"):
        prepare(rows, more)
    with pytest.raises(InputError, match="no question is left"):
        prepare(more, support)


def test_other_kinds_of_rows(home, model, prepare):
    rows, _ = read(home / "vqa.jsonl")
    captions, _ = read(home / "captions.jsonl", "caption")
    with pytest.raises(InputError, match="these are answer, caption"):
        prepare(rows, captions)
    with pytest.raises(InputError, match="these are empty"):
        prepare([], [])


def test_wrong_answers_are_those_of_the_same_prompt_if_there_are_any():
    shots = [Shot("Red?", "yes"), Shot("Red?", "No."), Shot("Red?", "no"), Shot("Shape?", "circle")]
    change = wrong_answers(shots)
    assert change(shots[0]).answer in ("No.", "no")
    assert change(shots[1]).answer == change(shots[2]).answer == "yes"
    # Its prompt has a single answer.
    assert change(shots[3]).answer in ("yes", "No.", "no")
    with pytest.raises(InputError, match="the same answer"):
        wrong_answers([Shot("Red?", "yes"), Shot("Blue?", "Yes.")])


def test_a_wrong_answer_of_a_multiple_choice_is_one_of_its_options():
    def choice(prompt, count, right):
        options = [f"The answer is ({letter})." for letter in "ABCDE"[:count]]
        return Shot(prompt, options[right]), options

    rows = [choice("Two?", 2, 0), choice("Three?", 3, 2), choice("Four?", 4, 3), choice("Five?", 5, 1)]
    shots, choices = [shot for shot, _ in rows], {shot.prompt: options for shot, options in rows}
    change = wrong_answers(shots, choices)
    for shot, options in rows:
        assert change(shot).answer in {*options} - {shot.answer}
    # An answer with an explanation: its bare letter would be right.
    explained = Shot("Two?", "Grass is green. The answer is (A).")
    other = Shot("Sky?", "blue")
    assert wrong_answers([explained, other], choices)(explained).answer == "blue"


def test_the_last_of_equally_frequent_answers():
    assert majority_shot(["a", "b"]) == "b"
    assert majority_shot([]) == ""


@pytest.fixture
def command(home, monkeypatch, tmp_path_factory, capsys):
    work = tmp_path_factory.mktemp("work")
    save_tiny_model(work / "model", work / "decoder")
    monkeypatch.chdir(work)

    def run(*words, code=0):
        allow = [word for name in ALLOW for word in ("--allow", name)]
        assert main(["few_shot", "model", str(home / "vqa.jsonl"), *words, *allow]) == code
        return capsys.readouterr()

    return run


def test_the_command_prints_a_table_and_writes_the_result(command, home):
    out = command(
        "--num_shots", "0", "--num_shots", "2", "--shots_by", "media", "--output", "out/result.json"
    ).out
    assert "accuracy by number of shots" in out
    assert any(
        line.split()[:1] == ["│"] and "copy_last" in line and "1.000" in line for line in out.splitlines()
    )
    assert "answers_2_shots: 8 shots, 0 excluded as the question itself, 0 without room in the decoder" in out
    result = json.loads(Path("out/result.json").read_text())
    assert list(result["tasks"]) == ["answers_0_shots", "answers_2_shots"]
    assert result["settings"]["shots_by"] == "media"
    assert (result["settings"]["quantize"], result["settings"]["tokens"]) == (None, None)
    assert len(result["rows"]["answers_2_shots"]) == 4


def test_a_support_of_its_own_and_a_limit(command, home):
    given = (
        "--support",
        str(home / "captions.jsonl"),
        "--format",
        "caption",
        "--num_shots",
        "1",
        "--limit",
        "5",
    )
    # All rows of the first table are questions.
    out = command("--num_shots", "1", "--support", str(home / "vqa.jsonl"), "--limit", "5").out
    # Each question is in the support too.
    assert "answers_1_shots: 5 shots" in out
    many = command("--num_shots", "9", "--shots_by", "order", "--limit", "1").out
    assert "answers_9_shots: 8 shots, 0 excluded" in many
    assert "1 not found in the support" in many
    assert "no column 'caption'" in command(*given, code=1).err


def test_mistakes_on_the_command_line(command):
    assert "--nearest_first needs the nearest shots" in command("--nearest_first", code=2).err
    assert "is a folder" in command("--output", ".", code=2).err
    assert "--prompt has no effect on rows of the format vqa" in command("--prompt", "Hue?", code=2).err
    assert "--records" in command("--records", "2", code=2).err
    assert "--datastore" in command("--datastore", "records", code=2).err


def test_a_model_with_retrieved_context(command, decoder):
    tiny_model(decoder, encoders=[Multimodal()], context=ContextConfig(latents=2, width=16)).save_pretrained(
        "model"
    )
    # It has no datastore, and needs none.
    for words in ([], ["--records", "0"]):
        printed = command("--num_shots", "1", "--limit", "1", *words).out
        assert printed.startswith("measured without the records of the model")


def test_a_frame_around_the_questions(command):
    command("--prompt", "Look. {question}", "--num_shots", "1", "--limit", "1", "--output", "result.json")
    (row,) = json.loads(Path("result.json").read_text())["rows"]["answers_1_shots"]
    assert row["question"] == row["shots"][0]["prompt"] == "Look. Color?"


def test_the_prompt_of_the_language_of_each_row(home):
    vqa = [json.loads(line) for line in (home / "vqa.jsonl").read_text().splitlines()]
    table = home / "languages.jsonl"
    rows = [{**row, "language": ("en", "es")[n % 2], "split": "test"} for n, row in enumerate(vqa)]
    table.write_text("\n".join(map(json.dumps, rows)))
    options = TableOptions(prompts={"en": "Look. {question}", "es": "Mira. {question}"})
    asked, _ = options.read(str(table), Skipped())
    assert {row.language: row.conversation.messages[0].text[:5] for row in asked} == {
        "en": "Look.",
        "es": "Mira.",
    }
    with pytest.raises(InputError, match="prompts of vqa are frames"):
        TableOptions(prompts={"en": "Look."}).read(str(table), Skipped())
