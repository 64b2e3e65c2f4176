"""Scores and parsers of benchmarks, against the published code and numbers computed by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import numpy as np
import pytest

from benchmark_parts import choices, image, isekai, mmbench, music_avqa, scienceqa, vl_icl, vqav2, write
from bindllm.errors import InputError
from bindllm.evaluation.benchmarks import BENCHMARKS, captions, parsers
from bindllm.evaluation.benchmarks.benchmark import Item, majority_answers, read_items
from bindllm.evaluation.benchmarks.bootstrap import by_group, intervals
from bindllm.evaluation.benchmarks.captions import meteor_stats, ptb_words
from bindllm.evaluation.benchmarks.metrics import CAPTIONS, CIRCULAR, meteor
from bindllm.evaluation.benchmarks.vqa import vqa_words
from bindllm.evaluation.ngrams import Cider, bleu_sums, rouge_l


def items_of(name, folder):
    return read_items(BENCHMARKS[name], folder, prompt="{question}").items


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The two dogs.", "2 dogs"),
        ("dont know", "don't know"),
        ("2,000", "2000"),
        ("3.5", "3.5"),
        # A mark without a space next to it becomes a space, with one it goes.
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("none", "0"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalized_as_published(text, words):
    assert vqa_words(text) == words


def test_soft_accuracy_counts_agreement_with_the_others(tmp_path):
    (item, *_) = items_of("vqav2", vqav2(tmp_path))
    score = BENCHMARKS["vqav2"].scorer([item])
    # Eight of nine people said red; the null is not a person's answer.
    assert item.references == ("red",) * 8 + ("brown",)
    assert score(item, "Red.")["score"] == 1
    assert score(item, "brown")["score"] == pytest.approx(8 / 9 / 3)
    assert score(item, "green")["score"] == 0


CAPTIONED = {
    "with dog blue": [
        "a dog table on runs dog on",
        "with blue table red dog red",
        "with dog",
        "with red dog the the two cat on table",
    ],
    "with dog on on two two cat cat": ["runs cat with two blue table"],
    "table on the blue blue": [
        "table dog a table a the runs two",
        "with",
        "cat blue cat the blue with blue blue",
        "table on the",
    ],
    "table on the dog table dog blue": ["table on the dog table dog"],
    "cat table blue with table with dog on the runs a": ["cat table blue with table with dog on the"],
    "with a": ["with blue dog red blue red", "with", "on the the two red", "a the table"],
}
"""Captions of made-up words, and their references."""


def test_caption_metrics_equal_pycocoevalcap():
    """Golden numbers: Cider, Rouge and Bleu(4) of pycocoevalcap 1.2 on `CAPTIONED`."""
    references = [[text.split() for text in texts] for texts in CAPTIONED.values()]
    weights, lines = Cider(references), []
    for candidate, texts in zip(map(str.split, CAPTIONED), references, strict=True):
        own = {"cider": weights.score(candidate, texts), "rouge_l": rouge_l(candidate, texts)}
        name = str(len(lines))
        lines.append({"id": name, "unit": name, "media": [], "stats": {**own, **bleu_sums(candidate, texts)}})
    golden = [1.05906241, 0.74341243, 1.42645542, 8.58840527, 7.45762179, 0.74364124]
    assert [line["stats"]["cider"] for line in lines] == pytest.approx(golden, abs=1e-8)
    golden = [0.82993197, 0.29326923, 0.78540773, 0.93606138, 0.91652755, 0.70930233]
    assert [line["stats"]["rouge_l"] for line in lines] == pytest.approx(golden, abs=1e-8)
    found = {name: number["value"] for name, number in intervals(lines, CAPTIONS).items()}
    assert found["cider"] == pytest.approx(3.336433092866615, abs=1e-12)
    assert found["rouge_l"] == pytest.approx(0.7450833635742747, abs=1e-12)
    # Bleu adds tiny constants.
    golden = [0.777777777756173, 0.6831300510430999, 0.6156382501281865, 0.5765890937889401]
    assert [found[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx(golden, abs=1e-9)
    lines[0]["stats"] = {**lines[0]["stats"], **bleu_sums([], references[0])}
    assert np.isfinite(intervals(lines, CAPTIONS)["bleu4"]["value"])


SPOKEN = {
    "A red dog runs on the table.": ["the red dog is running on a table", "a dog"],
    "a cat": ["A cat."],
    "": ["nothing here"],
    "Two dogs' toys -- 3.5 (red) and it's \u201cfine\u201d; na\u00efve": [
        "two dogs and toys",
        "red things it's fine",
    ],
    "the table with a red dog": ["A red dog, with the table!"],
    "dog dogs running ||| quick": ["quick dogs run", "a fast dog ran"],
}
METEOR_STATS = (
    (7, 8, 3, 4, 3, 3, 3, 3, *[0] * 8, 1, 0, 0, 1, 5, 7, 7),
    (2, 2, 1, 1, 1, 1, 1, 1, *[0] * 12, 0, 2, 2),
    (0, 2, *[0] * 21),
    (13, 4, 7, 2, 2, 2, 2, 2, *[0] * 12, 3, 4, 4),
    (6, 6, 3, 3, 3, 3, 3, 3, *[0] * 12, 3, 6, 6),
    (7, 3, 0, 0, 2, 2, 0, 0, 1, 1, *[0] * 10, 2, 3, 3),
)
"""Statistics of METEOR 1.5 for `SPOKEN`, by words of the PTB tokenizer."""


def test_meteor_equals_its_program():
    """Golden numbers: Meteor of pycocoevalcap 1.2 on `SPOKEN`."""
    stats = [{f"meteor{n}": np.array(float(x)) for n, x in enumerate(values)} for values in METEOR_STATS]
    golden = [0.353384618623258, 1.0, 0.0, 0.32875639296535264, 0.4776696620223255, 0.3226421272468069]
    assert [float(meteor(one)) for one in stats] == pytest.approx(golden, abs=1e-12)
    total = {name: sum(one[name] for one in stats) for name in stats[0]}
    assert float(meteor(total)) == pytest.approx(0.35210323327294885, abs=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")
def test_java_gives_the_words_and_the_statistics():
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    words = ptb_words([*SPOKEN])
    assert words[0] == ["a", "red", "dog", "runs", "on", "the", "table"]
    assert words[2:4] == [
        [],
        ["two", "dogs", "toys", "3.5", "-lrb-", "red", "-rrb-", "and", "it", "'s", "fine", "na\u00efve"],
    ]
    found = meteor_stats(zip(words, map(ptb_words, SPOKEN.values()), strict=True))
    assert [tuple(one.values()) for one in found] == [*METEOR_STATS]


def test_a_program_that_fails_or_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    monkeypatch.setattr(captions, "import_module", lambda name: captions)
    with pytest.raises(InputError, match="needs Java, .* install a JRE, or use the tokenizer python"):
        captions.check_java()
    told = CompletedProcess((), 1, b"one\n", b"Exception: no memory")
    monkeypatch.setattr(captions.subprocess, "run", lambda *_, **__: told)
    with pytest.raises(InputError, match="Java ended with code 1 and 1 lines for 2: Exception: no memory"):
        captions._java(captions, lines=["a", "b"])


SPICE = """#!{python}
import json, sys

*options, given, out, found, silent = sys.argv[1:]
assert options[:3] == ["-Dfile.encoding=UTF-8", "-Xmx8G", "-cp"], options
assert options[4:] + [out, silent] == ["edu.anu.spice.SpiceScorer", "-out", "-silent"], options
if not options[3].endswith("/spice-1.0.jar:{home}/lib/*:{jars}/*"):
    sys.exit("Error: no parser\\n\\tat edu.anu.spice.SpiceScorer.main")
scores = []
for one in json.load(open(given)):
    said, known = set(one["test"].split()), set(" ".join(one["refs"]).split())
    value = {{"pr": 1.0, "re": 1.0, "f": len(said & known) / len(said | known), "fn": 0.0, "numImages": 1.0}}
    scores.append({{"image_id": one["image_id"], "scores": {{"All": value}}}})
json.dump(scores[::-1], open(found, "w"))
"""
"""A stand-in for SPICE: its command line and files, with the overlap of the words as the score."""


def test_spice_needs_its_parser_and_gives_spider(tmp_path, monkeypatch):
    jars, java = tmp_path / "corenlp", tmp_path / "bin/java"
    java.parent.mkdir()
    java.write_text(SPICE.format(python=sys.executable, home=tmp_path, jars=jars))
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(java.parent))
    tool = SimpleNamespace(__file__=str(tmp_path / "spice.py"), SPICE_JAR="spice-1.0.jar")
    monkeypatch.setattr(captions, "import_module", lambda name: tool)
    with pytest.raises(
        InputError, match=r"corenlp has no stanford-corenlp-3.6.0.jar and no .*-models.jar; give"
    ):
        captions.check_java(str(jars))
    jars.mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (jars / name).touch()
    captions.check_java(str(jars))
    with pytest.raises(InputError, match="Java ended with code 1 and 0 lines for 0: Error: no parser$"):
        captions.spice_scores([(["a"], [["a"]])], tmp_path)
    monkeypatch.setattr(captions, "ptb_words", lambda texts: [text.split() for text in texts])
    monkeypatch.setattr(captions, "meteor_stats", lambda pairs: [{} for _ in pairs])
    items = [
        SimpleNamespace(id="0", references=("a red dog", "a dog")),
        SimpleNamespace(id="1", references=("blue",)),
    ]
    lines = [
        {"id": name, "unit": name, "media": [], "parsed": text}
        for name, text in (("0", "a dog"), ("1", None))
    ]
    captions.score_as_published([lines], items, str(jars))
    assert [line["stats"]["spice"] for line in lines] == [2 / 3, 0.0]
    found = {name: number["value"] for name, number in intervals(lines, CAPTIONS).items()}
    assert found["spice"] == pytest.approx(1 / 3)
    assert found["spider"] == pytest.approx((found["cider"] + 1 / 3) / 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")
def test_spice_is_that_of_its_program():
    folder = Path(pytest.importorskip("pycocoevalcap.spice.spice").__file__).parent / "lib"
    if not (folder / "stanford-corenlp-3.6.0-models.jar").is_file():
        pytest.skip(f"the jars of Stanford CoreNLP 3.6.0 are not in {folder}")
    words = ["a", "red", "dog", "runs", "on", "the", "table"]
    assert captions.spice_scores([(words, [words]), (["rain"], [words]), ([], [words])], folder) == [1, 0, 0]


def test_circular_questions_are_right_in_all_rotations(tmp_path):
    items = items_of("mmbench", mmbench(tmp_path))
    assert [(item.id, item.unit, item.letter) for item in items] == [
        ("0", "0", "A"),
        ("1000000", "0", "B"),
        ("1", "1", "A"),
        ("1000001", "1", "C"),
        ("2000001", "1", "B"),
    ]
    lines = [
        {"id": item.id, "unit": item.unit, "media": [], "score": float(item.id != "1000001")}
        for item in items
    ]
    found = {name: number["value"] for name, number in intervals(lines, CIRCULAR).items()}
    assert found == {"accuracy": 0.5, "plain_accuracy": 1.0}


def test_fields_of_mmbench_may_have_several_lines_and_no_answer(tmp_path):
    table = mmbench(tmp_path) / "mmbench_dev_en.tsv"
    # Parts of a quotation, as pandas writes it.
    assert '"A hint of\nseveral ""lines""."' in table.read_text()
    item = items_of("mmbench", tmp_path)[-1]
    assert 'Context: A hint of\nseveral "lines".\nOptions: (A)' in item.row.conversation.messages[0].text
    for answer in ("", "AB", "C"):
        changed = table.read_text().replace("\tA\tcolor\t", f"\t{answer}\tcolor\t", 1)
        (tmp_path / "other.tsv").write_text(changed)
        found = read_items(BENCHMARKS["mmbench"], tmp_path / "other.tsv", prompt="")
        assert [item.unit for item in found.items] == ["1"] * 3
        assert found.skipped.counts == {
            "no letter of an option as the answer, as in splits without answers": 1
        }
    (tmp_path / "other.tsv").write_text(table.read_text().replace('""lines""', '"lines"'))
    with pytest.raises(InputError, match=r"other.tsv: 1 x not valid TSV .*fetch the file again"):
        items_of("mmbench", tmp_path / "other.tsv")


def test_columns_of_scienceqa_overlap_as_in_the_paper(tmp_path):
    items = items_of("scienceqa", scienceqa(tmp_path))
    lines = [
        {"id": item.id, "unit": item.id, "media": [], "score": 1.0, "groups": dict(item.groups)}
        for item in items
    ]
    columns = {
        value: number["accuracy"]["n"]
        for values in by_group(lines, BENCHMARKS["scienceqa"].metric).values()
        for value, number in values.items()
    }
    assert columns == {"NAT": 2, "SOC": 1, "LAN": 1, "TXT": 2, "IMG": 2, "NO": 1, "G1-6": 3, "G7-12": 1}


def test_options_that_are_empty_or_called_none(tmp_path):
    (item, *_) = items_of("choices", choices(tmp_path))
    assert item.row.options == ("None", "red", "", "black")
    assert item.row.conversation.messages[0].text.endswith("Options: (A) None (B) red (D) black")
    assert [parsers.letter(text, item) for text in ("None", "C", "The answer is (D).", "")] == [
        "A",
        None,
        "D",
        None,
    ]


def test_shots_of_vl_icl_have_the_operator_of_the_question(tmp_path):
    items = {item.id: item for item in items_of("vl_icl", vl_icl(tmp_path))}
    shown = items["operator_induction/3/4 shots"].row.conversation
    answers = {message.text for message in shown.messages if message.role == "assistant"}
    assert answers == {"10", "11", "12", "13", "3"}
    # Two classes, each with as many shots as the others.
    names = [message.text for message in items["open_mi/0/2 shots"].row.conversation.messages[1:-2:2]]
    assert len(names) == 4
    assert len(set(names)) == 2
    assert "red" in names
    item = items["operator_induction/3/0 shots"]
    assert BENCHMARKS["vl_icl"].parser(None)[1]("It is 3.", item) == item.target == "3"


def test_the_published_score_of_isekai(tmp_path):
    item = items_of("isekai", isekai(tmp_path))[0]
    score = BENCHMARKS["isekai"].scorer([item])
    assert (item.target, item.letter) == ("octopus vacuum", None)
    assert [score(item, text)["score"] for text in ("an octopus vacuum", "octopus")] == [1, 0]


def test_the_words_of_a_template_are_filled_in(tmp_path):
    (item, *_) = items_of("music_avqa", music_avqa(tmp_path))
    assert item.row.conversation.messages[0].text == "How many violin are there?"
    assert [media.modality for media in item.media] == ["video", "audio"]
    assert item.groups == {"modality": "Audio-Visual", "type": "Audio-Visual Counting"}


@pytest.mark.parametrize(
    ("parser", "answers"),
    [
        (parsers.yes_no, {"Yes.": "yes", "No, it is not": "no", "not": None, "yes and no": None}),
        # The published script finds an answer in every text.
        (parsers.pope, {"Yes.": "yes", "It is not. Yes.": "no", "": "yes", "NO": "yes"}),
        (parsers.mme, {"Yes": "yes", "  no": "no", "It is no": None}),
    ],
)
def test_parsers_of_yes_and_no(parser, answers):
    assert {text: parser(text, None) for text in answers} == answers


def test_captions_of_one_image_in_several_rows_are_one_question(tmp_path):
    image(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": text} for text in ("one", ["two", "one"], None, "")]
    rows += [{"image": "a.png", "caption": "un", "language": "fr"}]
    write(tmp_path / "captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read_items(BENCHMARKS["captions"], tmp_path, prompt="What?")
    assert [item.references for item in found.items] == [("one", "two"), ("un",)]
    assert found.skipped.total == 2


def test_a_class_is_named_by_whole_words():
    item = SimpleNamespace(facts={"classes": ["rain", "train", "stand", "night stand"]})
    texts = ("A train.", "rain on a train", "a night-stand", "a stand next to a night stand", "trains")
    assert [parsers.named_class(text, item) for text in texts] == ["train", None, "night stand", None, None]


def test_the_majority_answer_counts_spellings_together():
    rows = [("no",), ("No.", "nope"), ("no way",), ("Yes",), ("yes.",), ("yes", "yes"), ("no way",)]
    items = [
        Item(str(n), SimpleNamespace(references=row, options=(), choices=(), language=""), {}, "")
        for n, row in enumerate(rows)
    ]
    assert majority_answers(items) == ["Yes"] * 7
