import json

import pytest

from benchmark_parts import scienceqa
from bindllm.card.limits import calibration_lines, not_measured
from bindllm.evaluation.benchmarks.folder import Evaluation
from bindllm.evaluation.benchmarks.run import evaluate
from tiny import tiny_model


@pytest.fixture(scope="module")
def measured(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    options = {"root": scienceqa(folder / "scienceqa"), "output": folder / "out", "store": folder / "store"}
    return (
        evaluate(tiny_model(decoder), "scienceqa", choose="likelihood", **options),
        tiny_model(decoder),
        options,
    )


def test_lines_have_the_probability_of_the_chosen_option(measured):
    done, model, options = measured
    found = [line["probability"] for line in done.lines["model"]]
    assert all(1 / 2 <= probability < 1 for probability in found)
    assert "probability" not in done.lines["majority_answer"][0]
    # Lines that are read again stay the same.
    before = (options["output"] / "items.jsonl").read_bytes()
    evaluate(model, "scienceqa", choose="likelihood", **options)
    assert (options["output"] / "items.jsonl").read_bytes() == before
    assert json.loads(before.splitlines()[0])["probability"] == found[0]


def test_the_card_states_the_calibration(measured):
    done = measured[0]
    (text,) = calibration_lines(done)
    assert text.startswith("- scienceqa: the mean probability of 4 chosen options is ")
    assert "Calibration" not in "\n".join(not_measured([done], [], extra=[]))


@pytest.mark.parametrize(
    ("sure", "verdict", "error"),
    [(0.95, "is too sure", "0.450"), (0.5, "neither", "0.000"), (0.1, "is too unsure", "0.400")],
)
def test_a_model_that_is_too_sure(sure, verdict, error, measured):
    lines = [
        {
            **measured[0].lines["model"][0],
            "unit": str(n),
            "media": [],
            "media_sha256": str(n),
            "score": float(n % 2),
            "probability": sure,
        }
        for n in range(40)
    ]
    (text,) = calibration_lines(Evaluation(measured[0].facts, measured[0].folder, {"model": lines}))
    assert verdict in text
    assert f"Expected calibration error: {error}, in 10 bins." in text
