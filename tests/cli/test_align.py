"""``bindllm align`` from recipe to folder, on tiny parts through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from align_parts import BeatTower, LetterEncoder, align_recipe, radar_table, rewrite, run_align
from bindllm.cli import main
from bindllm.encoders import Aligned, alignment_warnings
from bindllm.media import Media
from bindllm.quickstart import assets_of
from bindllm.training.run import lock_output
from tiny import ColorEncoder, color_images

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = {"align.json", "head.safetensors", "metrics.json", "README.md", "recipe.yaml"}


@pytest.fixture
def texts(work) -> Path:
    folder = color_images(work / "pictures", per_color=8)
    rewrite(folder, lambda n, row: {**row, "caption": f"{row['caption']} number {n}"})
    return folder


def radar_recipe(folder: Path, **sections: dict) -> dict:
    source = {"path": str(folder), "modality": "radar"}
    model = {"tower": {"class_path": "align_parts.BeatTower", "init_args": {"width": 8}}}
    recipe = align_recipe(folder, data={"sources": [source]})
    recipe["model"] |= model
    return recipe | sections


def test_a_frozen_tower_gets_a_head_and_a_folder(texts, capsys):
    assert run_align(align_recipe(texts)) == 0
    output = Path("checkpoints/taught")
    assert {path.name for path in output.iterdir()} == FILES
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["pairs"] == {"train": 24, "validation": 4, "test": 4}
    assert metrics["epochs"] == 3
    assert metrics["trained_parameters"] == 12 * 2 + 12 * 32 + 32 + 32 * 16 + 16 + 1
    for way in ("text_to_image", "image_to_text"):
        assert metrics["test"][way]["chance@1"] == 0.25
        assert metrics["test"][way]["queries"] == metrics["test"][way]["gallery"] == 4
    told = capsys.readouterr().out
    assert "train: 24 pairs of 24 media and 24 targets" in told
    assert "aligned encoder: checkpoints/taught" in told
    assert "(25.0)" in told
    card = (output / "README.md").read_text()
    assert "align_parts.LetterEncoder" in card
    assert "(25.0%)" in card
    # Both sides are in the store now: a second run embeds nothing.
    assert len(list(Path("data/store").iterdir())) == 2


def test_the_folder_is_an_encoder_with_the_numbers_of_the_run(texts):
    assert run_align(align_recipe(texts)) == 0
    encoder, target = Aligned("checkpoints/taught", allow=["align_parts.LetterEncoder"]), ColorEncoder()
    rows = [row for row in rewrite(texts, lambda n, row: row) if row["split"] == "test"]
    media = encoder.embed("text", [encoder.prepare(Media.text(row["caption"])) for row in rows])
    pictures = target.embed("image", [target.prepare(Media.image(str(texts / row["image"]))) for row in rows])
    similar = float((media * pictures).sum(1).mean())
    expected = json.loads(Path("checkpoints/taught/metrics.json").read_text())["test"]["pair_similarity"]
    assert similar == pytest.approx(expected, abs=1e-3)
    again = Aligned("checkpoints/taught", allow=["align_parts.LetterEncoder"])
    assert torch.equal(
        again.embed("text", [again.prepare(Media.text("red"))]),
        encoder.embed("text", [again.prepare(Media.text("red"))]),
    )
    assert alignment_warnings([target, encoder]) != []  # ColorEncoder names no space


def test_a_tower_from_scratch_is_in_the_folder(work):
    folder = radar_table(work / "radar")
    (folder / "9.npy").write_bytes(b"no array")
    assert run_align(radar_recipe(folder)) == 0
    output = Path("checkpoints/taught")
    assert {path.name for path in output.iterdir()} == FILES | {"tower.safetensors"}
    assert json.loads((output / "metrics.json").read_text())["skipped"] == 1
    encoder = Aligned(str(output), allow=["align_parts.BeatTower"])
    signals = [Media("radar", np.arange(9.0)), Media("radar", np.arange(20.0) / 7)]
    rows = encoder.embed("radar", [encoder.prepare(signal) for signal in signals])
    # The weights are those that were trained, not the first ones of the class.
    fresh = BeatTower(8)
    assert not torch.equal(encoder._tower.layer.weight, fresh.layer.weight)
    assert (rows[0] - rows[1]).norm() > 1e-3


def test_a_class_of_ones_own_is_allowed_on_the_command_line(work, capsys):
    folder = radar_table(work / "radar")
    assert run_align(radar_recipe(folder)) == 0
    assert "uses align_parts.BeatTower, which is imported only if it is allowed" in capsys.readouterr().out
    files = [f"radar:{folder}/{number}.npy" for number in range(2)]
    line = ["encode", "--encoder", "checkpoints/taught", *files]
    assert main(line) == 1
    assert "not part of bindllm" in capsys.readouterr().err
    assert main([*line, "--allow", "align_parts.BeatTower"]) == 0
    assert "1.000" in capsys.readouterr().out


class Interrupted(BeatTower):
    """Somebody presses Ctrl-C in the second epoch."""

    num_steps = 0

    def forward(self, inputs):
        type(self).num_steps += self.training
        if self.num_steps > 4:
            raise KeyboardInterrupt
        return super().forward(inputs)


def test_a_run_that_is_stopped_leaves_no_folder(work, capsys):
    recipe = radar_recipe(radar_table(work / "radar"))
    recipe["model"]["tower"] = {"class_path": f"{__name__}.Interrupted"}
    assert run_align(recipe) == 130
    assert list(Path("checkpoints").iterdir()) == []
    assert "aligned encoder" not in capsys.readouterr().out


def test_the_same_recipe_gives_the_same_bytes(work):
    recipe = radar_recipe(radar_table(work / "radar"))
    found = []
    for _ in range(2):
        assert run_align(recipe, "--overwrite") == 0
        found.append(
            [
                Path("checkpoints/taught", name).read_bytes()
                for name in ("head.safetensors", "tower.safetensors")
            ]
        )
    assert found[0] == found[1]


def test_without_held_out_pairs_it_says_so(texts, capsys):
    source = {"path": str(texts), "split": "train"}
    assert run_align(align_recipe(texts, data={"sources": [source]})) == 0
    assert "there are no held-out pairs, so nothing is measured" in capsys.readouterr().out
    assert "nothing was measured" in Path("checkpoints/taught/README.md").read_text()


def test_an_encoder_is_replaced_and_other_content_is_not(texts, capsys):
    assert run_align(align_recipe(texts)) == 0
    assert run_align(align_recipe(texts), "--trainer.fast_dev_run", "true") == 0
    assert "nothing was saved" in capsys.readouterr().out
    assert run_align(align_recipe(texts), "--model.head.depth", "1") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run_align(align_recipe(texts), "--model.head.depth", "1", "--overwrite") == 0
    assert "replaced an earlier one" in capsys.readouterr().out
    assert json.loads(Path("checkpoints/taught/align.json").read_text())["head"]["depth"] == 1
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert run_align(align_recipe(texts), "--output", "new", "--data.store", "new/store") == 1
    assert "output new contains new/store" in capsys.readouterr().err
    own = {"weights": "checkpoints/taught", "allow": ["align_parts.LetterEncoder", "tiny.ColorEncoder"]}
    tower = {"class_path": "bindllm.encoders.Aligned", "init_args": own}
    assert run_align(align_recipe(texts, model={"tower": tower}), "--overwrite") == 1
    assert (
        "output checkpoints/taught contains checkpoints/taught, which would be lost"
        in capsys.readouterr().err
    )
    assert run_align(align_recipe(texts), "--output", "mine") == 1
    assert "mine exists and is not an aligned encoder (no align.json)" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_a_run_that_fails_leaves_the_earlier_encoder(texts):
    assert run_align(align_recipe(texts)) == 0
    before = Path("checkpoints/taught/head.safetensors").read_bytes()
    assert (
        run_align(align_recipe(texts), "--model.optim.lr", "1e30", "--model.optim.warmup", "0", "--overwrite")
        == 1
    )
    assert Path("checkpoints/taught/head.safetensors").read_bytes() == before
    assert [path.name for path in Path("checkpoints").iterdir()] == ["taught"]


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({"max_epochs": 0}, "no step would be taken"),
        ({"accumulate_grad_batches": -1}, "accumulate_grad_batches is -1"),
        (
            {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_recal"}}]},
            "'val_recall'?",
        ),
        ({"callbacks": ["EMAWeightAveraging"]}, "EMAWeightAveraging of Lightning"),
        ({"callbacks": ["bindllm.training.callbacks.AverageWeights"]}, "has no effect in align"),
        ({"logger": {"class_path": "WandbLogger"}}, "wandb"),
    ],
)
def test_a_trainer_that_cannot_work_is_refused(trainer, told, texts, capsys):
    recipe = align_recipe(texts)
    recipe["trainer"] = {**recipe.get("trainer", {}), **trainer}
    assert run_align(recipe) == 1
    assert told in " ".join(capsys.readouterr().err.split())
    assert not list(Path().glob("checkpoints/*"))


def test_a_head_without_a_gradient_ends_the_run(texts, monkeypatch, capsys):
    monkeypatch.setattr("bindllm.training.align.module.contrastive_loss", lambda media, *_: (media * 0).sum())
    assert run_align(align_recipe(texts)) == 1
    assert "exactly zero in all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model.head.detph", "1"], 2, "Did you mean 'depth'"),
        (["--data.sources", "[{path: x, modailty: text}]"], 2, "Did you mean 'modality'"),
        (["--model.tower", "align_parts.LetterEncodre"], 2, "LetterEncod"),
        (["--model.best", "recalls"], 2, "Did you mean 'recall'"),
        (["--model.temperature.start", "5"], 1, "expected 0.01 to 1"),
        (["--data.sources", "[{path: nowhere}]"], 1, "data source nowhere does not exist"),
        (["--model.tower", "tiny.ColorEncoder"], 1, "serves image media, but the sources have text"),
    ],
)
def test_a_mistake_in_the_recipe_names_what_is_right(texts, capsys, options, code, message):
    assert run_align(align_recipe(texts), *options) == code
    assert message in capsys.readouterr().err
    assert not list(Path().glob("checkpoints/*"))


def test_an_output_that_another_run_is_writing_is_refused(texts, capsys):
    with lock_output(Path("checkpoints/taught")):
        assert run_align(align_recipe(texts)) == 1
        assert "another run is writing checkpoints/taught" in capsys.readouterr().err
        assert run_align(align_recipe(texts), "--trainer.fast_dev_run", "true") == 0


@pytest.mark.parametrize("file", sorted(RECIPES.glob("align-*.yaml")), ids=lambda file: file.name)
def test_a_recipe_of_the_project_says_what_it_is_and_can_be_read(file, work):
    from bindllm.cli.recipes.align import AlignCLI
    from bindllm.cli.recipes.recipe import quiet

    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(f"bindllm fetch recipes/{file.name}" in line for line in header)
    assert any(f"bindllm align --config recipes/{file.name}" in line for line in header)
    assert "efficientnet-lite0" in assets_of(yaml.safe_load(file.read_text()))
    with quiet():
        cli = AlignCLI(["--config", str(file)])
    assert cli.config.output == f"checkpoints/{file.stem}"
    resolved = yaml.safe_load(cli.resolved())
    assert resolved["model"]["temperature"] == {"start": 0.07, "learned": True}


def test_the_tower_of_letters_is_one(work):
    """The parts of these tests keep the contract that they stand for."""
    from bindllm.testing import check_encoder

    check_encoder(LetterEncoder())


def test_the_page_shows_the_recipe_as_it_is():
    page = (RECIPES.parent / "docs" / "align.md").read_text()
    shown = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert yaml.safe_load(shown[0]) == yaml.safe_load((RECIPES / "align-text.yaml").read_text())
