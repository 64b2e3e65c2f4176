"""The code of docs/python-training.md runs, with tiny parts in the places of the named ones."""

import re
from pathlib import Path

import pytest
import yaml

from bindllm.cli.recipes.recipe import quiet
from bindllm.training.optim import OptimConfig
from tiny import color_images, save_tiny_decoder

PAGE = Path(__file__).parents[1] / "docs/python-training.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NAMES = {
    '"checkpoints/smollm2-135m-instruct"': '"decoder", dtype="float32"',
    'EfficientNetLite("checkpoints/efficientnet-lite0")': "ColorEncoder()",
    "from bindllm.encoders import EfficientNetLite": "from tiny import ColorEncoder",
    "data/openmoji": "data/pictures",
    "logger=False": 'logger=False, accelerator="cpu", enable_progress_bar=False',
    "encoders=encoders)\nmodel.set": 'encoders=encoders, device="cpu")\nmodel.set',
}


@pytest.mark.slow
def test_the_code_of_the_page_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_decoder(tmp_path / "decoder")
    color_images(tmp_path / "data/pictures", per_color=5)
    code = "\n".join(text for language, text in BLOCKS if language == "python" and "push_to_hub" not in text)
    for name, tiny in NAMES.items():
        assert name in code
        code = code.replace(name, tiny)
    with quiet():
        exec(compile(code, str(PAGE), "exec"), {})
    assert Path("checkpoints/mine/bindllm.json").is_file()


def test_the_reference_has_every_name_that_the_pages_import():
    docs = PAGE.parent
    listed = re.findall(r"^::: .*?(\w+)$", (docs / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for page in docs.glob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for names in re.findall(r"^from bindllm[\w.]* import (.+)$", block, flags=re.MULTILINE):
                assert set(names.split(", ")) <= set(listed), page.name


def test_the_optimizer_of_the_page_exists():
    recipes = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
    OptimConfig(**next(recipe["model"]["optim"] for recipe in recipes if "model" in recipe))
