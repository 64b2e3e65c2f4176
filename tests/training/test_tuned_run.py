"""Runs that train a decoder or the blocks of an encoder: they resume exactly, continue in stages, and work with DDP."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bindllm import BindLLM
from bindllm.embeddings.store import EmbeddingStore
from bindllm.training.module import BindModule
from tiny import color_images, save_tiny_decoder, tuned_encoder
from tiny_run import count_calls, run, run_and_die, tiny_recipe
from two_processes import run_pair, told

pytestmark = pytest.mark.usefixtures("work", "unmeasured")

OUTPUT = Path("checkpoints/tiny")
FILES = tuple(OUTPUT / f"{name}.safetensors" for name in ("bind", "decoder", "encoders"))
GROUPS = ["bind", "inject", "decoder", "encoders"]


def tuned_recipe(parts, *, trainable=GROUPS, **sections) -> dict:
    """A recipe that trains the decoder and the last two blocks of the encoder."""
    recipe = tiny_recipe(
        parts, **{"data": {"store": None}, "trainer": {"max_epochs": 2, "log_every_n_steps": 1}, **sections}
    )
    recipe["model"] |= {"encoders": [tuned_encoder()], "trainable": list(trainable)}
    recipe["model"]["decoder"]["tuned"] = True
    return recipe


def stage_two(recipe, **model) -> dict:
    """A run that starts from the output of a recipe."""
    return {
        **recipe,
        "output": "checkpoints/two",
        "model": {**recipe["model"], "init_from": str(OUTPUT), **model},
    }


def losses() -> list[float]:
    rows = Path("runs/tiny/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val_loss")
    return [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]


@pytest.mark.parametrize("at", [3, 8], ids=["in the first epoch", "in the second"])
def test_an_interrupted_run_ends_in_the_same_bytes(parts, tmp_path, monkeypatch, at):
    recipe = tuned_recipe(parts)
    assert run("fit", recipe) == 0
    validated = losses()
    assert validated[-1] < validated[0] - 0.1
    expected = [file.read_bytes() for file in FILES]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    run_and_die(recipe, monkeypatch, at=at)
    taken = count_calls(monkeypatch, BindModule, "training_step")
    assert run("fit", recipe) == 0
    assert len(taken) == 11 - at
    assert [file.read_bytes() for file in FILES] == expected


def test_files_of_the_base_keep_their_bytes(tmp_path):
    save_tiny_decoder(tmp_path / "decoder")
    color_images(tmp_path / "pictures")
    before = {file: file.read_bytes() for file in (tmp_path / "decoder").iterdir()}
    assert run("fit", tuned_recipe(tmp_path)) == 0
    assert {file: file.read_bytes() for file in (tmp_path / "decoder").iterdir()} == before
    assert not Path("data/store").exists()
    card = (OUTPUT / "README.md").read_text()
    assert "no longer has the output of the base model" in card
    assert "Encoder `tiny.BlockEncoder`: the weights of the last 2 blocks were trained" in card


def test_a_later_stage_keeps_the_tuned_parts(parts):
    recipe = tuned_recipe(parts)
    assert run("fit", recipe) == 0
    before = {file.name: file.read_bytes() for file in FILES}
    assert run("fit", stage_two(recipe, trainable=["bind"])) == 0
    after = {file.name: (Path("checkpoints/two") / file.name).read_bytes() for file in FILES}
    assert [name for name in before if before[name] != after[name]] == ["bind.safetensors"]


def test_a_stage_may_begin_to_tune(parts, capsys):
    assert run("fit", tiny_recipe(parts, model={"encoders": [tuned_encoder()["init_args"]["encoder"]]})) == 0
    assert run("fit", stage_two(tuned_recipe(parts))) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model["decoder"].update(tuned=False), "set model.decoder.tuned: true"),
        (lambda model: model["encoders"][0]["init_args"].update(blocks=1), 'with {"blocks": 2, "rank": null'),
        (
            lambda model: model.update(encoders=[{"class_path": "tiny.BlockEncoder"}]),
            "class bindllm.encoders.Tuned with",
        ),
        (
            lambda model: model["encoders"][0]["init_args"]["encoder"].update(init_args={"num_blocks": 5}),
            "the encoders of checkpoints/tiny .* differ",
        ),
    ],
)
def test_a_stage_without_the_tuned_parts_is_refused(parts, capsys, change, words):
    recipe = tuned_recipe(parts, trainer={"max_epochs": 1, "limit_train_batches": 1})
    assert run("fit", recipe) == 0
    later = stage_two(recipe, trainable=["bind"], decoder=dict(recipe["model"]["decoder"]))
    later["model"]["encoders"] = [tuned_encoder()]
    change(later["model"])
    assert run("fit", later) == 1
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def test_stores_of_the_untrained_encoder_are_refused(parts):
    assert run("fit", tuned_recipe(parts)) == 0
    model = BindLLM.from_pretrained(OUTPUT, device="cpu", allow=["tiny.BlockEncoder"])
    before = EmbeddingStore.for_encoder("store", model.encoders[0].base)
    after = EmbeddingStore.for_encoder("store", model.encoders[0])
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"data": {"store": "data/store"}},
            "data.store is data/store, and encoder 1 (BlockEncoder) is tuned",
        ),
        ({"objective": {"class_path": "bindllm.objectives.GRPO"}}, "GRPO compares with values of the media"),
        ({"modality": "audio"}, "serves image: set its modality to one of them, not 'audio'"),
        (
            {"precision": "bf16-true"},
            "in which small training steps would vanish; expected 32-true, bf16-mixed",
        ),
        ({"context": {"records": 2}}, "the records of model.context are encoded before training"),
    ],
)
def test_runs_that_cannot_train_an_encoder_are_refused(parts, capsys, change, words):
    recipe = tuned_recipe(parts)
    if "data" in change:
        recipe["data"] |= change["data"]
    elif "precision" in change:
        recipe["trainer"] |= change
    elif "modality" in change:
        recipe["model"]["encoders"] = [tuned_encoder(**change)]
    else:
        recipe["model"] |= change
    assert run("fit", recipe) == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_rows_without_the_trained_media_are_refused(tmp_path, parts, capsys):
    rows = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(8)]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    assert (
        run(
            "fit",
            tuned_recipe(
                parts, data={"store": None, "sources": [{"path": "texts.json", "format": "alpaca"}]}
            ),
        )
        == 1
    )
    assert "encoder 1 is trained on image media, and no training row has any" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_sharded_decoder_is_not_tuned(tmp_path, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tuned_recipe(parts)
    recipe["trainer"]["strategy"] = {"class_path": "bindllm.training.strategies.ShardedDecoder"}
    # In a process of its own: the strategy starts gloo, whose thread later forks would miss, and they would hang.
    assert run_pair(lambda _: run("fit", recipe), count=1) == [1]
    assert "decoder.tuned does not work with ShardedDecoder" in " ".join(told("err", 0).split())


def test_two_processes_take_the_steps_of_one_also_without_media(tmp_path, parts, monkeypatch):
    """Half of the rows are long texts, so one of two processes has a batch without an image."""
    rows = [{"instruction": f"Say {n} in many words, please.", "output": f"{n} " * 9} for n in range(20)]
    (tmp_path / "texts.json").write_text(json.dumps(rows))
    data = {"store": None, "batch_size": 5}
    data["sources"] = [
        {"path": str(parts / "pictures")},
        {"path": str(tmp_path / "texts.json"), "format": "alpaca"},
    ]
    recipe = tuned_recipe(parts, data=data)
    recipe["trainer"]["max_epochs"] = 1
    recipe["model"]["optim"]["lr"] = 0.003
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder, options in zip(
        folders, ({"devices": 2, "strategy": "ddp"}, {"accumulate_grad_batches": 2}), strict=True
    ):
        folder.mkdir()
        monkeypatch.chdir(folder)
        with_trainer = {**recipe, "trainer": {**recipe["trainer"], **options}}
        if "devices" in options:
            assert run_pair(lambda _: run("fit", with_trainer)) == [0, 0], told("err", 0)  # noqa: B023
        else:
            assert run("fit", with_trainer) == 0
    for file in FILES:
        ours, theirs = (load_file(folder / file) for folder in folders)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-3, rtol=1e-2)
