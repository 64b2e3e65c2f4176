"""Held-out evaluation of a tiny model, each number against one worked out another way."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm.conversation import Conversation, Message
from bindllm.data.collate import answer_batch
from bindllm.data.rows import tokenize
from bindllm.errors import InputError
from bindllm.evaluation.baselines import blind, exchange, neighbours, subject_name
from bindllm.evaluation.measuring import loss_numbers
from bindllm.evaluation.metrics import caption_metrics
from bindllm.evaluation.run import VARIANTS, evaluate_captions, measure_captions
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from tiny import COLOURS, ColourEncoder, tiny_decoder, tiny_tokenizer

PROMPT = "What colour?"


def lookup(groups):
    """Embeddings by the tiny encoder."""
    encoder = ColourEncoder()
    if not groups:
        return torch.zeros(0, encoder.embedding_size)
    return encoder.embed("image", [encoder.prepare(group[0]) for group in groups])


def picture(colour, shade=0, *, file_format="PNG"):
    pixels = (np.full((4, 4, 3), COLOURS[colour], dtype=np.int64) + shade).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, file_format)
    return Media.image(content.getvalue())


def sample(colour, caption=None, *, shade=0, references=None, prompt=PROMPT, media=True, file_format="PNG"):
    caption = caption or f"{colour} square"
    content = [picture(colour, shade, file_format=file_format), prompt] if media else prompt
    conversation = Conversation((Message("user", content), Message("assistant", caption)))
    return replace(tokenize(conversation, tiny_tokenizer(), 200), references=references or (caption,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = BindLLM(tiny_decoder(), tiny_tokenizer(), DecoderConfig("tiny"), encoders=[ColourEncoder()])
    with torch.no_grad():
        built.injection.gates.normal_(0, 1)
    return built


@pytest.fixture
def held():
    return [sample("red"), sample("green"), sample("blue", "a big blue square"), sample("white")]


def evaluate(model, samples, **changes):
    options = {
        "train_samples": [sample("red", "dark red", shade=-20), sample("blue", shade=-20)],
        "lookup": lookup,
    }
    return evaluate_captions(model, samples, max_new_tokens=6, **{**options, **changes})


def one_by_one_loss(model, samples, lookup):
    """Mean over all supervised tokens from the full logits, without batches or padding."""
    losses = []
    for one in samples:
        batch = answer_batch([one], lookup, pad_id=0)
        labels = batch.pop("labels")[0, 1:]
        logits, seen = model(**batch).logits[0, :-1], labels != -100
        losses.append(torch.nn.functional.cross_entropy(logits[seen], labels[seen], reduction="none"))
    return torch.cat(losses).mean().item()


def test_losses_are_means_over_all_tokens(model, held):
    result = evaluate(model, held, batch_size=3)
    with torch.no_grad():
        assert result.metrics["heldout"]["loss"] == pytest.approx(
            one_by_one_loss(model, held, lookup), abs=1e-5
        )
        wrong = one_by_one_loss(model, held, exchange(held, lookup))
        assert result.metrics["shuffled"]["loss"] == pytest.approx(wrong, abs=1e-5)
        gates = model.injection.gates.clone()
        model.injection.gates.zero_()
        blind_loss = one_by_one_loss(model, held, lookup)
        model.injection.gates.copy_(gates)
    assert result.metrics["zero_gates"]["loss"] == pytest.approx(blind_loss, abs=1e-5)
    assert result.metrics["nearest"]["loss"] is None
    assert result.metrics["nearest"]["perplexity"] is None
    for name in ("heldout", "zero_gates", "shuffled"):
        assert result.metrics[name]["perplexity"] == pytest.approx(math.exp(result.metrics[name]["loss"]))
    assert result.problems == {}


def test_captions_are_those_of_generate(model, held):
    result = evaluate(model, held, batch_size=3)
    for row, one in zip(result.rows, held, strict=True):
        media = list(one.media[0])
        assert row.generated == model.generate(PROMPT, media=media, max_new_tokens=6)
        assert row.zero_gates == model.generate(PROMPT, max_new_tokens=6)
    assert any(row.shuffled != row.generated for row in result.rows)


def test_a_blind_model_is_asked_once_per_prompt(model, held, monkeypatch):
    sizes = []
    generate = BindLLM.generate_from

    def counting(self, input_ids, *args, **options):
        sizes.append(len(input_ids))
        return generate(self, input_ids, *args, **options)

    monkeypatch.setattr(BindLLM, "generate_from", counting)
    evaluate(model, [*held, sample("red", "rouge", prompt="Quelle couleur?")], batch_size=8)
    assert sizes == [5, 2, 5]


def test_metrics_compare_each_variant_with_the_references(model, held):
    result = evaluate(model, held)
    references = [row.references for row in result.rows]
    said = {
        "heldout": [row.generated for row in result.rows],
        "zero_gates": [row.zero_gates for row in result.rows],
        "shuffled": [row.shuffled for row in result.rows],
        "nearest": [row.nearest for row in result.rows],
    }
    assert tuple(result.metrics) == tuple(said) == VARIANTS
    for name, captions in said.items():
        expected = caption_metrics(captions, references)
        assert {key: result.metrics[name][key] for key in expected} == expected


def test_the_nearest_training_picture(model, held):
    result = evaluate(model, held)
    assert result.rows[0].nearest == "dark red"
    assert not result.rows[0].nearest_exact
    assert result.rows[2].nearest == "blue square"
    assert 0.9 < result.rows[0].nearest_similarity <= 1.0001


def test_nearest_is_searched_in_chunks(held, monkeypatch):
    training = [sample(colour, f"{colour} {shade}", shade=shade) for shade in (-90, 0) for colour in COLOURS]
    held = held[:3]  # darker white is nearly parallel to white
    whole = neighbours(held, training, lookup)
    monkeypatch.setattr("bindllm.evaluation.baselines._CHUNK", 3)
    assert neighbours(held, training, lookup) == whole
    assert [one.caption for one in whole] == ["red 0", "green 0", "blue 0"]
    # Of equal pictures the first counts.
    assert (
        neighbours(held[:1], [sample("red", "first"), sample("red", "second")], lookup)[0].caption == "first"
    )


def test_no_picture_keeps_its_place_and_the_exchange_is_fixed():
    held = [sample("red", shade=-shade) for shade in range(0, 60, 3)]
    groups = [one.media[0] for one in held]
    true, wrong = lookup(groups), exchange(held, lookup)(groups)
    assert all(not torch.equal(a, b) for a, b in zip(true, wrong, strict=True))
    assert {row.numpy().tobytes() for row in wrong} == {row.numpy().tobytes() for row in true}
    assert torch.equal(wrong, exchange(held, lookup)(groups))


def test_several_captions_of_a_picture_are_one_row(model):
    held = [
        sample("red", "red square", references=("red square", "a red thing")),
        sample("red", "a red thing", references=("red square", "a red thing")),
        sample("blue"),
    ]
    result = evaluate(model, held)
    assert result.problems == {}
    assert [row.references for row in result.rows] == [["red square", "a red thing"], ["blue square"]]
    with torch.no_grad():
        assert result.metrics["heldout"]["loss"] == pytest.approx(
            one_by_one_loss(model, held, lookup), abs=1e-5
        )


def test_one_picture_in_two_files_is_one_row(model):
    held = [sample("red"), sample("red", "rouge", file_format="BMP"), sample("blue")]
    assert held[0].media != held[1].media
    result = evaluate(model, held)
    assert [row.references for row in result.rows] == [["red square", "rouge"], ["blue square"]]
    assert result.problems == {}


def test_a_picture_inside_a_table_is_called_like_its_row(held):
    one = replace(held[0], name="rows.parquet row 3")
    assert subject_name(one) == "rows.parquet row 3"
    (found,) = neighbours(held[:1], [one], lookup)
    assert found.picture == "rows.parquet row 3"
    conversation = Conversation((Message("user", (Media.image("a/red.png"), "?")), Message("assistant", "!")))
    assert subject_name(replace(one, conversation=conversation)) == "a/red.png"


def test_one_picture_cannot_be_shuffled(model):
    result = evaluate(model, [sample("red")])
    assert result.metrics["shuffled"] == dict.fromkeys(result.metrics["heldout"])
    assert "none to exchange" in result.problems["shuffled"]
    assert result.metrics["heldout"]["loss"] is not None


def test_without_training_pictures_there_is_no_nearest(model, held):
    result = evaluate(model, held, train_samples=[sample("red", media=False)])
    assert result.metrics["nearest"] == dict.fromkeys(result.metrics["heldout"])
    assert result.rows[0].nearest is None
    assert "no training pictures" in result.problems["nearest"]


def test_samples_without_media_are_left_out_and_counted(model, held):
    result = evaluate(model, [*held, sample("red", media=False)])
    assert (len(result.rows), result.num_without_media) == (4, 1)
    with pytest.raises(InputError, match="none of the 1 held-out samples"):
        evaluate(model, [sample("red", media=False)])


def test_a_failed_measurement_leaves_the_others(model, held, monkeypatch):
    generate = BindLLM.generate_from

    def failing(self, input_ids, attention_mask, media_index, embeddings, **options):
        if len(input_ids) == 1:  # only the blind model is asked one prompt
            raise torch.OutOfMemoryError("no memory left")
        return generate(self, input_ids, attention_mask, media_index, embeddings, **options)

    monkeypatch.setattr(BindLLM, "generate_from", failing)
    result = evaluate(model, held)
    assert result.problems == {"zero_gates captions": "OutOfMemoryError: no memory left"}
    assert result.metrics["zero_gates"]["cider"] is None
    assert result.metrics["zero_gates"]["loss"] is not None
    assert result.metrics["shuffled"]["cider"] is not None
    assert result.rows[0].zero_gates is None


def test_a_loss_that_is_no_number_is_a_problem(model, held, monkeypatch):
    forward = BindLLM.forward

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits *= math.nan
        return output

    monkeypatch.setattr(BindLLM, "forward", broken)
    result = evaluate(model, held)
    assert result.metrics["heldout"]["loss"] is None
    assert "not finite" in result.problems["heldout loss"]


def test_a_perplexity_beyond_floats_is_none():
    assert loss_numbers(800.0) == {"loss": 800.0, "perplexity": None}
    assert loss_numbers(None) == {"loss": None, "perplexity": None}
    assert loss_numbers(2.0)["perplexity"] == pytest.approx(math.exp(2))


def test_evaluation_repeats_and_leaves_the_model_alone(model, held):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = evaluate(model, held, batch_size=2), evaluate(model, held, batch_size=2)
    assert (first.metrics, first.captions()) == (second.metrics, second.captions())
    assert model.bind.training
    assert not model.decoder.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_blind_samples_show_nothing(held):
    assert [one.media for one in blind(held)] == [()] * 4
    assert held[0].media


def test_a_single_measurement_gives_the_numbers_of_the_whole_evaluation(model, held):
    expected = evaluate(model, held).metrics
    assert measure_captions(model, held, lookup, max_new_tokens=6) == expected["heldout"]
    exchanged = measure_captions(model, held, exchange(held, lookup), max_new_tokens=6)
    assert exchanged == expected["shuffled"] != expected["heldout"]


def test_a_single_measurement_that_fails_says_why(model, held):
    with pytest.raises(InputError, match="leave out those that show nothing"):
        measure_captions(model, [*held, sample("red", media=False)], lookup)
    with pytest.raises(InputError, match="held-out loss: InputError: the loss is not finite"):
        measure_captions(model, held, lambda groups: lookup(groups) * math.nan)
