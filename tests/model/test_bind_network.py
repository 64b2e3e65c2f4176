import pytest
import torch

from bindllm.errors import InputError
from bindllm.model.bind_network import BindConfig, BindNetwork


def test_it_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    network = BindNetwork(6, 4, BindConfig(depth=2, expansion=3))
    x = torch.nn.functional.normalize(torch.randn(5, 2, 6), dim=-1)
    z = x @ network.projection.weight.T + network.projection.bias
    for block in network.blocks:
        n = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6) * block.norm.weight
        gate, up = n @ block.gate.weight.T, n @ block.up.weight.T
        z = z + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T
    torch.testing.assert_close(network(x), z, atol=1e-5, rtol=1e-5)


def test_the_older_bridge_has_layer_norms_and_biases():
    torch.manual_seed(0)
    network = BindNetwork(6, 4, BindConfig(depth=1, expansion=3, norm="layer", bias=True))
    (block,) = network.blocks
    assert not any(layer.bias.any() for layer in (block.gate, block.up, block.down))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 2, 6)
    z = network.projection(x)
    n = (z - z.mean(-1, keepdim=True)) * torch.rsqrt(z.var(-1, keepdim=True, unbiased=False) + 1e-5)
    n = n * block.norm.weight + block.norm.bias
    gate, up = (n @ layer.weight.T + layer.bias for layer in (block.gate, block.up))
    expected = z + (gate * torch.sigmoid(gate) * up) @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("legacy", "published"), [(False, 608_322_560), (True, 608_445_440)])
def test_sizes_are_those_published_for_7b(legacy, published):
    with torch.device("meta"):
        network = BindNetwork(1024, 4096, BindConfig(norm="layer" if legacy else "rms", bias=legacy))
    # The published counts include queries (32 x 4096) and gates (32 x 32).
    assert sum(p.numel() for p in network.parameters()) == published - 32 * 4096 - 32 * 32


def test_outputs_start_at_unit_size():
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(64, 256), dim=-1)
    for depth in (0, 3):
        size = BindNetwork(256, 128, BindConfig(depth=depth))(x).square().mean().sqrt()
        assert 0.8 < size < 2


@pytest.mark.parametrize("values", [{"depth": -1}, {"expansion": 0}])
def test_impossible_shapes_are_refused(values):
    with pytest.raises(InputError, match="at least"):
        BindConfig(**values)


@pytest.mark.parametrize(("values", "words"), [({"norm": "rsm"}, "'rms'"), ({"fusion": "men"}, "'mean'")])
def test_unknown_words_name_the_closest(values, words):
    with pytest.raises(InputError, match=f"Did you mean {words}"):
        BindConfig(**values)
