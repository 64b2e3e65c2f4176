"""A run of a model with retrieved context: its datastore is made of its training rows."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bindllm import BindLLM
from bindllm.cli.recipes.recipe import RecipeCLI, quiet
from bindllm.data.embeddings import RetrievedRecords
from bindllm.embeddings.datastore import Datastore
from bindllm.errors import CheckpointError
from bindllm.media import Media
from tiny_run import run, tiny_recipe, with_bind_tokens, write_recipe

pytestmark = pytest.mark.usefixtures("silent")

CONTEXT = {"records": 3, "latents": 2, "width": 16, "depth": 1, "text_length": 8}


def context_recipe(parts, **model):
    recipe = tiny_recipe(parts)
    recipe["model"] |= {"context": CONTEXT, "trainable": ["bind", "inject", "context"], **model}
    return recipe


def data_of(recipe):
    with quiet():
        return RecipeCLI("fit", ["--config", str(write_recipe(recipe))]).datamodule


def test_batches_hold_records_that_are_not_of_their_own_rows(parts, work):
    data = data_of(context_recipe(parts))
    data.setup()
    found: RetrievedRecords = data.lookup
    store = found.reader.datastore
    assert len(store) == len(data.samples("train"))
    # Each training row finds itself, which is excluded; a held-out one has no record of its own.
    assert data.report.records == len(store) == data.report.excluded_itself
    assert data.report.cut_records == sum(len(record.text) > 8 for record in store.records)
    for sample in data.samples("train") + data.samples("test"):
        ids = found.ids(sample.media)
        assert ids.shape == (1, 3)
        for n in ids.flatten().tolist():
            assert data._embeddings.key(sample.media[0][0]) not in store.records[n].keys
            # The nearest images have the same color.
            assert store.records[n].texts == sample.references
    batch = next(iter(data.train_dataloader()))
    assert batch["context_embeddings"].shape == (4, 1, 3, 16)
    assert batch["context_ids"].dtype == torch.int64


def test_drawn_records_are_the_same_in_every_order_and_never_the_own_one(parts, work):
    data = data_of(context_recipe(parts))
    groups = [group for sample in data.samples("train") for group in sample.media]
    first, second = data.lookup.drawn(3), data.lookup.drawn(3)
    ids = first.ids(groups)
    assert torch.equal(second.ids(groups[::-1]).flip(0), ids)
    assert not torch.equal(data.lookup.drawn(4).ids(groups), ids)
    for group, own in zip(groups, ids.tolist(), strict=True):
        keys = {key for n in own for key in first.reader.datastore.records[n].keys}
        assert data._embeddings.key(group[0]) not in keys


def test_a_run_writes_its_datastore_and_the_checkpoint_answers_with_it(parts, work, capsys):
    recipe = context_recipe(parts)
    assert run("fit", recipe) == 0
    output = Path(recipe["output"])
    model = BindLLM.from_pretrained(output, allow=["tiny.ColorEncoder"])
    assert {record.text for record in model.datastore.records} == {
        f"{color} square" for color in ("red", "green", "blue", "white")
    }
    assert model.injection.context_gates.any()
    image = Media.image(parts / "pictures/images/red0.png")
    assert isinstance(model.generate("Describe this image.", [image], max_new_tokens=4), str)
    report = json.loads((output / "report/facts.json").read_text())["data"]
    assert report["records"] == len(model.datastore)
    metrics = json.loads((output / "metrics.json").read_text())["tasks"]["captions"]
    losses = {name: metrics[name]["loss"] for name in ("model", "no_media", "no_context", "random_context")}
    assert len(set(losses.values())) == 4
    # Every color has other images of its own, and the nearest one has the caption of the held-out one.
    assert metrics["copied_context"]["exact_match"] == 1
    assert metrics["context_as_text"]["exact_match"] is not None
    assert "With retrieved records its ROUGE-L is" in capsys.readouterr().out
    assert run("test", recipe) == 0
    assert "test_loss" in capsys.readouterr().out


def test_copied_records_answer_the_same_question(parts, work):
    """The nearest image of another one has the same color; only held-out rows ask what no record answers."""
    pictures = parts / "pictures"
    rows = []
    for line in (pictures / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        color = row["caption"].split()[0]
        questions = {"Which shape?": "square", "Which color?": color, "Is it a color?": "yes"}
        if row["split"] == "test":
            questions["Which size?"] = "square"
        rows += [
            {
                "image": str(pictures / row["image"]),
                "question": question,
                "answer": answer,
                "split": row["split"],
            }
            for question, answer in questions.items()
        ]
    Path("vqa.jsonl").write_text("".join(json.dumps({**row, "type": row["question"]}) + "\n" for row in rows))
    recipe = context_recipe(parts)
    recipe["data"]["sources"] = [{"path": "vqa.jsonl", "format": "vqa"}]
    assert run("fit", recipe) == 0
    metrics = json.loads(Path(recipe["output"], "metrics.json").read_text())["tasks"]["answers"]
    assert metrics["copied_context"]["by_type"] == {
        "Is it a color?": 1,
        "Which color?": 1,
        "Which shape?": 1,
        "Which size?": 0,
    }


@pytest.mark.usefixtures("unmeasured")
def test_a_context_is_added_to_a_model_that_was_trained_without_one(parts, work):
    """With the group `context` only, the model without records stays as it was, bit for bit."""
    first = tiny_recipe(parts, output="checkpoints/first")
    assert run("fit", first) == 0
    second = context_recipe(parts, init_from="checkpoints/first", trainable=["context"])
    assert run("fit", {**second, "output": "checkpoints/second"}) == 0
    options = {"allow": ["tiny.ColorEncoder"], "device": "cpu"}
    before = BindLLM.from_pretrained("checkpoints/first", **options)
    after = BindLLM.from_pretrained("checkpoints/second", **options)
    for name, value in before.trainable_state().items():
        assert torch.equal(after.trainable_state()[name], value)
    assert after.injection.context_gates.any()
    # A run without context would lose it.
    with pytest.raises(CheckpointError, match="context is null here"):
        from bindllm.training.stages import init_from_checkpoint

        init_from_checkpoint(before, "checkpoints/second")
    # Other draws do not make another base.
    after.context.config = replace(after.context.config, records=1, copied=0.5)
    init_from_checkpoint(after, "checkpoints/second")


@pytest.mark.usefixtures("unmeasured")
def test_a_run_resumes_with_the_same_records(parts, work, monkeypatch):
    from tiny_run import run_and_die

    recipe = context_recipe(parts)
    assert run("fit", {**recipe, "output": "checkpoints/whole"}) == 0
    run_and_die(recipe, monkeypatch, at=7)
    assert run("fit", recipe) == 0
    whole, resumed = (
        (Path("checkpoints") / name / "bind.safetensors").read_bytes() for name in ("whole", "tiny")
    )
    assert whole == resumed


@pytest.mark.usefixtures("unmeasured")
def test_context_with_several_bind_tokens(parts, work):
    recipe = with_bind_tokens(context_recipe(parts), 3)
    assert run("fit", recipe) == 0
    assert len(Datastore.open("checkpoints/tiny/datastore")) == 20


def test_check_builds_the_context(parts, work, capsys):
    assert run("check", context_recipe(parts), "--memory") == 0
    assert "context" in capsys.readouterr().out
    recipe = context_recipe(parts, context={**CONTEXT, "width": 12})
    assert run("check", recipe) == 1
    printed = capsys.readouterr()
    assert "context.width is 12" in printed.out + printed.err


def test_check_finds_streams_that_cannot_be_retrieved_from(parts, work, capsys):
    recipe = context_recipe(parts)
    shard = Path("shards/0.tar")
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for number in range(3):
            tar.add(parts / "pictures/images/red0.png", f"{number}.png")
            Path("caption.txt").write_text("red square")
            tar.add("caption.txt", f"{number}.txt")
    recipe["data"]["sources"] = [{"path": str(shard)}]
    recipe["trainer"]["max_steps"] = 4
    assert run("check", recipe) == 1
    assert "retrieves from all training rows" in capsys.readouterr().out
    assert run("fit", recipe) == 1


def test_the_group_needs_a_context(parts, work, capsys):
    recipe = tiny_recipe(parts)
    recipe["model"]["trainable"] = ["context"]
    assert run("fit", recipe) == 1
    assert "Give the model one, such as context: {records: 3}" in capsys.readouterr().err
