"""Preferences about colored images, and modules that learn them: instant data without files."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningDataModule

from bindllm.conversation import Conversation, Message
from bindllm.data.batches import BatchLoader, sorted_batches
from bindllm.data.collate import collate
from bindllm.data.rows import Sample, tokenize
from bindllm.media import Media
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.training.module import BindModule
from bindllm.training.optim import OptimConfig
from tiny import ColorEncoder, tiny_tokenizer

COLORS = ("red", "green", "blue", "white")
TOKENIZER = tiny_tokenizer()


def conversation(color: str, answer: str, question: str = "Colour?") -> Conversation:
    """A question about an image, or about none if the color is empty."""
    content = (Media.image(color), question) if color else (question,)
    return Conversation((Message("user", content), Message("assistant", answer)))


def row(number: int, color: str, answer: str, rejected: str | None = None, **fields) -> Sample:
    """One row; its media are named by their color, which `lookup` turns into an embedding."""
    sample = tokenize(conversation(color, answer), TOKENIZER, 64, last_only=True)
    if rejected is not None:
        fields["rejected"] = tokenize(conversation(color, rejected), TOKENIZER, 64, last_only=True)
    return replace(sample, name=f"row {number}", number=number, **fields)


def pairs() -> list[Sample]:
    """Of each image its own color is chosen, every other one rejected; lengths differ."""
    options = [(mine, other) for mine in COLORS for other in COLORS if mine != other]
    return [row(n, mine, mine, other) for n, (mine, other) in enumerate(options)]


def judged() -> list[Sample]:
    """The same as rows on their own: the right color is desirable, a wrong one is not."""
    options = [(mine, said) for mine in COLORS for said in COLORS]
    return [row(n, mine, said, desirable=mine == said) for n, (mine, said) in enumerate(options)]


def lookup(groups, *, turn: int = 0) -> torch.Tensor:
    """One unit vector per color; with ``turn`` every image is taken for one of another color."""
    found = torch.zeros(len(groups), 16)
    for n, group in enumerate(groups):
        found[n, (COLORS.index(group[0].source) + turn) % len(COLORS)] = 1
    return found


class Preferences(LightningDataModule):
    """What an objective asks of `BindData`: samples by split, embeddings, and batches."""

    seed, streamed = 0, False

    def __init__(self, samples: list[Sample], *, batch_size: int = 6, lookup=lookup):
        super().__init__()
        self.batch_size, self.lookup = batch_size, lookup
        self.sources = [SimpleNamespace(path="data/colours")]
        self.splits = {"train": samples, "validation": samples, "test": []}

    def samples(self, split):
        return self.splits[split]

    def train_dataloader(self):
        samples = self.splits["train"]
        rows = sorted_batches([len(s.input_ids) for s in samples], batch_size=self.batch_size)
        make = lambda numbers: collate([samples[n] for n in numbers], self.lookup, pad_id=0)  # noqa: E731
        return BatchLoader(rows, make)

    val_dataloader = train_dataloader


def build(decoder, objective, **changes) -> BindModule:
    """A module on a tiny decoder; the gates are open, so that images matter from the start."""
    options = {
        "encoders": [ColorEncoder()],
        "bind": BindConfig(depth=1),
        "inject": InjectConfig(),
        "optim": OptimConfig(lr=0.02, warmup=2),
        "objective": objective,
        **changes,
    }
    torch.manual_seed(0)
    return BindModule(DecoderConfig(str(decoder), dtype="float32"), **options)
