"""What a report says of questions and of conversations, alone and beside captions."""

import copy
import json
from dataclasses import asdict

import pytest
import torch

from bindllm.errors import InputError
from bindllm.evaluation.answers import ANSWER_VARIANTS, AnswerRow
from bindllm.evaluation.chat import CHAT_VARIANTS
from bindllm.evaluation.run import CaptionRow
from bindllm.evaluation.tasks import KINDS as MEASURED_KINDS
from bindllm.model.checkpoint import write_checkpoint
from bindllm.report import answers, page, summary
from bindllm.report.report import RunFacts, rebuild_report, write_report
from bindllm.report.summary import measured_kinds, summarise

REST = {"seconds": {"embed": 1.5, "train": 336.0, "evaluate": 70.2}, "trainable_parameters": 12}
CAPTION = {"loss": 3.5, "perplexity": 33.1, "cider": 1.2, "bleu4": 0.0, "rouge_l": 0.3, "exact_match": 0.25}
CAPTIONS = dict.fromkeys(("heldout", "zero_gates", "shuffled", "nearest"), CAPTION)
CHAT = {
    "heldout": {"loss": 1.5, "perplexity": 4.5, "count": 300, "with_media": 200},
    "zero_gates": {"loss": 2.5, "perplexity": 12.2},
    "shuffled": {"loss": 1.9, "perplexity": 6.7},
}


def share(accuracy, count=400, **more):
    types = {
        "by_type": {"colour": accuracy, "yes/no": accuracy},
        "count_by_type": {"colour": 100, "yes/no": 300},
    }
    return {"accuracy": accuracy, "count": count, **types, **more}


NOTHING = {"accuracy": None, "by_type": {}, "count": 0, "count_by_type": {}}
ANSWERS = {"test": share(0.9), "question_only": share(0.6), "shuffled": share(0.5), "blind": share(0.4)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "gate_figure", lambda *_: "<svg></svg>")
    manifest = {"decoder": {"name": "tiny"}, "encoders": [], "inject": {"kind": "value", "queries": True}}
    write_checkpoint(tmp_path / "checkpoint", manifest, {"injection.gates": torch.full((3, 4), 0.5)}, "card")
    return tmp_path / "checkpoint"


def row(question, **changes):
    usual = AnswerRow(question, ["red"], "7.png", "colour", "Red.", right=True, question_only="blue")
    return {**asdict(usual), **changes}


def write(folder, metrics, **rows):
    return write_report(folder, metrics={**metrics, **REST}, facts=RunFacts(), **rows).read_text(
        encoding="utf-8"
    )


def told(**variants):
    return " ".join(summarise({**ANSWERS, **variants}, num_pictures=0))


def test_names_of_kinds_and_variants_are_those_of_the_evaluation():
    assert tuple(answers.VARIANTS) == ANSWER_VARIANTS
    assert summary.CHAT_VARIANTS == CHAT_VARIANTS
    assert set(summary.KINDS) == set(MEASURED_KINDS.values())


def test_the_kind_is_found_by_its_variants():
    assert measured_kinds({**CAPTIONS, **REST}).keys() == {"captions"}
    assert measured_kinds({**ANSWERS, **REST}).keys() == {"answers"}
    assert measured_kinds({**CHAT, **REST}).keys() == {"chat"}
    several = {"answers": ANSWERS, "chat": CHAT}
    assert measured_kinds({**several, **REST}) == several


def test_a_model_that_looks():
    assert told() == (
        "Of 400 held-out questions the model answers 90.0% right. "
        "The most frequent training answer to each question, without looking, is right for 60.0%. "
        "Asked without the picture the same model answers 40.0% right. "
        "Shown wrong pictures it answers 50.0% right, so what it answers does depend on what it sees."
    )


def test_a_model_that_only_knows_the_questions_is_found_out():
    text = told(question_only=share(0.9), shuffled=share(0.9))
    assert "is right for 90.0%: the model knows no more than the questions give away" in text
    assert "no fewer: nothing here shows that it uses the picture" in text


def test_a_sample_is_compared_on_the_same_questions():
    text = told(shuffled=share(0.5, 100, model_accuracy=0.45))
    assert "50.0% right (of 100 questions, of which it answers 45.0% with the right one), no fewer" in text
    assert "300 questions are few" not in text
    assert "40 questions are few" in told(test=share(0.9, 40))


def test_what_was_not_measured_is_left_out_of_the_headline():
    text = told(question_only=NOTHING, shuffled=NOTHING, blind=NOTHING)
    assert text == "Of 400 held-out questions the model answers 90.0% right."
    assert told(test=NOTHING) == "The answers to the held-out questions could not be measured."


def test_conversations_are_told_by_their_loss():
    text = " ".join(summarise(CHAT, num_pictures=0))
    assert "On 300 held-out conversations the loss is 1.50 per token (perplexity 4.5)." in text
    assert (
        "which sees nothing, has 2.50. Shown wrong pictures it has 1.90, so what it says does depend" in text
    )


def test_the_page_shows_questions_types_and_answers(folder):
    rows = [row("is <it> red?"), row("two?", picture=None, generated="", right=False, references=["a", "b"])]
    text = write(folder, ANSWERS, answers=rows)
    assert "caption" not in text.split("</style>")[1].replace("figcaption", "")
    for expected in (
        '<dt>asked</dt><dd dir="auto">is &lt;it&gt; red?</dd>',
        'Red. <span class="mark">✓ right</span>',
        '<dd class="model" dir="auto">(nothing)</dd>',
        "a / b",
        '<th scope="row">yes/no</th><td>300</td><td>90.0%</td><td>60.0%</td><td>50.0%</td><td>40.0%</td>',
        'width:90.0%"></i></span><span>90.0%</span>',
    ):
        assert expected in text
    assert text.count('class="missing"') == 1  # the picture that is gone; the other row has none
    lines = (folder / "report/answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    (folder / "report.html").unlink()
    assert rebuild_report(folder).read_text(encoding="utf-8") == text


def test_several_kinds_stand_under_their_names(folder):
    caption = asdict(CaptionRow("7.png", ["red square"], "a guess"))
    metrics = {"captions": CAPTIONS, "answers": ANSWERS, "chat": CHAT}
    text = write(folder, metrics, captions=[caption], answers=[row("is it red?")])
    for heading in ("Captions", "Questions and answers", "Conversations"):
        assert f"<h3>{heading}</h3>" in text
    assert "On 1 held-out pictures the loss is 3.50" in text
    assert "Of 400 held-out questions" in text
    assert "On 300 held-out conversations" in text
    assert "a guess" in text
    assert rebuild_report(folder).read_text(encoding="utf-8") == text


def test_a_report_of_conversations_alone_has_no_sheet(folder):
    text = write(folder, CHAT)
    assert "the loss alone is measured" in text
    assert "<article" not in text
    assert "CIDEr" not in text
    assert "12.2" in text


def test_rows_of_an_earlier_report_do_not_stay(folder):
    write(folder, ANSWERS, answers=[row("is it red?")])
    write(folder, CAPTIONS, captions=[asdict(CaptionRow("7.png", ["red"]))])
    assert not (folder / "report/answers.jsonl").exists()
    assert (folder / "report/captions.jsonl").exists()


def test_numbers_that_are_missing_are_named_with_their_kind(folder):
    metrics = copy.deepcopy({"answers": ANSWERS, "chat": CHAT})
    del metrics["answers"]["blind"]["by_type"], metrics["chat"]["shuffled"]
    with pytest.raises(
        InputError, match=r"answers\.blind\.by_type, chat\.shuffled\.loss, chat\.shuffled\.perp"
    ):
        write(folder, metrics)
    with pytest.raises(InputError, match=r"lacks question_only\.accuracy"):
        write(folder, {"test": share(0.9), "shuffled": share(0.5), "blind": share(0.5)})
