"""Captions of a tiny model and their metrics: each number is compared with one computed another way."""

import io
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm.conversation import Conversation, Message
from bindllm.data.collate import answer_batch
from bindllm.data.rows import tokenize
from bindllm.errors import InputError
from bindllm.evaluation import task
from bindllm.evaluation.answering import input_digests
from bindllm.evaluation.captions import (
    METRICS,
    MIN_TOKENS,
    caption_metrics,
    caption_words,
    captions_task,
    nearest_captions,
    same_caption,
)
from bindllm.evaluation.task import (
    VARIANTS,
    loss_metrics,
    media_name,
    shuffle_media,
    without_media,
)
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from tiny import COLORS, ColorEncoder, tiny_model, tiny_tokenizer

PROMPT = "What color?"


def lookup(groups):
    """Embeddings by the tiny encoder."""
    encoder = ColorEncoder()
    if not groups:
        return torch.zeros(0, encoder.embedding_size)
    return encoder.embed("image", [encoder.prepare(group[0]) for group in groups])


def image(color, shade=0, *, file_format="PNG"):
    pixels = (np.full((4, 4, 3), COLORS[color], dtype=np.int64) + shade).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, file_format)
    return Media.image(content.getvalue())


def sample(color, caption=None, *, shade=0, references=None, prompt=PROMPT, media=True, file_format="PNG"):
    caption = caption or f"{color} square"
    content = [image(color, shade, file_format=file_format), prompt] if media else prompt
    conversation = Conversation((Message("user", content), Message("assistant", caption)))
    return replace(tokenize(conversation, tiny_tokenizer(), 200), references=references or (caption,))


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder, gates=1.0)


@pytest.fixture
def held():
    return [sample("red"), sample("green"), sample("blue", "a big blue square"), sample("white")]


def evaluate(model, samples, *, train_samples=None, lookup=lookup, **options):
    if train_samples is None:
        train_samples = [sample("red", "dark red", shade=-20), sample("blue", shade=-20)]
    captions = captions_task(
        samples, train_samples=train_samples, lookup=lookup, tokenizer=tiny_tokenizer(), max_new_tokens=6
    )
    return task.evaluate(model, [captions], lookup=lookup, **options)


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
        assert result.metrics["captions"]["model"]["loss"] == pytest.approx(
            one_by_one_loss(model, held, lookup), abs=1e-5
        )
        wrong = one_by_one_loss(model, held, shuffle_media(held, lookup))
        assert result.metrics["captions"]["shuffled_media"]["loss"] == pytest.approx(wrong, abs=1e-5)
        gates = model.injection.gates.clone()
        model.injection.gates.zero_()
        no_media_loss = one_by_one_loss(model, held, lookup)
        model.injection.gates.copy_(gates)
    assert result.metrics["captions"]["no_media"]["loss"] == pytest.approx(no_media_loss, abs=1e-5)
    assert result.metrics["captions"]["nearest_caption"]["loss"] is None
    assert result.metrics["captions"]["nearest_caption"]["perplexity"] is None
    for name in ("model", "no_media", "shuffled_media"):
        assert result.metrics["captions"][name]["perplexity"] == pytest.approx(
            math.exp(result.metrics["captions"][name]["loss"])
        )
    assert result.problems == {}


def test_captions_are_those_of_generate(model, held):
    result = evaluate(model, held, batch_size=3)
    for row, one in zip(result.rows["captions"], held, strict=True):
        media = list(one.media[0])
        assert row["model"] == model.generate(PROMPT, media=media, max_new_tokens=6)
        assert row["no_media"] == model.generate(PROMPT, max_new_tokens=6)
    assert any(row["shuffled_media"] != row["model"] for row in result.rows["captions"])


def test_without_media_each_prompt_is_run_once(model, held, monkeypatch):
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
    references = [row["references"] for row in result.rows["captions"]]
    said = {
        "model": [row["model"] for row in result.rows["captions"]],
        "no_media": [row["no_media"] for row in result.rows["captions"]],
        "shuffled_media": [row["shuffled_media"] for row in result.rows["captions"]],
        "nearest_caption": [row["nearest_caption"] for row in result.rows["captions"]],
    }
    assert tuple(result.metrics["captions"]) == tuple(said) == VARIANTS["captions"]
    for name, captions in said.items():
        expected = caption_metrics(captions, references)
        assert {key: result.metrics["captions"][name][key] for key in expected} == expected


def test_subsets_have_metrics_of_their_own(model, held):
    samples = [replace(one, subset="new" if n < 3 else "known") for n, one in enumerate(held)]
    result = evaluate(model, samples)
    assert [row["subset"] for row in result.rows["captions"]] == ["new", "new", "new", "known"]
    for name, metrics in result.metrics["captions"].items():
        rows = [row for row in result.rows["captions"] if row["subset"] == "new"]
        said = [row[name] for row in rows]
        expected = caption_metrics(said, [row["references"] for row in rows])
        assert metrics["by_subset"]["new"] == {"count": 3, **expected}


def test_languages_are_apart_also_with_the_same_prompt(model):
    samples = [
        replace(sample(color, name), language=language, subset="new")
        for language, names in (("en", ("red", "blue")), ("zh", ("红色", "蓝色")))
        for color, name in zip(("red", "blue"), names, strict=True)
    ]
    # The nearest training image has an English caption only; the Chinese one is of another image.
    training = [
        replace(sample("red", "dark red", shade=-20), language="en"),
        replace(sample("blue", "深蓝色", shade=-20), language="zh"),
    ]
    result = evaluate(model, [*samples, replace(samples[0], language="es")], train_samples=training)
    rows = result.rows["captions"]
    assert [(row["language"], row["references"]) for row in rows] == [
        *[(one.language, [*one.references]) for one in samples],
        ("es", ["red"]),
    ]
    assert [row["nearest_caption"] for row in rows] == ["dark red"] * 2 + ["深蓝色"] * 2 + [""]
    metrics = result.metrics["captions"]["nearest_caption"]
    assert {name: part["count"] for name, part in metrics["by_language"].items()} == {
        "en": 2,
        "zh": 2,
        "es": 1,
    }
    # 3 of 3 characters against 2: the longest common subsequence of 深蓝色 and 蓝色 has both.
    assert metrics["by_language"]["zh"]["rouge_l"] == pytest.approx((2 / 5 + 4 / 5) / 2)
    assert metrics["by_subset"]["new"]["by_language"]["zh"] == metrics["by_language"]["zh"]
    assert "by_subset" not in metrics["by_language"]["zh"]


def test_a_caption_may_be_as_long_as_the_longest_true_one():
    made = partial(captions_task, train_samples=[], lookup=lookup, tokenizer=tiny_tokenizer())
    assert made([sample("red", "red")]).max_new_tokens == MIN_TOKENS
    # Three bytes, and tokens, for each character; the end token, and a margin.
    assert made([sample("red", "红" * 30)]).max_new_tokens > 91


def test_the_nearest_training_image(model, held):
    result = evaluate(model, held)
    assert result.rows["captions"][0]["nearest_caption"] == "dark red"
    assert not result.rows["captions"][0]["nearest_exact"]
    assert result.rows["captions"][2]["nearest_caption"] == "blue square"
    assert 0.9 < result.rows["captions"][0]["nearest_similarity"] <= 1.0001


def test_nearest_is_searched_in_chunks(held, monkeypatch):
    training = [sample(color, f"{color} {shade}", shade=shade) for shade in (-90, 0) for color in COLORS]
    held = held[:3]  # darker white is nearly parallel to white
    whole = nearest_captions(held, training, lookup)
    monkeypatch.setattr("bindllm.evaluation.captions._CHUNK", 3)
    assert nearest_captions(held, training, lookup) == whole
    assert [one.text for one in whole] == ["red 0", "green 0", "blue 0"]
    # The first of equal images counts.
    assert (
        nearest_captions(held[:1], [sample("red", "first"), sample("red", "second")], lookup)[0].text
        == "first"
    )


def test_every_image_is_exchanged_and_the_exchange_is_fixed():
    held = [sample("red", shade=-shade) for shade in range(0, 60, 3)]
    groups = [one.media[0] for one in held]
    true, wrong = lookup(groups), shuffle_media(held, lookup)(groups)
    assert all(not torch.equal(a, b) for a, b in zip(true, wrong, strict=True))
    assert {row.numpy().tobytes() for row in wrong} == {row.numpy().tobytes() for row in true}
    assert torch.equal(wrong, shuffle_media(held, lookup)(groups))


class WithTokens:
    """One token for each image: its embedding, or the same for all."""

    def __init__(self, *, same=False):
        self.same = same

    def __call__(self, groups):
        return lookup(groups)

    def tokens(self, groups):
        return torch.ones(len(groups), 1, 16) if self.same else lookup(groups)[:, None]


def test_tokens_are_exchanged_together_with_the_embeddings():
    held = [sample("red", shade=-shade) for shade in range(0, 60, 3)]
    groups = [one.media[0] for one in held]
    exchanged = shuffle_media(held, WithTokens())
    torch.testing.assert_close(exchanged.tokens(groups)[:, 0], exchanged(groups))
    assert torch.equal(exchanged(groups), shuffle_media(held, lookup)(groups))
    assert shuffle_media(held, lookup).tokens(groups) is None


def test_equal_inputs_have_equal_tokens():
    held = [sample("red"), sample("red"), sample("blue")]
    first, second, third = input_digests(held, WithTokens())
    assert first == second != third
    assert first != input_digests(held, WithTokens(same=True))[0] != input_digests(held, lookup)[0]


def test_several_captions_of_an_image_are_one_row(model):
    held = [
        sample("red", "red square", references=("red square", "a red thing")),
        sample("red", "a red thing", references=("red square", "a red thing")),
        sample("blue"),
    ]
    result = evaluate(model, held)
    assert result.problems == {}
    assert [row["references"] for row in result.rows["captions"]] == [
        ["red square", "a red thing"],
        ["blue square"],
    ]
    with torch.no_grad():
        assert result.metrics["captions"]["model"]["loss"] == pytest.approx(
            one_by_one_loss(model, held, lookup), abs=1e-5
        )


def test_one_image_in_two_files_is_one_row(model):
    held = [sample("red"), sample("red", "rouge", file_format="BMP"), sample("blue")]
    assert held[0].media != held[1].media
    result = evaluate(model, held)
    assert [row["references"] for row in result.rows["captions"]] == [
        ["red square", "rouge"],
        ["blue square"],
    ]
    assert result.problems == {}


def test_an_image_inside_a_table_has_the_name_of_its_row(held):
    one = replace(held[0], name="rows.parquet row 3")
    assert media_name(one) == "rows.parquet row 3"
    (found,) = nearest_captions(held[:1], [one], lookup)
    assert found.media == "rows.parquet row 3"
    conversation = Conversation((Message("user", (Media.image("a/red.png"), "?")), Message("assistant", "!")))
    assert media_name(replace(one, conversation=conversation)) == "a/red.png"


def test_one_image_cannot_be_shuffled(model):
    result = evaluate(model, [sample("red")])
    assert result.metrics["captions"]["shuffled_media"] == dict.fromkeys(result.metrics["captions"]["model"])
    assert "cannot be exchanged" in result.problems["captions: shuffled_media"]
    assert result.metrics["captions"]["model"]["loss"] is not None


def test_without_training_media_there_is_no_nearest_caption(model, held):
    result = evaluate(model, held, train_samples=[sample("red", media=False)])
    assert result.metrics["captions"]["nearest_caption"] == dict.fromkeys(result.metrics["captions"]["model"])
    assert result.rows["captions"][0]["nearest_caption"] is None
    assert "training samples have no media" in result.problems["captions: nearest_caption"]


def test_samples_without_media_are_skipped_and_counted(model, held):
    result = evaluate(model, [*held, sample("red", media=False)])
    assert len(result.rows["captions"]) == 4
    assert result.metrics["captions"]["model"]["without_media"] == 1
    with pytest.raises(InputError, match="none of the 1 held-out samples"):
        evaluate(model, [sample("red", media=False)])


def test_a_failed_measurement_leaves_the_others(model, held, monkeypatch):
    generate = BindLLM.generate_from

    def failing(self, input_ids, attention_mask, media_index, embeddings, **options):
        if len(input_ids) == 1:  # only without media is there a single distinct prompt
            raise torch.OutOfMemoryError("no memory left")
        return generate(self, input_ids, attention_mask, media_index, embeddings, **options)

    monkeypatch.setattr(BindLLM, "generate_from", failing)
    result = evaluate(model, held)
    assert result.problems == {"captions: no_media answers": "OutOfMemoryError: no memory left"}
    assert result.metrics["captions"]["no_media"]["cider"] is None
    assert result.metrics["captions"]["no_media"]["loss"] is not None
    assert result.metrics["captions"]["shuffled_media"]["cider"] is not None
    assert result.rows["captions"][0]["no_media"] is None


def test_a_loss_that_is_not_finite_is_a_problem(model, held, monkeypatch):
    forward = BindLLM.forward

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits *= math.nan
        return output

    monkeypatch.setattr(BindLLM, "forward", broken)
    result = evaluate(model, held)
    assert result.metrics["captions"]["model"]["loss"] is None
    assert "not finite" in result.problems["captions: model loss"]


def test_a_perplexity_beyond_floats_is_none():
    assert loss_metrics(800.0) == {"loss": 800.0, "perplexity": None}
    assert loss_metrics(None) == {"loss": None, "perplexity": None}
    assert loss_metrics(2.0)["perplexity"] == pytest.approx(math.exp(2))


def test_evaluation_repeats_and_leaves_the_model_alone(model, held):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = evaluate(model, held, batch_size=2), evaluate(model, held, batch_size=2)
    assert (first.metrics, first.rows) == (second.metrics, second.rows)
    assert model.bind.training
    assert not model.decoder.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_samples_without_media(held):
    assert [one.media for one in without_media(held)] == [()] * 4
    assert held[0].media


def test_chosen_variants_are_measured_alone(model, held):
    whole, alone = evaluate(model, held), evaluate(model, held, variants=["model"])
    assert alone.metrics["captions"] == {"model": whole.metrics["captions"]["model"]}
    assert alone.rows["captions"][0]["no_media"] is None
    # Shuffled media are the same as the model with a shuffled lookup.
    exchanged = evaluate(model, held, lookup=shuffle_media(held, lookup), variants=["model"])
    assert exchanged.metrics["captions"]["model"] == whole.metrics["captions"]["shuffled_media"]
    assert exchanged.metrics["captions"]["model"] != whole.metrics["captions"]["model"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  Black medium-small SQUARE! ", ["black", "medium", "small", "square"]),
        ("o'clock: three\u2013thirty", ["o", "clock", "three", "thirty"]),
        ("Cafe\u0301", ["caf\u00e9"]),  # e and a combining accent become one letter
        ("हिन्दी चित्र", ["हिन्दी", "चित्र"]),  # combining marks stay inside their word
        ("1 + 1 = 2", ["1", "+", "1", "=", "2"]),
        ("...", []),
        ("", []),
        ("红色的T恤。", ["红", "色", "的", "t", "恤"]),  # a character of a script without spaces is a word
        ("赤い ﾄﾏﾄ・トマト", ["赤", "い", "ト", "マ", "ト", "ト", "マ", "ト"]),
        ("ที่นี่", ["ที่", "นี่"]),  # marks stay with their character
        ("빨간 사과", ["빨간", "사과"]),
    ],
)
def test_words_of_a_caption(text, words):
    assert caption_words(text) == words


def test_identical_long_captions_reach_every_maximum():
    captions = ["a baby sheep in a field", "two red trucks on the road", "one old man with big hats"]
    scores = caption_metrics(captions, [[caption] for caption in captions])
    assert tuple(scores) == METRICS
    assert scores == pytest.approx({"cider": 10.0, "bleu4": 1.0, "rouge_l": 1.0, "exact_match": 1.0})


def test_disjoint_captions_score_zero_everywhere():
    scores = caption_metrics(["red truck", "green tree"], [["old man"], ["baby sheep"]])
    assert scores == dict.fromkeys(METRICS, 0.0)


def test_short_captions_have_lower_ceilings():
    # Two words: the terms for 1 and 2 words are 1, the others compare nothing: 10 * (1 + 1 + 0 + 0) / 4.
    scores = caption_metrics(["red truck", "old man"], [["red truck"], ["old man"]])
    assert scores["cider"] == pytest.approx(5.0)
    assert scores["bleu4"] == 0.0
    assert scores["exact_match"] == 1.0


def test_cider_by_hand():
    # "cat" is in one of two references (weight log 2), "a" in both (weight log 2 - log 2 = 0): the first
    # caption agrees in "cat" (cosine 1) and "a cat" (cosine 1), the second in "a" only, which weighs nothing.
    scores = caption_metrics(["a cat", "a bush"], [["a cat"], ["a tree"]])
    assert scores["cider"] == pytest.approx((5.0 + 0.0) / 2)
    # One word against two: the phrase lengths (counted in 2-grams) differ by 1, sigma is 6.
    scores = caption_metrics(["cat", "tree"], [["black cat"], ["tree"]])
    first = 10 / 4 * (1 / math.sqrt(2)) * math.exp(-1 / 72)
    assert scores["cider"] == pytest.approx((first + 2.5) / 2)


def test_one_picture_has_no_cider():
    assert caption_metrics(["a cat"], [["a cat"]])["cider"] == 0.0


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are in the reference; equal lengths.
    scores = caption_metrics(["the cat is on the mat"], [["the dog is on the mat"]])
    assert scores["bleu4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6)


def test_rouge_takes_the_best_reference():
    # Longest common subsequence with "a small cat": "a cat", precision 2/2, recall 2/3; with "dog": nothing.
    scores = caption_metrics(["a cat"], [["dog", "a small cat"]])
    assert scores["rouge_l"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))


def test_metrics_read_other_alphabets():
    scores = caption_metrics(["красный чайник", "дом"], [["Красный чайник!"], ["лес"]])
    assert scores["rouge_l"] == pytest.approx(0.5)
    assert scores["exact_match"] == 0.5
    assert scores["cider"] == pytest.approx(2.5)


def test_characters_of_chinese_are_compared_as_words():
    scores = caption_metrics(["消防车", "红色 苹果"], [["消防员"], ["红色苹果。"]])
    assert scores["rouge_l"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["exact_match"] == 0.5


def test_words_are_rare_in_their_own_language():
    pairs = (
        (["a cat", "a dog"], [["a cat"], ["a dog"]]),
        (["un gato", "el perro"], [["un gato"], ["un perro"]]),
    )
    apart = [caption_metrics(*pair)["cider"] for pair in pairs]
    together = caption_metrics(
        [*pairs[0][0], *pairs[1][0]], [*pairs[0][1], *pairs[1][1]], ["en", "en", "es", "es"]
    )
    assert together["cider"] == pytest.approx(sum(apart) / 2)
    # Without languages, "a" and "un" would be in half of the references, and count.
    assert caption_metrics([*pairs[0][0], *pairs[1][0]], [*pairs[0][1], *pairs[1][1]])[
        "cider"
    ] != pytest.approx(together["cider"])


def test_empty_predictions_match_nothing():
    scores = caption_metrics(["", "tree"], [["cat"], ["tree"]])
    assert scores["exact_match"] == 0.5
    assert scores["rouge_l"] == 0.5
    assert not same_caption("", ["..."])
    assert caption_metrics([""], [["..."]]) == dict.fromkeys(METRICS, 0.0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 predictions for 2"),
        ([], [], "at least one image"),
        (["a", "b"], [["a"], []], r"references\[1\]"),
        (["a"], ["a"], r"references\[0\] is 'a'"),
    ],
)
def test_wrong_shapes_are_refused(predictions, references, message):
    with pytest.raises(InputError, match=message):
        caption_metrics(predictions, references)


def test_neither_java_nor_nltk_is_needed(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("started a program")

    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert caption_metrics(["a cat", "b"], [["a cat"], ["b"]])["exact_match"] == 1.0
