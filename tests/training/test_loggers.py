"""The recipe, sample answers and final metrics reach every logger of a run, and one that fails costs nothing."""

import json
from types import SimpleNamespace

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from bindllm.training.loggers import log_captions
from tiny import color_images, save_tiny_decoder
from tiny_run import run, tiny_recipe

SEEN: list = []


class Recorder(Logger):
    """Keeps what it gets."""

    name, version = "recorder", ""

    def log_hyperparams(self, params, *args, **kwargs):
        SEEN.append(("recipe", params))

    def log_metrics(self, metrics, step=None):
        SEEN.append(("metrics", metrics))


class Broken(Recorder):
    """Has no network."""

    def log_hyperparams(self, params, *args, **kwargs):
        raise ConnectionError("no network")


def test_a_run_sends_its_recipe_and_its_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_decoder(tmp_path / "decoder")
    color_images(tmp_path / "pictures", per_color=3)
    loggers = [{"class_path": f"test_loggers.{name}"} for name in ("Broken", "Recorder")]
    SEEN.clear()
    assert run("fit", tiny_recipe(tmp_path, trainer={"max_epochs": 1, "logger": loggers})) == 0
    recipes = [params for kind, params in SEEN if kind == "recipe"]
    assert [params["output"] for params in recipes] == ["checkpoints/tiny"]
    final = {name: value for kind, metrics in SEEN if kind == "metrics" for name, value in metrics.items()}
    written = json.loads((tmp_path / "checkpoints/tiny/metrics.json").read_text())["tasks"]["captions"]
    for variant in ("model", "no_media", "nearest_caption"):
        assert final[f"held_out/captions/{variant}/cider"] == written[variant]["cider"]


def test_captions_reach_loggers_that_take_texts(tmp_path):
    sent = []

    def made(kind, **members):
        logger = kind.__new__(kind)
        vars(logger).update(members)
        return logger

    board = TensorBoardLogger(tmp_path)
    wandb = type("Wandb", (WandbLogger,), {"log_text": lambda self, **given: sent.append(given)})
    experiment = SimpleNamespace(log_text=lambda *given: sent.append(given))
    mlflow = type("MLFlow", (MLFlowLogger,), {"experiment": experiment, "run_id": "7"})
    # As in swanlab 0.10.3: a list of texts for one key.
    swanlab = type(
        "SwanLabLogger",
        (Recorder,),
        {"log_text": lambda self, key, texts, step: sent.append((key, texts, step))},
    )
    rows = [{"media": "a|b.png", "reference": "red", "model": "blue"}]
    log_captions([board, made(wandb), made(mlflow), made(swanlab), Recorder()], rows, step=3)
    table = "| media | reference | model |\n| --- | --- | --- |\n| a/b.png | red | blue |"
    assert sent[0] == {
        "key": "captions",
        "columns": ["media", "reference", "model"],
        "data": [["a|b.png", "red", "blue"]],
        "step": 3,
    }
    assert sent[1] == ("7", table, "captions/3.md")
    assert sent[2] == ("captions", [table], 3)
    board.finalize("success")
    assert any(b"a/b.png" in file.read_bytes() for file in tmp_path.rglob("events*"))
