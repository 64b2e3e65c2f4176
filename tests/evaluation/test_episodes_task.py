"""Episodes to a tiny model: each control takes away one thing that a model may answer from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import Row, make_sample
from bindllm.errors import InputError
from bindllm.evaluation import task
from bindllm.evaluation.episodes import blank_support, episodes_task, exchange_names, is_published_right
from bindllm.evaluation.held_out import evaluate_held_out, held_out_rows
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.rewards import ExactAnswer
from bindllm.report.summary import KEYS, summarize
from tiny import tiny_model, tiny_tokenizer

EYE = torch.eye(16)


def lookup(groups):
    """Image n.png has the n-th unit vector; classes are 0 to 3, 4 to 7, and so on."""
    return torch.stack([EYE[int(group[0].name.split(".")[0])] for group in groups]) if groups else EYE[:0]


def episode(*shots, query, names=("dax", "wug")):
    """Shots are pairs of an image and a name; the query is one such pair."""
    messages = []
    for image, name in (*shots, query):
        messages += [Message("user", (Media.image(f"{image}.png"), "What?")), Message("assistant", name)]
    count = len(shots) // 2
    row = Row(
        Conversation(tuple(messages)),
        (query[1],),
        f"episode of {shots}",
        task="episode",
        subset=f"{count} shots",
        options=names,
        query_only=True,
    )
    return make_sample(row, tiny_tokenizer(), 400)


ITEMS = [
    episode((0, "dax"), (4, "wug"), query=(1, "dax")),
    episode((0, "dax"), (4, "wug"), query=(5, "wug")),
    episode((12, "wug"), (8, "dax"), query=(9, "dax")),
    episode((12, "wug"), (8, "dax"), query=(13, "wug")),
    episode(query=(10, "dax")),
]


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder, gates=1.0)


def turns_of(tokenizer, row, index, vectors):
    """The shots of a prompt, and the image of its query: what a model can see, and no more."""
    seen, starts = [], (row == tokenizer.convert_tokens_to_ids("<|im_start|>")).nonzero().flatten().tolist()
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        role, _, text = tokenizer.decode(row[start:stop], skip_special_tokens=True).partition("\n")
        image = int(vectors[index[start]].argmax()) if index[start] >= 0 else None
        seen.append((role, text.strip(), image))
    names = [text for role, text, _ in seen[:-1] if role == "assistant"]
    images = [image for role, _, image in seen if role == "user"]
    return list(zip(images, names, strict=False)), images[-1]


@pytest.fixture
def scripted(model, monkeypatch):
    """Make the model answer by a function of the shots and the image of the query."""

    def script(answer):
        def generate_from(self, input_ids, attention_mask, media_index, embeddings, **options):
            texts = []
            for ids, mask, index, vectors in zip(
                input_ids, attention_mask, media_index, embeddings, strict=True
            ):
                texts.append(answer(*turns_of(self.tokenizer, ids[mask > 0], index[mask > 0], vectors)))
            return self.tokenizer(texts, padding=True, return_tensors="pt").input_ids

        monkeypatch.setattr(BindLLM, "generate_from", generate_from)

    return script


def measure(model, samples=ITEMS):
    result = task.evaluate(
        model, [episodes_task(samples, tokenizer=model.tokenizer, lookup=lookup)], lookup=lookup
    )
    assert result.problems == {}
    return result.metrics["episodes"], result.rows["episodes"]


def looks(shots, query):
    """Learns from the images of the shots."""
    if query is None:
        return "none"
    return next((name for image, name in shots if image is not None and image // 4 == query // 4), "none")


def test_a_model_that_learns_from_images_falls_with_exchanged_names(model, scripted):
    scripted(looks)
    metrics, rows = measure(model)
    accuracy = {
        name: found["by_subset"].get("1 shots", {}).get("accuracy") for name, found in metrics.items()
    }
    assert accuracy.pop("shuffled_media") < 1
    assert accuracy.pop("shuffled_support") < 1
    assert accuracy == {
        "model": 1.0,
        "no_media": 0.0,
        "wrong_support": 0.0,
        "blank_support": 0.0,
        "nearest_shot": 0.5,
        "copy_last": 0.5,
        "majority_shot": 0.5,
    }
    assert tuple(metrics) == task.VARIANTS["episodes"]
    assert all(metrics[name].keys() >= set(KEYS["episodes"]) for name in metrics)
    # Without shots there is nothing to learn from, and nothing to exchange.
    assert metrics["model"]["by_subset"]["0 shots"]["accuracy"] == 0
    assert metrics["wrong_support"]["count"] == metrics["blank_support"]["count"] == 4
    assert metrics["wrong_support"]["model_accuracy"] == 1.0
    assert (metrics["model"]["published"], metrics["model"]["named"]) == (0.8, 0.8)
    first = rows[0]
    assert (first["model"], first["wrong_support"], first["copy_last"], first["right"]) == (
        "dax",
        "wug",
        "wug",
        True,
    )
    assert (first["names"], first["media"], first["subset"], first["question"]) == (
        ["dax", "wug"],
        "1.png",
        "1 shots",
        "What?",
    )
    assert rows[-1]["wrong_support"] is None


def test_a_model_that_copies_text_is_found_out(model, scripted):
    scripted(lambda shots, query: shots[-1][1] if shots else "none")
    metrics, _ = measure(model)
    accuracy = {name: found["accuracy"] for name, found in metrics.items()}
    assert accuracy["model"] == accuracy["copy_last"] == 0.4
    # On the four episodes with shots.
    assert (
        accuracy["blank_support"]
        == accuracy["wrong_support"]
        == metrics["blank_support"]["model_accuracy"]
        == 0.5
    )
    text = " ".join(summarize({"tasks": {"episodes": metrics}}, num_captions=0))
    assert (
        "In 5 held-out episodes the model names 40.0% of the queries right (50.0% at 1 shots, 0.0% at 0 shots)."
        in text
    )
    assert "the most frequent name for 40.0%: the model does no better than copying." in text
    assert "50.0% right instead of 50.0%, not fewer: nothing here shows that it learns names" in text


def test_exchanged_names_change_the_shots_only(model):
    sample = ITEMS[0]
    changed = exchange_names(sample, tokenizer=model.tokenizer)
    texts = [message.text for message in changed.conversation.messages]
    assert texts == ["What?", "wug", "What?", "dax", "What?", "dax"]
    assert changed.references == sample.references
    assert (changed.media_index == sample.media_index).all()
    three = episode((1, "a"), (2, "b"), (3, "c"), query=(1, "a"), names=("a", "b", "c"))
    given = exchange_names(three, tokenizer=model.tokenizer).conversation.messages[1:-1:2]
    assert [message.text for message in given] == ["b", "c", "a"]
    assert exchange_names(ITEMS[-1], tokenizer=model.tokenizer) is None


def test_a_blank_support_keeps_the_media_of_the_query():
    sample = blank_support(ITEMS[0])
    start = int(np.flatnonzero(ITEMS[0].media_index == 2)[0])
    assert (sample.media_index[:start] == -1).all()
    assert (sample.media_index[start:] == 2).all()
    assert (sample.input_ids == ITEMS[0].input_ids).all()
    assert blank_support(ITEMS[-1]) is None


def test_the_strict_and_the_published_metric(model, scripted):
    scripted(lambda shots, query: "a dax vacuum")
    metrics, _ = measure(model, ITEMS[:1])
    assert (metrics["model"]["accuracy"], metrics["model"]["published"], metrics["model"]["named"]) == (
        0,
        1,
        0,
    )
    assert not is_published_right("dax or wug", "dax", ("dax", "wug"))
    assert is_published_right("daxwu", "Dax", ("Dax", "wug"))


@pytest.mark.parametrize("answer", ["A", "a. cat", "The answer is (A)."])
def test_a_letter_is_not_a_name(model, scripted, answer):
    # The names are not the options of a multiple choice: the answer has exactly the words of the name.
    scripted(lambda shots, query: answer)
    metrics, rows = measure(model, ITEMS[:1])
    assert (metrics["model"]["accuracy"], rows[0]["right"]) == (0, False)
    assert ExactAnswer()([answer, "dax"], ITEMS[:1] * 2).tolist() == [0, 1]


def test_held_out_episodes_are_measured_next_to_other_rows(model, scripted):
    scripted(looks)
    chat = [replace(ITEMS[0], task="chat")]
    held_out = held_out_rows({"test": [*ITEMS, *chat], "validation": []}.__getitem__)
    assert {name: len(rows) for name, rows in held_out.items()} == {"episodes": 5, "conversations": 1}
    result = evaluate_held_out(model, held_out, train_samples=[], lookup=lookup)
    assert result.metrics.keys() == held_out.keys()
    with pytest.raises(InputError, match="no held-out episodes"):
        episodes_task([], tokenizer=model.tokenizer, lookup=lookup)
