"""Converters of published weights to bindllm's own folders, and their settings (which import nothing heavy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("imagebind", "pointbind", "imagebind-llm")
TOKENIZER = "checkpoints/clip-vocabulary/tokenizer.json"
"""Where ``bindllm fetch clip-vocabulary`` puts CLIP's tokenizer."""


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of the conversions.

    Args:
        kind: one of `KINDS`; None: found from the names of the tensors.
        tokenizer: for imagebind: CLIP's ``tokenizer.json`` or its packed list of merges (``.gz``); "none" to convert
            without texts; None: `TOKENIZER`.
        base: for imagebind-llm: Hugging Face folder of the LLaMA that the adapter was trained on.
        encoders: for imagebind-llm: folders of converted encoders, or import paths of encoder classes.
        accept_base: for imagebind-llm: convert although the base's weights differ from those in training.
    """

    kind: str | None = None
    tokenizer: str | None = None
    base: str | None = None
    encoders: Sequence[str] = ()
    accept_base: bool = False
