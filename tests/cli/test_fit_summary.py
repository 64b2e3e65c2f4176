"""What `bindllm fit` prints at its end."""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from bindllm.evaluation.answers import AnswerRow
from bindllm.evaluation.captions import CaptionRow
from bindllm.evaluation.task import VARIANTS, Evaluation
from bindllm.training.run import print_summary

NUMBERS = {"loss": 2.0, "perplexity": 7.4, **dict.fromkeys(("cider", "bleu4", "rouge_l", "exact_match"), 0.5)}
METRICS = {"tasks": {"captions": {name: NUMBERS for name in VARIANTS["captions"]}}}


def test_a_long_caption_leaves_room_for_the_file_and_the_true_caption(capsys):
    row = CaptionRow("data/radar/sweeps/0.npy", "radar", ["something near"], model="It is a metaphor. " * 20)
    measured = Evaluation(METRICS["tasks"], {"captions": [asdict(row)]})
    print_summary(Console(width=80), METRICS, measured, Path("report.html"), modalities={"radar"})
    told = capsys.readouterr().out
    assert "0.npy" in told
    assert "something near" in told
    assert "It is a metaphor" in told


def test_questions_are_shown_with_their_answers(capsys):
    numbers = {"accuracy": 0.75, "by_type": {}, "count": 400, "count_by_type": {}}
    nothing = {"accuracy": None, "by_type": {}, "count": 0, "count_by_type": {}}
    metrics = {"tasks": {"answers": {**dict.fromkeys(VARIANTS["answers"], nothing), "model": numbers}}}
    rows = [
        AnswerRow("is it red?", ["yes", "yep"], media="data/images/7.png", modality="image", model="no"),
        AnswerRow("what is two and two?", ["four"], model="four", right=True),
    ]
    measured = Evaluation(metrics["tasks"], {"answers": [asdict(row) for row in rows]})
    print_summary(Console(width=100), metrics, measured, Path("report.html"), modalities={"image"})
    told = capsys.readouterr().out
    assert "Of 400 held-out questions the model answers 75.0% right." in told
    lines = [line.split() for line in told.splitlines()]
    assert ["7.png", "is", "it", "red?", "yes", "no"] in lines
    assert ["what", "is", "two", "and", "two?", "four", "four"] in lines
    assert "caption" not in told
