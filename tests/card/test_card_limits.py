import pytest

from bindllm.card.evidence import number_text, percent
from bindllm.card.limits import limits, not_measured
from bindllm.evaluation.benchmarks.folder import Evaluation, read_evaluation
from card_parts import write_checkpoint, write_evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return read_evaluation(write_evaluation(home / "pope", write_checkpoint(home)))


@pytest.fixture(scope="module")
def report(evaluation):
    return "\n".join(limits([evaluation]))


def test_a_model_that_always_says_yes_is_named(report):
    assert "the model answers yes to 97.5%" in report
    assert "of 40 questions; yes is true for 50.0%: the model says yes too often." in report


def test_controls_are_compared_on_the_same_items(report):
    assert "- pope: It is not shown that the score needs the media" in report
    # 20 of the questions were asked without media; half of their answers are yes.
    assert "of 20 answers stay the same without media." in report
    assert "- pope: 50.0% (" in report


def test_answers_that_were_not_read_and_groups_are_stated(report):
    assert "of 40 answers (parser yes_no); they count as wrong." in report
    assert "| a | 0.5 (" in report
    # One of 20 is marked as a small group.
    assert "| 20 (few) |" in report


def test_tables_of_two_evaluations_are_apart(evaluation):
    text = "\n".join(limits([evaluation, evaluation]))
    assert text.count("\n\npope, by split:\n\n|") == 2
    assert "\n\n\n" not in text


def test_a_baseline_that_is_better_is_named(evaluation):
    facts = {
        **evaluation.facts,
        "scores": {**evaluation.facts["scores"], "majority_answer": {"accuracy": _number(0.9)}},
    }
    text = "\n".join(limits([Evaluation(facts, evaluation.folder, evaluation.lines)]))
    assert "accuracy of `majority_answer` is 0.9, better than the model with 0.5" in text


def test_a_check_without_a_measurement_is_listed(evaluation):
    missing = "\n".join(not_measured([evaluation], [], extra=["more"]))
    assert "conflict with the question" in missing
    assert "Calibration" in missing
    assert "- more" in missing
    assert "Bias towards yes" not in missing
    assert "conflict" not in "\n".join(not_measured([evaluation], ["shuffled_media"], extra=[]))


def test_length_of_the_answer_is_a_group(evaluation):
    lines = [
        {**line, "target": ["red car", "a b c d"] if n else "red"}
        for n, line in enumerate(evaluation.lines["model"])
    ]
    text = "\n".join(limits([Evaluation(evaluation.facts, evaluation.folder, {"model": lines})]))
    assert "| 2 to 3 words | 0.5128 (" in text
    assert "| 1 word | 0 | 1 (few) |" in text


def test_equal_values_have_no_interval():
    assert number_text(_number(1.0)) == "1"
    assert percent(_number(0.0)) == "0.0%"
    assert number_text({"value": 8.5e-6}) == "0.0000"


def _number(value):
    return {"value": value, "low": value, "high": value, "n": 40}
