"""Tiny, deterministic parts for tests: a byte tokenizer, decoders of four families and an image encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from bindllm import BindLLM
from bindllm.encoders import Embedded
from bindllm.encoders.efficientnet import _Network
from bindllm.media import Media, open_image
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, a ChatML template, `<|im_end|>` as end and another token as padding."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(special + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        padding_side="left",
    )


def tiny_decoder(family: str = "llama", *, seed: int = 0, **changes):
    """A random decoder with 3 layers, 4 heads and 2 key/value heads; weights large enough to matter."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            **changes,
        },
    )
    torch.manual_seed(seed)
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return decoder.eval()


def save_tiny_decoder(folder: Path, family: str = "llama", **changes) -> Path:
    """Write decoder and tokenizer as a Hugging Face folder, and return it."""
    tiny_decoder(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_tiny_text_encoder(folder: Path) -> Path:
    """Write a random BERT with the byte tokenizer as a Hugging Face folder, and return it."""
    config = AutoConfig.for_model(
        "bert",
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


class ColorEncoder:
    """Mean colors of a grid over the image, through a fixed random projection: instant and deterministic.

    Args:
        embedding_size: width of the embedding.
        grid: the image is averaged over grid x grid cells.
    """

    modalities = ("image",)

    def __init__(self, embedding_size: int = 16, grid: int = 4) -> None:
        self.embedding_size = embedding_size
        self.grid = grid
        generator = torch.Generator().manual_seed(7)
        self._projection = torch.randn(3 * grid * grid, embedding_size, generator=generator)

    @property
    def config(self) -> dict:
        return {"embedding_size": self.embedding_size, "grid": self.grid}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"ColorEncoder {sorted(self.config.items())}".encode()).hexdigest()

    def to(self, device) -> ColorEncoder:
        self._projection = self._projection.to(device)
        return self

    def prepare(self, media: Media) -> torch.Tensor:
        image = open_image(media.source).resize((self.grid, self.grid), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).flatten()

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(list(inputs)).to(self._projection)
        return torch.nn.functional.normalize(stacked @ self._projection + 1e-3, dim=-1)


class TokenEncoder(ColorEncoder):
    """Also returns the colors of the cells as tokens, projected to a width."""

    def __init__(self, embedding_size: int = 16, grid: int = 4, width: int = 8) -> None:
        super().__init__(embedding_size, grid)
        self.token_sizes = dict.fromkeys(self.modalities, width)
        generator = torch.Generator().manual_seed(8)
        self._token_projection = torch.randn(3, width, generator=generator)

    @property
    def config(self) -> dict:
        return {**super().config, "width": self._token_projection.shape[1]}

    def embed(self, modality: str, inputs: list[torch.Tensor], *, tokens: bool = False):
        embeddings = super().embed(modality, inputs)
        if not tokens:
            return embeddings
        cells = torch.stack(list(inputs)).unflatten(1, (self.grid, self.grid, 3)) + 1e-3
        return Embedded(embeddings, list(cells @ self._token_projection))


class BlockEncoder(ColorEncoder):
    """Also runs residual blocks with random weights, which can be trained; frozen otherwise."""

    def __init__(self, embedding_size: int = 16, grid: int = 4, num_blocks: int = 3) -> None:
        super().__init__(embedding_size, grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            parts = [nn.Sequential(nn.Linear(embedding_size, embedding_size)) for _ in range(num_blocks)]
        self._blocks = nn.ModuleList(parts).requires_grad_(False)

    @property
    def config(self) -> dict:
        return {**super().config, "num_blocks": len(self._blocks)}

    def blocks(self, modality: str) -> list[nn.Module]:
        return list(self._blocks)

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        x = super().embed(modality, inputs)
        for block in self._blocks:
            x = x + torch.tanh(block(x))
        return torch.nn.functional.normalize(x, dim=-1)


def tuned_encoder(kind: str = "tiny.BlockEncoder", **changes) -> dict:
    """The entry of a tuned encoder in a recipe."""
    arguments = {"encoder": {"class_path": kind}, "blocks": 2, "allow": [kind], **changes}
    return {"class_path": "bindllm.encoders.Tuned", "init_args": arguments}


IDS = torch.arange(3, 19).reshape(2, 8)
"""Token ids of two rows, for decoders of the tiny vocabulary."""


def tiny_batch(**changes) -> dict[str, torch.Tensor]:
    """Inputs of a model: two rows without padding, each with one media group."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(2, 1, 16, generator=generator), dim=-1)
    ones = torch.ones_like(IDS)
    batch = {"input_ids": IDS, "attention_mask": ones, "media_index": 0 * ones, "embeddings": embeddings}
    return {**batch, **changes}


def tiny_model(
    folder, *, gates: float = 2.0, dtype="float32", system=None, quantize=None, **parts
) -> BindLLM:
    """A model on the decoder of a folder; ``gates`` is the deviation of its gates, open so that media matter."""
    torch.manual_seed(0)
    config = DecoderConfig(str(folder), dtype=dtype, system=system, quantize=quantize)
    parts = {"encoders": [ColorEncoder()], "bind": BindConfig(depth=1, expansion=2), **parts}
    model = BindLLM.build(config, device="cpu", **parts)
    torch.nn.init.normal_(model.injection.gates, std=gates)
    return model.eval()


COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


def color_images(folder: Path, *, per_color: int = 4, split: bool = True) -> Path:
    """Write plain PNG images and `captions.jsonl` (image, caption, split); return the folder."""
    import json

    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, rng = [], np.random.default_rng(0)
    for color, value in COLORS.items():
        for n in range(per_color):
            pixels = np.clip(rng.normal(value, 12, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{color}{n}.png")
            row = {"image": f"images/{color}{n}.png", "caption": f"{color} square"}
            if split:
                row["split"] = {0: "test", 1: "validation"}.get(n, "train")
            rows.append(row)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_gates(folder: Path) -> Path:
    """Write a checkpoint folder of gates only, which is enough for a report; return it."""
    from bindllm.model.checkpoint import write_checkpoint

    manifest = {"decoder": {"name": "tiny"}, "encoders": [], "inject": {"kind": "value", "queries": True}}
    write_checkpoint(folder, manifest, {"injection.gates": torch.full((3, 4), 0.5)}, "card")
    return folder


def synthetic_efficientnet() -> dict[str, torch.Tensor]:
    """Fill every published tensor with fixed numbers that keep the activations in a normal range.

    The golden numbers were made from these by the package efficientnet-lite-pytorch 0.1.0, so the generator
    is numpy's legacy one, whose stream never changes.
    """
    random = np.random.RandomState(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    tensors = {}
    for convolution, kernel, norm in _Network().published_names():
        shape = convolution.published_shape
        tensors[f"{kernel}.weight"] = normal(*shape) * (2 / np.prod(shape[1:])) ** 0.5
        tensors[f"{norm}.weight"] = 1 + 0.1 * normal(shape[0])
        tensors[f"{norm}.bias"] = 0.3 * normal(shape[0])
        tensors[f"{norm}.running_mean"] = 0.1 * normal(shape[0])
        tensors[f"{norm}.running_var"] = 0.5 + normal(shape[0]).abs()
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    return tensors
