import json

import pytest

from benchmark_parts import pairs
from bindllm.card.limits import limits, not_measured
from bindllm.evaluation.benchmarks import BENCHMARKS
from bindllm.evaluation.benchmarks.benchmark import read_items
from bindllm.evaluation.benchmarks.bootstrap import intervals
from bindllm.evaluation.benchmarks.metrics import PAIRS
from bindllm.evaluation.benchmarks.run import evaluate
from tiny import tiny_model


def line(pair, parsed, *, target="yes", score=1.0):
    shared = {"unit": pair, "media": [], "groups": {}}
    return {
        **shared,
        "id": f"{pair} {parsed}",
        "answer": "?",
        "parsed": parsed,
        "target": target,
        "score": score,
    }


def test_only_pairs_with_one_true_answer_can_flip():
    lines = [line("a", "yes"), line("a", "no", score=0.0), line("b", "yes"), line("b", "yes")]
    assert intervals(lines, PAIRS)["flip_rate"]["value"] == pytest.approx(0.5)
    lines += [line("c", "yes"), line("c", "no", target="no")]
    assert intervals(lines, PAIRS)["flip_rate"]["value"] == pytest.approx(0.5)
    assert intervals(lines[4:], PAIRS)["flip_rate"]["value"] is None
    # Two answers that nobody can read are not the same answer.
    assert intervals([line("d", None), {**line("d", None), "answer": "!"}], PAIRS)["flip_rate"]["value"] == 1


def test_a_question_without_its_pair_is_counted(tmp_path):
    file = pairs(tmp_path) / "pairs.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], {**rows[3], "pair": None}]))
    found = read_items(BENCHMARKS["pairs"], tmp_path, prompt="{question}")
    assert len(found.items) == 2
    assert found.skipped.counts == {"no other question of its pair": 2}


def test_flips_by_attribute_reach_the_card(decoder, tmp_path):
    folder, stored = pairs(tmp_path / "pairs"), tmp_path / "store"
    done = evaluate(tiny_model(decoder), "pairs", root=folder, output=tmp_path / "out", store=stored)
    text = "\n".join(limits([done]))
    assert "- pairs: the answer changes in 100.0% of the pairs, though the true answer is the same." in text
    assert "- pairs, color of the shirt: the answer changes in 100.0% of the pairs" in text
    assert "Counterfactual" not in "\n".join(not_measured([done], [], extra=[]))
