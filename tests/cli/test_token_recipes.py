"""Recipes with more than one bind token, from `embed` to `generate`."""

import json
from pathlib import Path

import pytest

from bindllm.cli import main
from tiny_run import run, tiny_recipe, with_bind_tokens

pytestmark = pytest.mark.usefixtures("work")


def recipe_of(parts, tokens: int, encoder: str = "TokenEncoder") -> dict:
    recipe = tiny_recipe(parts, trainer={"max_epochs": 1, "limit_train_batches": 2})
    recipe = with_bind_tokens(recipe, tokens)
    recipe["model"]["encoders"] = [{"class_path": f"tiny.{encoder}"}]
    return recipe


def test_tokens_are_precomputed_checked_trained_on_and_generated_with(parts, capsys):
    assert run("embed", recipe_of(parts, 1)) == 0
    assert "28 encoded, 0 from the store" in capsys.readouterr().out
    stored = {file: file.read_bytes() for file in Path("data").rglob("embeddings-*.arrow")}
    assert not list(Path("data").rglob("tokens-*"))
    recipe = recipe_of(parts, 4)
    assert run("check", recipe) == 0
    # 28 images of 4 x 4 tokens of 8 numbers, two bytes each.
    assert "tokens of 28 image media: about 0.0 MB in data/store" in capsys.readouterr().out
    # The embeddings are there, their tokens are not.
    assert run("embed", recipe) == 0
    assert "28 encoded, 0 from the store" in capsys.readouterr().out
    assert len(list(Path("data").rglob("tokens-*.arrow"))) == 1
    assert run("fit", recipe) == 0
    assert {file: file.read_bytes() for file in stored} == stored
    measured = json.loads(Path("checkpoints/tiny/metrics.json").read_text())["tasks"]["captions"]
    assert all(measured[name]["loss"] > 0 for name in ("model", "no_media", "shuffled_media"))
    assert measured["shuffled_media"]["loss"] != measured["model"]["loss"]
    # The resolved recipe does not name what the model decides.
    assert "token_modalities" not in Path("checkpoints/tiny/recipe.yaml").read_text().split("data:")[1]
    image = str(parts / "pictures/images/red0.png")
    question = ["generate", "checkpoints/tiny", "What?", "--image", image, "--allow", "tiny.TokenEncoder"]
    assert main(question) == main([*question, "--tokens", "2"]) == 0
    assert main([*question, "--tokens", "5"]) == 1
    assert "5 bind tokens were asked for" in "".join(capsys.readouterr())


@pytest.mark.parametrize("command", ["embed", "check"])
def test_an_encoder_without_tokens_is_refused_before_any_work(parts, capsys, command):
    assert run(command, recipe_of(parts, 4, "ColorEncoder")) == 1
    told = "".join(capsys.readouterr())
    assert "ColorEncoder has no tokens of image media" in told
    assert "Encoders of this model with tokens: none" in told
    assert "1 problem\n" in told or command == "embed"
    assert not list(Path("data").rglob("*.arrow"))
