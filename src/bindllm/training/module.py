"""The Lightning module: what one training step, one validation pass and one saved state are.

The decoder is loaded in `configure_model`, after the data are ready: parsing a recipe, printing it, or filling the
embedding store never waits for it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bindllm.cache.settings import CacheConfig
from bindllm.conversation import check_vocabulary
from bindllm.data.collate import Batch
from bindllm.errors import InputError, TrainingError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig, load_decoder, load_tokenizer
from bindllm.model.injection import InjectConfig
from bindllm.objectives import NextToken, Objective
from bindllm.parallel import RunContext
from bindllm.training.optim import OptimConfig, build_optimizer, build_schedule
from bindllm.training.stages import init_from_checkpoint
from bindllm.training.strategies import ShardedDecoder, averages_gradients, check_strategy

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
    """Trains the parts of a `BindLLM` that a recipe names.

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
        init_from: a checkpoint folder whose trained tensors are the starting point.
        objective: what is minimised; null: `NextToken`.
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
        init_from: str | None = None,
        objective: Objective | None = None,
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
        self.trainable, self.adapter_config, self.init_from = trainable, adapter, init_from
        self.objective = NextToken() if objective is None else objective
        self.cache_config = CacheConfig(cache) if isinstance(cache, str) else cache
        self.checkpoint_activations = checkpoint_activations
        self.model: BindLLM | None = None
        self._accumulation = WeightedAccumulation()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's tokenizer; the data need it long before the decoder."""
        return load_tokenizer(self.decoder_config)

    def setup(self, stage: str) -> None:
        """Refuse data that the objective cannot learn from; Lightning has made them ready.

        Raises:
            InputError: names what the rows lack.
        """
        self.objective.check(self.trainer.datamodule, stage)

    def configure_model(self) -> None:
        """Load the decoder and join the parts to it; Lightning calls this before fit, validate and test."""
        if self.model is not None:
            return
        strategy = None if self._trainer is None else self._trainer.strategy
        if strategy is not None:
            check_strategy(strategy)
        # Embedding the pictures may have drawn random numbers; the initial weights must not depend on that.
        reset_seed()
        # A decoder that is to be spread over the devices may be too large for one of them.
        device = "cpu" if isinstance(strategy, ShardedDecoder) else self.device
        if self.decoder_config.quantize is not None and strategy is not None:
            # Lightning moves the module after this, and weights in 8 bits cannot be moved.
            device = strategy.root_device
        decoder = load_decoder(self.decoder_config, device=device)
        check_vocabulary(self.tokenizer, decoder.get_input_embeddings().num_embeddings)
        self.model = BindLLM(
            decoder,
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
        if self.init_from is not None:
            init_from_checkpoint(self.model, self.init_from)
        self.objective.on_start(self.model)

    def on_fit_start(self) -> None:
        """Prepare the objective, and set the modes that Lightning leaves alone: the decoder stays in eval mode."""
        self.eval()
        with self.trainer.precision_plugin.predict_step_context():
            self.objective.prepare(self.model, self.trainer.datamodule, RunContext.of_trainer(self.trainer))
        self.train()

    def on_train_epoch_start(self) -> None:
        """Tell the objective."""
        self.objective.on_epoch_start()

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and a schedule that moves every step."""
        fused = not self.trainer.precision.endswith("mixed")
        optimizer = build_optimizer(self.model.parameter_groups(), self.optim_config, fused=fused)
        schedule = build_schedule(optimizer, self.trainer.estimated_stepping_batches, self.optim_config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return what the gradient is taken of: the loss of a batch, weighed among those of its step."""
        batch = self.objective.add_reference(batch, "train")
        loss, metrics = self.objective.loss(self.model, batch)
        self.log_dict({"lr": self.lr_schedulers().get_last_lr()[0]})
        self.log_dict({f"train_{name}": value for name, value in metrics.items()})
        return self._accumulation.add(loss, self.objective.count(batch), trainer=self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weigh the gradients of the step's batches, and look at the whole before it reaches the weights.

        Raises:
            TrainingError: loss or gradient is not finite, on all devices alike; the weights are kept as they were
                before this step. In float16 the gradient is the loss scaler's business, which skips the step.
        """
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        loss = self._accumulation.finish(gradients, trainer=self.trainer)
        if not torch.isfinite(loss):
            self._stop("loss")
        self.log("train_loss", loss)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":
            self._stop("gradient")
        self.log("gradient_norm", norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation loss, each token (or pair) counting the same."""
        self._log_held_out("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test loss, each token (or pair) counting the same."""
        self._log_held_out("test", batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the trainable tensors: frozen weights never enter a saved state."""
        return self.model.trainable_state()

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Take over a saved state; a missing or an extra tensor is an error."""
        self.model.load_trainable_state(state_dict, source="the saved state")

    def _log_held_out(self, split: str, batch: Batch) -> None:
        # Lightning weighs a batch's mean by batch_size, and sums both over devices: the mean over all tokens.
        prefix = {"validation": "val", "test": "test"}[split]
        loss, count, metrics = self.objective.held_out(self.model, self.objective.add_reference(batch, split))
        options = {"batch_size": count, "on_epoch": True, "sync_dist": True}
        self.log(f"{prefix}_loss", loss, prog_bar=True, **options)
        self.log_dict({f"{prefix}_{name}": value for name, value in metrics.items()}, **options)

    def _stop(self, what: str) -> NoReturn:
        """End the run at a step that is not finite, keeping the weights from before it."""
        run = Path(self.trainer.default_root_dir)
        # Beside the run's folder: the next run sets that aside, and may start from these weights.
        folder = run.with_name(f"{run.name}.{LAST_GOOD}")
        if self.trainer.is_global_zero:
            self.model.save_pretrained(folder)
        # The others are here as well; the first to leave would stop one that is writing.
        self.trainer.strategy.barrier()
        raise TrainingError(
            f"the {what} is not finite at step {self.global_step + 1}; the weights from before it are kept in "
            f"{folder}. Go on from them with a lower learning rate: --model.init_from {folder} "
            f"--model.optim.lr {self.optim_config.lr / 3:.1g}"
        )


class WeightedAccumulation:
    """Weighs the batches of a step by what they hold.

    A step of one batch on one device is left alone, to the bit. So is one of DeepSpeed, which keeps gradients to
    itself: there each batch weighs the same.

    Example:
        loss = accumulation.add(loss, count, trainer=trainer)      # for each batch, before backward
        mean = accumulation.finish(gradients, trainer=trainer)     # before the optimizer moves
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, count: int, *, trainer: Trainer) -> Tensor:
        """Return what to take the gradient of.

        Args:
            loss: of a batch, a mean.
            count: the number of things that it is a mean of.
            trainer: of the run.
        """
        self._batches.append((loss.detach(), count))
        return loss * count if _divisor(trainer) > 1 else loss

    def finish(self, gradients: Sequence[Tensor], *, trainer: Trainer) -> Tensor:
        """Scale the gradients of a step in place, on all devices alike, and return the step's mean loss.

        Args:
            gradients: averaged over devices, and over batches by Lightning.
            trainer: of the run.
        """
        batches, self._batches = self._batches, []
        if len(batches) == 1 and _divisor(trainer) == 1 == trainer.world_size:
            return batches[0][0]
        own = sum(torch.stack([loss * count, torch.full_like(loss, count)]) for loss, count in batches)
        total, count = trainer.strategy.reduce(own, reduce_op="sum")
        if (divisor := _divisor(trainer)) > 1:
            torch._foreach_mul_(list(gradients), divisor / count)
        return total / count


def _divisor(trainer: Trainer) -> int:
    """How many batches the gradients of a step have been divided by."""
    if not averages_gradients(trainer.strategy):
        return 1
    return trainer.world_size * trainer.accumulate_grad_batches
