"""The Lightning module: one training step, one validation pass, and the tensors of a saved state.

The decoder is loaded in `configure_model`, after the data is ready: parsing a recipe, printing it, or precomputing
embeddings never waits for it.
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
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bindllm.cache.blend import CacheConfig
from bindllm.conversation import check_vocabulary
from bindllm.data.collate import Batch
from bindllm.data.datamodule import BindData
from bindllm.encoders.trainable import tuned_encoders
from bindllm.errors import InputError, TrainingError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.context import ContextConfig
from bindllm.model.context.draws import draw_records
from bindllm.model.decoder import DecoderConfig, load_decoder, load_tokenizer
from bindllm.model.groups import ENCODERS
from bindllm.model.injection import InjectConfig
from bindllm.model.layers import compile_layers
from bindllm.objectives import NextToken, Objective
from bindllm.parallel import RunContext
from bindllm.training.bag_of_words import pretrain_bind
from bindllm.training.optim import OptimConfig, ZeroGradientCheck, configure_lightning, set_rates
from bindllm.training.stages import init_from_checkpoint
from bindllm.training.strategies import ShardedDecoder, check_strategy

LAST_GOOD = "last_good"
"""Suffix of the folder, next to the run's, for the weights from before a step that was not finite."""


class AnyEncoder(ABC):  # noqa: B024 (checked by its methods, never inherited)
    """Type of an encoder in a recipe: a class with the methods of `bindllm.encoders.Encoder`.

    jsonargparse compares the annotations of a Protocol literally, and would refuse a user's class that has
    ``list[Tensor]`` instead of ``Sequence[Tensor]``. This class only checks the names of the methods.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return {"fingerprint", "to", "prepare", "embed"} <= set(dir(other))


class BindModule(LightningModule):
    """Trains the parts of a `BindLLM` that a recipe names.

    The signature is the ``model`` section of a recipe.

    Args:
        decoder: the language model and its dtype.
        encoders: the frozen encoders, each by its import path.
        bind: shape of the bind network.
        inject: kind of injection.
        optim: optimizer and schedule.
        trainable: names of the trained parameter groups; all others are frozen.
        adapter: adapter of the decoder (group `adapter`); null: none.
        context: perceivers of retrieved records (group `context`); null: the model reads none. The records are the
            training rows.
        cache: the visual cache that the checkpoint names, for modalities other than images at inference, or only its
            folder; null: none. Training does not open it.
        init_from: a checkpoint folder whose trained tensors are the initial weights.
        objective: the training objective; null: `NextToken`.
        bag_of_words: passes over the training media in which the bind network learns the words of their answers,
            before the decoder's first step (`bindllm.training.bag_of_words`); 0: none.
        checkpoint_activations: recompute activations in the backward pass: less memory, more time.
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
        context: ContextConfig | None = None,
        cache: CacheConfig | str | None = None,
        init_from: str | None = None,
        objective: Objective | None = None,
        bag_of_words: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        # Only settings: loading waits for `configure_model`, when the data is known to be sound.
        self.decoder_config, self.encoders = decoder, encoders
        self.bind_config, self.inject_config, self.optim_config = bind, inject, optim
        if bind.fusion != "unit":
            raise InputError(
                f"bind.fusion is {bind.fusion!r}, which is only for released weights: training fuses the media of a "
                "row at unit length; remove bind.fusion from the recipe"
            )
        if bag_of_words < 0 or (bag_of_words and (init_from is not None or "bind" not in trainable)):
            raise InputError(
                f"model.bag_of_words is {bag_of_words}: expected a number of passes that is not negative, and 0 if "
                "init_from brings a trained bind network or model.trainable does not name bind"
            )
        self.bag_of_words = bag_of_words
        self.trainable, self.adapter_config, self.init_from = trainable, adapter, init_from
        self.context_config = context
        self.objective = NextToken() if objective is None else objective
        if context is not None and context.copied and not self.objective.drops_tokens:
            raise InputError(
                f"model.context.copied is {context.copied}, and {type(self.objective).__name__} reads the same records "
                "in each pass over a row, so no answer would be copied: set it to 0"
            )
        self.cache_config = CacheConfig(cache) if isinstance(cache, str) else cache
        self.checkpoint_activations = checkpoint_activations
        self.model: BindLLM | None = None
        self._accumulation = WeightedAccumulation()
        self._zero_gradients = ZeroGradientCheck()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's tokenizer; the data needs it before the decoder is loaded."""
        return load_tokenizer(self.decoder_config)

    @property
    def token_modalities(self) -> list[str]:
        """Modalities whose tokens the batches hold; none for a model with one bind token."""
        return self.bind_config.token_modalities if self.bind_config.reads_tokens else []

    def setup(self, stage: str) -> None:
        """Refuse data that the objective cannot learn from; called when the data is ready.

        Raises:
            InputError: names the missing field.
        """
        self.objective.check(self.trainer.datamodule, stage)
        if stage == "fit" and ENCODERS in self.trainable:
            self._check_encoders(self.trainer.datamodule)

    def _check_encoders(self, data: BindData) -> None:
        """Refuse to train encoders with an objective that keeps values of their media, or without such media."""
        for number, encoder in tuned_encoders(self.encoders).items():
            if not self.objective.drops_tokens:
                raise InputError(
                    f"model.trainable names encoders, and {type(self.objective).__name__} compares with values of the "
                    "media that were computed before: train the encoders in an earlier stage with NextToken"
                )
            rows = () if data.streamed else data.samples("train")
            if not any(
                media.modality == encoder.modality for row in rows for group in row.media for media in group
            ):
                raise InputError(
                    f"encoder {number + 1} is trained on {encoder.modality} media, and no training row has any: "
                    "remove encoders from model.trainable, or change its modality"
                )

    def configure_model(self) -> None:
        """Load the decoder and build the model; Lightning calls this before fit, validate and test."""
        if self.model is not None:
            return
        # Without a trainer, as in tests and tools, nothing is distributed and the device is the module's own.
        strategy = None if self._trainer is None else self._trainer.strategy
        if strategy is not None:
            check_strategy(strategy)
        if self.decoder_config.tuned and isinstance(strategy, ShardedDecoder):
            raise InputError(
                "model.decoder.tuned does not work with ShardedDecoder, which shards frozen weights only: use "
                "trainer.strategy ddp, or deepspeed_stage_2, which shards the optimizer and the gradients"
            )
        if self.context_config is not None and isinstance(strategy, ShardedDecoder):
            raise InputError(
                "model.context reads the word embeddings of the decoder outside of its forward pass, which a sharded "
                "decoder does not allow: use another trainer.strategy, or remove model.context"
            )
        # Embedding media may have drawn random numbers; the initial weights must not depend on that.
        reset_seed()
        # A sharded decoder may be too large for one device.
        device = "cpu" if isinstance(strategy, ShardedDecoder) else self.device
        if self.decoder_config.quantize is not None and strategy is not None:
            # Lightning moves the module after this, and weights in 8 bits cannot be moved.
            device = strategy.root_device
        decoder = load_decoder(self.decoder_config, device=device)
        # An id beyond the embedding table would fail in the middle of an epoch, on a GPU without a message.
        check_vocabulary(self.tokenizer, decoder.get_input_embeddings().num_embeddings)
        self.model = BindLLM(
            decoder,
            self.tokenizer,
            self.decoder_config,
            encoders=self.encoders,
            bind=self.bind_config,
            inject=self.inject_config,
            adapter=self.adapter_config,
            context=self.context_config,
            cache_config=self.cache_config,
        )
        self.model.bind.drops_tokens = self.objective.drops_tokens
        # The order of construction is fixed: decoder, adapter, injection; then the groups, then earlier weights.
        self.model.set_trainable(self.trainable)
        # Hooks of the injection are in place by now: recomputed layers must add the same bind tensors.
        if self.checkpoint_activations:
            self.model.checkpoint_activations()
        if self.decoder_config.compile:
            compile_layers(decoder)
        if self.init_from is not None:
            init_from_checkpoint(self.model, self.init_from)
        # Last: a reference model of an objective is a copy of the initial weights, which may come from `init_from`.
        self.objective.on_start(self.model)

    def on_fit_start(self) -> None:
        """Prepare bind network and objective, and set the modes: Lightning would not keep the decoder in eval mode."""
        if self.model.context is not None:
            # Every checkpoint of the run contains the records that it was trained with.
            self.model.datastore = self.trainer.datamodule.retrieved.reader.datastore
        context = RunContext.of_trainer(self.trainer)
        # A resumed run has restored its weights.
        if self.bag_of_words and not context.resumed:
            if isinstance(self.trainer.strategy, DeepSpeedStrategy | ShardedDecoder):
                # DeepSpeed's copies of the weights, made earlier, would undo the pretraining at the first step. A
                # sharded decoder has whole word embeddings only inside its forward pass.
                raise InputError(
                    "model.bag_of_words does not work with DeepSpeed or a sharded decoder: set it to 0, or use another "
                    "trainer.strategy"
                )
            pretrain_bind(self.model, self.trainer.datamodule, self.bag_of_words, self.optim_config, context)
        self.eval()
        # In eval mode and the precision of training: values that are computed once, such as log-probabilities of
        # a reference model, are compared with those of training steps.
        with self.trainer.precision_plugin.predict_step_context():
            self.objective.prepare(self.model, self.trainer.datamodule, context)
        self.train()

    def on_train_start(self) -> None:
        """Follow the schedule of this run, also if the state is of a shorter one."""
        set_rates(self.lr_schedulers())

    def on_train_epoch_start(self) -> None:
        """Forward the hook to the objective."""
        self.objective.on_epoch_start()

    def on_train_epoch_end(self) -> None:
        """Refuse a run that cannot learn."""
        self._zero_gradients.finish_epoch()

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and a schedule that moves every step."""
        return configure_lightning(self.trainer, self.model.parameter_groups(), self.optim_config)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, weighted among the batches of its step."""
        # Columns that the objective has prepared, looked up by the numbers of the rows.
        batch = self.objective.add_reference(batch, "train")
        # Not for objectives that compare two passes over the same rows.
        if self.model.context is not None and self.objective.drops_tokens:
            batch = draw_records(batch, self.model.context.config, self.tokenizer)
        loss, metrics = self.objective.loss(self.model, batch)
        for parameter in self.model.tuned if ENCODERS in self.trainable else ():
            # DDP waits for all gradients, also if no row of the batch has media.
            loss = loss + 0 * parameter.sum()
        self.log_dict({"lr": self.lr_schedulers().get_last_lr()[0]})
        self.log_dict({f"train_{name}": value for name, value in metrics.items()})
        # The weighted loss is only for the gradient; the logged one is computed in `on_before_optimizer_step`.
        return self._accumulation.add(loss, self.objective.count(batch), trainer=self.trainer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weight the gradients of the step's batches, and check them before they change the weights.

        Raises:
            TrainingError: loss or gradient is not finite, on all devices alike; the weights from before this step are
                saved. In float16 the loss scaler handles the gradient and skips the step.
        """
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        # Checked before the optimizer: one step with NaN would spoil all weights and both of Adam's moments.
        loss = self._accumulation.finish(gradients, trainer=self.trainer)
        if not torch.isfinite(loss):
            self._stop("loss")
        self.log("train_loss", loss)
        # Before clipping, which would hide how large the gradient was.
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":
            self._stop("gradient")
        self.log("gradient_norm", norm)
        # DeepSpeed does not expose its gradients.
        if gradients:
            self._zero_gradients.add(norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation loss, each token (or pair) counting the same."""
        self._log_held_out("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test loss, each token (or pair) counting the same."""
        self._log_held_out("test", batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the number of steps without a gradient, so that a resumed run does not count again."""
        # None once a gradient was not zero: the check is over for the whole run.
        checkpoint["zero_gradients"] = self._zero_gradients.steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the value of `on_save_checkpoint`."""
        self._zero_gradients.steps = checkpoint.get("zero_gradients")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the trainable tensors: frozen weights never enter a saved state."""
        # Megabytes instead of gigabytes: frozen weights are only named, by their fingerprint, in the checkpoint folder.
        return self.model.trainable_state()

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Load a saved state; a missing or an extra tensor is an error."""
        self.model.load_trainable_state(state_dict, source="the saved state")

    def _log_held_out(self, split: str, batch: Batch) -> None:
        # Lightning weights a mean by batch_size and sums both over devices, so this is the mean over all tokens.
        # Names that Lightning users expect, such as val_loss, and not those of our splits.
        prefix = {"validation": "val", "test": "test"}[split]
        loss, count, metrics = self.objective.held_out(self.model, self.objective.add_reference(batch, split))
        options = {"batch_size": count, "on_epoch": True, "sync_dist": True}
        self.log(f"{prefix}_loss", loss, prog_bar=True, **options)
        self.log_dict({f"{prefix}_{name}": value for name, value in metrics.items()}, **options)

    def _stop(self, what: str) -> NoReturn:
        """End the run at a step that is not finite, and save the weights from before it."""
        run = Path(self.trainer.default_root_dir)
        # Next to the run's folder: the next run renames that one, and may start from these weights.
        folder = run.with_name(f"{run.name}.{LAST_GOOD}")
        # The trained tensors are the same on all devices, so one of them can write.
        if self.trainer.is_global_zero:
            self.model.save_pretrained(folder)
        # All processes stop here; one that ended earlier would let the launcher kill the one that is writing.
        self.trainer.strategy.barrier()
        # Else the next run would refuse weights that are trained already.
        further = " --model.bag_of_words 0" if self.bag_of_words else ""
        raise TrainingError(
            f"the {what} is not finite at step {self.global_step + 1}; the weights from before it are kept in "
            f"{folder}. Continue from them with a lower learning rate: --model.init_from {folder} "
            f"--model.optim.lr {self.optim_config.lr / 3:.1g}{further}"
        )


class WeightedAccumulation:
    """Token-weighted gradient accumulation: every token (or pair) of a step counts the same.

    A step sums the gradients of several batches: `accumulate_grad_batches` in turn, on every device. Lightning averages
    the means of the batches, so a token of a short batch would weigh more. Here each mean is scaled by its number of
    terms before the backward pass, and the sum is divided by the total, as in one large batch.

    A step of one batch on one device is unchanged, to the bit. With DeepSpeed, which does not expose its gradients,
    each batch weighs the same.

    Example:
        loss = accumulation.add(loss, count, trainer=trainer)      # for each batch, before backward
        mean = accumulation.finish(gradients, trainer=trainer)     # before the optimizer moves
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, count: int, *, trainer: Trainer) -> Tensor:
        """Return the scaled loss for the backward pass.

        Args:
            loss: mean loss of a batch.
            count: number of terms in the mean.
        """
        self._batches.append((loss.detach(), count))
        return loss * count if _divisor(trainer) > 1 else loss

    def finish(self, gradients: Sequence[Tensor], *, trainer: Trainer) -> Tensor:
        """Scale the gradients of a step in place, on all devices alike, and return the step's mean loss.

        Args:
            gradients: gradients as averaged over devices and batches by Lightning.
        """
        # Emptied first: also a step that fails below leaves no batch to the next one.
        batches, self._batches = self._batches, []
        if len(batches) == 1 and _divisor(trainer) == 1 == trainer.world_size:
            return batches[0][0]
        # Sums and counts travel in one tensor, so the devices meet once: mean = sum(loss_i * n_i) / sum(n_i).
        own = sum(torch.stack([loss * count, torch.full_like(loss, count)]) for loss, count in batches)
        total, count = trainer.strategy.reduce(own, reduce_op="sum")
        if (divisor := _divisor(trainer)) > 1:
            # Lightning divided the sum of n_i * gradient_i by the number of batches; it must be the number of terms.
            torch._foreach_mul_(list(gradients), divisor / count)
        return total / count


def _divisor(trainer: Trainer) -> int:
    """Return the number of batches that the gradients of a step were divided by."""
    # DeepSpeed does not expose gradients between backward and optimizer step, so they cannot be scaled.
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return 1
    return trainer.world_size * trainer.accumulate_grad_batches
