"""Captions and classes by generation, for the data sets whose layouts `bindllm.evaluation.layouts` reads, and others.

Captions: COCO (Karpathy's test split), Flickr30k, NoCaps, Clotho, AudioCaps, and PointLLM's descriptions of Objaverse.
Classes: ModelNet40 and ESC-50.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from bindllm.atomic import read_json
from bindllm.errors import InputError, needs_extra
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, Item, Score
from bindllm.evaluation.benchmarks.metrics import ACCURACY, CAPTIONS, Line
from bindllm.evaluation.benchmarks.vqa import read_questions
from bindllm.evaluation.captions import caption_words
from bindllm.evaluation.layouts import Dataset, read_layout
from bindllm.evaluation.layouts.dataset import Files, read_entries, require
from bindllm.evaluation.ngrams import Cider, Words, bleu_sums, rouge_l

TOKENIZERS = {
    "python": "words by Unicode NFKC, lower case, without punctuation; published scores use the PTB tokenizer and "
    "differ a little (--tokenizer ptb). METEOR and SPICE are not measured",
    "ptb": "words by the PTB tokenizer of published scores. SPICE is not measured",
}
"""Tokenizers of captions, and the remark that results have."""

_PTB = "pycocoevalcap.tokenizer.ptbtokenizer"
_POINT_LLM = "PointLLM_brief_description_val_200_GT.json"


def score_captions(items: Sequence[Item]) -> Score:
    """Return the scorer of captions; the weights of words in CIDEr-D are those of the references of all items."""
    words = {item.id: [caption_words(text) for text in item.references] for item in items}
    cider = Cider(list(words.values()))

    def score(item: Item, parsed: Any) -> Mapping[str, float]:
        return _scores(cider, caption_words(parsed or ""), words[item.id])

    return score


def _scores(cider: Cider, candidate: Words, references: Sequence[Words]) -> dict[str, float]:
    own = cider.score(candidate, references)
    return {
        "score": own,
        "cider": own,
        "rouge_l": rouge_l(candidate, references),
        **bleu_sums(candidate, references),
    }


def check_java() -> None:
    """Raise if captions cannot be scored by Java.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
        InputError: Java is not.
    """
    with needs_extra(
        "pycocoevalcap", extra="captions", purpose="score captions as published (tokenizer ptb)"
    ):
        import_module(_PTB)
    if shutil.which("java") is None:
        raise InputError(
            "the PTB tokenizer needs Java, and the command java does not exist; install a JRE, or use the tokenizer "
            "python"
        )


def score_as_published(variants: Iterable[Sequence[Line]], items: Sequence[Item]) -> None:
    """Score captions again, in place: by the words of the PTB tokenizer, and with the statistics of METEOR.

    Raises:
        InputError: Java fails.
    """
    lines = [line for part in variants for line in part]
    references = ptb_words([text for item in items for text in item.references])
    own = iter(references)
    words = {item.id: [next(own) for _ in item.references] for item in items}
    candidates = ptb_words([line["parsed"] or "" for line in lines])
    pairs = [(said, words[line["id"]]) for line, said in zip(lines, candidates, strict=True)]
    cider = Cider([*words.values()])
    for line, pair, stats in zip(lines, pairs, meteor_stats(pairs), strict=True):
        score = _scores(cider, *pair)
        line |= {"score": score.pop("score"), "stats": score | stats}


def ptb_words(texts: Sequence[str]) -> list[list[str]]:
    """Return the words of texts as pycocoevalcap splits them."""
    tool = import_module(_PTB)
    options = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    found = _java(
        tool,
        "-cp",
        tool.STANFORD_CORENLP_3_4_1_JAR,
        *options,
        lines=[" ".join(text.split()) for text in texts],
    )
    # By spaces only: a token may hold white space of another kind.
    return [[word for word in line.split(" ") if word and word not in tool.PUNCTUATIONS] for line in found]


def meteor_stats(pairs: Iterable[tuple[Words, Sequence[Words]]]) -> list[dict[str, float]]:
    """Return the sums of METEOR for the words of captions and of their references, see `metrics.meteor`."""
    tool = import_module("pycocoevalcap.meteor.meteor")
    asked = [
        " ||| ".join(["SCORE", *(" ".join(words) for words in (*references, candidate))])
        for candidate, references in pairs
    ]
    options = ("-Xmx2G", "-jar", tool.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
    found = []
    for line in _java(tool, *options, lines=asked):
        values = [float(value) for value in line.split()]
        # As the program adds them up: equal texts have no chunk, else a single one.
        if values[20] == 1 and values[21:] == values[:2]:
            values[20] = 0.0
        found.append({f"meteor{n}": value for n, value in enumerate(values)})
    return found


def _java(tool: ModuleType, *options: str, lines: Sequence[str]) -> list[str]:
    """Return a line of a Java program for each line of its input."""
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", *options],
        cwd=Path(str(tool.__file__)).parent,
        input="\n".join(lines).encode(errors="replace"),
        capture_output=True,
    )
    found = done.stdout.decode(errors="replace").removesuffix("\n").split("\n") if lines else []
    if done.returncode or len(found) != len(lines):
        reason = done.stderr.decode(errors="replace").strip()[-300:]
        raise InputError(f"Java returned {len(found):,} lines for {len(lines):,} captions: {reason}")
    return found


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
