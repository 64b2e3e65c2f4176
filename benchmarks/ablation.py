"""`python -m benchmarks.ablation`: does the visual cache help text and audio queries of models trained on images only?

Trains OpenMoji and the stamps with three seeds. Each model then describes held-out images that it gets as their
caption (`recipes/align-text.yaml`) or their sound (`recipes/align-audio.yaml`). The variants are no cache, caches of
several sizes and settings, the image itself (the ceiling), the mean of all images, and a shuffled cache (the floor).
Settings are compared on the validation split. The defaults are measured on the test split. Rows of
benchmarks/results/ablation.json are not measured again. Takes two hours on 2 cores, most of it training. Then it
prints the tables of docs/results.md and draws docs/ablation.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation_tables import draw, tables
from benchmarks.measure import RESULTS, run_bindllm
from bindllm.atomic import write_json
from bindllm.cache.blend import CacheSettings
from bindllm.cache.index import VectorIndex
from bindllm.cache.visual_cache import VisualCache
from bindllm.conversation import Conversation
from bindllm.data.collate import MediaGroup
from bindllm.data.datamodule import BindData
from bindllm.data.rows import Sample
from bindllm.data.sources import SourceConfig
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.embeddings.store import EmbeddingStore
from bindllm.encoders import Aligned, EfficientNetLite, Encoder
from bindllm.evaluation.captions import captions_task
from bindllm.evaluation.task import MODEL, evaluate
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM

FOLDER, STORE = Path("checkpoints/ablation"), "data/store"
SEEDS = (0, 1, 2)
SWEPT_QUESTIONS, BATCH = 96, 160
"""Maximum number of validation questions for comparing settings, spread evenly. The test split is used in full."""


@dataclass(frozen=True)
class Case:
    """A recipe, the folder of the images that the questions are about, and the modality of the questions."""

    recipe: str
    images: str
    modality: str

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the questions. Few held-out images have a sound, so validation and test are joined for them."""
        return ("validation", "test") if self.modality == "text" else ("held-out",)


CASES = (
    Case("openmoji", "data/openmoji", "text"),
    Case("stamps", "data/stamps", "text"),
    Case("openmoji", "data/stamps", "audio"),
    Case("stamps", "data/stamps", "audio"),
)


@dataclass(frozen=True)
class Setting:
    """How a question's embedding is changed; ``size`` 0 means a cache of all training images."""

    kind: str = "cache"
    size: int = 0
    top_k: int = 10
    temperature: float = 20.0
    weight: float = 0.5
    formula: str = "released"

    @property
    def blend(self) -> dict[str, float | str]:
        """The arguments of `VisualCache.blend`."""
        return {name: asdict(self)[name] for name in ("top_k", "temperature", "weight", "formula")}


RELEASED = Setting()
BOUNDS = (Setting("none"), Setting("shuffled"), Setting("mean"), Setting("image"))
SWEEPS: dict[str, tuple[float, ...]] = {
    "size": (64, 256, 0),
    "top_k": (1, 10, 30),
    "temperature": (0.0, 20.0, 100.0),
    "weight": (0.25, 0.5, 1.0),
}
"""One setting is changed at a time; the others keep the released values."""


def sweep() -> list[Setting]:
    """Return every setting without duplicates."""
    changed = [replace(RELEASED, **{name: value}) for name, values in SWEEPS.items() for value in values]
    return list(dict.fromkeys([*BOUNDS, *changed, replace(RELEASED, formula="paper")]))


def chosen() -> Setting:
    """Return the defaults of `CacheSettings`."""
    defaults = asdict(CacheSettings())
    return Setting(**{name: defaults[name] for name in RELEASED.blend})


@dataclass(frozen=True)
class Questions:
    """Held-out samples, the query embedding of each, [N, E], and the embedding of its image, [N, E]."""

    samples: list[Sample]
    asked: Tensor
    images: Tensor


class Bench:
    """The questions of one case and the caches of its training images, the same for all seeds."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.encoder = EfficientNetLite("checkpoints/efficientnet-lite0")
        self.model = BindLLM.from_pretrained(train(case.recipe, SEEDS[0]), cache=False)
        self.data = self._read(case.images)
        self._caches: dict[int, VisualCache] = {}

    def questions(self, split: str) -> Questions:
        """Return the questions of a split."""
        splits = ("validation", "test") if split == "held-out" else (split,)
        pairs = [pair for name in splits for pair in self._pairs(name)]
        if split == "validation":
            pairs = pairs[:: -(-len(pairs) // SWEPT_QUESTIONS)]
        samples, media = [sample for sample, _ in pairs], [item for _, item in pairs]
        aligned = Aligned(f"checkpoints/align-{self.case.modality}")
        return Questions(samples, embed(aligned, media), self.data.lookup([s.media[0] for s in samples]))

    def show(self, questions: Questions, setting: Setting) -> Tensor:
        """Return the embedding that the model gets for each question, [N, E]."""
        match setting.kind:
            case "image":
                return questions.images
            case "none":
                return questions.asked
            case "shuffled":
                # Each question gets the neighbors of another question, drawn at random.
                order = torch.randperm(len(questions.asked), generator=torch.Generator().manual_seed(0))
                others = torch.empty_like(questions.asked)
                others[order] = questions.asked[order.roll(1)]
                found = self.cache(setting.size).blend(others, **{**setting.blend, "weight": 1.0})
            case "mean":
                # The same vector for every question separates moving towards images in general from retrieval.
                index = self.cache(setting.size).index
                mean = torch.from_numpy(index.vectors(np.arange(len(index)))).mean(0)
                found = torch.nn.functional.normalize(mean, dim=0).expand_as(questions.asked)
            case _:
                return self.cache(setting.size).blend(questions.asked, **setting.blend)
        mixed = (1 - setting.weight) * questions.asked + setting.weight * found
        return torch.nn.functional.normalize(mixed, dim=1)

    def cache(self, size: int) -> VisualCache:
        """Return a cache of this many of the model's training images, 0 for all."""
        if size not in self._caches:
            media = dict.fromkeys(sample.media[0][0] for sample in self._trained_on.samples("train"))
            store = EmbeddingStore.for_encoder(STORE, self.encoder)
            keys = sorted({store.key_of(item) for item in media})
            folder = FOLDER / f"cache-{self.case.recipe}-{size or 'all'}"
            # Keys are content hashes, so the first ones are a random sample.
            index = VectorIndex.build(folder, store, keys=keys[: size or None], factory="Flat")
            self._caches[size] = VisualCache(index)
        return self._caches[size]

    @cached_property
    def _trained_on(self) -> BindData:
        return self._read({"openmoji": "data/openmoji", "stamps": "data/stamps"}[self.case.recipe])

    def _read(self, path: str) -> BindData:
        return BindData([SourceConfig(path)], STORE, tokenizer=self.model.tokenizer, encoders=[self.encoder])

    def _pairs(self, split: str) -> Iterator[tuple[Sample, Media]]:
        """Yield a sample of each image with its query: its first caption, or each of its sounds."""
        table = Path(self.case.images) / "captions.jsonl"
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        by_image = {str(table.parent / row["image"]): row for row in rows}
        first = {str(sample.media[0][0].source): sample for sample in reversed(self.data.samples(split))}
        for image, sample in sorted(first.items()):
            row = by_image[image]
            if self.case.modality == "text":
                yield sample, Media.text(sample.references[0])
                continue
            for column in ("sound", "spoken"):
                if column in row:
                    yield sample, Media.audio(table.parent / row[column])


def embed(encoder: Encoder, media: Sequence[Media]) -> Tensor:
    """Return the embeddings of media, [N, E], from the embedding store; missing ones are computed."""
    store = EmbeddingStore.for_encoder(STORE, encoder)
    if failed := precompute_embeddings(store, encoder, media).failed:
        raise SystemExit(f"{len(failed)} media cannot be embedded, the first: {failed[0][1]}")
    return store.get([store.key_of(item) for item in media])


def train(recipe: str, seed: int) -> Path:
    """Train a recipe with a seed unless its folder is complete, and return the folder."""
    output = FOLDER / f"{recipe}-{seed}"
    if not (output / "metrics.json").is_file():
        run_bindllm(
            *("fit", "--config", f"recipes/{recipe}.yaml", "--output", str(output)),
            *("--seed_everything", str(seed), "--trainer.logger", "false"),
        )
    return output


def about(sample: Sample, media: Media) -> Sample:
    """Return the sample with other media in place of its image. Media add no tokens."""
    messages = [
        replace(turn, content=tuple(media if isinstance(part, Media) else part for part in turn.content))
        for turn in sample.conversation.messages
    ]
    return replace(sample, conversation=Conversation(messages))


def measure(bench: Bench, model: BindLLM, questions: Questions, setting: Setting) -> dict[str, float | None]:
    """Ask a model every question and return its metrics."""
    shown = bench.show(questions, setting)
    # Several questions may share an image or a text, so each needs a unique name.
    names = [Media("question", str(n)) for n in range(len(shown))]
    samples = [about(sample, name) for sample, name in zip(questions.samples, names, strict=True)]

    def lookup(groups: Sequence[MediaGroup]) -> Tensor:
        return shown[[names.index(group[0]) for group in groups]]

    task = captions_task(samples, train_samples=[], lookup=lookup, tokenizer=model.tokenizer)
    result = evaluate(model, [task], lookup=lookup, variants=[MODEL], batch_size=BATCH)
    if result.problems:
        raise SystemExit("; ".join(f"{name}: {reason}" for name, reason in result.problems.items()))
    return {
        **result.metrics["captions"][MODEL],
        "cosine": (shown * questions.images).sum(1).mean().item(),
        "questions": len(samples),
    }


def main() -> None:
    """Measure the missing rows, case by case and seed by seed, then print the tables and draw the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for name in ("align-text", "align-audio"):
        if not (Path("checkpoints") / name / "metrics.json").is_file():
            run_bindllm("align", "--config", f"recipes/{name}.yaml")
    file = RESULTS / "ablation.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for case in CASES:
        bench = Bench(case)
        asked = {split: bench.questions(split) for split in case.splits}
        for seed in SEEDS:
            model = BindLLM.from_pretrained(train(case.recipe, seed), cache=False)
            for split, questions in asked.items():
                few = [*BOUNDS, RELEASED, chosen()] if split == "test" else [*sweep(), chosen()]
                for setting in dict.fromkeys(few):
                    key = {**asdict(case), "seed": seed, "split": split, **asdict(setting)}
                    if not any(key.items() <= row.items() for row in rows):
                        rows.append({**key, **measure(bench, model, questions, setting)})
                        write_json(file, rows)
                        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    print(tables(rows))
    draw(rows, Path("docs/ablation.png"))


if __name__ == "__main__":
    main()
