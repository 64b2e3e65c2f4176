"""The Lightning module of an alignment, and its result: a head, and optionally a tower, for the space of an encoder.

The method of ImageBind (arXiv 2305.05665, section 3.2): each further modality is trained only on pairs with images, by
a contrastive loss against their frozen embeddings.
"""

from __future__ import annotations

import copy
import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from bindllm.atomic import remove_leftovers
from bindllm.encoders import space_of
from bindllm.encoders.aligned import HEAD, TOWER, AlignedManifest, Head, HeadConfig, write_aligned
from bindllm.encoders.trainable import is_trainable
from bindllm.errors import InputError, TrainingError
from bindllm.evaluation.measures import (
    RECALL_AT,
    chance,
    cosines,
    find_positions,
    hit_rate,
    join_positions,
    mean_ranks,
)
from bindllm.model.card import license_of
from bindllm.training.align.data import AlignData, PairSet
from bindllm.training.module import AnyEncoder
from bindllm.training.optim import OptimConfig, ZeroGradientCheck, configure_lightning

METRICS = ("train_loss", "temperature", "val_loss", "val_recall")
"""Metrics that a run logs, for callbacks that monitor one."""

_EMBEDDED_AT_ONCE = 32


class AnyTower(ABC):  # noqa: B024 (checked by its methods, never inherited)
    """Type of a tower in a recipe: an encoder, or a network with the methods of `TrainableTower`."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return issubclass(other, AnyEncoder) or {"prepare", "augment", "forward"} <= set(dir(other))


@dataclass
class Best:
    """The best epoch so far, with its validation metrics.

    Args:
        epoch: epoch, counted from 1.
        score: validation score; larger is better.
        metrics: None without validation pairs.
        weights: a copy of the trained tensors.
    """

    epoch: int
    score: float
    metrics: dict[str, Any] | None
    weights: dict[str, Tensor]


class AlignModule(LightningModule):
    """Trains a head, and a tower that can be trained, towards the space of a frozen encoder.

    The signature is the ``model`` section of a recipe.

    Args:
        tower: processes the media: a frozen encoder, or a network that is trained with the head.
        target: the frozen encoder of the joint space.
        head: shape of the head.
        temperature: temperature of the softmax.
        optim: optimizer and schedule.
        best: selects the epoch to keep: best validation "recall" (the mean of recall@1/5/10 in both directions) or
            lowest validation "loss".
    """

    def __init__(
        self,
        tower: AnyTower,
        target: AnyEncoder,
        head: HeadConfig,
        temperature: TemperatureConfig,
        optim: OptimConfig,
        best: Literal["recall", "loss"] = "recall",
    ) -> None:
        super().__init__()
        self.trains_tower = is_trainable(tower)
        # In a tuple a frozen encoder that is a torch module stays out of parameters and training mode.
        self._encoders = (tower, target)
        self.trained_tower: nn.Module | None = tower if self.trains_tower else None
        self.head_config, self.optim_config, self.keep = head, optim, best
        self.temperature = Temperature(temperature)
        self.head: Head | None = None
        self.best: Best | None = None
        self._zero_gradients = ZeroGradientCheck()

    @property
    def tower(self) -> Any:
        """The part that processes the media."""
        return self._encoders[0]

    @property
    def target(self) -> Any:
        """The frozen encoder of the joint space."""
        return self._encoders[1]

    def configure_model(self) -> None:
        """Create the head; Lightning calls this when the data is ready."""
        if self.head is None:
            # Embedding may have drawn random numbers; the initial weights must not depend on that.
            reset_seed()
            self.head = Head(self.tower.embedding_size, self.target.embedding_size, self.head_config)

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        """Return unit embeddings [B, E] from vectors [B, W] of a frozen tower, or from B prepared media."""
        return self.head(inputs if self.trained_tower is None else self.trained_tower(inputs))

    def on_fit_start(self) -> None:
        """Set the training mode, which Lightning does not change."""
        self.train()

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return the trained parameters in named groups."""
        # Names for the table and for weight decay; the temperature is a scalar and never decays.
        parts = {"head": self.head, "tower": self.trained_tower, "temperature": self.temperature}
        return {name: list(part.named_parameters()) for name, part in parts.items() if part is not None}

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and a schedule that moves every step."""
        return configure_lightning(self.trainer, self.groups(), self.optim_config)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            TrainingError: it is not finite.
        """
        # Checked before the backward pass: NaN in Adam's moments would stay.
        loss = contrastive_loss(self(batch["inputs"]), batch["targets"], batch["belongs"], self.temperature())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite at step {self.global_step + 1}; nothing was written. Lower the learning rate: "
                f"--model.optim.lr {self.optim_config.lr / 3:.1g}"
            )
        self.log_dict({"train_loss": loss, "temperature": 1 / self.temperature()})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a run that cannot learn."""
        gradients = [p.grad for group in self.groups().values() for _, p in group if p.grad is not None]
        self._zero_gradients.add(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the temperature within its bounds."""
        self.temperature.clamp()

    def on_train_epoch_end(self) -> None:
        """Evaluate on the validation split, and keep the weights if they are the best so far."""
        self._zero_gradients.finish_epoch()
        data: AlignData = self.trainer.datamodule
        metrics = self.measure(data, "validation")
        # Without validation pairs the last epoch counts as the best.
        score = float(self.current_epoch)
        if metrics is not None:
            recall = mean_recall(metrics)
            score = recall if self.keep == "recall" else -metrics["loss"]
            self.log_dict({"val_loss": metrics["loss"], "val_recall": recall})
        if self.best is None or score > self.best.score:
            # A copy: on a CPU `.cpu()` returns the tensor that the next step changes.
            weights = copy.deepcopy({name: tensor.cpu() for name, tensor in self.state_dict().items()})
            self.best = Best(self.current_epoch + 1, score, metrics, weights)

    def take_best(self) -> Best:
        """Load the weights of the best epoch, and return it.

        Raises:
            TrainingError: no epoch was finished.
        """
        if self.best is None:
            raise TrainingError(
                "no epoch was finished, so there are no weights to keep; check trainer.max_epochs and trainer.max_steps"
            )
        self.load_state_dict(self.best.weights)
        return self.best

    @torch.no_grad()
    def measure(self, data: AlignData, split: str) -> dict[str, Any] | None:
        """Return loss, retrieval in both directions and the mean similarity of pairs; None without pairs."""
        pairs = data.pairs(split)
        if not len(pairs.links):
            return None
        media = self.embed_media(data, pairs)
        targets = data.target_rows(pairs, torch.arange(len(pairs.targets))).to(self.device)
        # In batches of the training size: InfoNCE depends on the number of negatives.
        losses = []
        for rows in pairs.links.split(data.batch_size):
            belongs = pairs.belongs(rows[:, 0], rows[:, 1]).to(self.device)
            loss = contrastive_loss(media[rows[:, 0]], targets[rows[:, 1]], belongs, self.temperature())
            losses.append(float(loss) * len(rows))
        linked = len({*pairs.links[:, 1].tolist()})
        similar = (media[pairs.links[:, 0]] * targets[pairs.links[:, 1]]).sum(1).mean()
        names = data.modality, data.sources[0].target
        if names[0] == names[1]:
            names = f"aligned_{names[0]}", names[1]
        return {
            "pairs": len(pairs.links),
            "loss": round(sum(losses) / len(pairs.links), 4),
            "pair_similarity": round(float(similar), 4),
            f"{names[0]}_to_{names[1]}": retrieval_metrics(media, targets, pairs.targets_of()),
            # Targets without media are last: they are in the gallery, but not among the queries.
            f"{names[1]}_to_{names[0]}": retrieval_metrics(
                targets[:linked], media, pairs.media_of()[:linked]
            ),
        }

    @torch.no_grad()
    def embed_media(self, data: AlignData, pairs: PairSet) -> Tensor:
        """Return the embeddings of all media of a split in evaluation mode, [M, E].

        Raises:
            TrainingError: one is not finite; names the media.
        """
        # Dropout must not blur the embeddings that are measured.
        was_training = self.training
        self.eval()
        parts = []
        for indices in torch.arange(len(pairs.media)).split(_EMBEDDED_AT_ONCE):
            inputs = data.media_inputs(pairs, indices)
            moved = (
                inputs.to(self.device) if isinstance(inputs, Tensor) else [x.to(self.device) for x in inputs]
            )
            parts.append(self(moved))
            # NaN would only lower the recall, without an error.
            wrong = (~parts[-1].isfinite().all(dim=1)).nonzero().flatten()
            if len(wrong):
                name = pairs.media[int(indices[wrong[0]])].name
                raise TrainingError(
                    f"{name}: its embedding is not finite; nothing was written. Let `prepare` of the tower raise a "
                    "MediaError for such media, so that they are skipped and counted"
                )
        self.train(was_training)
        return torch.cat(parts)


MAX_SCALE = 100.0
"""Largest factor of the similarities, as in CLIP (arXiv 2103.00020, section 2.5): a temperature of at least 0.01."""


@dataclass
class TemperatureConfig:
    """Temperature of the softmax over similarities."""

    start: float = 0.07
    """Initial temperature, 0.01 to 1."""

    learned: bool = True
    """Train the temperature with the head, never below 0.01; else it is constant."""

    def __post_init__(self) -> None:
        if not 1 / MAX_SCALE <= self.start <= 1:
            raise InputError(f"model.temperature.start is {self.start}, expected {1 / MAX_SCALE:g} to 1")


class Temperature(nn.Module):
    """The factor of the similarities: the exponential of one number, which is trained or fixed.

    Examples:
        >>> round(Temperature(TemperatureConfig(start=0.05))().item(), 3)
        20.0
    """

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        # In logarithms, as CLIP: the factor stays positive and moves by ratios.
        log_scale = torch.tensor(math.log(1 / config.start))
        self.log_scale = nn.Parameter(log_scale, requires_grad=config.learned)

    def forward(self) -> Tensor:
        """Return 1 / temperature, a number."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp the temperature to 0.01 to 1, after a step."""
        self.log_scale.clamp_(0.0, math.log(MAX_SCALE))


def contrastive_loss(media: Tensor, targets: Tensor, belongs: Tensor, scale: Tensor) -> Tensor:
    """Return InfoNCE in both directions (arXiv 2305.05665, section 3.2), averaged over the pairs of a batch.

    The negatives of a row are the rows of the other side that do not belong to it. Further positives (a second caption
    of the image, the same caption of another image, a copy of the file) are removed from the sum, so they are neither
    pulled nor pushed.

    Args:
        media: trained unit embeddings, [B, E].
        targets: frozen unit embeddings of their partners, [B, E].
        belongs: whether media i and target j are a pair of the data, bool [B, B]; True on the diagonal.
        scale: 1 / temperature.

    Examples:
        >>> rows = torch.eye(2)
        >>> contrastive_loss(rows, rows, torch.eye(2, dtype=torch.bool), torch.tensor(1.0))
        tensor(0.3133)
    """
    # L = -log(exp(s x_i.y_i) / sum_j exp(s x_i.y_j)), once over rows and once over columns, where j skips
    # other positives of i.
    own = torch.eye(len(media), dtype=torch.bool, device=media.device)
    logits = (scale * media @ targets.T).masked_fill(belongs & ~own, float("-inf"))
    labels = torch.arange(len(media), device=media.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


_SCORES_AT_ONCE = 1 << 22


def retrieval_metrics(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return recall@1/5/10 with its chance level, the median rank, and the numbers of queries and candidates.

    Args:
        queries: unit embeddings [Q, E], Q at least 1.
        gallery: unit embeddings of the candidates, [G, E].
        right: indices of the right candidates of each query, at least one.

    Returns:
        Keys ``recall@k``, ``chance@k`` (0 to 1), ``median_rank`` (from 1; half ranks are ties), ``queries``,
        ``gallery``. Ties count as if in random order, so equal embeddings score at chance level.
    """
    # A part of the queries at a time: all scores at once would be Q x G numbers.
    step = max(1, _SCORES_AT_ONCE // len(gallery))
    parts = [slice(start, start + step) for start in range(0, len(queries), step)]
    positions = join_positions(
        [find_positions(cosines(queries[part], gallery).cpu(), right[part]) for part in parts]
    )
    # Queries with several right answers are hit more easily by chance.
    counts = torch.tensor([len(indices) for indices in right])
    measured: dict[str, Any] = {"queries": len(queries), "gallery": len(gallery)}
    for k in RECALL_AT:
        measured[f"recall@{k}"] = round(float(hit_rate(positions, k).mean()), 4)
        measured[f"chance@{k}"] = round(chance(counts, len(gallery), k), 4)
    measured["median_rank"] = round(float(mean_ranks(positions).median()), 1)
    return measured


def mean_recall(metrics: dict[str, Any]) -> float:
    """Return the mean of recall@1/5/10 over both directions.

    Examples:
        >>> mean_recall({"loss": 2.0, "text_to_image": {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75}})
        0.5
    """
    ways = [value for value in metrics.values() if isinstance(value, dict)]
    recalls = [way[f"recall@{k}"] for way in ways for k in RECALL_AT]
    return sum(recalls) / len(recalls)


def save_aligned(
    folder: str | Path, model: AlignModule, data: AlignData, *, metrics: Mapping[str, Any], recipe: str
) -> None:
    """Write a trained model as the folder of an aligned encoder, atomically.

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
