"""What is refused; that a shared decoder takes the same steps is in test_devices.py."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from bindllm.errors import InputError
from bindllm.training.strategies import (
    ShardedDecoder,
    check_strategy,
    shard_decoder,
)
from tiny import tiny_decoder


def deepspeed(stage: int) -> DeepSpeedStrategy:
    """As Lightning makes it, which needs the package."""
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy(), deepspeed(3)])
def test_strategies_that_cut_what_is_trained_are_refused_and_ours_is_named(strategy):
    with pytest.raises(InputError, match=r"bindllm\.training\.strategies\.ShardedDecoder"):
        check_strategy(strategy)


@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy("cpu"), DDPStrategy(), ShardedDecoder(), deepspeed(2)]
)
def test_strategies_that_leave_it_whole_are_not(strategy):
    check_strategy(strategy)


def test_a_quantized_decoder_cannot_be_cut_and_stays_as_it_was():
    decoder = tiny_decoder()
    projection = decoder.get_decoder().layers[0].mlp.up_proj
    projection.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    before = type(decoder.get_decoder().layers[0])
    with pytest.raises(
        InputError, match=r"quantized \(model\.layers\.0\.mlp\.up_proj\.weight.*trainer\.strategy ddp"
    ):
        shard_decoder(decoder, mesh=None)
    assert type(decoder.get_decoder().layers[0]) is before


@pytest.mark.parametrize(
    ("nodes", "across_nodes", "shape", "names"),
    [(1, False, (8,), ()), (4, True, (32,), ()), (4, False, (4, 8), ("node", "device"))],
)
def test_the_decoder_is_spread_over_a_node_or_over_all_of_them(
    nodes, across_nodes, shape, names, monkeypatch
):
    made = {}

    def init_device_mesh(kind, shape, mesh_dim_names=()):
        made.update(kind=kind, shape=shape, names=mesh_dim_names)
        return {"device": "of this node"} if mesh_dim_names else "of all"

    monkeypatch.setattr("bindllm.training.strategies.init_device_mesh", init_device_mesh)
    strategy = ShardedDecoder(across_nodes=across_nodes, parallel_devices=[torch.device("cpu")] * 8)
    strategy.num_nodes = nodes
    strategy.cluster_environment = SimpleNamespace(
        local_rank=lambda: 0, world_size=lambda: 8 * nodes, global_rank=lambda: 0
    )
    assert strategy._mesh() == ("of this node" if names else "of all")
    assert made == {"kind": "cpu", "shape": shape, "names": names}
