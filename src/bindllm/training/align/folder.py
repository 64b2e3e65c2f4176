"""The result of an alignment: the folder of an aligned encoder, with its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bindllm.atomic import remove_leftovers
from bindllm.encoders import space_of
from bindllm.encoders.aligned import HEAD, TOWER, AlignedManifest, write_aligned
from bindllm.model.checkpoint import license_of
from bindllm.training.align.data import AlignData
from bindllm.training.align.module import RECALL_AT, AlignModule


def save_aligned(
    folder: str | Path, model: AlignModule, data: AlignData, *, metrics: Mapping[str, Any], recipe: str
) -> None:
    """Write a trained model as the folder of an aligned encoder, atomically.

    Args:
        folder: path of the folder.
        model: the model with its best weights.
        data: the data of the run.
        metrics: metrics of the run.
        recipe: the resolved recipe.

    Raises:
        InputError: the folder holds something else.
    """
    weights = {HEAD: model.head.state_dict()}
    if model.trained_tower is not None:
        weights[TOWER] = model.trained_tower.state_dict()
    manifest = describe_aligned(model, data)
    # No other process writes there: temporary files are of a killed run.
    remove_leftovers(folder)
    texts = {"README.md": write_card(manifest, data, metrics), "recipe.yaml": recipe}
    write_aligned(folder, manifest, weights, metrics=metrics, texts=texts)


def describe_aligned(model: AlignModule, data: AlignData) -> AlignedManifest:
    """Return the description of a trained model."""
    # A frozen part is named and fingerprinted; a trained tower is saved, so its revision is enough.
    tower, target = _entry(model.tower), _entry(model.target)
    target["fingerprint"] = model.target.fingerprint()
    if model.trained_tower is None:
        tower["fingerprint"] = model.tower.fingerprint()
    else:
        tower["revision"] = model.tower.revision
    # A target without a named space gives its class and fingerprint, which no other encoder shares.
    own_space = f"{target['class_path'].rpartition('.')[2]} {target['fingerprint'][:16]}"
    return AlignedManifest(
        modality=data.modality,
        embedding_size=model.target.embedding_size,
        space=space_of(model.target) or own_space,
        tower=tower,
        tower_size=model.tower.embedding_size,
        head=model.head_config,
        target=target,
        sha256={},
    )


def _entry(part: Any) -> dict[str, Any]:
    kind = type(part)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(part.config)}


def write_card(manifest: AlignedManifest, data: AlignData, metrics: Mapping[str, Any]) -> str:
    """Return the text of the model card."""
    lines = [
        f"# {manifest.modality} in the space {manifest.space}",
        "",
        f"An encoder of {manifest.modality} media for [bindllm](https://arxiv.org/abs/2309.03905), in the space of",
        f"`{manifest.target['class_path']}`. It was aligned as in [ImageBind](https://arxiv.org/abs/2305.05665), by a",
        "contrastive loss against frozen embeddings of paired media.",
        "",
        "| part | is | license |",
        "|---|---|---|",
        *(f"| {part} | `{name}` | {license} |" for part, name, license in _parts(manifest, data)),
        "",
        f"Trained: {metrics['trained_parameters']:,} parameters, "
        f"{'tower and head' if manifest.trained else 'only the head'}, on {metrics['pairs']['train']:,} pairs. "
        f"Kept: epoch {metrics['epoch']} of {metrics['epochs']}. Temperature: {metrics['temperature']:g}.",
        "",
        "## Held-out pairs",
        "",
        *_table(metrics),
        "",
        "## Use",
        "",
        "```yaml",
        "encoders:",
        "  - class_path: bindllm.encoders.Aligned",
        "    init_args: {weights: THIS_FOLDER}",
        "```",
        "",
        "The licenses of the parts in the table, and of the data, hold for these weights as well.",
    ]
    return "\n".join(lines) + "\n"


def _parts(manifest: AlignedManifest, data: AlignData) -> list[tuple[str, str, str]]:
    rows = []
    for part, entry in (("tower", manifest.tower), ("target", manifest.target)):
        folder = str(entry["init_args"].get("weights") or entry["init_args"].get("name") or "")
        license = "trained here" if part == "tower" and manifest.trained else license_of(folder)
        rows.append((part, f"{entry['class_path']} {folder}".rstrip(), license))
    return rows + [("training data", source.path, license_of(source.path)) for source in data.sources]


def _table(metrics: Mapping[str, Any]) -> list[str]:
    """Return recall and chance level in both directions for each measured split."""
    recalls = [f"recall@{k} (chance)" for k in RECALL_AT]
    lines = [
        f"| split | direction | queries | gallery | {' | '.join(recalls)} |",
        "|---" * (4 + len(recalls)) + "|",
    ]
    # Loss and similarity are numbers; only the directions of retrieval are tables.
    for split in ("validation", "test"):
        for way, found in (metrics[split] or {}).items():
            if isinstance(found, dict):
                cells = [f"{found[f'recall@{k}']:.1%} ({found[f'chance@{k}']:.1%})" for k in RECALL_AT]
                name = way.replace("_", " ")
                lines.append(
                    f"| {split} | {name} | {found['queries']} | {found['gallery']} | {' | '.join(cells)} |"
                )
    return lines if len(lines) > 2 else ["There were none, so nothing was measured."]
