"""Several devices: which of Lightning's strategies a run may use, and one that spreads the frozen decoder.

What is trained is small beside the decoder. So it is whole on every device, and its gradients are averaged as in
DDP (arXiv 2006.15704); the frozen decoder, which has neither gradients nor optimizer state, lies in shards and is
gathered layer by layer when it is needed, as in FSDP (arXiv 2304.11277). States and checkpoints are those of a run
on one device, and load anywhere.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from bindllm.errors import InputError

SHARDED = "bindllm.training.strategies.ShardedDecoder"
_WHOLE_STAGES = (0, 1, 2)


class ShardedDecoder(DDPStrategy):
    """DDP whose frozen decoder is spread over the devices: each holds its share of the weights, and one whole layer.

    Takes the same steps as DDP, to the bit. The output projection stays whole, and so do the input embeddings where
    they are the same tensor.

    Args:
        across_nodes: spread the decoder over the devices of all nodes; by default over those of each node, so that
            layers are gathered over the fast connections inside it.
        **options: as for Lightning's ``DDPStrategy``.

    Example:
        trainer:
          devices: 8
          strategy: {class_path: bindllm.training.strategies.ShardedDecoder}
    """

    def __init__(self, across_nodes: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.across_nodes = across_nodes

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Load the decoder into the memory of the host: whole, it may be too large for the device."""
        with self.precision_plugin.tensor_init_context():
            yield

    def model_to_device(self) -> None:
        """Spread the decoder over the devices, layer by layer, and move everything else.

        Raises:
            InputError: the decoder is quantized.
        """
        module = self.lightning_module
        model = module.model
        frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
        buffers = [name for name, _ in module.named_buffers()]
        # Also an adapter that this run leaves as it is: states and checkpoints hold it.
        whole = [value for group in model.parameter_groups().values() for _, value in group]
        shard_decoder(model.decoder, self._mesh(), whole=whole)
        # Frozen weights are the same everywhere by themselves; DDP would send each shard over the other ones.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*frozen, *buffers])
        super().model_to_device()

    def teardown(self) -> None:
        """Give the first process a whole decoder, which it measures the model with; the others need none."""
        module = self.lightning_module
        if module is not None and module.model is not None:
            finished = module.trainer.state.status is not TrainerStatus.INTERRUPTED
            state = {name: value.cpu() for name, value in module.model.trainable_state().items()}
            self.model = module
            module.model = None
            if finished and self.is_global_zero:
                module.configure_model()
                module.model.load_trainable_state(state, source="the trained model")
        super().teardown()

    def _mesh(self) -> DeviceMesh:
        """The processes that share one decoder."""
        kind = self.root_device.type
        if self.across_nodes or self.num_nodes == 1:
            return init_device_mesh(kind, (self.world_size,))
        mesh = init_device_mesh(kind, (self.num_nodes, self.num_processes), mesh_dim_names=("node", "device"))
        return mesh["device"]


def shard_decoder(decoder: PreTrainedModel, mesh: DeviceMesh, *, whole: Iterable[nn.Parameter] = ()) -> None:
    """Leave each process of a mesh its share of the decoder's weights; each layer is gathered when it runs.

    Args:
        decoder: with its adapter and injection.
        mesh: one-dimensional.
        whole: parameters in it that are not cut.

    Raises:
        InputError: the decoder is quantized: its packed weights cannot be cut.
    """
    if packed := [name for name, value in decoder.named_parameters() if not value.is_floating_point()]:
        raise InputError(
            f"the decoder is quantized ({packed[0]}, ...), and packed weights cannot be spread over devices. Take "
            "decoder.quantize out of the recipe, or give each device the whole decoder with trainer.strategy ddp"
        )
    core = decoder.get_decoder()
    kept = {*whole, *decoder.get_output_embeddings().parameters()}
    for layer in core.layers:
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(core, mesh=mesh, ignored_params=kept)
    # Hugging Face then generates in step on all processes, even where their answers differ in length.
    decoder._is_fsdp_managed_module = True


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that cut the trained tensors to pieces, which our checkpoints hold whole.

    Raises:
        InputError: says what to use instead.
    """
    name = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise InputError(
            f"trainer.strategy {name} would cut what is trained to pieces as well. To spread the frozen decoder "
            f"over the devices: trainer.strategy: {{class_path: {SHARDED}}}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        stage = strategy.config.get("zero_optimization", {}).get("stage", 0) if strategy.config else 0
        if stage not in _WHOLE_STAGES:
            raise InputError(
                f"DeepSpeed stage {stage} would cut what is trained to pieces; use deepspeed_stage_2, or to spread the "
                f"frozen decoder: trainer.strategy: {{class_path: {SHARDED}}}"
            )


def averages_gradients(strategy: Strategy) -> bool:
    """Return whether gradients lie in the parameters between backward and optimizer step, where they can be weighed."""
    return not isinstance(strategy, DeepSpeedStrategy)
