import json

import pytest

from bindllm.model.card import licenses, write_card

MANIFEST = {
    "decoder": {"name": "checkpoints/some-decoder"},
    "encoders": [{"class_path": "my_lab.Encoder", "init_args": {"weights": "checkpoints/some-encoder"}}],
    "bind": {"depth": 3, "expansion": 4},
    "inject": {"kind": "value", "queries": True},
}


def test_the_card_names_parts_data_and_their_licenses(tmp_path):
    source = {"packages": [{"license": "CC BY-SA 4.0"}, {"license": "BSD"}, {"license": "BSD"}]}
    (tmp_path / "SOURCE.json").write_text(json.dumps(source))
    card = write_card(MANIFEST, data=[str(tmp_path)])
    assert f"| training data | `{tmp_path}` | CC BY-SA 4.0, BSD |" in card
    table = tmp_path / "train.jsonl"
    table.write_text("")
    assert f"| training data | `{table}` | CC BY-SA 4.0, BSD |" in write_card(MANIFEST, data=[str(table)])
    assert "| decoder | `checkpoints/some-decoder` | see its own page |" in card
    assert "| encoder | `my_lab.Encoder checkpoints/some-encoder` | see its own page |" in card


def test_a_tuned_encoder_keeps_the_license_of_its_weights(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    inner = {"class_path": "bindllm.encoders.ImageBind", "init_args": {"weights": str(tmp_path)}}
    settings = {"encoder": inner, "blocks": None, "rank": 4, "modality": "image"}
    entry = {"class_path": "bindllm.encoders.trainable.Tuned", "init_args": settings, "base": "00"}
    card = write_card({**MANIFEST, "encoders": [entry]})
    assert f"| encoder | `bindllm.encoders.ImageBind {tmp_path}` | cc-by-nc-4.0 |" in card
    plain = {"class_path": "bindllm.encoders.HuggingFace", "init_args": {"name": str(tmp_path)}}
    assert f"`bindllm.encoders.HuggingFace {tmp_path}` | cc-by-nc-4.0 |" in write_card(
        {**MANIFEST, "encoders": [plain]}
    )


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"packages": [1]}', '{"packages": {"a": 1}}'])
def test_a_source_file_of_somebody_else_does_not_lose_the_model(tmp_path, content):
    (tmp_path / "SOURCE.json").write_text(content)
    assert licenses(MANIFEST, data=[str(tmp_path)])[-1]["license"] == "see its own page"


def test_the_card_says_what_of_the_decoder_is_tuned():
    assert "adapter" not in write_card(MANIFEST).lower()
    adapter = {"rank": 16, "alpha": None, "bias": True, "norm": False}
    card = write_card({**MANIFEST, "adapter": adapter})
    assert "frozen language model, and an adapter that tunes that model." in card
    assert "LoRA of rank 16 and scale 1, new biases True, tuned norms False" in card
    assert "rank 16 and scale 2," in write_card({**MANIFEST, "adapter": {**adapter, "alpha": 32.0}})
    variant = {**adapter, "alpha": 8.0, "dora": True, "rslora": True}
    card = write_card({**MANIFEST, "adapter": variant, "decoder": {**MANIFEST["decoder"], "quantize": "nf4"}})
    assert "DoRA of rank 16 and scale 2," in card
    assert "Trained on the decoder in nf4." in card


def test_only_data_that_are_named_are_said_to_stand_above():
    assert "learned from its training data and" in write_card(MANIFEST)
    assert "learned from the data named above and" in write_card(MANIFEST, data=["data/pictures"])
