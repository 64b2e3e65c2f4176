"""`python -m benchmarks.records checkpoints/context ...`: does a model say the words of a foreign datastore?

Photographs of tuxpaint-stamps with ImageNet's names as datastore, and unseen drawings whose made-up names are in a
datastore of two images each. Needs `bindllm fetch stamps links imagenet-names`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from benchmarks.languages import read
from bindllm import BindLLM, Media
from bindllm.data.answers import answer_words
from bindllm.embeddings.datastore import Datastore, Record

NAMES, STAMPS, LINKS = Path("datastores/imagenet-names"), Path("data/stamps"), Path("data/links")
QUESTION, TOKENS, DRAWINGS = "Describe this image.", 12, 40


def is_named(text: str, name: str) -> bool:
    """Whether a text ends with a name: a tailed frog is a frog."""
    words = answer_words(name)
    return answer_words(text)[-len(words) :] == words


def photographs(store: Datastore) -> list[tuple[Path, str]]:
    """Return files and names of the photographs whose name is a text of the datastore, or the last words of one."""
    found = []
    for row in read(STAMPS / "captions.jsonl"):
        name = row["caption"].strip().rstrip(".")
        file = STAMPS / row["image"]
        if file.suffix == ".png" and any(is_named(record.text, name) for record in store.records):
            found.append((file, name))
    return found


def made_up_name(rng: Random, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a word of three to five tokens."""
    while True:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        name = "".join(syllables) + rng.choice("bdgklmnprstz")
        if 3 <= len(tokenizer(name, add_special_tokens=False).input_ids) <= 5:
            return name


def drawings(model: BindLLM) -> tuple[Datastore, list[tuple[Path, str]]]:
    """Return a datastore of two views of unseen drawings with made-up names, and a third view of each."""
    views: dict[str, list[Path]] = defaultdict(list)
    for row in read(LINKS / "labels.jsonl"):
        if row["split"] == "test":
            views[row["label"]].append(LINKS / row["image"])
    rng = Random(0)
    chosen = rng.sample(sorted(views), DRAWINGS)
    names = {label: made_up_name(rng, model.tokenizer) for label in chosen}
    shown = [(file, names[label]) for label in chosen for file in views[label][:2]]
    embeddings = model.encode([Media.image(file) for file, _ in shown])
    records = [Record((), str(file), "image", (name,)) for file, name in shown]
    store = Datastore(embeddings, records, [model.encoders[0].fingerprint()])
    return store, [(views[label][2], names[label]) for label in chosen]


def cells(model: BindLLM, store: Datastore, questions: Sequence[tuple[Path, str]]) -> list[str]:
    """Return the shares of right names: of the nearest record, with the datastore, without; and of exact copies."""
    media = [[Media.image(file)] for file, _ in questions]
    nearest = [
        store.records[n].text for n in store.search(model.encode([m for (m,) in media]), 1).ids[:, 0].tolist()
    ]
    said, alone = (
        model.generate([QUESTION] * len(media), media=media, max_new_tokens=TOKENS, datastore=choice)
        for choice in (store, False)
    )
    shares = [
        sum(is_named(text, name) for text, (_, name) in zip(texts, questions, strict=True))
        for texts in (nearest, said, alone)
    ]
    shares.append(sum(answer_words(a) == answer_words(b) for a, b in zip(said, nearest, strict=True)))
    return [f"{count / len(questions):.1%}" for count in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="+", type=Path)
    table = Table("checkpoint", "of", "count", "nearest record", "model", "without records", "copied")
    names = Datastore.open(NAMES)
    for checkpoint in parser.parse_args().checkpoint:
        model = BindLLM.from_pretrained(checkpoint)
        for kind, (store, questions) in {
            "photographs": (names, photographs(names)),
            "made-up names": drawings(model),
        }.items():
            table.add_row(checkpoint.name, kind, str(len(questions)), *cells(model, store, questions))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
