"""What the numbers of a run say, in plain sentences that are as ready to report a loss as a win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bindllm.report import answers

Metrics = Mapping[str, Any]
"""Content of ``metrics.json``: a mapping of numbers (or None) for each variant, and facts of the run."""

VARIANTS = {
    "model": "this model",
    "no_media": "gates at zero",
    "shuffled_media": "wrong pictures",
    "nearest_caption": "nearest picture",
}
CHAT_VARIANTS = ("model", "no_media", "shuffled_media")
CHAT_MEASURES = ("loss", "perplexity")
FEW_PICTURES = 100
"""Below this number of held-out pictures the text warns that chance is large."""

_SMALL_SHARE = 0.02
"""A loss that moves by less than this share counts as hardly moved."""


@dataclass(frozen=True)
class Metric:
    """How a metric is named and shown."""

    name: str
    pattern: str
    lower_is_better: bool = False

    @property
    def title(self) -> str:
        """The name as the start of a line."""
        return self.name[0].upper() + self.name[1:]

    def show(self, value: float | None) -> str:
        """Return the number as text, or a dash where it is not defined."""
        return "-" if value is None else self.pattern.format(value)


METRICS = {
    "loss": Metric("loss per token", "{:.2f}", lower_is_better=True),
    "perplexity": Metric("perplexity", "{:,.4g}", lower_is_better=True),
    "cider": Metric("CIDEr", "{:.2f}"),
    "bleu4": Metric("BLEU-4", "{:.3f}"),
    "rouge_l": Metric("ROUGE-L", "{:.3f}"),
    "exact_match": Metric("exact match", "{:.1%}"),
}
KINDS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "captions": (tuple(VARIANTS), tuple(METRICS)),
    "answers": (tuple(answers.VARIANTS), answers.MEASURES),
    "conversations": (CHAT_VARIANTS, CHAT_MEASURES),
}
"""What is measured of each kind of held-out rows: its variants, and the numbers of each variant."""

CAPTION_METRICS = ("cider", "bleu4", "rouge_l", "exact_match")


def best_variants(metrics: Metrics, key: str, variants: Iterable[str] = tuple(VARIANTS)) -> list[str]:
    """Return the variants that share the best value of a metric; none where all are equal or undefined."""
    known = {name: metrics[name][key] for name in variants if metrics[name][key] is not None}
    if len(set(known.values())) < 2:
        return []
    best = min(known.values()) if METRICS[key].lower_is_better else max(known.values())
    return [name for name, value in known.items() if value == best]


def in_words_of(text: str, modalities: Iterable[str]) -> str:
    """Return a text about pictures, or the same about media where there are others than pictures.

    Args:
        text: our own words; nothing of the data is in it.
        modalities: what the run was trained on.

    Example:
        >>> in_words_of("Wrong pictures", ["image"]), in_words_of("Wrong pictures", ["image", "radar"])
        ('Wrong pictures', 'Wrong media')
    """
    if set(modalities) <= {"image"}:
        return text
    return text.replace("pictures", "media").replace("picture", "media")


def summarise(metrics: Metrics, *, num_pictures: int, modalities: Iterable[str] = ("image",)) -> list[str]:
    """Return the headline: what was measured, against its baselines, one sentence each.

    Args:
        metrics: content of ``metrics.json``.
        num_pictures: number of held-out pictures with captions, or other media.
        modalities: what the run was trained on.
    """
    known, sentences = set(modalities), []
    for kind, numbers in metrics["tasks"].items():
        if kind == "answers":
            sentences += answers.sentences(numbers)
        elif kind == "conversations":
            sentences += _chat_sentences(numbers)
        else:
            sentences += _caption_sentences(numbers, num_pictures)
    return [in_words_of(sentence, known) for sentence in sentences]


def _chat_sentences(metrics: Metrics) -> list[str]:
    return _loss_sentences(metrics, f"{metrics['model']['count']:,} held-out conversations")


def _caption_sentences(metrics: Metrics, num_pictures: int) -> list[str]:
    held = metrics["model"]
    sentences = _loss_sentences(metrics, f"{num_pictures:,} held-out pictures")
    if held["loss"] is None:
        return sentences
    sentences += _against_nearest(held, metrics["nearest_caption"])
    if num_pictures < FEW_PICTURES:
        sentences.append(f"{num_pictures:,} pictures are few: small differences here can be chance.")
    return sentences


def _loss_sentences(metrics: Metrics, what: str) -> list[str]:
    """The loss on some rows, beside that of the blind model and of wrong pictures."""
    held = metrics["model"]
    if held["loss"] is None:
        return [f"The loss on {what} could not be measured."]
    perplexity = METRICS["perplexity"].show(held["perplexity"])
    sentences = [f"On {what} the loss is {held['loss']:.2f} per token (perplexity {perplexity})."]
    sentences += _against_blind(held["loss"], metrics["no_media"]["loss"])
    return sentences + _against_shuffled(held["loss"], metrics["shuffled_media"]["loss"])


def _against_blind(loss: float, blind: float | None) -> list[str]:
    if blind is None:
        return []
    if loss >= blind:
        return [
            f"The same model with its gates at zero has {blind:.2f}: training has not helped it on this data."
        ]
    return [f"The same model with its gates at zero, which sees nothing, has {blind:.2f}."]


def _against_shuffled(loss: float, shuffled: float | None) -> list[str]:
    if shuffled is None:
        return []
    if shuffled <= loss:
        return [
            f"Shown wrong pictures it has {shuffled:.2f}, no worse: nothing here shows that it uses the picture."
        ]
    if shuffled < loss * (1 + _SMALL_SHARE):
        return [
            f"Shown wrong pictures it has {shuffled:.2f}, hardly worse: it makes little use of the picture."
        ]
    return [f"Shown wrong pictures it has {shuffled:.2f}, so what it says does depend on what it sees."]


def _against_nearest(held: Metrics, nearest: Metrics) -> list[str]:
    pairs = {key: (held[key], nearest[key]) for key in CAPTION_METRICS}
    pairs = {key: pair for key, pair in pairs.items() if None not in pair}
    better = [key for key, (own, other) in pairs.items() if own > other]
    worse = [key for key, (own, other) in pairs.items() if own < other]
    if not pairs:
        return []
    copying = "copying the caption of the nearest training picture"
    if not better and not worse:
        return [f"Its captions score the same as {copying}."]
    if not worse:
        return [f"Its captions beat {copying}: {_listed(better, pairs)}."]
    if not better:
        return [f"Its captions are worse than {copying}: {_listed(worse, pairs)}. Plain look-up wins here."]
    return [
        f"Its captions beat {copying} in {_listed(better, pairs)}; copying is better in {_listed(worse, pairs)}."
    ]


def _listed(keys: Sequence[str], pairs: Mapping[str, tuple[float, float]]) -> str:
    def one(key: str) -> str:
        metric, (own, other) = METRICS[key], pairs[key]
        return f"{metric.name} {metric.show(own)} against {metric.show(other)}"

    return ", ".join(one(key) for key in keys)
