"""The recipes on easy-VQA, one after the other on tiny parts: questions after captions, and preferences after both."""

import json
from pathlib import Path

import pytest
import yaml

from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.quickstart import ASSETS, assets_of, easyvqa
from easyvqa_parts import published
from tiny import ColorEncoder, save_tiny_decoder
from tiny_run import run

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("easyvqa")
    save_tiny_decoder(folder / "checkpoints/smollm2-135m-instruct")
    (folder / "data/easyvqa").mkdir(parents=True)
    easyvqa.build([published(folder)], folder / "data/easyvqa")
    return folder


def save_openmoji() -> None:
    """Write the folder that the OpenMoji recipe leaves, untrained."""
    config = yaml.safe_load((RECIPES / "openmoji.yaml").read_text())["model"]
    parts = {"bind": BindConfig(**config["bind"]), "inject": InjectConfig(**config["inject"])}
    decoder = DecoderConfig(**config["decoder"])
    model = BindLLM.build(decoder, device="cpu", encoders=[ColorEncoder()], **parts)
    model.save_pretrained("checkpoints/openmoji")


def fit(name: str) -> dict:
    """Run a recipe, as it is but for its encoder and length; return its metrics."""
    recipe = yaml.safe_load((RECIPES / name).read_text())
    recipe["model"]["encoders"] = [{"class_path": "tiny.ColorEncoder"}]
    recipe["trainer"] |= {"accelerator": "cpu", "max_epochs": 1, "max_steps": 2, "logger": False}
    recipe["trainer"] |= {"val_check_interval": 1.0, "limit_train_batches": 2}
    assert run("fit", recipe) == 0
    return json.loads(Path(recipe["output"], "metrics.json").read_text())["tasks"]["answers"]


def test_each_stage_continues_from_the_one_before(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    # In two steps of GRPO all answers may have the same reward.
    monkeypatch.setattr("bindllm.training.optim.ZeroGradientCheck.finish_epoch", lambda self: None)
    save_openmoji()
    for name in ("easyvqa.yaml", "easyvqa-dpo.yaml", "easyvqa-grpo.yaml"):
        metrics = fit(name)
        counts = {"color": 8, "yes/no color": 8, "yes/no not color": 8}
        assert metrics["model"]["count_by_type"] == counts
        assert set(metrics) == {"model", "no_media", "shuffled_media", "majority_answer"}
        guessed = metrics["majority_answer"]["by_type"]
        # Two of three images are not red, and the published test images are as the training ones.
        assert guessed["yes/no color"] == guessed["yes/no not color"] == pytest.approx(5 / 8)


def test_fetch_finds_what_the_recipe_needs():
    recipe = yaml.safe_load((RECIPES / "easyvqa.yaml").read_text())
    assert assets_of(recipe) == ["smollm2-135m-instruct", "efficientnet-lite0", "easyvqa"]
    assert ASSETS["easyvqa"].folder == "data/easyvqa"


def test_the_questions_are_asked_of_the_parts_that_the_openmoji_recipe_trained():
    first, second = (
        yaml.safe_load((RECIPES / name).read_text()) for name in ("openmoji.yaml", "easyvqa.yaml")
    )
    assert second["model"]["init_from"] == first["output"]
    for part in ("decoder", "encoders", "bind", "inject"):
        assert second["model"][part] == first["model"][part]
