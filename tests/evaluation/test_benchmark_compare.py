"""Comparing two evaluations: the paired test, won and lost questions, and folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bindllm.cli import main
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks.bootstrap import compare_folders
from bindllm.evaluation.benchmarks.folder import EvaluationFolder, find_evaluations
from bindllm.evaluation.ngrams import Cider, bleu_sums


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


def test_other_questions_and_media_of_the_same_ids_are_noted(tmp_path, folders):
    a, b = (write_evaluation(tmp_path / name, ["yes"] * 3) for name in ("one", "two"))
    file = b / "pope/items.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["question"] = "Is it not?"
    # Of another folder, and one of other content.
    lines[1] |= {"media": ["/other/a.png"], "media_sha256": "1"}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = compare_folders(a, b)
    assert found.notes == [
        "1 questions have another text on the other side",
        "1 questions are about media with another content on the other side",
    ]
    assert found.count == 3
    b.joinpath("copy").mkdir()
    for name in ("items.jsonl", "evaluation.json"):
        b.joinpath("copy", name).write_bytes(b.joinpath("pope", name).read_bytes())
    with pytest.raises(InputError, match=r"two/copy and .*two/pope are both evaluations of pope; give one"):
        compare_folders(a, b)


def test_captions_of_a_part_are_compared_by_the_weights_of_the_part(tmp_path):
    said = ["a red dog", "a blue cat", "a red table"]
    true = [["a red dog runs"], ["a blue dog"], ["the red table", "a table"]]

    def write(name, count):
        weights = Cider([[text.split() for text in texts] for texts in true[:count]])
        lines = []
        for n in range(count):
            score = weights.score(said[n].split(), [text.split() for text in true[n]])
            line = {
                "id": str(n),
                "unit": str(n),
                "question": "",
                "media": [],
                "groups": {},
                "variant": "model",
            }
            line |= {"target": true[n], "answer": said[n], "parsed": said[n], "score": score}
            stats = bleu_sums(said[n].split(), [text.split() for text in true[n]])
            lines.append(line | {"stats": {**stats, "cider": score, "rouge_l": 1.0, "exact_match": 0.0}})
        facts = {"format": 1, "benchmark": "captions", "metric": "captions", "checkpoint": name, "title": ""}
        facts |= {"settings": {"tokenizer": "python"}, "notes": [], "skipped": {}, "counts": {"items": count}}
        EvaluationFolder(tmp_path / name).close(facts, {"model": lines})
        return tmp_path / name

    whole, part = write("whole", 3), write("part", 2)
    (found,) = compare_folders(whole, part)
    assert (found.won, found.lost) == ([], [])
    assert found.difference["cider"]["value"] == 0
    scores = [line["score"] for line in find_evaluations(part)["captions"].lines["model"]]
    assert found.a["cider"]["value"] == pytest.approx(sum(scores) / 2)
    assert scores[0] != find_evaluations(whole)["captions"].lines["model"][0]["score"]


def test_the_command_prints_both_sides(folders, capsys, tmp_path):
    assert main(["compare", *map(str, folders), "--show", "1", "--output", str(tmp_path / "c.json")]) == 0
    told = capsys.readouterr().out
    assert "0.200 [" in told
    assert "B won 20 questions and lost 10" in told
    assert "won: q1: 'Is it 1?', true 'yes': A 'no.', B 'yes.'" in told
    assert "lost: q4: 'Is it 4?', true 'yes': A 'yes.', B 'no.'" in told
    written = json.loads((tmp_path / "c.json").read_text())["pope"]
    assert written["won"][0]["answer"] == {"a": "no.", "b": "yes."}
