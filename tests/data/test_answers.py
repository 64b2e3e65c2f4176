"""Which answers count as right."""

import pytest

from bindllm.data.answers import answer_words, is_right, option_letter, same_answer, stated_answer, vote

OPTIONS = ("a rose", "the sea", "both", "C")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  YES!! ", ["yes"]),
        ("the red, round ball", ["red", "round", "ball"]),
        ("A", ["a"]),
        ("\uff52\uff45\uff44", ["red"]),
        ("1,000", ["1000"]),
        ("12,345,678.5", ["12345678.5"]),
        ("1,2", ["1", "2"]),
        ("\u22123", ["-3"]),
        ("-3.5.", ["-3.5"]),
        ("3-4", ["3", "4"]),
        ("well-known", ["well", "known"]),
        ("...", []),
    ],
)
def test_words_by_which_answers_are_compared(text, words):
    assert answer_words(text) == words


def test_the_sign_and_the_point_of_a_number_count():
    assert not same_answer("-3", ["3"])
    assert not same_answer("3.5", ["35", "3 5"])
    assert same_answer("1000", ["1,000"])


def test_an_empty_answer_is_never_right():
    assert not same_answer("", [""])
    assert not is_right(".", ["."], ())


def test_a_part_of_the_answer_is_not_the_answer():
    assert same_answer("a triangle", ["circle", "Triangle."])
    assert not same_answer("triangle or circle", ["circle"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("the answer is b", "B"),
        ("Answer: B", "B"),
        ("answer is option (A)", "A"),
        ("First the answer is (A). No: plants grow, so the answer is (C).", "C"),
        ("B", "B"),
        ("(b)", "B"),
        ("B. the sea", "B"),
        ("B) the sea", "B"),
        ("The sea.", "B"),
        ("a rose", "A"),
        ("A rose", "A"),
        ("both", "C"),
        ("E", None),
        ("The answer is (F).", None),
        ("because", None),
        ("a whale", None),
        # An article, and the start of a word.
        ("The answer is a whale.", None),
        ("The answer is the sea.", "B"),
        ("So the answer: a rose", "A"),
        ("The answer is b'", None),
        ("The answer is A since it is red.", "A"),
        ("", None),
    ],
)
def test_the_letter_of_an_option(text, letter):
    assert option_letter(text, OPTIONS) == letter


def test_a_text_that_two_options_have_chooses_none():
    assert option_letter("red", ("red", "Red.")) is None


def test_multiple_choice_is_right_by_letter_in_any_form():
    references = ["The answer is (B)."]
    assert is_right("It is wet.\nThe answer is (B).", references, OPTIONS)
    assert is_right("the sea", references, OPTIONS)
    assert not is_right("The answer is (A).", references, OPTIONS)
    assert not is_right("no idea", references, OPTIONS)
    assert is_right("the sea", ["The sea"], ())


def test_the_last_stated_answer_counts_also_without_options():
    assert stated_answer("A cat. The answer is one. No, the answer is: two.\nOr not.") == "two."
    assert [stated_answer(text) for text in ("two", "The answer is", "Answer: 2")] == [None, None, "2"]
    assert stated_answer("The answer isn't clear.") is None
    assert stated_answer("The answer is two. This answer isn't sure.") == "two. This answer isn't sure."
    assert is_right("a cat and a dog.\nThe answer is two.", ["two"])
    assert not is_right("two dogs.\nThe answer is three.", ["two"])


def test_votes():
    assert vote(["a", "The B.", None, "b"]) == 1
    assert vote(["b", "a", "a", "b"]) == 0
    assert vote([None, None]) == vote([]) == 0
