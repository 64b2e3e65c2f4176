"""Parsers of answers. Each returns None for a text that gives no answer; such answers are counted, and are wrong.

Official scripts differ in their parsers, so results name theirs. Some official ones always find an answer: `pope`
takes every text without "no" or "not" for "yes", also an empty one.
"""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import TYPE_CHECKING

from bindllm.data.answers import answer_words, option_letter, stated_answer
from bindllm.evaluation.captions import caption_words

if TYPE_CHECKING:
    from bindllm.evaluation.benchmarks.benchmark import Item

_THE_ANSWER_IS = re.compile(r"The answer is \(?([A-Z])\)?\.")
_INTEGER = re.compile(r"-?\d+")


def yes_no(text: str, item: Item) -> str | None:
    """Return yes or no if the text has exactly one of these words.

    Examples:
        >>> yes_no("Yes.", None), yes_no("No dog.", None), yes_no("yes or no", None)
        ('yes', 'no', None)
    """
    found = {"yes", "no"} & set(answer_words(text))
    return found.pop() if len(found) == 1 else None


def pope(text: str, item: Item) -> str:
    """Return the answer by POPE's script: no if the first sentence has the word No, not or no, else yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme(text: str, item: Item) -> str | None:
    """Return the answer by MME's script: the whole text, else its first four characters."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def letter(text: str, item: Item) -> str | None:
    """Return the letter of the chosen option, see `bindllm.data.answers.option_letter`."""
    return option_letter(text, item.row.options)


def first_letter(text: str, item: Item) -> str | None:
    """Return the first character if it is the letter of an option, as in SEED's script."""
    known = ascii_uppercase[: len(item.row.options)]
    return text[:1] if text[:1] and text[:1] in known else None


def the_answer_is(text: str, item: Item) -> str | None:
    """Return the letter of the only "The answer is (B).", as in the scripts of ScienceQA and mm-cot."""
    found = _THE_ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 and found[0] in ascii_uppercase[: len(item.row.options)] else None


def stated(text: str, item: Item) -> str | None:
    """Return the rest of the line after the last "answer is", see `bindllm.data.answers.stated_answer`."""
    return stated_answer(text)


def whole(text: str, item: Item) -> str | None:
    """Return the text without white space at its ends."""
    return text.strip() or None


def first_line(text: str, item: Item) -> str | None:
    """Return the first line."""
    return whole(text.strip().partition("\n")[0], item)


def up_to_period(text: str, item: Item) -> str | None:
    """Return the text up to its first line break or period, as in the scripts of VL-ICL."""
    return whole(re.split(r"[\n.]", text.strip(), maxsplit=1)[0], item)


def integer(text: str, item: Item) -> str | None:
    """Return the first integer of the text."""
    found = _INTEGER.search(text)
    return found[0] if found else None


def named_class(text: str, item: Item) -> str | None:
    """Return the only class that the text names; the words "night stand" do not name the class "stand".

    The classes are ``item.facts["classes"]``.
    """
    words, found = f" {' '.join(caption_words(text))} ", []
    spelled = {name: f" {' '.join(caption_words(name))} " for name in item.facts["classes"]}
    for name in sorted(spelled, key=lambda name: -len(spelled[name])):
        if spelled[name] in words:
            found.append(name)
            # The words of a longer name are no mention of a shorter one.
            words = words.replace(spelled[name], " | ")
    return found[0] if len(found) == 1 else None
