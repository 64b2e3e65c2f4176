"""Caption metrics compared with values computed by hand and with the promises of each metric."""

import math
import subprocess
import sys

import pytest

from bindllm.errors import InputError, MissingExtraError
from bindllm.evaluation.captions import METRICS, caption_metrics, caption_words, same_caption


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  Black medium-small SQUARE! ", ["black", "medium", "small", "square"]),
        ("o'clock: three\u2013thirty", ["o", "clock", "three", "thirty"]),
        ("Cafe\u0301", ["caf\u00e9"]),  # e and a combining accent become one letter
        ("हिन्दी चित्र", ["हिन्दी", "चित्र"]),  # combining marks stay inside their word
        ("1 + 1 = 2", ["1", "+", "1", "=", "2"]),
        ("...", []),
        ("", []),
    ],
)
def test_words_of_a_caption(text, words):
    assert caption_words(text) == words


def test_identical_long_captions_reach_every_maximum():
    captions = ["a baby sheep in a field", "two red trucks on the road", "one old man with big hats"]
    scores = caption_metrics(captions, [[caption] for caption in captions])
    assert tuple(scores) == METRICS
    assert scores == pytest.approx({"cider": 10.0, "bleu4": 1.0, "rouge_l": 1.0, "exact_match": 1.0})


def test_disjoint_captions_score_zero_everywhere():
    scores = caption_metrics(["red truck", "green tree"], [["old man"], ["baby sheep"]])
    assert scores == dict.fromkeys(METRICS, 0.0)


def test_short_captions_have_lower_ceilings():
    # Two words: the terms for 1 and 2 words are 1, the others compare nothing: 10 * (1 + 1 + 0 + 0) / 4.
    scores = caption_metrics(["red truck", "old man"], [["red truck"], ["old man"]])
    assert scores["cider"] == pytest.approx(5.0)
    assert scores["bleu4"] == 0.0
    assert scores["exact_match"] == 1.0


def test_cider_by_hand():
    # "cat" is in one of two references (weight log 2), "a" in both (weight log 2 - log 2 = 0): the first
    # caption agrees in "cat" (cosine 1) and "a cat" (cosine 1), the second in "a" only, which weighs nothing.
    scores = caption_metrics(["a cat", "a bush"], [["a cat"], ["a tree"]])
    assert scores["cider"] == pytest.approx((5.0 + 0.0) / 2)
    # One word against two: the phrase lengths (counted in 2-grams) differ by 1, sigma is 6.
    scores = caption_metrics(["cat", "tree"], [["black cat"], ["tree"]])
    first = 10 / 4 * (1 / math.sqrt(2)) * math.exp(-1 / 72)
    assert scores["cider"] == pytest.approx((first + 2.5) / 2)


def test_one_picture_has_no_cider():
    assert caption_metrics(["a cat"], [["a cat"]])["cider"] == 0.0


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are in the reference; equal lengths.
    scores = caption_metrics(["the cat is on the mat"], [["the dog is on the mat"]])
    assert scores["bleu4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6)


def test_rouge_takes_the_best_reference():
    # Longest common subsequence with "a small cat": "a cat", precision 2/2, recall 2/3; with "dog": nothing.
    scores = caption_metrics(["a cat"], [["dog", "a small cat"]])
    assert scores["rouge_l"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_metrics_read_other_alphabets():
    scores = caption_metrics(["красный чайник", "дом"], [["Красный чайник!"], ["лес"]])
    assert scores["rouge_l"] == pytest.approx(0.5)
    assert scores["exact_match"] == 0.5
    assert scores["cider"] == pytest.approx(2.5)


def test_empty_predictions_match_nothing():
    scores = caption_metrics(["", "tree"], [["cat"], ["tree"]])
    assert scores["exact_match"] == 0.5
    assert scores["rouge_l"] == 0.5
    assert not same_caption("", ["..."])
    assert caption_metrics([""], [["..."]]) == dict.fromkeys(METRICS, 0.0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 predictions for 2"),
        ([], [], "at least one image"),
        (["a", "b"], [["a"], []], r"references\[1\]"),
        (["a"], ["a"], r"references\[0\] is 'a'"),
    ],
)
def test_wrong_shapes_are_refused(predictions, references, message):
    with pytest.raises(InputError, match=message):
        caption_metrics(predictions, references)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(MissingExtraError, match=r"pycocoevalcap .*bindllm\[report\]"):
        caption_metrics(["a"], [["a"]])


def test_neither_java_nor_nltk_is_needed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("started a program")

    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert caption_metrics(["a cat", "b"], [["a cat"], ["b"]])["exact_match"] == 1.0
