"""The table of model families in `docs/encoders.md`: `make test-families` writes it.

Each family is read as `HuggingFace` reads a folder, from the default config of transformers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoConfig

from bindllm.encoders.hub import SERVED, read_spec

PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
MARKS = ("<!-- families -->\n", "<!-- end of families -->\n")
NAMES = {
    **{"clip": "CLIP", "siglip": "SigLIP", "siglip2": "SigLIP 2", "aimv2": "AIMv2", "align": "ALIGN"},
    **{"chinese_clip": "Chinese-CLIP", "clap": "CLAP", "pe_audio": "PE-Audio", "xclip": "X-CLIP"},
    **{
        "dinov2": "DINOv2",
        "dinov3_vit": "DINOv3",
        "aimv2_vision_model": "AIMv2",
        "vit": "ViT",
        "swin": "Swin",
    },
    **{"convnext": "ConvNeXt", "bert": "BERT and its kind", "wav2vec2": "wav2vec 2.0", "hubert": "HuBERT"},
    **{"audio-spectrogram-transformer": "AST", "whisper": "Whisper's encoder", "videomae": "VideoMAE"},
    "vjepa2": "V-JEPA 2",
}
"""Families of the table, by their ``model_type``."""


def table() -> str:
    """Return the table."""
    cells: dict[tuple[str, bool], list[str]] = {}
    for kind, name in NAMES.items():
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(kind).save_pretrained(folder)
            spec = read_spec(Path(folder))
        for modality in spec.modalities:
            tokens = "" if spec.state_widths.get(modality) else "*"
            cells.setdefault((modality, spec.joint), []).append(f"{name}{tokens}")
    lines = ["| modality | joint models | single towers |", "|---|---|---|"]
    for modality in SERVED:
        joint, towers = (", ".join(cells.get((modality, kind), [])) for kind in (True, False))
        lines.append(f"| {modality} | {joint} | {towers} |")
    return "\n".join([*lines, "", "\\* without tokens", ""])


def main() -> None:
    """Write the table into the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text(before + MARKS[0] + "\n" + table() + "\n" + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
