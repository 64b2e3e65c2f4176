"""Published ImageBind names -> a converted folder: every tensor accounted for, nothing guessed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bindllm.convert.imagebind import RULES, convert_imagebind
from bindllm.convert.keymap import Rule, rename
from bindllm.encoders.imagebind.config import HUGE, TRUNKS, read_config
from bindllm.encoders.imagebind.network import Trunk
from bindllm.errors import CheckpointError
from bindllm.model.card import licenses
from goldens import hollow, keys
from imagebind_small import HEADS, published_heads, small_state, write_small_imagebind

POINT = (
    Rule(r"(bind[.])?modality_(head|postprocessor)s?[._]point[.].*", None, "of the point trunk"),
    Rule(r"(point_encoder|point_trunk)[.].*|pc_projection|logit_scale", None, "of the point trunk"),
)


def convert(state, folder, **changes):
    return convert_imagebind(state, folder, **{"tokenizer_file": None, "heads": HEADS, **changes})


def test_every_published_name_gets_the_name_and_shape_that_our_networks_have():
    ours, report = rename(hollow("imagebind_huge"), RULES)
    assert report.unknown == []
    assert [name for name, _ in report.dropped] == ["modality_preprocessors.text.mask"]
    with torch.device("meta"):
        networks = {name: Trunk(name, size, HUGE.embedding_size) for name, size in HUGE.trunks.items()}
    expected = {
        f"{trunk}.{name}": tensor.shape
        for trunk, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    assert len(ours) == len(keys("imagebind_huge")) - 1
    # The published count is of parameters and buffers, the mask among them.
    assert round(sum(tensor.numel() for tensor in ours.values()) / 1e6) == 1201


def test_the_heads_of_the_published_widths_are_known():
    assert published_heads() == HEADS
    assert {name: size.num_heads for name, size in HUGE.trunks.items()} == {
        "vision": 16, "text": 16, "audio": 12, "depth": 8, "thermal": 12, "imu": 8,
    }  # fmt: skip


def test_a_folder_holds_each_trunk_once_with_its_values(tmp_path):
    state, folder = small_state(), tmp_path / "imagebind"
    (tmp_path / "words.json").write_text("{}")
    report = convert(state, folder, tokenizer_file=tmp_path / "words.json")
    assert len(report.mapped) == len(state) - 1
    names = {"README.md", "SOURCE.json", "config.json", "conversion.tsv", "tokenizer.json"}
    assert {file.name for file in folder.iterdir()} == names | {f"{trunk}.safetensors" for trunk in TRUNKS}
    assert len((folder / "conversion.tsv").read_text().splitlines()) == 1 + len(state)
    audio = load_file(folder / "audio.safetensors")
    prefix = "modality_trunks.audio.blocks.1"
    for ours, theirs in {
        "blocks.1.attention.bias_value": state[f"{prefix}.attn.bias_v"].flatten(),
        "blocks.1.attention.qkv.weight": state[f"{prefix}.attn.in_proj_weight"],
        "blocks.1.down.bias": state[f"{prefix}.mlp.fc2.bias"],
        "stem.positions": state["modality_preprocessors.audio.pos_embedding_helper.pos_embed"][0],
        "log_scale": state["modality_postprocessors.audio.1.log_logit_scale"],
    }.items():
        assert torch.equal(audio[ours], theirs), ours
    config = read_config(folder)
    assert config.embedding_size == 32
    assert config.sizes("imu") == {"embedding_size": 32, "width": 64, "num_blocks": 2, "num_heads": 8}


def test_the_license_of_the_weights_reaches_every_card(tmp_path):
    folder = write_small_imagebind(tmp_path / "imagebind")
    assert "CC-BY-NC 4.0" in (folder / "README.md").read_text()
    entry = {"class_path": "bindllm.encoders.imagebind.ImageBind", "init_args": {"weights": str(folder)}}
    rows = licenses({"decoder": {"name": "somewhere"}, "encoders": [entry]})
    assert rows[1]["license"].startswith("CC-BY-NC 4.0")


@pytest.mark.parametrize("table", ["pointbind_pointbert", "pointbind_i2pmae", "imagebind_w3d"])
def test_larger_checkpoints_are_accounted_for_with_the_rules_of_their_other_parts(table):
    ours, report = rename(hollow(table), [*POINT, *RULES])
    assert report.unknown == []
    assert ours.keys() == rename(hollow("imagebind_huge"), RULES)[0].keys()
    assert rename(hollow(table), RULES)[1].unknown != []


def test_a_prefixed_checkpoint_makes_the_same_folder(tmp_path):
    state = {f"bind.{name}": tensor for name, tensor in small_state().items()}
    convert({**state, "logit_scale": torch.ones(())}, tmp_path / "a", rules=POINT)
    convert(small_state(), tmp_path / "b")
    for file in ("vision.safetensors", "text.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_some_trunks_alone_are_enough(tmp_path):
    state = {name: tensor for name, tensor in small_state().items() if ".depth." in name or ".imu." in name}
    convert(state, tmp_path / "part")
    assert read_config(tmp_path / "part").modalities == ("depth", "imu")


def test_unknown_missing_unexpected_and_misshapen_tensors_are_refused(tmp_path):
    prefix, ours = "modality_trunks.vision.blocks", "vision.blocks"
    for change, words in (
        ({"modality_trunks.taste.norm": torch.ones(1)}, "1 unknown tensors: modality_trunks.taste.norm"),
        ({f"{prefix}.0.norm_1.bias": None}, f"missing {ours}.0.norm_1.bias"),
        ({f"{prefix}.7.norm_1.bias": torch.ones(64)}, f"unexpected {ours}.7.norm_1.bias"),
        (
            {f"{prefix}.0.mlp.fc1.weight": torch.ones(9, 64)},
            r"blocks.0.up.weight has shape \[9, 64\], expected \[256, 64\]",
        ),
        ({"modality_heads.imu.2.weight": torch.ones(32, 64)}, "both become imu.head.project.weight"),
        ({"modality_heads.vision.2.weight": torch.ones(31, 64)}, "end in different widths"),
        ({"modality_preprocessors.taste.cls_token": torch.ones(1)}, "unexpected taste.stem.class_token"),
    ):
        state = {name: tensor for name, tensor in {**small_state(), **change}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=words):
            convert(state, tmp_path / "never", source="some.pth")
    with pytest.raises(CheckpointError, match=r"some.pth is not the published ImageBind: it holds no tensor"):
        convert({}, tmp_path / "never", source="some.pth")
    assert list(tmp_path.iterdir()) == []


def test_heads_are_never_guessed(tmp_path):
    with pytest.raises(CheckpointError, match="its vision trunk is 64 wide"):
        convert(small_state(), tmp_path / "never", heads=None)
    with pytest.raises(CheckpointError, match="do not determine the number of attention heads \\(5 given\\)"):
        convert(small_state(), tmp_path / "never", heads={**HEADS, "audio": 5})


def test_only_an_earlier_conversion_is_replaced(tmp_path):
    folder = write_small_imagebind(tmp_path / "imagebind")
    convert({n: t for n, t in small_state().items() if ".imu." in n}, folder)
    assert json.loads((folder / "config.json").read_text())["trunks"].keys() == {"imu"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("text")
    with pytest.raises(CheckpointError, match="is not a converted folder"):
        convert(small_state(), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "text"


def test_the_stored_precision_is_kept(tmp_path):
    state = {name: tensor.half() for name, tensor in small_state().items() if ".imu." in name}
    convert(state, tmp_path / "half")
    with safe_open(tmp_path / "half" / "imu.safetensors", framework="pt") as tensors:
        assert tensors.get_tensor("stem.weight").dtype == torch.float16


def test_shapes_and_numbers_that_cannot_be_are_refused(tmp_path):
    norm, positions = "modality_heads.imu.0.weight", "modality_preprocessors.imu.pos_embed"
    for name, value, words in (
        (positions, torch.tensor(1.0), r"imu\.stem\.positions has shape \[\]"),
        (norm, torch.full((64,), float("nan")), r"not finite in imu\.head\.norm\.weight"),
        (norm, torch.ones(64, dtype=torch.int32), r"imu\.head\.norm\.weight \(int32\)"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert(small_state() | {name: value}, tmp_path / "imagebind")
    assert not (tmp_path / "imagebind").exists()
