"""Tokens of encoders: how many, of what scale, where on their grid, and which encoders have them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bindllm.encoders.tokens import (
    MOST_TOKENS,
    add_positions,
    flatten_tokens,
    group_tokens,
    reduce_tokens,
    token_size,
)
from bindllm.errors import InputError
from tiny import ColorEncoder, TokenEncoder


class Words(TokenEncoder):
    modalities = ("text",)


@pytest.mark.parametrize(
    ("grid", "kept"),
    [
        ((7, 7), (7, 7)),
        ((16, 16), (16, 16)),
        ((27, 27), (16, 16)),
        ((10, 40), (10, 25)),
        ((3, 12, 19), (3, 9, 9)),
        ((15, 16, 16), (6, 6, 6)),
        ((1212,), (256,)),
        ((2, 10_000), (2, 128)),
    ],
)
def test_large_grids_are_averaged_and_small_ones_kept(grid, kept):
    tokens = torch.randn(*grid, 4, generator=torch.Generator().manual_seed(0))
    found = reduce_tokens(tokens)
    assert (found.shape, found.dtype) == ((*kept, 4), torch.float16)
    torch.testing.assert_close(found.float().square().mean(-1), torch.ones(kept), atol=2e-3, rtol=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_at_most_so_many_tokens_and_no_axis_is_lost(grid):
    kept = reduce_tokens(torch.ones(*grid, 2)).shape[:-1]
    assert math.prod(kept) <= MOST_TOKENS
    assert all(1 <= small <= large for small, large in zip(kept, grid, strict=True))
    assert len(kept) == len(grid)


def test_averages_are_those_of_the_cells():
    tokens = torch.arange(1.0, 1025.0).view(32, 32, 1) * torch.tensor([1.0, 2.0])
    cell = tokens[:2, 2:4].mean((0, 1))
    torch.testing.assert_close(
        reduce_tokens(tokens)[0, 1].float(), cell / cell.square().mean().sqrt(), atol=2e-3, rtol=0
    )


def test_scale_does_not_matter_and_half_precision_does_not_overflow():
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    for scale in (1e-2, 1e6):
        torch.testing.assert_close(flatten_tokens(scale * tokens), flatten_tokens(tokens), atol=2e-3, rtol=0)
    assert torch.equal(reduce_tokens(torch.zeros(2, 4)), torch.zeros(2, 4, dtype=torch.float16))


@pytest.mark.parametrize("grid", [(6,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("width", [12, 13, 48])
def test_each_cell_of_the_grid_has_its_own_position(grid, width):
    positioned = add_positions(torch.zeros(*grid, width, dtype=torch.float16))
    assert positioned.shape == (math.prod(grid), width)
    assert torch.pdist(positioned.double()).min() > 1e-3
    # A row of zeros means that there is no token.
    assert positioned.norm(dim=1).min() > 0
    # Neighbors along one axis differ in the channels of this axis only.
    share = 2 * (width // (2 * len(grid)))
    step = (positioned.view(*grid, width)[(0,) * len(grid)] - positioned[1]).abs()
    changed = step.nonzero().flatten()
    assert changed.min() >= share * (len(grid) - 1)
    assert changed.max() < share * len(grid)


def test_positions_made_in_inference_mode_take_part_in_training():
    with torch.inference_mode():
        add_positions(torch.zeros(5, 9, 22, dtype=torch.float16))
    positioned = add_positions(torch.zeros(5, 9, 22, dtype=torch.float16))
    scale = torch.ones(22, requires_grad=True)
    (positioned * scale).sum().backward()
    assert torch.equal(scale.grad, positioned.sum(0))


def test_groups_of_unequal_media():
    one, two = (reduce_tokens(torch.randn(n, 4)) for n in (2, 3))
    found = group_tokens([one, None, two, one, None], [1, 1, 2, 1], 4)
    assert found.shape == (4, 5, 4)
    assert torch.equal(found[2], torch.cat([add_positions(two), add_positions(one)]))
    assert torch.equal(found[0, :2], add_positions(one))
    assert not found[0, 2:].any()
    assert not found[[1, 3]].any()
    assert group_tokens([], [], 4).shape == (0, 1, 4)


def test_the_width_of_a_model():
    assert token_size([TokenEncoder(width=8)], ["image"]) == 8
    assert token_size([ColorEncoder(), Words(width=6)], ["text"]) == 6
    with pytest.raises(InputError) as caught:
        token_size([ColorEncoder(), Words()], ["image"])
    assert "ColorEncoder has no tokens of image media" in str(caught.value)
    assert "Encoders of this model with tokens: Words for text." in str(caught.value)
    with pytest.raises(InputError, match="with tokens: none"):
        token_size([ColorEncoder()], ["image"])
    with pytest.raises(InputError, match="must have one width, not: image 8, text 6"):
        token_size([TokenEncoder(width=8), Words(width=6)], ["image", "text"])
    with pytest.raises(InputError, match="not: no modality"):
        token_size([TokenEncoder()], [])
    with pytest.raises(InputError, match="no encoder serves the modality 'audio'"):
        token_size([TokenEncoder()], ["audio"])
