"""Whether an answer to a question is right: the same words as a true one, or the same option of a multiple choice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

ARTICLES = frozenset(["a", "an", "the"])

_ANSWER_IS = r"\banswer\s*(?:is|:)"
# A small a ahead of a word is an article.
_SAID = re.compile(
    rf"{_ANSWER_IS}\s*(?:option\s+|:\s*)?(?!(?-i:a)\s+\w)\(?([A-Z])\b(?!['\u2019])", re.IGNORECASE
)
_UP_TO_ANSWER = re.compile(rf".*{_ANSWER_IS}", re.IGNORECASE | re.DOTALL)
_ALONE = re.compile(r"\(?([A-Z])(?:[).:]+(?:\s|$)|$)", re.IGNORECASE)
# The point, commas ahead of three digits, and the sign.
_IN_NUMBER = re.compile(r"(?<=\d)(?:\.(?=\d)|,(?=\d{3}(?!\d)))|(?<!\w)-(?=\d)")
_MINUS = "\u2212"


def answer_words(text: str) -> list[str]:
    """Return the words by which answers are compared.

    Unicode NFKC, lower case, punctuation to spaces, split at white space, without the articles a, an and the (kept
    where nothing else is said). The point and the sign of a number stay, and its commas go: 1,000 is 1000.

    Example:
        >>> answer_words("A circle."), answer_words("-3.5"), answer_words("The.")
        (['circle'], ['-3.5'], ['the'])
    """
    text = unicodedata.normalize("NFKC", text).lower().replace(_MINUS, "-")
    in_numbers = {match.start() for match in _IN_NUMBER.finditer(text)}
    letters = []
    for place, letter in enumerate(text):
        if place in in_numbers:
            letters.append("" if letter == "," else letter)
        else:
            letters.append(" " if unicodedata.category(letter).startswith("P") else letter)
    words = "".join(letters).split()
    return [word for word in words if word not in ARTICLES] or words


def same_answer(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction has exactly the words of one of its references; no words never match.

    Example:
        >>> same_answer("A Circle.", ["square", "circle"]), same_answer("red circle", ["circle"])
        (True, False)
    """
    words = answer_words(prediction)
    return bool(words) and any(words == answer_words(reference) for reference in references)


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer chooses, or None where it chooses none.

    In this order: the last "answer is (B)" or "answer: B" of the text; an answer that is or starts with a letter
    of its own, as "B", "(B)" or "b. the sea"; an answer that has, in all or behind its last "answer is", the words of
    exactly one option.

    Args:
        text: the answer.
        options: the options in the order of their letters, at most 26.

    Example:
        >>> option_letter("It is salty, so the answer is (B).", ["a rose", "the sea"])
        'B'
        >>> option_letter("The sea", ["a rose", "the sea"])
        'B'
    """
    known = ascii_uppercase[: len(options)]
    said = _SAID.findall(text)
    if said and said[-1].upper() in known:
        return said[-1].upper()
    alone = _ALONE.match(text.strip())
    if alone and alone[1].upper() in known:
        return alone[1].upper()
    told = (text, _UP_TO_ANSWER.sub("", text))
    named = [
        letter
        for letter, option in zip(known, options, strict=False)
        if any(same_answer(part, [option]) for part in told)
    ]
    return named[0] if len(named) == 1 else None


def is_right(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> bool:
    """Whether an answer is right: by its option where there are options, else by its words.

    Args:
        prediction: the answer.
        references: the true answers.
        options: the options of a multiple choice, in the order of their letters.

    Example:
        >>> is_right("B", ["The answer is (B)."], ["a rose", "the sea"])
        True
    """
    if options:
        true = {option_letter(reference, options) for reference in references} - {None}
        if true:
            return option_letter(prediction, options) in true
    return same_answer(prediction, references)
