import json

import pytest

from bindllm.checkpoint.card import licences, write_card

MANIFEST = {
    "decoder": {"name": "checkpoints/some-decoder"},
    "encoders": [{"class_path": "my_lab.Encoder", "init_args": {"weights": "checkpoints/some-encoder"}}],
    "bind": {"depth": 3, "expansion": 4},
    "inject": {"kind": "value", "queries": True},
}


def test_the_card_names_parts_data_and_their_licences(tmp_path):
    source = {"packages": [{"licence": "CC BY-SA 4.0"}, {"licence": "BSD"}, {"licence": "BSD"}]}
    (tmp_path / "SOURCE.json").write_text(json.dumps(source))
    card = write_card(MANIFEST, data=[str(tmp_path)])
    assert f"| training data | `{tmp_path}` | CC BY-SA 4.0, BSD |" in card
    assert "| decoder | `checkpoints/some-decoder` | see its own page |" in card
    assert "| encoder | `my_lab.Encoder checkpoints/some-encoder` | see its own page |" in card


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"packages": [1]}', '{"packages": {"a": 1}}'])
def test_a_source_file_of_somebody_else_does_not_lose_the_model(tmp_path, content):
    (tmp_path / "SOURCE.json").write_text(content)
    assert licences(MANIFEST, data=[str(tmp_path)])[-1]["licence"] == "see its own page"
