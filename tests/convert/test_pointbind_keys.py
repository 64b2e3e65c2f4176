"""Point-Bind's published checkpoints: every tensor accounted for, and the folder that is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bindllm.convert.pointbind import convert_pointbind, find_variant, imagebind_part, rename_pointbind
from bindllm.encoders.pointbind.networks import build_network, fold_norms
from bindllm.errors import CheckpointError
from goldens import hollow, keys

VARIANTS = {"pointbind_pointbert": "point-bert", "pointbind_i2pmae": "i2p-mae", "imagebind_w3d": "point-bert"}


@pytest.mark.parametrize("table", VARIANTS)
def test_every_tensor_is_accounted_for_and_fills_the_network(table):
    state = hollow(table)
    variant, tensors, report = rename_pointbind(state)
    assert variant == find_variant(state) == VARIANTS[table]
    assert report.unknown == []
    assert len(report.mapped) + len(report.dropped) == len(state)
    network = build_network({"variant": variant}, source="test").state_dict()
    folded = fold_norms(tensors)
    assert {name: t.shape for name, t in folded.items()} == {name: t.shape for name, t in network.items()}


@pytest.mark.parametrize("table", VARIANTS)
def test_what_is_dropped_is_imagebind_or_has_no_use(table):
    _, _, report = rename_pointbind(hollow(table))
    inside = set(imagebind_part(hollow(table)))
    others = {name for name, _ in report.dropped if name.removeprefix("bind.") not in inside}
    assert len(report.dropped) == len(inside) + len(others)
    last = {name.split(".")[-1] for name in others}
    assert last == {"log_logit_scale", "num_batches_tracked"} | ({"logit_scale"} & set(keys(table)))
    assert all(why for _, why in report.dropped)


@pytest.mark.parametrize("table", VARIANTS)
def test_the_imagebind_inside_is_whole(table):
    part = imagebind_part(hollow(table))
    assert {name: tuple(tensor.shape) for name, tensor in part.items()} == keys("imagebind_huge")


def test_imagebind_alone_is_refused():
    with pytest.raises(
        CheckpointError, match=r"huge.pth is not a checkpoint of Point-Bind.*pointbind_i2pmae.pt"
    ):
        rename_pointbind(hollow("imagebind_huge"), source="huge.pth")
    assert find_variant({}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("point_encoder.norm.bias"), "missing norm.bias"),
        (lambda s: s.pop("bind.modality_head_point.2.weight"), "missing head.linear.weight"),
        (lambda s: s.update({"bind.modality_heads.point.7.weight": torch.ones(1)}), "1 unknown tensors: bind.mo"),
        (lambda s: s.update({"point_encoder.mask_token": torch.ones(1)}), "unknown tensors: point_encoder.mask_token"),
        (lambda s: s.update({"pc_projection": torch.ones(384, 512)}), r"head.projection has shape \[384, 512\]"),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused_and_nothing_is_written(tmp_path, change, words):
    state = hollow("pointbind_pointbert")
    change(state)
    with pytest.raises(CheckpointError, match=words):
        convert_pointbind(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_that_is_written(tmp_path):
    state = {
        name: torch.full(tensor.shape, 0.5) if "point" in name or name == "pc_projection" else tensor
        for name, tensor in hollow("pointbind_i2pmae").items()
    }
    state["pc_projection"] = torch.arange(384 * 512.0).view(384, 512)
    folder = tmp_path / "pointbind"
    report = convert_pointbind(state, folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md", "SOURCE.json", "config.json", "conversion.tsv", "model.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "config.json").read_text()) == {"model": "pointbind", "variant": "i2p-mae"}
    assert "CC-BY-NC 4.0" in (folder / "README.md").read_text()
    assert "CC-BY-NC 4.0" in json.loads((folder / "SOURCE.json").read_text())["packages"][0]["license"]
    assert len((folder / "conversion.tsv").read_text().splitlines()) == 1 + len(state)
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == len(report.mapped)
    assert torch.equal(tensors["head.projection"], state["pc_projection"])
    assert tensors["scales.2.groups.third.weight"].shape == (384, 384)

    # A second conversion replaces the first; anything else there stays.
    state["pc_projection"] = torch.zeros(384, 512)
    convert_pointbind(state, folder)
    assert not load_file(folder / "model.safetensors")["head.projection"].any()
    (folder / "conversion.tsv").unlink()
    with pytest.raises(CheckpointError, match="is not a converted folder"):
        convert_pointbind(state, folder)
    assert (folder / "model.safetensors").is_file()
