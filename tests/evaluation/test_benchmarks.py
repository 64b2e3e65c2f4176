"""Every benchmark keeps one contract: its layout is read, right answers are right, a second run is the same."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from benchmark_parts import BUILDERS
from bindllm.data.formats import answer_of
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import BENCHMARKS, bootstrap
from bindllm.evaluation.benchmarks.benchmark import read_items
from bindllm.evaluation.benchmarks.run import evaluate
from cache_parts import Multimodal
from tiny import save_tiny_decoder, tiny_model


class Everything(Multimodal):
    """Also serves videos and point clouds, whose files it does not open."""

    modalities = (*Multimodal.modalities, "video", "point")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 50)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(save_tiny_decoder(tmp_path_factory.mktemp("decoder")), encoders=[Everything()])


@pytest.fixture(scope="module", params=list(BENCHMARKS))
def benchmark(request):
    return BENCHMARKS[request.param]


@pytest.fixture(scope="module")
def folder(benchmark, tmp_path_factory):
    return BUILDERS[benchmark.name](tmp_path_factory.mktemp(benchmark.name))


def items_of(benchmark, folder):
    return read_items(benchmark, folder, prompt=benchmark.prompt)


def right_answer(item):
    if item.letter:
        return answer_of(item.row.options, "ABCDEFGH".index(item.letter))
    return item.references[0]


def test_every_question_of_the_layout_is_read(benchmark, folder):
    found = items_of(benchmark, folder)
    assert found.num_listed == len(found.items) > 1
    assert not found.skipped.total
    ids = [item.id for item in found.items]
    assert len(set(ids)) == len(ids)
    assert all(json.dumps(item.target) for item in found.items)


def test_right_answers_are_right_and_an_empty_one_is_wrong(benchmark, folder):
    items = items_of(benchmark, folder).items
    score = benchmark.scorer(items)
    _, parse = benchmark.parser(None)
    scores = [score(item, parse(right_answer(item), item))["score"] for item in items]
    best = 10.0 if benchmark.format == "caption" else 1.0
    assert min(scores) == best if best == 1 else max(scores) > 1
    assert parse("", items[0]) is None
    assert score(items[0], None)["score"] == 0


def test_an_evaluation_has_lines_scores_and_controls(benchmark, folder, model, tmp_path):
    done = evaluate(
        model, benchmark, root=folder, output=tmp_path / "out", store=tmp_path / "store", batch_size=3
    )
    lines = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    for key in ("id", "variant", "prompt_sha256", "parser", "answer", "parsed", "target", "score", "groups"):
        assert all(key in line for line in lines)
    facts = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert facts == done.facts
    number = facts["scores"]["model"][benchmark.metric.main]
    assert number["low"] <= number["value"] <= number["high"]
    assert number["n"] == facts["counts"]["items"]
    assert len(facts["scores"]) > 1
    # The controls of the model cost at most half of the main run.
    asked = {name: len(part) for name, part in done.lines.items()}
    assert asked.get("no_media", 0) + asked.get("shuffled_media", 0) <= max(2, asked["model"] / 2 + 2)
    before = (tmp_path / "out/items.jsonl").read_bytes()
    evaluate(model, benchmark, root=folder, output=tmp_path / "out", store=tmp_path / "store", batch_size=3)
    assert (tmp_path / "out/items.jsonl").read_bytes() == before


def first_record(content):
    """Return the first object of JSON with a question, an image or captions."""
    if isinstance(content, dict) and {"question", "text", "answers", "sentences", "caption", "answer"} & {
        *content
    }:
        return content
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return next(filter(None, map(first_record, parts)), None)


@pytest.mark.parametrize("null", [None, [], {}])
def test_a_null_is_counted_or_refused(benchmark, folder, null):
    """Or changes nothing: it was a remark."""
    before = len(items_of(benchmark, folder).items)
    for file in sorted(folder.rglob("*.json*")):
        text = file.read_text()
        lines = text.splitlines() if file.suffix == ".jsonl" or "\n{" in text else [text]
        first = json.loads(lines[0])
        record = first_record(first)
        for key in record or ():
            kept, record[key] = record[key], null
            file.write_text("\n".join([json.dumps(first), *lines[1:]]))
            record[key] = kept
            with suppress(InputError):
                found = items_of(benchmark, folder)
                assert all(item.references and "None" not in item.references for item in found.items), key
                assert len(found.items) + found.skipped.total == found.num_listed
                assert found.num_listed >= before
        file.write_text(text)


def test_another_layout_is_refused_with_the_file_that_was_looked_for(benchmark, tmp_path):
    with pytest.raises(InputError, match=r"has (no|neither)|contains"):
        items_of(benchmark, tmp_path)
