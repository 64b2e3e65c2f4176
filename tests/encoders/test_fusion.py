from pathlib import Path

import pytest
import torch

from bindllm.encoders.fusion import common_size, fuse
from bindllm.errors import EncoderError, InputError
from tiny import ColorEncoder


def test_fused_embedding_is_the_normalized_weighted_mean():
    embeddings = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    # Mean (3, 4, 0) / 7 before normalizing; (0.6, 0.8, 0) after.
    torch.testing.assert_close(fuse(embeddings, torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8, 0.0]))


def test_only_ratios_of_weights_count():
    embeddings = torch.nn.functional.normalize(torch.randn(3, 5), dim=-1)
    weights = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(fuse(embeddings, weights), fuse(embeddings, weights * 1000))


def test_a_single_embedding_keeps_its_bits():
    embedding = torch.nn.functional.normalize(torch.randn(1, 7), dim=-1)
    assert torch.equal(fuse(embedding, torch.tensor([0.3])), embedding[0])


def test_opposite_embeddings_are_refused():
    with pytest.raises(InputError, match="cancel out"):
        fuse(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "weights", [[1.0, 0.0], [0.0, 0.0], [2.0, -1.0], [-1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]]
)
def test_weights_that_are_not_finite_and_above_zero_are_refused(weights, normalize):
    with pytest.raises(InputError, match="finite and above 0, not \\["):
        fuse(torch.eye(2), torch.tensor(weights), normalize=normalize)
    with pytest.raises(InputError, match="finite and above 0"):
        fuse(torch.eye(2)[:1], torch.tensor([min(weights[1], 0.0)]), normalize=normalize)


def test_the_published_mean_is_not_normalized_again():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # Shares 1 / 1.500001 and 0.5 / 1.500001.
    found = fuse(embeddings, torch.tensor([1.0, 0.5]), normalize=False)
    torch.testing.assert_close(found, torch.tensor([0.66666622, 0.33333311]), atol=1e-8, rtol=1e-7)
    single = fuse(embeddings[:1], torch.tensor([0.5]), normalize=False)
    assert single[0].item() == pytest.approx(0.5 / 0.500001, abs=1e-7)
    assert single[0].item() < 1
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert fuse(opposite, torch.ones(2), normalize=False).tolist() == [0, 0]


@pytest.mark.parametrize(("rows", "weights"), [(0, 0), (2, 1)])
def test_shapes_that_do_not_fit_are_refused(rows, weights):
    with pytest.raises(InputError, match="expected embeddings"):
        fuse(torch.ones(rows, 3), torch.ones(weights))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("config", {"weights": Path("w")}, "config must be a dict that JSON gives back unchanged"),
        ("config", None, "config must be a dict"),
        (
            "config",
            {"depth": 3},
            "config must be keywords of the constructor, not .* unexpected keyword argument 'depth'",
        ),
        ("modalities", "image", "modalities must be a tuple of names"),
        ("embedding_size", 16.0, "embedding_size must be an int above 0"),
        ("embed", None, "embed must be a method"),
    ],
)
def test_encoders_with_wrong_members_are_refused_before_any_work(name, value, problem):
    # A run would train for hours, and then could not write its checkpoint, or nobody could load it.
    members = {"embedding_size": 16, "config": {}, "__init__": lambda self: None, name: value}
    broken = type("Broken", (ColorEncoder,), members)
    with pytest.raises(EncoderError, match=f"Broken breaks the contract of an encoder: .*{problem}"):
        common_size([broken()])


def test_a_name_in_place_of_an_encoder_is_refused():
    with pytest.raises(EncoderError, match="str breaks the contract of an encoder: it lacks modalities"):
        common_size(["efficientnet"])
