"""Tiny towers, and a recipe that aligns them with the colors of images in a second."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from bindllm.cli import main
from bindllm.errors import MediaError
from bindllm.media import Media
from tiny import color_images
from tiny_run import short_runs, write_recipe

LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"


class LetterEncoder:
    """A frozen encoder of texts: how often each letter occurs, through a fixed random projection."""

    modalities = ("text",)
    embedding_size = 12

    def __init__(self, seed: int = 3) -> None:
        self.config = {"seed": seed}
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(len(LETTERS), self.embedding_size, generator=generator)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.projection.numpy().tobytes()).hexdigest()

    def to(self, device) -> LetterEncoder:
        return self

    def prepare(self, media: Media) -> Tensor:
        return torch.tensor([str(media.source).lower().count(letter) for letter in LETTERS]).float()

    def embed(self, modality: str, inputs: list[Tensor]) -> Tensor:
        return normalize(torch.stack(list(inputs)) @ self.projection + 1e-3, dim=-1)


class FrozenModule(nn.Module):
    """A frozen encoder that is a torch module with weights: training must leave them alone."""

    modalities = ("text",)
    embedding_size = 12
    config = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(len(LETTERS), self.embedding_size, generator=generator))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.weight.detach().numpy().tobytes()).hexdigest()

    prepare = LetterEncoder.prepare

    @torch.no_grad()
    def embed(self, modality: str, inputs: list[Tensor]) -> Tensor:
        return normalize(torch.stack(list(inputs)) @ self.weight + 1e-3, dim=-1)


class BeatTower(nn.Module):
    """A trainable tower of a sensor of its own: signals [N] of any length in .npy files."""

    modality = "radar"
    revision = "beats 1"

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.config = {"width": width}
        self.embedding_size = width
        self.layer = nn.Linear(4, width)
        self.dropout = nn.Dropout(0.2)

    def prepare(self, media: Media) -> Tensor:
        try:
            signal = media.source if isinstance(media.source, np.ndarray) else np.load(media.source)
        except (OSError, ValueError, EOFError) as error:
            raise MediaError(f"{media.name}: no signal ({error})") from error
        return torch.from_numpy(np.asarray(signal, np.float32)).flatten()

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + 0.05 * torch.randn(inputs.shape, generator=generator)

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        return torch.cat([first, second])

    def forward(self, inputs: list[Tensor]) -> Tensor:
        facts = [torch.stack([x.mean(), x.std(), x.min(), x.max()]) for x in inputs]
        return torch.tanh(self.dropout(self.layer(torch.stack(facts))))


def patchwork_table(folder: Path) -> Path:
    """Write 24 images of random patches, each unlike the others, with a caption of its own; return the folder."""
    rng = np.random.default_rng(2)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(24):
        patches = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(patches.repeat(6, 0).repeat(6, 1)).save(folder / f"images/{number}.png")
        words = " ".join("".join(rng.choice(list(LETTERS[:26]), 4)) for _ in range(3))
        split = {0: "test", 1: "validation"}.get(number % 6, "train")
        rows.append({"image": f"images/{number}.png", "caption": words, "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rewrite(folder: Path, change) -> list[dict]:
    """Change the rows of a table in place, and return them."""
    table = folder / "captions.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [row for row in (change(number, row) for number, row in enumerate(rows)) if row is not None]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def radar_table(folder: Path, *, per_color: int = 8) -> Path:
    """Write images of four colors, each with a signal whose level and spread tell the color."""
    color_images(folder, per_color=per_color)
    rng, order = np.random.default_rng(1), []

    def add(number: int, row: dict) -> dict:
        color = row["caption"].split()[0]
        order.extend([color] * (color not in order))
        place = order.index(color)
        np.save(folder / f"{number}.npy", rng.normal(place - 1.5, 0.1 + 0.1 * place, 20 + number))
        return {**row, "radar": f"{number}.npy"}

    rewrite(folder, add)
    return folder


def align_recipe(images: Path, **sections: dict) -> dict:
    """A recipe of a few epochs; the sections given replace keys of the sections here."""
    recipe = {
        "seed_everything": 0,
        "output": "checkpoints/taught",
        "model": {
            "tower": {"class_path": "align_parts.LetterEncoder"},
            "target": {"class_path": "tiny.ColorEncoder"},
            "head": {"depth": 2, "width": 32, "dropout": 0.0},
            "optim": {"lr": 0.01},
        },
        "data": {"sources": [{"path": str(images)}], "store": "data/store", "batch_size": 8},
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe[name], **section} if isinstance(section, dict) else section
    return copy.deepcopy(recipe)


def run_align(recipe: dict, *options: str) -> int:
    """Run the command with a recipe in the current folder; return the exit code."""
    with short_runs():
        return main(["align", "--config", str(write_recipe(recipe)), *options])
