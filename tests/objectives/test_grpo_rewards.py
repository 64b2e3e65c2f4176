"""Rewards: what an answer earns, and which rows cannot be judged."""

from dataclasses import replace

import pytest

from bindllm.errors import InputError
from bindllm.objectives import CaptionMetric, ExactAnswer, OptionLetter
from preference_parts import row


def asked(*references: str, options: tuple[str, ...] = ()):
    return row(0, "red", "red", references=references, options=options)


def test_an_exact_answer_has_the_words_of_a_true_one():
    samples = [asked("red"), asked("red", "crimson"), asked("red"), asked("red")]
    rewards = ExactAnswer()(["Red.", "a crimson", "red square", ""], samples)
    assert rewards.tolist() == [1, 1, 0, 0]


def test_an_exact_answer_to_a_multiple_choice_is_its_option():
    choice = asked("The answer is (B).", options=("a rose", "the sea"))
    assert ExactAnswer()(["B", "sea", "(A)", "salt"], [choice] * 4).tolist() == [1, 1, 0, 0]


def test_a_letter_earns_more_than_no_letter():
    choice = asked("The answer is (B).", options=("a rose", "the sea"))
    answers = ["It is salty, so the answer is (B).", "A", "I do not know"]
    assert OptionLetter(unreadable=-0.5)(answers, [choice] * 3).tolist() == [1, 0, -0.5]
    for value in (1, float("nan"), -float("inf")):
        with pytest.raises(InputError, match="unreadable must be finite and below 1"):
            OptionLetter(unreadable=value)


def test_rows_without_options_are_refused_by_name():
    choice = asked("B", options=("a rose", "the sea"))
    OptionLetter().check([choice])
    unclear = replace(choice, references=("maybe",), name="unclear")
    with pytest.raises(InputError, match="2 of 3 rows have no options.*the first is plain"):
        OptionLetter().check([choice, replace(asked("red"), name="plain"), unclear])


def test_a_caption_metric_counts_shared_words_of_the_closest_reference():
    sample = asked("a red square on grass", "the sea")
    answers = ["square red on", "the Sea!", "", "blue"]
    assert CaptionMetric("words")(answers, [sample] * 4).tolist() == pytest.approx([2 * 3 / 7, 1, 0, 0])
    assert CaptionMetric("rouge_l")(answers, [sample] * 4).tolist() == pytest.approx([2 * 2 / 7, 1, 0, 0])
    with pytest.raises(InputError, match="unknown metric 'rouge'.*rouge_l"):
        CaptionMetric("rouge")


def test_rouge_l_is_that_of_torchmetrics():
    rouge_score = pytest.importorskip("torchmetrics.functional.text").rouge_score
    answers = ["a b c b d", "d c b a", "one two three", "a c"]
    references = ["b d c a b a", "a b c d", "three one two", "b c a c"]
    # The letter a is an article, which answers are compared without.
    answers, references = ([text.replace("a", "x") for text in texts] for texts in (answers, references))
    ours = CaptionMetric()(answers, [asked(text) for text in references]).tolist()
    theirs = [
        rouge_score(mine, true, rouge_keys="rougeL", normalizer=str, tokenizer=str.split)[
            "rougeL_fmeasure"
        ].item()
        for mine, true in zip(answers, references, strict=True)
    ]
    assert ours == pytest.approx(theirs)
