"""The bind network and its resampler against their formulas."""

import pytest
import torch
from torch import nn

from bindllm.errors import InputError
from bindllm.model import bind_network
from bindllm.model.bind_network import BindConfig, BindNetwork, draw_count


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


@pytest.mark.parametrize("values", [{"depth": -1}, {"expansion": 0}, {"expansion": 10**18}])
def test_impossible_shapes_are_refused(values):
    with pytest.raises(InputError, match="depth must be 0 to 1000, expansion 1 to 1000"):
        BindConfig(**values)


@pytest.mark.parametrize(("values", "words"), [({"norm": "rsm"}, "'rms'"), ({"fusion": "men"}, "'mean'")])
def test_unknown_words_name_the_closest(values, words):
    with pytest.raises(InputError, match=f"Did you mean {words}"):
        BindConfig(**values)


def resampling(num_tokens: int = 4, *, width: int = 48, token_size: int = 5) -> BindNetwork:
    """A network whose norms and biases are random as well."""
    torch.manual_seed(0)
    config = BindConfig(depth=1, expansion=2, tokens=num_tokens)
    network = BindNetwork(6, width, config, token_size)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return network


def inputs(groups: int = 3, tokens: int = 7):
    """Embeddings [B, M, E] and tokens [B, M, n, C]: one group without tokens, one with padding."""
    embeddings = nn.functional.normalize(torch.randn(2, groups, 6), dim=-1)
    tokens = torch.randn(2, groups, tokens, 5)
    tokens[0, 1] = 0
    tokens[1, 2, 4:] = 0
    return embeddings, tokens


def rms(x, norm):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


def test_the_resampler_is_its_formula():
    network = resampling().eval()
    embeddings, tokens = inputs()
    found = network(embeddings, tokens)
    assert found.shape == (2, 3, 4, 48)
    own, resampler = network(embeddings), network.resampler
    assert own.shape == (2, 3, 1, 48)
    for b, m in ((b, m) for b in range(2) for m in range(3)):
        assert torch.equal(found[b, m, 0], own[b, m, 0])
        given = tokens[b, m][tokens[b, m].any(-1)]
        if not len(given):
            assert found[b, m, 1:].abs().max() == 0
            continue
        x = rms(given @ resampler.projection.weight.T + resampler.projection.bias, resampler.norm)
        z = resampler.latents
        for block in resampler.blocks:
            q = rms(z, block.norm) @ block.query.weight.T
            k, v = x @ block.key.weight.T, x @ block.value.weight.T
            # 48 has 8 heads of width 3
            heads = [
                (q[:, at : at + 3] @ k[:, at : at + 3].T / 3**0.5).softmax(-1) @ v[:, at : at + 3]
                for at in range(0, 24, 3)
            ]
            z = z + torch.cat(heads, dim=-1) @ block.out.weight.T
            n, ffn = rms(z, block.block.norm), block.block
            gate, up = n @ ffn.gate.weight.T, n @ ffn.up.weight.T
            z = z + (gate * torch.sigmoid(gate) * up) @ ffn.down.weight.T
        torch.testing.assert_close(found[b, m, 1:], rms(z, resampler.output_norm), atol=1e-5, rtol=1e-4)


def test_one_bind_token_has_no_resampler_and_reads_no_tokens():
    network = BindNetwork(6, 8, BindConfig(depth=1), 5)
    assert not [name for name in network.state_dict() if "resampler" in name]
    with pytest.raises(InputError, match="reads no encoder tokens"):
        network(torch.randn(2, 1, 6), torch.randn(2, 1, 3, 5))


def test_fewer_bind_tokens_are_the_first_ones():
    network = resampling(num_tokens=9).eval()
    embeddings, tokens = inputs()
    every = network(embeddings, tokens)
    for count in (1, 2, 5):
        network.num_tokens = count
        torch.testing.assert_close(network(embeddings, tokens), every[..., :count, :])
    for count in (0, 10):
        with pytest.raises(InputError, match=f"{count} bind tokens were asked for.*bind.tokens 9"):
            network.num_tokens = count
    assert network.num_tokens == 5


def test_bind_tokens_depend_on_no_other_group_and_on_no_padding():
    network = resampling().eval()
    embeddings, tokens = inputs()
    every = network(embeddings, tokens)
    padded = nn.functional.pad(tokens, (0, 0, 0, 5))
    torch.testing.assert_close(network(embeddings, padded), every)
    torch.testing.assert_close(network(embeddings[1:, 2:], tokens[1:, 2:, :4]), every[1:, 2:])


def test_training_drops_bind_tokens_at_random_and_repeats_with_the_seed():
    network = resampling(num_tokens=16).train()
    embeddings, tokens = inputs()

    def counts():
        torch.manual_seed(1)
        return [int(network(embeddings, tokens)[0, 0].any(-1).sum()) for _ in range(100)]

    drawn = counts()
    assert drawn == counts()
    assert {1, 2, 16} <= set(drawn)
    assert 30 < drawn.count(16) < 70
    network.drops_tokens = False
    assert set(counts()) == {16}
    network.drops_tokens = True
    with torch.no_grad():
        assert set(counts()) == {16}


def test_the_draw_is_half_all_and_half_log_uniform():
    torch.manual_seed(0)
    drawn = [draw_count(64) for _ in range(4000)]
    assert set(drawn) <= set(range(1, 65))
    shares = [sum(low <= n < high for n in drawn) / 4000 for low, high in ((1, 2), (2, 8), (8, 64), (64, 65))]
    # log2 of the borders, out of 6, in half of the draws
    for share, expected in zip(shares, (1 / 12, 2 / 12, 3 / 12, 1 / 2), strict=True):
        assert abs(share - expected) < 0.02


def test_one_group_in_eight_trains_with_its_first_token_only():
    network = BindNetwork(16, 48, BindConfig(depth=1, tokens="all"), token_size=24).train()
    torch.manual_seed(0)
    embeddings, tokens = torch.randn(4000, 16), torch.randn(4000, 5, 24)
    bind = network(embeddings, tokens)
    counts = bind.any(-1).sum(-1)
    assert set(counts.tolist()) == {1, 6}
    assert abs((counts == 1).float().mean().item() - 1 / 8) < 0.02
    torch.testing.assert_close(bind[counts == 6], network.eval()(embeddings, tokens)[counts == 6])
    network.train().drops_tokens = False
    assert network(embeddings[:50], tokens[:50]).any(-1).all()


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_parameter_has_a_finite_gradient_in_every_step(monkeypatch, count, with_tokens):
    """With several devices, a parameter without a gradient would end the run."""
    monkeypatch.setattr(bind_network, "draw_count", lambda _: count)
    network = resampling().train()
    embeddings, tokens = inputs()
    found = network(embeddings, tokens if with_tokens else None)
    assert found.shape == (2, 3, max(count, 2), 48)
    found.square().sum().backward()
    learns = count > 1 and with_tokens
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if "resampler" in name and "latents" not in name:
            assert bool(parameter.grad.abs().max() > 0) == learns, name
    assert network.resampler.latents.grad.abs().amax(-1).tolist()[count - 1 if learns else 0 :] == [0.0] * (
        4 - count if learns else 3
    )


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (2, 2, 7, 5), (2, 3, 5), (3, 2, 7, 5)])
def test_tokens_of_another_shape_are_refused(shape):
    network = resampling()
    with pytest.raises(InputError, match=r"expected \[2, 3, 'n', 5\]"):
        network(torch.randn(2, 3, 6), torch.zeros(shape))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokens": 0}, "bind.tokens is 0"),
        ({"tokens": 2.5}, "whole number"),
        ({"token_modalities": "image"}, "a list of modalities"),
        ({"token_modalities": []}, "a list of modalities"),
    ],
)
def test_impossible_tokens_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        BindConfig(**values)
