from bindllm.card.evidence import Evidence, Figure, mean_of, read_evaluation
from bindllm.card.limits import limits, not_measured
from card_parts import WEIGHTS, write_evaluation


def report(tmp_path):
    evidence = read_evaluation(write_evaluation(tmp_path / "pope"), {"weights_sha256": WEIGHTS})
    return "\n".join(limits([evidence])), evidence


def test_a_model_that_always_says_yes_is_named(tmp_path):
    text, _ = report(tmp_path)
    assert "the model answers yes to 97.5% (87.1% to 99.6%) of 40 questions; yes is true for 50.0%" in text
    assert "the model says yes too often" in text


def test_controls_are_compared_on_the_same_items(tmp_path):
    text, _ = report(tmp_path)
    # The first 20 questions; the other 20 were not asked without media.
    assert "the mean score of 20 items is 0.500, and 1.000 without media (difference -0.5" in text
    assert "nothing here shows that the score needs the media" in text
    assert "50.0% (29.9% to 70.1%) of the answers stay the same" in text


def test_answers_that_were_not_read_and_groups_are_stated(tmp_path):
    text, _ = report(tmp_path)
    assert "2.5% (0.4% to 12.9%) of 40 answers (parser yes or no); they count as wrong" in text
    assert "| a | 0.5 (0.35 to 0.65) | 40 |" in text


def test_a_check_without_a_measurement_is_listed(tmp_path):
    _, evidence = report(tmp_path)
    missing = "\n".join(not_measured([evidence], extra=["more"], measured=["probes"]))
    assert "conflict with the question" in missing
    assert "calibration" in missing.lower()
    assert "- more" in missing
    assert "Bias towards yes" not in missing
    assert "Counterfactual" not in missing


def test_length_of_the_answer_is_a_group():
    items = [
        {
            "id": n,
            "variant": "model",
            "answer": "",
            "parsed": "",
            "target": ["a"] if n else "a b c d",
            "score": 1.0,
        }
        for n in range(4)
    ]
    text = "\n".join(limits([Evidence("x", "f", {"model": {"accuracy": Figure(1.0)}}, items=items)]))
    assert "| 1 word | 1 (0.4385 to 1) | 3 (few) |" in text
    assert "| 4 to 8 words | 1 (0.2065 to 1) | 1 (few) |" in text


def test_intervals():
    values = [0.0, 0.5, 1.0] * 50
    found = mean_of(values)
    assert found == mean_of(values)
    assert found.low < found.value < found.high
    assert found.low > 0.3
    assert mean_of([1.0] * 100).low > 0.95
