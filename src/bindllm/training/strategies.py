"""Several devices: the allowed strategies of Lightning, and one that shards the frozen decoder.

Trained tensors are small compared with the decoder. Every device holds all of them, and gradients are averaged as in
DDP (arXiv 2006.15704). The frozen decoder, which has neither gradients nor optimizer state, is sharded and gathered
layer by layer, as in FSDP (arXiv 2304.11277). Saved states and checkpoints are those of a run on one device, and load
anywhere.
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
from bindllm.model.layers import find_layers

SHARDED = "bindllm.training.strategies.ShardedDecoder"
_WHOLE_STAGES = (0, 1, 2)


class ShardedDecoder(DDPStrategy):
    """DDP with a sharded frozen decoder: each device holds its shard of the weights, and one whole layer at a time.

    The steps are those of DDP, to the bit. The output projection is not sharded, nor are input embeddings that share
    its tensor.

    Args:
        across_nodes: shard the decoder over the devices of all nodes. By default it is sharded over those of each node,
            so that layers are gathered over the fast connections of the node.
        **options: options of Lightning's ``DDPStrategy``.

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
        """Load the decoder into host memory, because it may be too large for the device."""
        with self.precision_plugin.tensor_init_context():
            yield

    def model_to_device(self) -> None:
        """Shard the decoder layer by layer, and move everything else to the device.

        Raises:
            InputError: the decoder is quantized.
        """
        module = self.lightning_module
        model = module.model
        frozen = [name for name, value in module.named_parameters() if not value.requires_grad]
        buffers = [name for name, _ in module.named_buffers()]
        # Includes an adapter that this run does not train: states and checkpoints hold it.
        whole = [value for group in model.parameter_groups().values() for _, value in group]
        shard_decoder(model.decoder, self._mesh(), whole=whole)
        # Every process has loaded the same frozen weights; DDP would overwrite all shards with that of rank 0.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*frozen, *buffers])
        super().model_to_device()

    def teardown(self) -> None:
        """Load the whole decoder in rank 0, which evaluates the model; the other processes need no decoder."""
        module = self.lightning_module
        if module is not None and module.model is not None:
            finished = module.trainer.state.status is not TrainerStatus.INTERRUPTED
            # Shards live on the devices: only the trained tensors are needed to build the model again.
            state = {name: value.cpu() for name, value in module.model.trainable_state().items()}
            # Drops the DDP wrapper, which refers to the sharded decoder.
            self.model = module
            module.model = None
            # An interrupted run has nothing to evaluate, and loading takes minutes.
            if finished and self.is_global_zero:
                module.configure_model()
                module.model.load_trainable_state(state, source="the trained model")
        super().teardown()

    def _mesh(self) -> DeviceMesh:
        """Return the mesh of the processes that share one decoder."""
        kind = self.root_device.type
        # Otherwise each node holds a whole decoder, so that no layer crosses the network.
        if self.across_nodes or self.num_nodes == 1:
            return init_device_mesh(kind, (self.world_size,))
        mesh = init_device_mesh(kind, (self.num_nodes, self.num_processes), mesh_dim_names=("node", "device"))
        return mesh["device"]


def shard_decoder(decoder: PreTrainedModel, mesh: DeviceMesh, *, whole: Iterable[nn.Parameter] = ()) -> None:
    """Shard the decoder's weights over a mesh; each layer is gathered when it runs.

    Args:
        whole: parameters of the decoder that are not sharded.

    Raises:
        InputError: the decoder is quantized: its packed weights cannot be sharded.
    """
    if packed := [name for name, value in decoder.named_parameters() if not value.is_floating_point()]:
        raise InputError(
            f"the decoder is quantized ({packed[0]}, ...), and packed weights cannot be sharded. Remove "
            "decoder.quantize from the recipe, or load the whole decoder on each device with trainer.strategy ddp"
        )
    # Layer by layer, so that only one layer is whole at a time; then the rest, such as the embeddings.
    core = decoder.get_decoder()
    kept = {*whole, *decoder.get_output_embeddings().parameters()}
    # The root comes last: fully_shard leaves out what its children have taken.
    for _, layer in find_layers(decoder):
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(core, mesh=mesh, ignored_params=kept)
    # Makes Hugging Face generate in step on all processes, even if their answers differ in length.
    decoder._is_fsdp_managed_module = True


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that shard the trained tensors, because saved states hold them whole.

    Raises:
        InputError: names a strategy to use instead.
    """
    # Stages 1 and 2 divide only optimizer and gradients, so each device still holds all trained tensors.
    name = type(strategy).__name__
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise InputError(
            f"trainer.strategy {name} would also shard the trained tensors. To shard only the frozen decoder: "
            f"trainer.strategy: {{class_path: {SHARDED}}}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        # Lightning turns all ways to choose a stage into this dictionary.
        stage = strategy.config.get("zero_optimization", {}).get("stage", 0) if strategy.config else 0
        if stage not in _WHOLE_STAGES:
            raise InputError(
                f"DeepSpeed stage {stage} would shard the trained tensors; use deepspeed_stage_2, or to shard the "
                f"frozen decoder: trainer.strategy: {{class_path: {SHARDED}}}"
            )
