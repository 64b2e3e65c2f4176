"""Every recipe of the project is read by the real command line and runs two steps on tiny parts."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from bindllm.cli.recipes.recipe import RecipeCLI, quiet
from bindllm.training.strategies import SHARDED
from tiny_run import run, tiny_parts

# Those of `bindllm align` have sections of their own: tests/cli/test_align.py. What the published second stage needs
# cannot be fetched: tests/test_stage2.py.
RECIPES = sorted(
    file
    for file in (Path(__file__).parents[1] / "recipes").glob("*.yaml")
    if not file.name.startswith("align-") and file.name != "stage2.yaml"
)
FILES = {
    "README.md",
    "bind.safetensors",
    "bindllm.json",
    "metrics.json",
    "recipe.yaml",
    "report.html",
    "report/captions.jsonl",
    "report/facts.json",
    "report/log.csv",
    "report/thumbnails.json",
}
DATASTORE_FILES = {
    f"datastore/{name}" for name in ("datastore.json", "embeddings.safetensors", "records.jsonl")
}
ADAPTER_FILES = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_parts(tmp_path_factory.mktemp("parts"))


# Those for several devices are alike but for them, and two processes are in tests/training/test_devices.py.
ONE_DEVICE = [file for file in RECIPES if yaml.safe_load(file.read_text())["trainer"].get("devices", 1) == 1]

# One with an objective of its own has other rows: tests/test_easyvqa_recipes.py runs it.
CAPTIONING = [file for file in ONE_DEVICE if "objective" not in yaml.safe_load(file.read_text())["model"]]


def with_tiny_parts(recipe: dict, parts: Path) -> dict:
    recipe["model"]["decoder"] |= {"name": str(parts / "decoder"), "dtype": "float32"}
    for key in ("quantize", "template"):
        recipe["model"]["decoder"].pop(key, None)
    recipe["model"].pop("init_from", None)
    several = recipe["model"]["bind"].get("tokens", 1) != 1
    recipe["model"]["encoders"] = [{"class_path": "tiny.TokenEncoder" if several else "tiny.ColorEncoder"}]
    for part in ("inject", "adapter"):
        if "layers" in (recipe["model"].get(part) or {}):
            recipe["model"][part]["layers"] = 1
    if "width" in (recipe["model"].get("context") or {}):
        recipe["model"]["context"]["width"] = 16
    recipe["data"]["sources"] = [
        {"path": str(parts / "pictures"), "format": "caption"} for _ in recipe["data"]["sources"]
    ]
    recipe["trainer"] |= {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "accumulate_grad_batches": 1,
        "val_check_interval": 1.0,
        "log_every_n_steps": 1,
    }
    return recipe


def test_there_are_recipes():
    assert {"openmoji.yaml", "stamps.yaml"} <= {file.name for file in RECIPES}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_says_what_it_is_and_how_to_run_it(file):
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(f"bindllm fetch recipes/{file.name}" in line for line in header)
    assert any(f"bindllm fit --config recipes/{file.name}" in line for line in header)


@pytest.mark.parametrize("file", sorted({*RECIPES} - {*ONE_DEVICE}), ids=lambda file: file.name)
def test_a_recipe_for_several_devices_is_read(file):
    with quiet():
        config = RecipeCLI("fit", ["--config", str(file)], build=False).config
    assert config.trainer.devices == 8
    assert config.trainer.strategy.class_path == SHARDED


@pytest.mark.parametrize("file", CAPTIONING, ids=lambda file: file.name)
def test_a_recipe_runs_and_leaves_its_files(file, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = with_tiny_parts(yaml.safe_load(file.read_text()), parts)
    assert run("fit", recipe) == 0
    output = Path(recipe["output"])
    adapter = ADAPTER_FILES if recipe["model"].get("adapter") else set()
    datastore = DATASTORE_FILES if recipe["model"].get("context") else set()
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == FILES | adapter | datastore
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics.keys() == {"tasks", "seconds", "trainable_parameters"}
    variants = {"model", "no_media", "shuffled_media", "nearest_caption"}
    if recipe["model"].get("context"):
        variants |= {"no_context", "random_context", "context_as_text", "copied_context"}
    assert {task: set(found) for task, found in metrics["tasks"].items()} == {"captions": variants}
    assert metrics["seconds"]["train"] > 0
    with Path("runs", output.name, "metrics.csv").open(newline="") as stream:
        steps = [row["step"] for row in csv.DictReader(stream) if row["train_loss"]]
    assert steps == ["0", "1"]
    logged = {path.name[:19] for path in Path("runs", output.name).iterdir()}
    assert {"metrics.csv", "captions.jsonl", "recipe.yaml", "events.out.tfevents"} <= logged
    # Kept, so that more epochs can continue the run.
    assert Path("runs", output.name, "last.ckpt").is_file()


def test_the_resolved_recipe_of_a_checkpoint_is_a_recipe(parts, tmp_path, monkeypatch):
    """What is written into the folder reads back to the same values, with every default in it."""
    monkeypatch.chdir(tmp_path)
    (file,) = (file for file in RECIPES if file.name == "openmoji.yaml")
    recipe = with_tiny_parts(yaml.safe_load(file.read_text()), parts)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quiet():
        first = RecipeCLI("fit", ["--config", "recipe.yaml"], build=False).resolved()
        Path("resolved.yaml").write_text(first)
        second = RecipeCLI("fit", ["--config", "resolved.yaml"], build=False).resolved()
    assert first == second
    network = {"depth": 3, "expansion": 4, "norm": "rms", "bias": False, "fusion": "unit"}
    tokens = {"tokens": 1, "token_modalities": ["image"]}
    assert yaml.safe_load(first)["model"]["bind"] == network | tokens
