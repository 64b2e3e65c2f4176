"""The headline says what the numbers say, wins and losses alike."""

from bindllm.report.summary import METRICS, VARIANTS, best_variants, summarise


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


def headline(num_pictures=400, **variants):
    return " ".join(summarise({"tasks": {"captions": metrics(**variants)}}, num_pictures=num_pictures))


def test_a_run_on_other_media_is_not_said_to_be_about_pictures():
    text = " ".join(
        summarise({"tasks": {"captions": metrics()}}, num_pictures=12, modalities=["radar", "image"])
    )
    assert "On 12 held-out media the loss is" in text
    assert "12 media are few" in text
    assert "picture" not in text


def test_a_good_run():
    text = headline()
    assert "On 400 held-out pictures the loss is 3.50 per token" in text
    assert "gates at zero, which sees nothing, has 8.20" in text
    assert "wrong pictures it has 4.90, so what it says does depend" in text
    assert "beat copying" in text
    assert "CIDEr 1.00 against 0.80, exact match 20.0% against 10.0%" in text
    assert "chance" not in text


def test_a_better_nearest_picture_is_said():
    text = headline(nearest_caption=numbers(None, 1.7, 0.3))
    assert "worse than copying" in text
    assert "CIDEr 1.00 against 1.70" in text
    assert "Plain look-up wins" in text


def test_a_mixed_result_names_both_sides():
    text = headline(nearest_caption=numbers(None, 1.7, 0.1))
    assert (
        "beat copying the caption of the nearest training picture in exact match 20.0% against 10.0%" in text
    )
    assert "copying is better in CIDEr 1.00 against 1.70" in text


def test_equal_captions():
    assert "score the same as copying" in headline(nearest_caption=numbers(None))


def test_a_model_that_does_not_look_is_found_out():
    assert "hardly worse: it makes little use" in headline(shuffled_media=numbers(3.52))
    assert "nothing here shows that it uses the picture" in headline(shuffled_media=numbers(3.5))


def test_training_that_did_not_help_is_said():
    assert "training has not helped" in headline(no_media=numbers(3.4))


def test_few_pictures_are_said_to_be_few():
    assert "12 pictures are few" in headline(num_pictures=12)


def test_what_was_not_measured_is_left_out():
    nothing = dict.fromkeys(METRICS)
    text = headline(shuffled_media=nothing, no_media=nothing, nearest_caption=nothing)
    assert text == "On 400 held-out pictures the loss is 3.50 per token (perplexity 32.34)."
    assert headline(model=nothing) == "The loss on 400 held-out pictures could not be measured."


def test_the_best_of_a_row():
    assert best_variants(metrics(), "loss") == ["model"]
    assert best_variants(metrics(nearest_caption=numbers(None, 1.0)), "cider") == ["model", "nearest_caption"]
    assert best_variants(metrics(), "bleu4") == []
    assert best_variants({name: dict.fromkeys(METRICS) for name in VARIANTS}, "loss") == []
