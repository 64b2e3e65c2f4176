"""Caption metrics: how close generated captions are to the true ones.

All four compare the same words (:func:`caption_words`), and none needs Java, a download or a network. Each
keeps the scale of its library: CIDEr 0..10 (papers print it times 100), the others 0..1.

CIDEr: https://arxiv.org/abs/1411.5726 (section 4, the CIDEr-D variant). BLEU: https://aclanthology.org/P02-1040.
ROUGE-L: https://aclanthology.org/W04-1013.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from bindllm.errors import InputError, MissingExtraError

METRICS = ("cider", "bleu4", "rouge_l", "exact_match")


def caption_words(text: str) -> list[str]:
    """Return the words of a caption: Unicode NFKC, lower case, punctuation to spaces, split at white space.

    It replaces the PTB tokenizer of the COCO caption tools, which needs Java, so scores are comparable with each
    other and only roughly with published ones. Text without spaces (Chinese, Thai) counts as one word.

    Examples:
        >>> caption_words("A black medium-small Square.")
        ['a', 'black', 'medium', 'small', 'square']
    """
    # NFKC also unifies the full-width and half-width forms of a character.
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(" " if unicodedata.category(char).startswith("P") else char for char in text).split()


def same_caption(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction has exactly the words of one of its references; no words never match.

    Examples:
        >>> same_caption("mosque.", ["bunker", "Mosque"])
        True
    """
    words = caption_words(prediction)
    return bool(words) and any(words == caption_words(reference) for reference in references)


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compare captions with their references.

    - ``cider``: CIDEr-D, 0..10. The weight of a word depends on how few of *these* images' references mention
      it, so a score belongs to its set of images, and a set of one image always scores 0. A caption equal to
      its only reference scores 2.5 for each n-gram length it has (1 to 4 words): two words reach 5, not 10.
    - ``bleu4``: corpus BLEU-4 without smoothing, 0..1. If no caption shares four words in a row with a
      reference, as is usual for names of two words, it is 0: the captions are short, not wrong.
    - ``rouge_l``: F-measure of the longest common subsequence of words, best reference of each image, 0..1.
    - ``exact_match``: share of captions for which :func:`same_caption` holds, 0..1.

    Args:
        predictions: one caption per image; an empty one is allowed and matches nothing.
        references: the true captions of each image, at least one.

    Returns:
        The four numbers, named as above.

    Raises:
        InputError: no predictions, a different number of references, or an image without a reference.
        MissingExtraError: torchmetrics or pycocoevalcap is not installed.

    Examples:
        >>> caption_metrics(["a cat", "a tree"], [["a cat"], ["a bush", "some tree"]])["exact_match"]
        0.5
    """
    _check(predictions, references)
    # All four metrics get the same words.
    generated = [" ".join(caption_words(text)) for text in predictions]
    true = [[" ".join(caption_words(text)) for text in texts] for texts in references]
    matches = [same_caption(text, texts) for text, texts in zip(predictions, references, strict=True)]
    return {
        "cider": _cider(generated, true),
        **_bleu_and_rouge(generated, true),
        "exact_match": sum(matches) / len(matches),
    }


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise InputError(
            f"{len(predictions)} predictions for {len(references)} sets of references; give one per image"
        )
    if not predictions:
        raise InputError("no predictions to compare; give at least one image with a caption")
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise InputError(f"references[{number}] is {texts!r}; expected a list of at least one caption")


def _cider(generated: list[str], true: list[list[str]]) -> float:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise MissingExtraError("pycocoevalcap", extra="report", purpose="compute CIDEr") from error
    if not any(text for texts in true for text in texts):
        return 0.0  # the scorer fails without any word
    score, _ = Cider().compute_score(dict(enumerate(true)), {n: [text] for n, text in enumerate(generated)})
    return float(score)


def _bleu_and_rouge(generated: list[str], true: list[list[str]]) -> dict[str, float]:
    try:
        from torchmetrics.functional.text import bleu_score, rouge_score
    except ImportError as error:
        raise MissingExtraError("torchmetrics", extra="report", purpose="compute BLEU and ROUGE") from error
    # Only rougeL, with our words: the splitting of torchmetrics drops every character outside a-z, and its
    # "rougeLsum" downloads a sentence splitter.
    rouge = rouge_score(generated, true, rouge_keys="rougeL", normalizer=str, tokenizer=str.split)
    return {"bleu4": float(bleu_score(generated, true)), "rouge_l": float(rouge["rougeL_fmeasure"])}
