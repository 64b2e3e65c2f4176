"""Comparing two evaluations: the paired test, won and lost questions, and folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bindllm.cli import main
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks.bootstrap import compare_folders
from bindllm.evaluation.benchmarks.folder import EvaluationFolder


def write_evaluation(
    folder: Path, answers: list[str], benchmark: str = "pope", targets=None, **settings
) -> Path:
    """Write an evaluation with a question for each answer; "yes" is true."""
    facts = {"format": 1, "benchmark": benchmark, "metric": "yes_no", "checkpoint": str(folder)}
    facts |= {"settings": {"parser": "yes_no", **settings}, "title": "POPE", "notes": [], "skipped": {}}
    facts["counts"] = {"items": len(answers)}
    lines = []
    for n, answer in enumerate(answers):
        target = targets[n] if targets else "yes"
        line = {
            "id": f"q{n}",
            "question": f"Is it {n}?",
            "media": [],
            "unit": f"q{n}",
            "groups": {"split": "random"},
        }
        line |= {"variant": "model", "target": target, "answer": f"{answer}.", "parsed": answer}
        lines.append(line | {"score": float(answer == target)})
    EvaluationFolder(folder / benchmark).close(facts, {"model": lines})
    return folder


@pytest.fixture
def folders(tmp_path):
    a = write_evaluation(tmp_path / "a", ["yes", "no", "no", "no", "yes"] * 10)
    b = write_evaluation(tmp_path / "b", ["yes", "yes", "yes", "no", "no"] * 10)
    return a, b


def test_won_and_lost_questions_and_the_difference(folders):
    (found,) = compare_folders(*folders)
    assert (found.count, len(found.won), len(found.lost)) == (50, 20, 10)
    assert found.won[0][0]["id"] == "q1"
    number = found.difference["accuracy"]
    assert number["value"] == pytest.approx(0.2)
    assert number["low"] < 0.2 < number["high"]
    # 20 won and 10 lost: the sign test has p = 0.099.
    assert 0.02 < number["p"] < 0.12


def test_an_evaluation_is_equal_to_itself(folders):
    (found,) = compare_folders(folders[0], folders[0])
    assert (found.won, found.lost) == ([], [])
    assert found.difference["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 50, "p": 1.0}


def test_only_questions_of_both_are_compared(tmp_path, folders):
    fewer = write_evaluation(tmp_path / "fewer", ["yes"] * 8, parser="pope", samples=5)
    (found,) = compare_folders(folders[0], fewer)
    assert found.count == 8
    assert found.notes == [
        "parser differs: 'yes_no' and 'pope'",
        "samples differs: None and 5",
        f"42 questions of {folders[0] / 'pope'} are not compared",
    ]


def test_folders_that_do_not_fit_are_refused(tmp_path, folders):
    other = write_evaluation(tmp_path / "other", ["yes"], "mme")
    with pytest.raises(InputError, match=r"has pope, and .* has mme; evaluate the same benchmark"):
        compare_folders(folders[0], other)
    changed = write_evaluation(tmp_path / "changed", ["yes"] * 3, targets=["yes", "no", "yes"])
    with pytest.raises(InputError, match="different data: the answer to q1 is 'yes' and 'no'"):
        compare_folders(folders[0], changed)
    with pytest.raises(
        InputError, match=r"has no evaluation.json; give a folder that bindllm evaluate wrote"
    ):
        compare_folders(folders[0], tmp_path)


def test_the_command_prints_both_sides(folders, capsys, tmp_path):
    assert main(["compare", *map(str, folders), "--show", "1", "--output", str(tmp_path / "c.json")]) == 0
    told = capsys.readouterr().out
    assert "0.200 [" in told
    assert "B won 20 questions and lost 10" in told
    assert "won: q1: 'Is it 1?', true 'yes': A 'no.', B 'yes.'" in told
    assert "lost: q4: 'Is it 4?', true 'yes': A 'yes.', B 'no.'" in told
    written = json.loads((tmp_path / "c.json").read_text())["pope"]
    assert written["won"][0]["answer"] == {"a": "no.", "b": "yes."}
