"""Captions and classes by generation, for the data sets whose layouts `bindllm.evaluation.layouts` reads, and others.

Captions: COCO (Karpathy's test split), Flickr30k, NoCaps, Clotho, AudioCaps, and PointLLM's descriptions of Objaverse.
Classes: ModelNet40 and ESC-50.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bindllm.atomic import read_json
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, Item, Score
from bindllm.evaluation.benchmarks.metrics import ACCURACY, CAPTIONS
from bindllm.evaluation.benchmarks.vqa import read_questions
from bindllm.evaluation.captions import caption_words
from bindllm.evaluation.layouts import Dataset, read_layout
from bindllm.evaluation.layouts.dataset import Files, read_entries, require
from bindllm.evaluation.ngrams import Cider, bleu_sums, rouge_l

_NOTE = (
    "words by Unicode NFKC, lower case, without punctuation; the PTB tokenizer of published scores needs Java, so "
    "scores differ a little. METEOR and SPICE are not measured"
)
_POINT_LLM = "PointLLM_brief_description_val_200_GT.json"


def score_captions(items: Sequence[Item]) -> Score:
    """Return the scorer of captions; the weights of words in CIDEr-D are those of the references of all items."""
    words = {item.id: [caption_words(text) for text in item.references] for item in items}
    cider = Cider(list(words.values()))

    def score(item: Item, parsed: Any) -> Mapping[str, float]:
        candidate, references = caption_words(parsed or ""), words[item.id]
        own = cider.score(candidate, references)
        return {
            "score": own,
            "cider": own,
            "rouge_l": rouge_l(candidate, references),
            **bleu_sums(candidate, references),
        }

    return score


def read_captions(folder: Path, *, layout: str) -> Iterator[Entry]:
    """Read the captions of a layout."""
    dataset = read_layout(layout, folder)
    for item in dataset.items:
        captions = [str(target.source) for target in item.targets]
        yield Entry(
            _name(item.media.name, folder), {item.media.modality: item.media.source, "caption": captions}
        )
    yield from _skipped(dataset)


def read_classes(folder: Path, *, layout: str, question: str) -> Iterator[Entry]:
    """Read the classes of a layout; the question is the same for all media."""
    dataset = read_layout(layout, folder)
    names = [names[0] for names in dataset.classes]
    for item in dataset.items:
        name = names[item.labels[0]]
        record = {item.media.modality: item.media.source, "question": question, "answer": name}
        yield Entry(_name(item.media.name, folder), record, {"class": name}, facts={"classes": names})
    yield from _skipped(dataset)


def _skipped(dataset: Dataset) -> Iterator[Entry]:
    """Yield an entry for each skipped row of a layout, so that it is counted."""
    for reason, count in dataset.skipped.counts.items():
        yield from (Entry(f"{reason} {n}", {}, problem=reason) for n in range(count))


def _name(path: str, folder: Path) -> str:
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path


def read_nocaps(folder: Path) -> Iterator[Entry]:
    """Read ``nocaps_val_4500_captions.json`` and the images of Open Images; groups are its three domains."""
    files = Files(folder, "image")
    path = require(
        folder,
        ("nocaps_val_4500_captions.json", "annotations/nocaps_val_4500_captions.json"),
        purpose="the captions",
    )
    images, annotations = read_entries(path, "images", "annotations")
    captions: dict[Any, list[str]] = {}
    for row in annotations:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    for row in images:
        image = files.find(str(row["file_name"]), "val", "images", "validation")
        record = {"image": image, "caption": captions.get(row["id"], [])}
        yield Entry(str(row["id"]), record, {"domain": str(row.get("domain", ""))})


def read_point_llm(folder: Path) -> Iterator[Entry]:
    """Read PointLLM's 200 brief descriptions and ``8192_npy/<object_id>_8192.npy``."""
    files = Files(folder, "")
    path = require(folder, (_POINT_LLM, f"anno_data/{_POINT_LLM}"), purpose="the descriptions")
    rows = read_json(path, InputError, "fetch the file again")
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects with object_id and conversations")
    for row in rows:
        cloud = files.find(f"{row['object_id']}_8192.npy", "8192_npy", "objaverse_data")
        captions = [turn["value"] for turn in row["conversations"] if turn.get("from") == "gpt"]
        yield Entry(str(row["object_id"]), {"point": cloud, "caption": captions})


def _captions(
    name: str, title: str, read: Any = None, modality: str = "image", prompt: str = ""
) -> Benchmark:
    return Benchmark(
        name,
        title,
        read or partial(read_captions, layout=name),
        {"first_line": parsers.first_line},
        CAPTIONS,
        score_captions,
        format="caption",
        modality=modality,
        prompt=prompt or f"Describe this {modality}.",
        max_new_tokens=40,
        notes=(_NOTE,),
    )


def _classes(name: str, title: str, modality: str, question: str) -> Benchmark:
    return Benchmark(
        name,
        title,
        partial(read_classes, layout=name, question=question),
        {"named_class": parsers.named_class},
        ACCURACY,
        modality=modality,
        notes=("an answer is right if the only class that it names is the right one",),
    )


BENCHMARKS = (
    _captions("coco", "COCO captions, Karpathy's test split (https://arxiv.org/abs/1412.2306)"),
    _captions("flickr30k", "Flickr30k, Karpathy's test split (https://arxiv.org/abs/1412.2306)"),
    _captions("nocaps", "NoCaps, validation (https://arxiv.org/abs/1812.08658)", read_nocaps),
    _captions("clotho", "Clotho, evaluation (https://arxiv.org/abs/1910.09387)", modality="audio"),
    _captions("audiocaps", "AudioCaps, test (https://aclanthology.org/N19-1011)", modality="audio"),
    _captions(
        "pointllm",
        "PointLLM, captions of Objaverse (https://arxiv.org/abs/2308.16911)",
        read_point_llm,
        "point",
        "Caption this 3D model.",
    ),
    _captions("captions", "a table of captions", partial(read_questions, names=("test", "captions"))),
    _classes(
        "modelnet40", "ModelNet40 by generation (https://arxiv.org/abs/2308.16911)", "point", "What is this?"
    ),
    _classes(
        "esc50",
        "ESC-50 by generation (https://doi.org/10.1145/2733373.2806390)",
        "audio",
        "What is this sound?",
    ),
)
