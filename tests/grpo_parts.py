"""Questions about colored images for GRPO, a reward that an untrained decoder earns, and models that answer."""

from __future__ import annotations

from dataclasses import replace

import torch

from bindllm.data.batches import BatchLoader
from bindllm.data.collate import collate
from bindllm.data.rows import tokenize
from bindllm.objectives import Reward
from preference_parts import COLORS, TOKENIZER, Preferences, build, conversation, lookup
from tiny_run import make_trainer

QUESTIONS = ("Colour?", "What colour is it?")


class LetterClass(Reward):
    """1 where the first letter is of the class of letters that belongs to the true color: a quarter of all letters."""

    def __call__(self, answers, samples):
        classes = [COLORS.index(sample.references[0]) for sample in samples]
        right = [bool(text) and ord(text[0]) % 4 == n for text, n in zip(answers, classes, strict=True)]
        return torch.tensor(right, dtype=torch.float32)


class Questions(Preferences):
    """A question about an image of each color, some with longer prompts."""

    tokenizer = TOKENIZER

    def __init__(self, **options):
        asked = [conversation(color, color, question) for question in QUESTIONS for color in COLORS]
        samples = [tokenize(each, TOKENIZER, 64) for each in asked]
        facts = [{"number": n, "references": (COLORS[n % 4],), "name": f"row {n}"} for n in range(len(asked))]
        samples = [replace(sample, **known) for sample, known in zip(samples, facts, strict=True)]
        super().__init__(samples, **{"batch_size": 4, **options})

    def train_dataloader(self):
        loader = super().train_dataloader()
        return BatchLoader(
            [n for n in range(len(loader)) for _ in range(self.steps_per_batch)], [*loader].__getitem__
        )


def started(decoder, objective, data=None, **options):
    """A module as a run starts, whose open gates let images matter, and the first batch of prompts."""
    module, data = build(decoder, objective, **options), data or Questions()
    objective.check(data, "validate")
    module.configure_model()
    with torch.no_grad():
        module.model.injection.gates.fill_(0.7)
    objective.on_start(module.model)
    rows = [data.samples("train")[n] for n in (0, 5, 2)]
    batch = objective.add_reference(collate(rows, data.lookup, pad_id=0), "train")
    return module.model.eval(), batch


def fitted(decoder, folder, objective, **options):
    torch.manual_seed(7)
    data = Questions(lookup=options.pop("lookup", lookup))
    module = build(decoder, objective, checkpoint_activations=options.pop("checkpoint_activations", False))
    module.configure_model()
    with torch.no_grad():
        module.model.injection.gates.fill_(0.7)
    trainer = make_trainer(folder, **{"max_epochs": 20, "limit_val_batches": 0, **options})
    trainer.fit(module, data)
    return module, trainer
