"""The headline states wins and losses alike."""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from bindllm.evaluation.answers import AnswerRow
from bindllm.evaluation.captions import CaptionRow
from bindllm.evaluation.task import VARIANTS
from bindllm.report.page import best_variants
from bindllm.report.summary import KEYS, print_summary, summarize


def numbers(loss, cider=1.0, exact=0.2):
    perplexity = None if loss is None else 2.7**loss
    return {
        "loss": loss,
        "perplexity": perplexity,
        "cider": cider,
        "bleu4": 0.0,
        "rouge_l": 0.3,
        "exact_match": exact,
    }


def metrics(**variants):
    usual = {
        "model": numbers(3.5),
        "no_media": numbers(8.2, 0.0, 0.0),
        "shuffled_media": numbers(4.9, 0.1, 0.0),
        "nearest_caption": numbers(None, 0.8, 0.1),
    }
    return {**usual, **variants}


def headline(num_captions=400, **variants):
    return " ".join(summarize({"tasks": {"captions": metrics(**variants)}}, num_captions=num_captions))


def test_a_run_on_other_media_does_not_mention_images():
    text = " ".join(
        summarize({"tasks": {"captions": metrics()}}, num_captions=12, modalities=["radar", "image"])
    )
    assert "On 12 held-out media the loss is" in text
    assert "12 media are few" in text
    assert "image" not in text


def test_a_good_run():
    text = headline()
    assert "On 400 held-out images the loss is 3.50 per token" in text
    assert "Without images (gates at zero) the same model has 8.20." in text
    assert "With wrong images it has 4.90, so its output does depend" in text
    assert "beat copying" in text
    assert "CIDEr 1.00 against 0.80, exact match 20.0% against 10.0%" in text
    assert "chance" not in text


def test_a_better_nearest_caption_is_stated():
    text = headline(nearest_caption=numbers(None, 1.7, 0.3))
    assert "worse than copying" in text
    assert "CIDEr 1.00 against 1.70" in text
    assert "Plain look-up wins" in text


def test_a_mixed_result_names_both_sides():
    text = headline(nearest_caption=numbers(None, 1.7, 0.1))
    assert "beat copying the caption of the nearest training image in exact match 20.0% against 10.0%" in text
    assert "copying is better in CIDEr 1.00 against 1.70" in text


def test_equal_captions():
    assert "score the same as copying" in headline(nearest_caption=numbers(None))


def test_a_model_that_ignores_media_is_exposed():
    assert "hardly worse: it makes little use" in headline(shuffled_media=numbers(3.52))
    assert "nothing here shows that it uses the image" in headline(shuffled_media=numbers(3.5))


def test_useless_training_is_stated():
    assert "training has not helped" in headline(no_media=numbers(3.4))


def test_few_images_are_called_few():
    assert "12 images are few" in headline(num_captions=12)


def test_missing_measurements_are_left_out():
    nothing = dict.fromkeys(KEYS["captions"])
    text = headline(shuffled_media=nothing, no_media=nothing, nearest_caption=nothing)
    assert text == "On 400 held-out images the loss is 3.50 per token (perplexity 32.34)."
    assert headline(model=nothing) == "The loss on 400 held-out images could not be measured."


def test_the_best_of_a_row():
    assert best_variants({"model": 3.5, "no_media": 8.2, "nearest_caption": None}, lower=True) == {"model"}
    assert best_variants({"model": 1.0, "no_media": 0.1, "nearest_caption": 1.0}) == {
        "model",
        "nearest_caption",
    }
    assert best_variants({"model": 0.0, "no_media": 0.0}) == set()
    assert best_variants({"model": None, "no_media": None}) == set()


def test_a_difference_that_can_be_chance_is_not_called_learning():
    def text(exchanged, count=100):
        variants = {name: {"accuracy": 0.5, "count": count} for name in VARIANTS["episodes"]}
        variants["wrong_support"]["accuracy"] = exchanged
        return summarize({"tasks": {"episodes": variants}}, num_captions=0)[-1]

    assert text(0.1).endswith(
        "10.0% right instead of 50.0%, so it does learn names from the image of a shot."
    )
    assert "so it does learn" in text(0.45, 10_000)
    # A model that copies the last name may have this by chance.
    assert text(0.45).endswith("45.0% right instead of 50.0%, hardly fewer: this can be chance.")
    assert "not fewer: nothing here shows" in text(0.5)


NUMBERS = {"loss": 2.0, "perplexity": 7.4, **dict.fromkeys(("cider", "bleu4", "rouge_l", "exact_match"), 0.5)}
METRICS = {"tasks": {"captions": {name: NUMBERS for name in VARIANTS["captions"]}}}


def test_a_long_caption_leaves_room_for_the_file_and_the_true_caption(capsys):
    row = CaptionRow("data/radar/sweeps/0.npy", "radar", ["something near"], model="It is a metaphor. " * 20)
    print_summary(
        Console(width=80), METRICS, {"captions": [asdict(row)]}, Path("report.html"), modalities={"radar"}
    )
    told = capsys.readouterr().out
    assert "0.npy" in told
    assert "something near" in told
    assert "It is a metaphor" in told


def test_questions_are_shown_with_their_answers(capsys):
    numbers = {"accuracy": 0.75, "by_type": {}, "count": 400, "count_by_type": {}}
    nothing = {"accuracy": None, "by_type": {}, "count": 0, "count_by_type": {}}
    metrics = {"tasks": {"answers": {**dict.fromkeys(VARIANTS["answers"], nothing), "model": numbers}}}
    rows = [
        AnswerRow("is it red?", ["yes", "yep"], media="data/images/7.png", modality="image", model="no"),
        AnswerRow("what is two and two?", ["four"], model="four", right=True),
    ]
    rows = {"answers": [asdict(row) for row in rows]}
    print_summary(Console(width=100), metrics, rows, Path("report.html"), modalities={"image"})
    told = capsys.readouterr().out
    assert "Of 400 held-out questions the model answers 75.0% right." in told
    lines = [line.split() for line in told.splitlines()]
    assert ["7.png", "is", "it", "red?", "yes", "no"] in lines
    assert ["what", "is", "two", "and", "two?", "four", "four"] in lines
    assert "caption" not in told
