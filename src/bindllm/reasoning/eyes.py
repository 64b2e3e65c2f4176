"""Tools that look at media with a trained model: describe, ask, count, classify, retrieve."""

# Without `from __future__ import annotations`: the type of media is a value of each call of `model_tools`.

from collections import Counter
from itertools import pairwise
from typing import Annotated, Any

from bindllm.data.answers import answer_words
from bindllm.embeddings.datastore import Datastore
from bindllm.errors import InputError
from bindllm.evaluation.zero_shot import NAME, TEMPLATES, fill_templates
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.reasoning.tools import Tool, tool

_NOUNS = {"point": "point cloud", "depth": "depth map", "thermal": "thermal image", "imu": "motion"}
_QUESTIONS = (
    "How many {} are in the image?",
    "How many {} are there?",
    "How many {} can you see in the image?",
)
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_NUMBERS = {word: number for number, word in enumerate(_WORDS)} | {"no": 0, "none": 0}
_TENS = {
    word: 10 * number
    for number, word in enumerate(
        ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2
    )
}
_SCALES = ("dozen", "hundred", "thousand", "million")


def model_tools(
    model: BindLLM, *, datastore: Datastore | None = None, max_new_tokens: int = 64
) -> list[Tool]:
    """Return the tools that look at media with a model.

    Args:
        model: a trained model; it may be called from several threads.
        datastore: records for ``retrieve``; None: those of the model, if it has some.
        max_new_tokens: length of the longest answer to one question.

    Raises:
        StoreError: the datastore was built with another encoder.
    """
    served = sorted({name for encoder in model.encoders for name in encoder.modalities} - {"text"})
    kind = Annotated[(Media, *served)]
    options = {"max_new_tokens": max_new_tokens}

    def describe(media: kind) -> str:
        """Describe an image or other media.

        Args:
            media: the media
        """
        word = _NOUNS.get(media.modality, media.modality)
        return model.generate(f"Describe this {word}.", [media], **options)

    def ask(media: kind, question: str) -> str:
        """Ask a short question about one image or other media.

        Args:
            media: the media
            question: about this media only
        """
        return model.generate(question, [media], **options)

    def count(image: Annotated[Media, "image"], thing: str = "things") -> int:
        """Count things in one image, by asking in several ways.

        Args:
            image: the image
            thing: the name of the things, in the plural
        """
        answers = model.generate(
            [question.format(thing) for question in _QUESTIONS], [[image]] * len(_QUESTIONS), **options
        )
        found = [number for answer in answers if (number := read_number(answer)) is not None]
        if not found:
            raise InputError(f"no answer has a number: {answers[0]!r}")
        # The most frequent one; of several, the first that was given.
        return Counter(found).most_common(1)[0][0]

    chosen = [describe, ask, count] if "image" in served else [describe, ask]
    return [
        *map(tool, chosen),
        *_embedding_tools(model, kind, model.datastore if datastore is None else datastore),
    ]


def _embedding_tools(model: BindLLM, kind: Any, store: Datastore | None) -> list[Tool]:
    """Return the tools that compare embeddings, if the model has the parts that they need."""

    def classify(media: kind, labels: list[str]) -> str:
        """Choose the label that fits an image or other media best.

        Args:
            media: the media
            labels: at least two short names
        """
        if len(labels) < 2:
            raise InputError(f"{len(labels)} labels, expected at least 2")
        templates = TEMPLATES.get(media.modality, (NAME,))
        groups = [fill_templates([label], templates) for label in labels]
        embeddings = model.encode([(media,), *groups], cache=False)
        return labels[int((embeddings[1:] @ embeddings[0]).argmax())]

    def retrieve(media: kind, records: int = 3) -> list[str]:
        """Return the texts of the most similar known media, the nearest first.

        Args:
            media: the media
            records: number of texts, at most 20
        """
        if not 1 <= records <= 20:
            raise InputError(f"records is {records}, expected 1 to 20")
        found = store.search(model.encode([media], cache=False), records).ids[0].tolist()
        return [store.records[number].text for number in found if number >= 0]

    chosen = []
    # Labels are compared in the joint space of media and texts.
    if any("text" in encoder.modalities for encoder in model.encoders):
        chosen.append(classify)
    if store is not None:
        store.check_encoders(model.encoders)
        chosen.append(retrieve)
    return [tool(function) for function in chosen]


def read_number(answer: str) -> int | None:
    """Return the first whole number of an answer, in digits or as words up to ninety-nine; None: it has none.

    Examples:
        >>> read_number("There are thirty-two cats."), read_number("1,200"), read_number("many")
        (32, 1200, None)
    """
    words = [*answer_words(answer), ""]
    for word, after in pairwise(words):
        if word.isdecimal() and len(word) < 10:
            found = int(word)
        elif word in _TENS:
            unit = _NUMBERS.get(after, 0)
            found = _TENS[word] + (unit if unit < 10 else 0)
        elif word in _NUMBERS:
            found = _NUMBERS[word]
        else:
            continue
        # Of "two hundred", two is not the number.
        return None if after in _SCALES else found
    return None
