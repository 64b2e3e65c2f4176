"""Scores and parsers of benchmarks, against the published code and numbers computed by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmark_parts import choices, isekai, mmbench, music_avqa, scienceqa, vl_icl, vqav2
from bindllm.evaluation.benchmarks import BENCHMARKS, parsers
from bindllm.evaluation.benchmarks.benchmark import read_items
from bindllm.evaluation.benchmarks.bootstrap import by_group, intervals
from bindllm.evaluation.benchmarks.metrics import CAPTIONS, CIRCULAR
from bindllm.evaluation.benchmarks.vqa import vqa_words
from bindllm.evaluation.ngrams import Cider, bleu_sums, rouge_l


def items_of(name, folder):
    return read_items(BENCHMARKS[name], folder, prompt="{question}").items


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The two dogs.", "2 dogs"),
        ("dont know", "don't know"),
        ("2,000", "2000"),
        ("3.5", "3.5"),
        # A mark without a space next to it becomes a space, with one it goes.
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("none", "0"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalized_as_published(text, words):
    assert vqa_words(text) == words


def test_soft_accuracy_counts_agreement_with_the_others(tmp_path):
    (item, *_) = items_of("vqav2", vqav2(tmp_path))
    score = BENCHMARKS["vqav2"].scorer([item])
    # Eight of nine people said red; the null is not a person's answer.
    assert item.references == ("red",) * 8 + ("brown",)
    assert score(item, "Red.")["score"] == 1
    assert score(item, "brown")["score"] == pytest.approx(8 / 9 / 3)
    assert score(item, "green")["score"] == 0


def test_caption_metrics_equal_pycocoevalcap():
    bleu, cider, rouge = (
        pytest.importorskip(f"pycocoevalcap.{name}.{name}") for name in ("bleu", "cider", "rouge")
    )
    rng = random.Random(0)

    def sentence(longest):
        words = ["a", "the", "red", "blue", "dog", "cat", "runs", "on", "table", "with", "two"]
        return [rng.choice(words) for _ in range(rng.randint(1, longest))]

    references = [[sentence(9) for _ in range(rng.randint(1, 5))] for _ in range(60)]
    candidates = [
        [*(rng.choice(texts) if rng.random() < 0.6 else sentence(9)), *sentence(2)] for texts in references
    ]
    weights = Cider(references)
    lines = []
    for n, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
        own = {"cider": weights.score(candidate, texts), "rouge_l": rouge_l(candidate, texts)}
        stats = {**own, **bleu_sums(candidate, texts)}
        lines.append({"id": str(n), "unit": str(n), "media": [], "stats": stats})
    found = {name: number["value"] for name, number in intervals(lines, CAPTIONS).items()}
    true = {n: [" ".join(words) for words in texts] for n, texts in enumerate(references)}
    said = {n: [" ".join(words)] for n, words in enumerate(candidates)}
    assert found["cider"] == pytest.approx(cider.Cider().compute_score(true, said)[0], abs=1e-12)
    assert found["rouge_l"] == pytest.approx(rouge.Rouge().compute_score(true, said)[0], abs=1e-12)
    published = bleu.Bleu(4).compute_score(true, said, verbose=0)[0]
    assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(published, abs=1e-8)
    lines[0]["stats"] = {**lines[0]["stats"], **bleu_sums([], references[0])}
    assert np.isfinite(intervals(lines, CAPTIONS)["bleu4"]["value"])


def test_circular_questions_are_right_in_all_rotations(tmp_path):
    items = items_of("mmbench", mmbench(tmp_path))
    assert [(item.id, item.unit, item.letter) for item in items] == [
        ("0", "0", "A"),
        ("1000000", "0", "B"),
        ("1", "1", "A"),
        ("1000001", "1", "C"),
        ("2000001", "1", "B"),
    ]
    lines = [
        {"id": item.id, "unit": item.unit, "media": [], "score": float(item.id != "1000001")}
        for item in items
    ]
    found = {name: number["value"] for name, number in intervals(lines, CIRCULAR).items()}
    assert found == {"accuracy": 0.5, "plain_accuracy": 1.0}


def test_columns_of_scienceqa_overlap_as_in_the_paper(tmp_path):
    items = items_of("scienceqa", scienceqa(tmp_path))
    lines = [
        {"id": item.id, "unit": item.id, "media": [], "score": 1.0, "groups": dict(item.groups)}
        for item in items
    ]
    columns = {
        value: number["accuracy"]["n"]
        for values in by_group(lines, BENCHMARKS["scienceqa"].metric).values()
        for value, number in values.items()
    }
    assert columns == {"NAT": 2, "SOC": 1, "LAN": 1, "TXT": 2, "IMG": 2, "NO": 1, "G1-6": 3, "G7-12": 1}


def test_options_that_are_empty_or_called_none(tmp_path):
    (item, *_) = items_of("choices", choices(tmp_path))
    assert item.row.options == ("None", "red", "", "black")
    assert item.row.conversation.messages[0].text.endswith("Options: (A) None (B) red (D) black")
    assert [parsers.letter(text, item) for text in ("None", "C", "The answer is (D).", "")] == [
        "A",
        None,
        "D",
        None,
    ]


def test_shots_of_vl_icl_have_the_operator_of_the_question(tmp_path):
    items = {item.id: item for item in items_of("vl_icl", vl_icl(tmp_path))}
    shown = items["operator_induction/3/4 shots"].row.conversation
    answers = {message.text for message in shown.messages if message.role == "assistant"}
    assert answers == {"10", "11", "12", "13", "3"}
    # Two classes, each with as many shots as the others.
    names = [message.text for message in items["open_mi/0/2 shots"].row.conversation.messages[1:-2:2]]
    assert len(names) == 4
    assert len(set(names)) == 2
    assert "red" in names
    item = items["operator_induction/3/0 shots"]
    assert BENCHMARKS["vl_icl"].parser(None)[1]("It is 3.", item) == item.target == "3"


def test_the_published_score_of_isekai(tmp_path):
    item = items_of("isekai", isekai(tmp_path))[0]
    score = BENCHMARKS["isekai"].scorer([item])
    assert (item.target, item.letter) == ("octopus vacuum", None)
    assert [score(item, text)["score"] for text in ("an octopus vacuum", "octopus")] == [1, 0]


def test_the_words_of_a_template_are_filled_in(tmp_path):
    (item, *_) = items_of("music_avqa", music_avqa(tmp_path))
    assert item.row.conversation.messages[0].text == "How many violin are there?"
    assert [media.modality for media in item.media] == ["video", "audio"]
    assert item.groups == {"modality": "Audio-Visual", "type": "Audio-Visual Counting"}


@pytest.mark.parametrize(
    ("parser", "answers"),
    [
        (parsers.yes_no, {"Yes.": "yes", "No, it is not": "no", "not": None, "yes and no": None}),
        # The published script finds an answer in every text.
        (parsers.pope, {"Yes.": "yes", "It is not. Yes.": "no", "": "yes", "NO": "yes"}),
        (parsers.mme, {"Yes": "yes", "  no": "no", "It is no": None}),
    ],
)
def test_parsers_of_yes_and_no(parser, answers):
    assert {text: parser(text, None) for text in answers} == answers
