"""Captions and classes by generation, for the data sets whose layouts `bindllm.evaluation.layouts` reads, and others.

Captions: COCO (Karpathy's test split), Flickr30k, NoCaps, Clotho, AudioCaps, and PointLLM's descriptions of Objaverse.
Classes: ModelNet40 and ESC-50.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch

from bindllm.atomic import read_json
from bindllm.data.collate import Lookup
from bindllm.data.formats.columns import json_list
from bindllm.errors import InputError, needs_extra
from bindllm.evaluation.benchmarks import parsers
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, Item, Score
from bindllm.evaluation.benchmarks.metrics import ACCURACY, CAPTIONS, Line
from bindllm.evaluation.benchmarks.vqa import MEDIA_COLUMNS, read_questions
from bindllm.evaluation.captions import caption_words
from bindllm.evaluation.layouts import Dataset, read_layout
from bindllm.evaluation.layouts.dataset import NO_FILE, Files, read_entries, require
from bindllm.evaluation.ngrams import Cider, Words, bleu_sums, ciders, rouge_l
from bindllm.media import Media

_PTB = "pycocoevalcap.tokenizer.ptbtokenizer"
_CORENLP = "Stanford CoreNLP 3.6.0"
_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_POINT_LLM = "PointLLM_brief_description_val_200_GT.json"
_CHUNK = 1024
"""Media compared with all others at a time."""


def score_captions(items: Sequence[Item]) -> Score:
    """Return the scorer of captions; the weights of words in CIDEr-D are those of the references of a language."""
    words = {item.id: [caption_words(text) for text in item.references] for item in items}
    weights = ciders(list(words.values()), [item.row.language for item in items])

    def score(item: Item, parsed: Any) -> Mapping[str, float]:
        return _scores(weights[item.row.language], caption_words(parsed or ""), words[item.id])

    return score


def _scores(cider: Cider, candidate: Words, references: Sequence[Words]) -> dict[str, float]:
    own = cider.score(candidate, references)
    return {
        "score": own,
        "cider": own,
        "exact_match": float(bool(candidate) and candidate in references),
        "rouge_l": rouge_l(candidate, references),
        **bleu_sums(candidate, references),
    }


def nearest_captions(items: Sequence[Item], lookup: Lookup) -> list[str]:
    """Return the first caption of the nearest other media in the language of each item, which needs no training.

    It is empty for an item without other media in its language.
    """
    found: dict[int, str] = {}
    for language in dict.fromkeys(item.row.language for item in items):
        own = [n for n, item in enumerate(items) if item.row.language == language]
        groups: list[tuple[Media, ...]] = [items[n].media for n in own]
        vectors = lookup(groups)  # [N, E], unit norm
        for start in range(0, len(own), _CHUNK):
            # Rounded, so that equal media stay equal in whatever order the products are summed.
            near = (vectors[start : start + _CHUNK] @ vectors.T).round(decimals=6)
            # Media with the same embedding are the item itself, or a copy of it.
            near[near >= 1] = -torch.inf
            best, positions = near.max(dim=1)
            texts = [items[own[n]].references[0] for n in positions.tolist()]
            # Without other media, the caption of this one would be copied.
            known = (best > -torch.inf).tolist()
            texts = [text if is_known else "" for text, is_known in zip(texts, known, strict=True)]
            found.update(zip(own[start:], texts, strict=False))
    return [found[n] for n in range(len(items))]


def caption_note(tokenizer: str, spice: str | None) -> str:
    """Return what the reader of the scores must know about a tokenizer of captions, and about SPICE."""
    if tokenizer == "python":
        return (
            "words by Unicode NFKC, lower case, without punctuation, single characters in scripts without spaces; "
            "published scores use the PTB tokenizer and differ a little (--tokenizer ptb). METEOR and SPICE are not "
            "measured"
        )
    told = f"SPICE by {_CORENLP}" if spice else "SPICE is not measured (--spice)"
    return f"words by the PTB tokenizer of published scores. {told}"


def check_java(spice: str | None = None) -> None:
    """Raise if captions cannot be scored by Java.

    Args:
        spice: folder with the jars of the parser of SPICE; None: without SPICE.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
        InputError: Java is not, or SPICE fails with a first caption.
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
    if spice:
        if missing := [name for name in _JARS if not Path(spice, name).is_file()]:
            raise InputError(f"{spice} has no {' and no '.join(missing)}; give the folder of {_CORENLP}")
        # Now, not after hours of answers.
        spice_scores([(["a", "dog"], [["a", "dog"]])], Path(spice))


def check_english(items: Sequence[Item]) -> None:
    """Raise if captions cannot be scored as published, because their rows name another language than English.

    Raises:
        InputError: names the languages.
    """
    others = {item.row.language for item in items if item.row.language.partition("-")[0] not in ("", "en")}
    if others:
        raise InputError(
            f"tokenizer=ptb and METEOR are for English, and there are captions in {', '.join(sorted(others))}; use the "
            "tokenizer python"
        )


def score_as_published(
    variants: Iterable[Sequence[Line]], items: Sequence[Item], spice: str | None = None
) -> None:
    """Score captions again, in place: by the words of the PTB tokenizer, with the statistics of METEOR, and by SPICE.

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
    added = meteor_stats(pairs)
    if spice:
        for stats, value in zip(added, spice_scores(pairs, Path(spice)), strict=True):
            stats["spice"] = value
    for line, pair, stats in zip(lines, pairs, added, strict=True):
        score = _scores(cider, *pair)
        line |= {"score": score.pop("score"), "stats": score | stats}


def score_again(lines: Sequence[Line], tokenizer: str) -> list[Line]:
    """Return lines with the CIDEr-D that they have in a set of their own.

    Args:
        tokenizer: its tokenizer, ``python`` or ``ptb``.

    Raises:
        InputError: Java fails.
    """
    if tokenizer == "ptb":
        check_java()
    split = ptb_words if tokenizer == "ptb" else lambda texts: list(map(caption_words, texts))
    own = iter(split([text for line in lines for text in line["target"]]))
    references = [[next(own) for _ in line["target"]] for line in lines]
    languages = [line["groups"].get("language", "") for line in lines]
    weights = ciders(references, languages)
    scores = [
        weights[language].score(said, words)
        for language, said, words in zip(
            languages, split([line["parsed"] or "" for line in lines]), references, strict=True
        )
    ]
    return [
        {**line, "score": score, "stats": {**line["stats"], "cider": score}}
        for line, score in zip(lines, scores, strict=True)
    ]


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


def spice_scores(pairs: Sequence[tuple[Words, Sequence[Words]]], folder: Path) -> list[float]:
    """Return SPICE (https://arxiv.org/abs/1607.08822) of each caption, 0..1; 0 of one without words.

    Args:
        folder: with the jars of the parser.

    Raises:
        InputError: Java fails.
    """
    tool = import_module("pycocoevalcap.spice.spice")
    home, scores = Path(str(tool.__file__)).parent, [0.0] * len(pairs)
    asked = [
        {"image_id": n, "test": " ".join(said), "refs": [" ".join(words) for words in references]}
        for n, (said, references) in enumerate(pairs)
        if said
    ]
    classes = os.pathsep.join(map(str, (home / tool.SPICE_JAR, home / "lib" / "*", folder.absolute() / "*")))
    with TemporaryDirectory() as name:
        given, found = Path(name, "captions.json"), Path(name, "scores.json")
        given.write_text(json.dumps(asked))
        # Without the cache of parses, whose library fails on newer versions of Java.
        options = ("-cp", classes, "edu.anu.spice.SpiceScorer", str(given), "-out", str(found), "-silent")
        _java(tool, "-Xmx8G", *options)
        for one in read_json(found, InputError, "see the requirements of SPICE in docs/benchmarks.md"):
            scores[one["image_id"]] = float(one["scores"]["All"]["f"])
    return scores


def _java(tool: ModuleType, *options: str, lines: Sequence[str] = ()) -> list[str]:
    """Return a line of a Java program for each line of its input."""
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", *options],
        cwd=Path(str(tool.__file__)).parent,
        input="\n".join(lines).encode(errors="replace"),
        capture_output=True,
    )
    found = done.stdout.decode(errors="replace").removesuffix("\n").split("\n") if lines else []
    if done.returncode or len(found) != len(lines):
        told = done.stderr.decode(errors="replace").splitlines()
        reason = " ".join(line for line in told if not line.startswith("\tat "))[-300:]
        raise InputError(
            f"Java ended with code {done.returncode} and {len(found):,} lines for {len(lines):,}: {reason}"
        )
    return found


def read_captions(folder: Path, *, layout: str) -> Iterator[Entry]:
    """Read the captions of a layout."""
    dataset = read_layout(layout, folder)
    for item in dataset.items:
        captions = [str(target.source) for target in item.targets]
        yield Entry(
            _name(item.media.name, folder), {item.media.modality: item.media.source, "caption": captions}
        )
    # Files that the layout lists without a caption.
    lost = dataset.num_listed - len(dataset.items) - dataset.skipped.counts.get(NO_FILE, 0)
    yield from (Entry(f"no caption {n}", {}, problem="no caption") for n in range(lost))
    yield from _skipped(dataset)


def read_caption_table(folder: Path) -> Iterator[Entry]:
    """Read a table of captions, as `read_questions` does; rows about the same media are one item with all captions.

    Rows of another type, subset or language stay apart.
    """
    joined: dict[Any, Entry] = {}
    for entry in read_questions(folder, names=("test", "captions")):
        caption = json_list(entry.record.get("caption"), (str,))
        captions = caption if isinstance(caption, list) else [caption]
        if entry.problem or not (
            captions and all(isinstance(text, str) and text.strip() for text in captions)
        ):
            # Counted by itself.
            yield entry
            continue
        # A hash, as an image inside the table may be large.
        media = hashlib.sha256(
            repr([entry.record.get(name) for name in MEDIA_COLUMNS]).encode("utf-8", "surrogatepass")
        ).digest()
        first = replace(entry, record={**entry.record, "caption": []})
        joined.setdefault((media, *entry.groups.items()), first).record["caption"].extend(captions)
    yield from joined.values()


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
    _captions("captions", "a table of captions", read_caption_table),
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
