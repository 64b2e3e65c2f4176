"""Renaming by a table: first rule wins, nothing gets lost, nothing is overwritten."""

import pytest
import torch

from bindllm.convert.keymap import Rule, rename, require_weights
from bindllm.errors import CheckpointError

RULES = [
    Rule(r"blocks\.(\d+)\.w", r"layers.\1.weight", change=lambda tensor: tensor.T),
    Rule(r"blocks\..*", None, "not needed"),
    Rule(r"(gate|query)", r"\1"),
]


def test_every_tensor_is_mapped_changed_dropped_or_unknown():
    given = {
        "blocks.3.w": torch.ones(2, 5),
        "blocks.3.cache": torch.ones(1),
        "gate": torch.tensor(1.0),
        "odd": torch.ones(1),
    }
    ours, report = rename(given, RULES)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        "layers.3.weight": (5, 2),
        "gate": (),
    }
    assert report.mapped == [("blocks.3.w", "layers.3.weight", (2, 5)), ("gate", "gate", ())]
    assert report.dropped == [("blocks.3.cache", "not needed")]
    assert report.unknown == ["odd"]
    with pytest.raises(CheckpointError, match="some.pth holds 1 unknown tensors: odd"):
        report.require_complete("some.pth")
    lines = report.text().splitlines()
    assert len(lines) == 1 + len(given)
    assert "blocks.3.w\tmapped\tlayers.3.weight\t2x5" in lines
    assert "gate\tmapped\tgate\tscalar" in lines


def test_a_rule_matches_the_whole_name_only():
    assert rename({"gate_proj": torch.ones(1)}, RULES)[1].unknown == ["gate_proj"]


def test_two_tensors_never_share_a_name():
    with pytest.raises(CheckpointError, match="both become x"):
        rename({"a": torch.ones(1), "b": torch.ones(1)}, [Rule("[ab]", "x")])


@pytest.mark.parametrize(("shape", "told"), [((), r"\[\]"), ((5,), r"\[5\]")])
def test_a_shape_that_a_rule_cannot_change_is_refused_by_name(shape, told):
    rules = [Rule("w", "weight", change=lambda tensor: tensor.unflatten(0, (2, -1)))]
    with pytest.raises(CheckpointError, match=rf"^w has shape {told}, impossible for this name"):
        rename({"w": torch.ones(shape)}, rules)


def test_only_plain_finite_numbers_are_weights():
    good = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.empty(3, device="meta")}
    require_weights(good, source="x.pth")
    for bad, words in (
        (torch.ones(2, dtype=torch.int64), r"not plain floating-point numbers: c \(int64\)"),
        (torch.ones(2, dtype=torch.complex64), r"c \(complex64\)"),
        (torch.ones(2).to(torch.float8_e4m3fn), r"c \(float8_e4m3fn\)"),
        (torch.ones(2, 2).to_sparse(), r"c \(float32\)"),
        (torch.tensor([1.0, float("inf")]), "not finite in c: it is damaged"),
        (torch.tensor(float("nan")), "not finite in c"),
    ):
        with pytest.raises(CheckpointError, match=rf"^x.pth holds .*{words}"):
            require_weights({**good, "c": bad}, source="x.pth")
