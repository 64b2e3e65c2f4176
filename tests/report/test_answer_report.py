"""Questions and conversations in a report, by themselves and together with captions."""

import copy
import json
from dataclasses import asdict

import pytest

from bindllm.errors import InputError
from bindllm.evaluation.answers import AnswerRow
from bindllm.evaluation.captions import CaptionRow
from bindllm.evaluation.task import VARIANTS
from bindllm.report import page, summary
from bindllm.report.report import RunFacts, rebuild_report, write_report
from bindllm.report.summary import summarize
from tiny import save_gates

REST = {"seconds": {"embed": 1.5, "train": 336.0, "evaluate": 70.2}, "trainable_parameters": 12}
CAPTION = {"loss": 3.5, "perplexity": 33.1, "cider": 1.2, "bleu4": 0.0, "rouge_l": 0.3, "exact_match": 0.25}
CAPTIONS = dict.fromkeys(("model", "no_media", "shuffled_media", "nearest_caption"), CAPTION)
CHAT = {
    "model": {"loss": 1.5, "perplexity": 4.5, "count": 300, "with_media": 200},
    "no_media": {"loss": 2.5, "perplexity": 12.2},
    "shuffled_media": {"loss": 1.9, "perplexity": 6.7},
}


def share(accuracy, count=400, **more):
    types = {
        "by_type": {"color": accuracy, "yes/no": accuracy},
        "count_by_type": {"color": 100, "yes/no": 300},
    }
    return {"accuracy": accuracy, "count": count, **types, **more}


NOTHING = {"accuracy": None, "by_type": {}, "count": 0, "count_by_type": {}}
ANSWERS = {
    "model": share(0.9),
    "no_media": share(0.4),
    "shuffled_media": share(0.5),
    "majority_answer": share(0.6),
}


@pytest.fixture
def folder(work, monkeypatch):
    monkeypatch.setattr(page, "gate_figure", lambda *_: "<svg></svg>")
    return save_gates(work / "checkpoint")


def row(question, **changes):
    usual = AnswerRow(
        question, ["red"], "color", "7.png", "image", "Red.", right=True, majority_answer="blue"
    )
    return {**asdict(usual), **changes}


def write(folder, metrics, **rows):
    return write_report(folder, metrics={"tasks": metrics, **REST}, facts=RunFacts(), rows=rows).read_text(
        encoding="utf-8"
    )


def told(**variants):
    return " ".join(summarize({"tasks": {"answers": {**ANSWERS, **variants}}}, num_captions=0))


def test_tasks_are_those_of_the_evaluation():
    assert summary.KEYS.keys() == VARIANTS.keys()


def test_a_model_that_looks():
    assert told() == (
        "Of 400 held-out questions the model answers 90.0% right. "
        "The most frequent training answer to each question is right for 60.0%. "
        "Without the image the same model answers 40.0% right. "
        "With wrong images it answers 50.0% right, so its answers do depend on the image."
    )


def test_a_model_that_only_knows_the_questions_is_found_out():
    text = told(majority_answer=share(0.9), shuffled_media=share(0.9))
    assert "is right for 90.0%: the model knows no more than the questions reveal" in text
    assert "not fewer: nothing here shows that it uses the image" in text


def test_a_sample_is_compared_on_the_same_questions():
    text = told(shuffled_media=share(0.5, 100, model_accuracy=0.45))
    assert (
        "50.0% right (on 100 questions, of which it answers 45.0% right with the right one), not fewer"
        in text
    )
    assert "300 questions are few" not in text
    assert "40 questions are few" in told(model=share(0.9, 40))


def test_missing_measurements_are_left_out_of_the_headline():
    text = told(majority_answer=NOTHING, shuffled_media=NOTHING, no_media=NOTHING)
    assert text == "Of 400 held-out questions the model answers 90.0% right."
    assert told(model=NOTHING) == "The answers to the held-out questions could not be measured."


def test_conversations_are_measured_by_their_loss():
    text = " ".join(summarize({"tasks": {"conversations": CHAT}}, num_captions=0))
    assert "On 300 held-out conversations the loss is 1.50 per token (perplexity 4.5)." in text
    assert (
        "(gates at zero) the same model has 2.50. With wrong images it has 1.90, so its output does depend"
        in text
    )


def test_the_page_shows_questions_types_and_answers(folder):
    rows = [
        row("is <it> red?"),
        row("two?", media=None, modality=None, model="", right=False, references=["a", "b"]),
    ]
    text = write(folder, {"answers": ANSWERS}, answers=rows)
    assert "caption" not in text.split("</style>")[1].replace("figcaption", "")
    for expected in (
        '<dt>asked</dt><dd dir="auto"><bdi>is &lt;it&gt; red?</bdi></dd>',
        '<bdi>Red.</bdi> <span class="mark">✓ right</span>',
        '<dd class="model" dir="auto"><bdi>(nothing)</bdi></dd>',
        "a / b",
        '<th scope="row">yes/no</th><td>300</td><td>90.0%</td><td>40.0%</td><td>50.0%</td><td>60.0%</td>',
        'width:90.0%"></i></span><span>90.0%</span>',
    ):
        assert expected in text
    assert text.count('class="missing"') == 1  # the missing image; the other row has none
    lines = (folder / "report/answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    (folder / "report.html").unlink()
    assert rebuild_report(folder).read_text(encoding="utf-8") == text


def test_the_page_shows_subsets_after_the_types(folder):
    metrics = {
        name: each | {"by_subset": {"new <things>": share(0.25, 40)}} for name, each in ANSWERS.items()
    }
    metrics["shuffled_media"] = ANSWERS["shuffled_media"]
    text = write(folder, {"answers": metrics}, answers=[row("is it red?", subset="new <things>")])
    for title, count in (("new &lt;things&gt;", 40), ("new &lt;things&gt;: color", 100)):
        shares = "<td>25.0%</td><td>25.0%</td><td>-</td><td>25.0%</td>"
        assert f'<th scope="row">{title}</th><td>{count}</td>{shares}' in text
    assert text.index(">yes/no</th>") < text.index(">new &lt;things&gt;</th>")
    # Bars for all questions and for the types.
    assert text.count('<div class="panel">') == 3


def test_several_tasks_have_headings(folder):
    caption = asdict(CaptionRow("7.png", "image", ["red square"], "a guess"))
    metrics = {"captions": CAPTIONS, "answers": ANSWERS, "conversations": CHAT}
    text = write(folder, metrics, captions=[caption], answers=[row("is it red?")])
    for heading in ("Captions", "Questions and answers", "Conversations"):
        assert f"<h3>{heading}</h3>" in text
    assert "On 1 held-out images the loss is 3.50" in text
    assert "Of 400 held-out questions" in text
    assert "On 300 held-out conversations" in text
    assert "a guess" in text
    assert rebuild_report(folder).read_text(encoding="utf-8") == text


def test_a_report_of_only_conversations_has_no_sheet(folder):
    text = write(folder, {"conversations": CHAT})
    assert "only their loss is measured" in text
    assert "<article" not in text
    assert "CIDEr" not in text
    assert "12.2" in text


def test_rows_of_an_earlier_report_are_removed(folder):
    write(folder, {"answers": ANSWERS}, answers=[row("is it red?")])
    write(folder, {"captions": CAPTIONS}, captions=[asdict(CaptionRow("7.png", "image", ["red"]))])
    assert not (folder / "report/answers.jsonl").exists()
    assert (folder / "report/captions.jsonl").exists()


def test_missing_metrics_are_named_with_their_task(folder):
    metrics = copy.deepcopy({"answers": ANSWERS, "conversations": CHAT})
    del metrics["answers"]["no_media"]["by_type"], metrics["conversations"]["shuffled_media"]
    with pytest.raises(
        InputError,
        match=r"answers\.no_media\.by_type, tasks\.conversations\.shuffled_media\.loss, tasks\.conv.*\.perp",
    ):
        write(folder, metrics)
    with pytest.raises(InputError, match=r"lacks tasks\.answers\.majority_answer\.accuracy"):
        write(folder, {"answers": {name: share(0.5) for name in ("model", "no_media", "shuffled_media")}})
