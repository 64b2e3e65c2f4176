"""Whether an answer is right: the same words as a reference, or the same option of a multiple choice."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase

ARTICLES = frozenset(["a", "an", "the"])

# "The answer isn't clear" states none.
_ANSWER_IS = r"\banswer\s*(?:is\b|:)"
# A lower-case a before a word is an article.
_STATED = re.compile(
    rf"{_ANSWER_IS}\s*(?:option\s+|:\s*)?(?!(?-i:a)\s+\w)\(?([A-Z])\b(?!['\u2019])", re.IGNORECASE
)
_UP_TO_ANSWER = re.compile(rf".*{_ANSWER_IS}", re.IGNORECASE | re.DOTALL)
# The whole answer is a letter, or starts with one: B, (B), b. the sea.
_LETTER_ONLY = re.compile(r"\(?([A-Z])(?:[).:]+(?:\s|$)|$)", re.IGNORECASE)
# The point, commas before three digits, and the sign.
_IN_NUMBER = re.compile(r"(?<=\d)(?:\.(?=\d)|,(?=\d{3}(?!\d)))|(?<!\w)-(?=\d)")
_MINUS = "\u2212"
# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def split_words(text: str) -> list[str]:
    """Return the words of a text: split at white space, and each character of a script without spaces is a word.

    These are the scripts of Chinese, Japanese, Thai, Lao, Khmer and Burmese. Combining marks stay with their character.

    Examples:
        >>> split_words("a red 消防車")
        ['a', 'red', '消', '防', '車']
    """
    if not _UNSPACED.search(text):
        return text.split()
    pieces, is_apart = [], False
    for char in text:
        if unicodedata.category(char).startswith("M"):
            pieces.append(char)
            continue
        was_apart, is_apart = is_apart, bool(_UNSPACED.match(char))
        # A space on both sides of such a character, after its marks.
        pieces.append(f" {char}" if is_apart or was_apart else char)
    return "".join(pieces).split()


def answer_words(text: str) -> list[str]:
    """Return the words by which answers are compared.

    Unicode NFKC, lower case, punctuation to spaces, split as by `split_words`, without the articles a, an and the (kept
    if they are the whole answer). The point and the sign of a number stay, and its commas are removed: 1,000 is 1000.

    Examples:
        >>> answer_words("A circle."), answer_words("-3.5"), answer_words("The.")
        (['circle'], ['-3.5'], ['the'])
    """
    text = unicodedata.normalize("NFKC", text).lower().replace(_MINUS, "-")
    in_numbers = {match.start() for match in _IN_NUMBER.finditer(text)}
    chars = []
    for position, char in enumerate(text):
        if position in in_numbers:
            chars.append("" if char == "," else char)
        else:
            # A mark becomes a space, so that medium-small is two words.
            chars.append(" " if unicodedata.category(char).startswith("P") else char)
    words = split_words("".join(chars))
    # An answer of articles only keeps them.
    return [word for word in words if word not in ARTICLES] or words


def same_answer(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction has exactly the words of one of its references; no words never match.

    Examples:
        >>> same_answer("A Circle.", ["square", "circle"]), same_answer("red circle", ["circle"])
        (True, False)
    """
    words = answer_words(prediction)
    return bool(words) and any(words == answer_words(reference) for reference in references)


def stated_answer(text: str) -> str | None:
    """Return the rest of the line after the last "answer is" or "answer:" of a text; None: it states no answer.

    Examples:
        >>> stated_answer("A cat and a dog. The answer is two."), stated_answer("A cat.")
        ('two.', None)
    """
    found = _UP_TO_ANSWER.match(text)
    # The last statement counts, because a model that reasons may correct itself.
    return (found and text[found.end() :].lstrip(" \t\n:").partition("\n")[0].strip()) or None


def vote(answers: Sequence[str | None]) -> int:
    """Return the position of the first of the most frequent answers (self-consistency, arXiv 2203.11171).

    Answers of the same words are one. None stands for a text without an answer, which has no vote.

    Examples:
        >>> vote([None, "two", "Three.", "three"]), vote([None, None])
        (2, 0)
    """
    words = [None if answer is None else " ".join(answer_words(answer)) for answer in answers]
    counts = Counter(one for one in words if one is not None)
    # most_common keeps the order of equal counts, so the first one wins.
    return words.index(counts.most_common(1)[0][0]) if counts else 0


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer chooses, or None if it chooses none.

    In this order: the last "answer is (B)" or "answer: B" of the text; an answer that is a letter or starts with one,
    such as "B", "(B)" or "b. the sea"; an answer whose words, in total or after its last "answer is", are those of
    exactly one option.

    Args:
        options: the options in the order of their letters, at most 26; an empty one cannot be chosen.

    Examples:
        >>> option_letter("It is salty, so the answer is (B).", ["a rose", "the sea"])
        'B'
        >>> option_letter("The sea", ["a rose", "the sea"])
        'B'
    """
    known = {letter: option for letter, option in zip(ascii_uppercase, options, strict=False) if option}
    # The last statement counts, because a model that reasons may correct itself.
    stated = _STATED.findall(text)
    if stated and stated[-1].upper() in known:
        return stated[-1].upper()
    letter = _LETTER_ONLY.match(text.strip())
    if letter and letter[1].upper() in known:
        return letter[1].upper()
    parts = (text, _UP_TO_ANSWER.sub("", text))
    named = [letter for letter, option in known.items() if any(same_answer(part, [option]) for part in parts)]
    # Words of two options leave the choice open.
    return named[0] if len(named) == 1 else None


def is_right(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> bool:
    """Whether an answer is right: by its option if there are options, else by its words.

    The words of a true answer are the whole answer, or all that follows its last "answer is".

    Args:
        prediction: the answer to judge.
        references: the true answers.
        options: the options of a multiple choice, in the order of their letters.

    Examples:
        >>> is_right("B", ["The answer is (B)."], ["a rose", "the sea"])
        True
    """
    if options:
        true = {option_letter(reference, options) for reference in references} - {None}
        if true:
            return option_letter(prediction, options) in true
    return any(same_answer(text, references) for text in (prediction, stated_answer(prediction) or ""))
