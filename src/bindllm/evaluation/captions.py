"""The captions task: how well a model captions held-out media, compared with copying the nearest training caption.

All metrics compare the same words (`caption_words`), without Java, downloads or a network, on the scale of their
library: CIDEr 0..10 (https://arxiv.org/abs/1411.5726, section 4, CIDEr-D; papers print it times 100), BLEU
(https://aclanthology.org/P02-1040) and ROUGE-L (https://aclanthology.org/W04-1013) 0..1.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bindllm.data.answers import split_words
from bindllm.data.collate import Lookup
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.evaluation.answering import input_digests
from bindllm.evaluation.answers import longest_answer
from bindllm.evaluation.ngrams import bleu_sums, ciders, corpus_bleu
from bindllm.evaluation.task import (
    MODEL,
    NEAREST_CAPTION,
    NO_MEDIA,
    SHUFFLED_MEDIA,
    BaselineAnswer,
    Metrics,
    Task,
    media_name,
    media_of,
)
from bindllm.objectives.rewards import f_measure, longest_common

METRICS = ("cider", "bleu4", "rouge_l", "exact_match")
MIN_TOKENS = 32
"""Tokens that a caption may have at least, also if all true ones are shorter."""
_CHUNK = 1024
"""Training media compared at a time, so that memory does not grow with their number."""


@dataclass
class CaptionRow:
    """One held-out image (or other media) and its captions; a caption that could not be measured is None.

    Attributes:
        media: path of the media, or name of the row that contains them.
        exact: whether the model's caption has exactly the words of a reference.
        nearest_exact: whether that caption has exactly the words of a reference.
        nearest_media: path or row of the nearest training media.
        nearest_similarity: cosine of the two embeddings, -1..1.
        subset: part of the held-out rows that it belongs to; empty if the row has none.
        language: its language; empty if the row has none.
    """

    media: str
    modality: str
    references: list[str]
    model: str | None = None
    exact: bool = False
    no_media: str | None = None
    shuffled_media: str | None = None
    nearest_caption: str | None = None
    nearest_exact: bool = False
    nearest_media: str | None = None
    nearest_modality: str | None = None
    nearest_similarity: float | None = None
    subset: str = ""
    language: str = ""


def captions_task(
    samples: Sequence[Sample],
    *,
    train_samples: Sequence[Sample],
    lookup: Lookup,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int | None = None,
) -> Task:
    """Return the captions task: the loss of every sample, and one caption per distinct media and language.

    Media with several captions are captioned once and compared with all of them. Two files with the same embedding
    count as one.

    Args:
        max_new_tokens: longest caption; None: a little more than the longest true one, and at least `MIN_TOKENS`.

    Raises:
        InputError: none of the samples has media.
    """
    shown = [sample for sample in samples if sample.media]
    if not shown:
        raise InputError(f"none of the {len(samples)} held-out samples has media; give captioned media")
    first: dict[tuple[bytes, str], Sample] = {}
    references: dict[tuple[bytes, str], dict[str, None]] = {}
    # Grouped by input: a prompt with the same embedding has one caption, whatever the file is called. Captions of
    # another language stay apart, also if they have the same prompt.
    for digest, sample in zip(input_digests(shown, lookup), shown, strict=True):
        key = digest, sample.language
        first.setdefault(key, sample)
        references.setdefault(key, {}).update(dict.fromkeys(sample.references))
    # One item for each input, with the references of all its rows.
    items = [replace(sample, references=tuple(references[key])) for key, sample in first.items()]
    skipped = len(samples) - len(shown)
    return Task(
        "captions",
        items,
        _metric,
        loss_items=shown,
        baselines={NEAREST_CAPTION: partial(nearest_captions, items, train_samples, lookup)},
        make_row=_row,
        max_new_tokens=max_new_tokens or max(MIN_TOKENS, longest_answer(items, tokenizer)),
        counts={"without_media": skipped} if skipped else {},
    )


def nearest_captions(
    samples: Sequence[Sample], train_samples: Sequence[Sample], lookup: Lookup
) -> list[BaselineAnswer]:
    """Return for each sample the caption of the training media with the highest cosine; the first of equal ones.

    Only captions in the language of the sample are copied; without any, the answer is empty.

    Raises:
        InputError: no training sample has media.
    """
    if not any(sample.media for sample in train_samples):
        raise InputError("the training samples have no media, so the nearest caption is not defined")
    found: dict[int, BaselineAnswer] = {}
    for language in dict.fromkeys(sample.language for sample in samples):
        own = [n for n, sample in enumerate(samples) if sample.language == language]
        training = [sample for sample in train_samples if sample.media and sample.language == language]
        copied = _nearest([samples[n] for n in own], training, lookup)
        found.update(zip(own, copied, strict=True))
    return [found[n] for n in range(len(samples))]


def _nearest(samples: Sequence[Sample], training: Sequence[Sample], lookup: Lookup) -> list[BaselineAnswer]:
    if not training:
        return [BaselineAnswer("")] * len(samples)
    # Unit embeddings, so the product is the cosine.
    held_out = lookup([media_of(sample) for sample in samples])
    best, position = torch.full((len(samples),), -math.inf), torch.zeros(len(samples), dtype=torch.long)
    for start in range(0, len(training), _CHUNK):
        vectors = lookup([media_of(sample) for sample in training[start : start + _CHUNK]])  # [n, E]
        # Rounded, so that equal media stay equal in whatever order the products are summed.
        top, column = (held_out @ vectors.T).round(decimals=6).max(dim=1)
        # Strictly greater, so that the first of equal media is kept across chunks.
        position = torch.where(top > best, column + start, position)
        best = torch.maximum(top, best)
    return [
        BaselineAnswer(sample.references[0], media_name(sample), media_of(sample)[0].modality, similarity)
        for sample, similarity in zip([training[n] for n in position.tolist()], best.tolist(), strict=True)
    ]


def _metric(items: Sequence[Sample], captions: Sequence[str]) -> Metrics:
    if not items:
        # A variant that was not measured has the same keys.
        return dict.fromkeys(METRICS)
    return caption_metrics(captions, [item.references for item in items], [item.language for item in items])


def _row(item: Sample, texts: Mapping[str, str | None], nearest: BaselineAnswer | None) -> dict[str, Any]:
    row = CaptionRow(
        media=media_name(item) or item.name,
        modality=media_of(item)[0].modality,
        references=list(item.references),
        subset=item.subset,
        language=item.language,
        model=texts[MODEL],
        exact=same_caption(texts[MODEL] or "", item.references),
        no_media=texts[NO_MEDIA],
        shuffled_media=texts[SHUFFLED_MEDIA],
    )
    # Without a baseline (no training media) these fields stay empty.
    if nearest is not None:
        row.nearest_caption, row.nearest_media, row.nearest_modality, row.nearest_similarity = nearest
        row.nearest_exact = same_caption(nearest.text, item.references)
    return asdict(row)


def caption_words(text: str) -> list[str]:
    """Return the words of a caption: Unicode NFKC, lower case, punctuation to spaces, split at white space.

    It replaces the PTB tokenizer of the COCO caption tools, which needs Java, so scores are comparable with each
    other and only roughly with published ones. In scripts without spaces (Chinese, Japanese, Thai) each character is a
    word, see `bindllm.data.answers.split_words`.

    Examples:
        >>> caption_words("A black medium-small Square."), caption_words("红色的方块。")
        (['a', 'black', 'medium', 'small', 'square'], ['红', '色', '的', '方', '块'])
    """
    # NFKC also unifies the full-width and half-width forms of a character.
    text = unicodedata.normalize("NFKC", text).lower()
    return split_words("".join(" " if unicodedata.category(char).startswith("P") else char for char in text))


def same_caption(prediction: str, references: Sequence[str]) -> bool:
    """Whether a prediction has exactly the words of one of its references; no words never match.

    Examples:
        >>> same_caption("mosque.", ["bunker", "Mosque"])
        True
    """
    words = caption_words(prediction)
    return bool(words) and any(words == caption_words(reference) for reference in references)


def caption_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str] | None = None
) -> dict[str, float]:
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
        languages: language of each image's captions; CIDEr-D counts how rare a word is in each of them. None: one.

    Returns:
        The four numbers, named as above.

    Raises:
        InputError: no predictions, a different number of references, or an image without a reference.

    Examples:
        >>> caption_metrics(["a cat", "a tree"], [["a cat"], ["a bush", "some tree"]])["exact_match"]
        0.5
    """
    _check(predictions, references)
    # All four metrics get the same words.
    generated = [caption_words(text) for text in predictions]
    true = [[caption_words(text) for text in texts] for texts in references]
    pairs, languages = list(zip(generated, true, strict=True)), languages or [""] * len(true)
    weights = ciders(true, languages)
    scores = [weights[language].score(*pair) for language, pair in zip(languages, pairs, strict=True)]
    sums = sum((Counter(bleu_sums(*pair)) for pair in pairs), Counter())
    closest = [
        max(f_measure(words, other, longest_common(words, other)) for other in texts)
        for words, texts in pairs
    ]
    matches = [same_caption(text, texts) for text, texts in zip(predictions, references, strict=True)]
    return {
        "cider": sum(scores) / len(pairs),
        "bleu4": float(corpus_bleu(sums, 4)),
        "rouge_l": sum(closest) / len(closest),
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
