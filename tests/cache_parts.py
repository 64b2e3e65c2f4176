"""A tiny checkpoint whose encoder serves images and texts, a store of images for it, and further encoders."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.parallel import Processes
from store_parts import write_images
from tiny import ColorEncoder, save_tiny_decoder, tiny_model

ALLOW = ["cache_parts.Multimodal", "cache_parts.Words", "tiny.ColorEncoder"]
TEXT = Media.text("a dog")


def hashed(media: Media, count: int = 48) -> torch.Tensor:
    """Numbers from -1 to 1 that follow from the content: each media its own direction."""
    numbers = np.frombuffer(bytes.fromhex(media.content_hash()), np.uint8)
    return torch.from_numpy(np.resize(numbers, count).astype(np.float32) / 127.5 - 1)


class Multimodal(ColorEncoder):
    """Serves texts and audio in addition to images."""

    modalities = ("image", "text", "audio")
    space = "colours"

    def prepare(self, media: Media) -> torch.Tensor:
        return super().prepare(media) if media.modality == "image" else hashed(media)


class Words(ColorEncoder):
    """Serves texts only, elsewhere in the space than `Multimodal`."""

    modalities = ("text",)

    def __init__(self, embedding_size: int = 16, space: str = "colours") -> None:
        super().__init__(embedding_size)
        self.space = space

    @property
    def config(self) -> dict:
        return {"embedding_size": self.embedding_size, "space": self.space}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"Words {self.embedding_size}".encode()).hexdigest()

    def prepare(self, media: Media) -> torch.Tensor:
        return hashed(media).flip(0)


def filled_store(folder: Path, media: list[Media], encoder: ColorEncoder | None = None) -> EmbeddingStore:
    """Embed media into a store."""
    encoder = encoder or Multimodal()
    store = EmbeddingStore.for_encoder(folder, encoder)
    precompute_embeddings(store, encoder, media, progress=False, processes=Processes(threads=1))
    return store


def save_tiny_model(folder: Path, decoder: Path, *, encoder: ColorEncoder | None = None) -> Path:
    """Write a checkpoint with open gates, so that answers depend on embeddings; return its folder."""
    if not decoder.is_dir():
        save_tiny_decoder(decoder)
    tiny_model(decoder, encoders=[encoder or Multimodal()]).save_pretrained(folder)
    return folder


def make_project(home: Path) -> EmbeddingStore:
    """Write a checkpoint, twelve images and a store of their embeddings into a project folder; return the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        save_tiny_model(Path("checkpoints/model"), Path("decoder"))
        return filled_store(Path("data/store"), write_images(Path("pictures"), 12))


def enter_copy(made: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a project folder into another one, and make the copy the current directory."""
    shutil.copytree(made, home / "project")
    monkeypatch.chdir(home / "project")
    return home / "project"
