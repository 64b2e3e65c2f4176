"""The Lightning module: what one training step, one validation pass and one saved state are.

The decoder is loaded in `configure_model`, after the data are ready: parsing a recipe, printing it, or filling the
embedding store never waits for it.
"""

from __future__ import annotations

from abc import ABC
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bindllm.checkpoint.folder import read_manifest, read_weights
from bindllm.errors import CheckpointError, InputError, TrainingError
from bindllm.model.adapter import PREFIX, AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.cache import CacheConfig
from bindllm.model.decoder import DecoderConfig, load_decoder, load_tokenizer
from bindllm.model.injection import InjectConfig
from bindllm.model.pretrained import describe
from bindllm.training.objectives import next_token_loss
from bindllm.training.optim import OptimConfig, build_optimizer, build_schedule

LAST_GOOD = "last_good"
"""Ending of the folder, beside the run's, that keeps the weights from before a step that was not finite."""


class AnyEncoder(ABC):  # noqa: B024 (its methods are looked for, never inherited)
    """What a recipe accepts as an encoder: a class with the methods of `bindllm.encoders.Encoder`.

    jsonargparse compares the annotations of a Protocol word by word, and would refuse a stranger's class that
    writes ``list[Tensor]`` where ours has ``Sequence[Tensor]``; this asks for the methods alone.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return {"fingerprint", "to", "prepare", "embed"} <= set(dir(other))


class BindModule(LightningModule):
    """Trains the bind network and the gates of a `BindLLM` on captions.

    The signature is the ``model`` section of a recipe.

    Args:
        decoder: which language model, and its dtype.
        encoders: the frozen encoders, each by its import path.
        bind: shape of the bind network.
        inject: kind of injection.
        optim: optimizer and schedule.
        trainable: names of the parameter groups that are trained; all others are frozen.
        adapter: what of the decoder is tuned (group `adapter`); null: nothing.
        cache: the visual cache that the checkpoint names, for other senses at inference, or its folder alone; null:
            none. A run does not open it: pictures need none.
        start_from: a checkpoint folder whose trained tensors are the starting point.
        checkpoint_activations: compute activations twice and keep few of them: less memory, more time.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        encoders: list[AnyEncoder],
        bind: BindConfig,
        inject: InjectConfig,
        optim: OptimConfig,
        trainable: list[str] = ["bind", "inject"],  # noqa: B006 (jsonargparse shows it as the default; only read)
        adapter: AdapterConfig | None = None,
        cache: CacheConfig | str | None = None,
        start_from: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.decoder_config, self.encoders = decoder, encoders
        self.bind_config, self.inject_config, self.optim_config = bind, inject, optim
        if bind.fusion != "unit":
            raise InputError(
                f"bind.fusion is {bind.fusion!r}, which is for the released weights: training fuses the media of a row "
                "at unit length; leave it out"
            )
        self.trainable, self.adapter_config, self.start_from = trainable, adapter, start_from
        self.cache_config = CacheConfig(cache) if isinstance(cache, str) else cache
        self.checkpoint_activations = checkpoint_activations
        self.model: BindLLM | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's tokenizer; the data need it long before the decoder."""
        return load_tokenizer(self.decoder_config)

    def configure_model(self) -> None:
        """Load the decoder and join the parts to it; Lightning calls this before fit, validate and test."""
        if self.model is not None:
            return
        # Embedding the pictures may have drawn random numbers; the initial weights must not depend on that.
        reset_seed()
        self.model = BindLLM(
            load_decoder(self.decoder_config, device=self.device),
            self.tokenizer,
            self.decoder_config,
            encoders=self.encoders,
            bind=self.bind_config,
            inject=self.inject_config,
            adapter=self.adapter_config,
            cache_config=self.cache_config,
        )
        self.model.set_trainable(self.trainable)
        if self.checkpoint_activations:
            self.model.checkpoint_activations()
        if self.start_from is not None:
            self.load_folder(self.start_from)

    def load_folder(self, folder: str | Path) -> None:
        """Take over the trained tensors of a checkpoint folder.

        Raises:
            CheckpointError: it was trained with another decoder or other encoders, or its tensors do not fit.
        """
        manifest, own = read_manifest(folder), describe(self.model)
        for what, found, expected in (
            ("decoder", manifest["decoder"]["fingerprint"], own["decoder"]["fingerprint"]),
            ("encoders", *([entry["fingerprint"] for entry in side["encoders"]] for side in (manifest, own))),
        ):
            if found != expected:
                raise CheckpointError(
                    f"{folder} was trained with another {what} than this recipe names: use the recipe.yaml in it"
                )
        # What is trained on from somebody's weights stays under their licence.
        self.model.origin = manifest.get("origin", "")
        tensors = read_weights(folder, manifest)
        if not manifest.get("adapter"):
            # The first stage has none; it is added here, and starts by changing nothing.
            own = self.model.trainable_state().items()
            tensors |= {name: value for name, value in own if name.startswith(PREFIX)}
        self.model.load_trainable_state(tensors, source=str(folder))

    def on_fit_start(self) -> None:
        """Set the modes that Lightning leaves alone: trained parts train, the decoder stays in eval mode."""
        self.train()

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and a schedule that moves every step."""
        fused = not self.trainer.precision.endswith("mixed")
        optimizer = build_optimizer(self.model.parameter_groups(), self.optim_config, fused=fused)
        schedule = build_schedule(optimizer, self.trainer.estimated_stepping_batches, self.optim_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, per supervised token.

        Raises:
            TrainingError: the loss is not finite; the weights are kept as they were before this step.
        """
        loss, _ = self._loss(batch)
        if not torch.isfinite(loss):
            self._stop("loss")
        self.log_dict({"train_loss": loss, "lr": self.lr_schedulers().get_last_lr()[0]})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradient before it reaches the weights.

        Raises:
            TrainingError: it is not finite. In float16 that is the loss scaler's business, which skips the step.
        """
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":
            self._stop("gradient")
        self.log("gradient_norm", norm)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation loss, each token counting the same."""
        self._log_held_out("val_loss", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the test loss, each token counting the same."""
        self._log_held_out("test_loss", batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the trainable tensors: frozen weights never enter a saved state."""
        return self.model.trainable_state()

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Take over a saved state; a missing or an extra tensor is an error."""
        self.model.load_trainable_state(state_dict, source="the saved state")

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        output = self.model(**batch)
        loss = next_token_loss(output.logits, output.targets)
        return loss, output.targets.numel()

    def _log_held_out(self, name: str, batch: dict[str, Tensor]) -> None:
        # Lightning weighs a batch's mean by batch_size, and sums both over devices: the mean over all tokens.
        loss, num_tokens = self._loss(batch)
        self.log(name, loss, batch_size=num_tokens, on_epoch=True, sync_dist=True, prog_bar=True)

    def _stop(self, what: str) -> NoReturn:
        """End the run at a step that is not finite, keeping the weights from before it."""
        run = Path(self.trainer.default_root_dir)
        # Beside the run's folder: the next run sets that aside, and may start from these weights.
        folder = run.with_name(f"{run.name}.{LAST_GOOD}")
        self.model.save_pretrained(folder)
        raise TrainingError(
            f"the {what} is not finite at step {self.global_step + 1}; the weights from before it are kept in "
            f"{folder}. Go on from them with a lower learning rate: --model.start_from {folder} "
            f"--model.optim.lr {self.optim_config.lr / 3:.1g}"
        )
