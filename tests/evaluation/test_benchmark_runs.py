"""Running a benchmark: resuming, bad files and settings, the controls, and the command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmark_parts import BUILDERS, captions, image, mme, pope, questions, scienceqa, vl_icl
from bindllm import BindLLM, Media, Message
from bindllm.cli import main
from bindllm.data.rows import make_sample, tokenize
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.errors import InputError
from bindllm.evaluation import evaluate
from bindllm.evaluation.benchmarks import BENCHMARKS, run
from bindllm.evaluation.benchmarks import captions as captions_module
from bindllm.evaluation.benchmarks.benchmark import Benchmark, Entry, read_items
from bindllm.evaluation.benchmarks.bootstrap import compare_folders, differences, intervals, media_sentence
from bindllm.evaluation.benchmarks.folder import EvaluationFolder, find_evaluations
from bindllm.evaluation.benchmarks.metrics import ACCURACY, MME, YES_NO
from bindllm.evaluation.benchmarks.parsers import whole
from bindllm.evaluation.benchmarks.shots import support_variants
from bindllm.evaluation.benchmarks.vqa import read_questions
from bindllm.model.context import ContextConfig
from bindllm.report.benchmark import write_page
from cache_parts import ALLOW, Words, save_tiny_model
from tiny import COLORS, save_tiny_decoder, tiny_model
from two_processes import run_pair, told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(save_tiny_decoder(tmp_path_factory.mktemp("decoder")))


@pytest.fixture
def folder(tmp_path):
    return pope(tmp_path / "pope")


@pytest.fixture
def measure(model, folder, tmp_path):
    def measure(name="pope", output="out", model=model, root=folder, **settings):
        settings = {"batch_size": 2, "max_new_tokens": 4, **settings}
        return evaluate(
            model, name, root=root, output=tmp_path / output, store=tmp_path / "store", **settings
        )

    return measure


@contextmanager
def shut(model):
    """A model whose gates are zero."""
    gates = model.injection.gates.detach().clone()
    model.injection.gates.data.zero_()
    try:
        yield
    finally:
        model.injection.gates.data.copy_(gates)


def line(n, *, target="yes", parsed="yes", unit="", media=(), task="existence"):
    score = float(parsed == target)
    return {
        "id": str(n),
        "target": target,
        "parsed": parsed,
        "score": score,
        "unit": unit or str(n),
        "media": list(media),
        "groups": {"task": task},
    }


def test_an_interrupted_evaluation_resumes_and_gives_the_same_file(measure, tmp_path, monkeypatch):
    whole_file = (measure(output="whole").folder / "items.jsonl").read_bytes()
    append, calls = EvaluationFolder.append, []

    def interrupt(self, lines):
        calls.append(1)
        if len(calls) == 4:
            # The last line of the batch is cut, as by a kill.
            with (self.place / "items.jsonl").open("a") as stream:
                stream.write('{"id": "adversarial/1", "var')
            raise KeyboardInterrupt
        append(self, lines)

    monkeypatch.setattr(EvaluationFolder, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert not json.loads((tmp_path / "out/evaluation.json").read_text())["complete"]
    with pytest.raises(InputError, match="was interrupted; resume it"):
        find_evaluations(tmp_path / "out")
    answered = []
    monkeypatch.setattr(
        EvaluationFolder, "append", lambda self, lines: answered.extend(lines) or append(self, lines)
    )
    resumed = measure()
    assert (resumed.folder / "items.jsonl").read_bytes() == whole_file
    assert 0 < len(answered) < sum(map(len, resumed.lines.values()))


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.split("\n", 1)[1]])
def test_a_finished_evaluation_that_lost_a_line_is_refused(measure, damage):
    """A comparison would be one of other questions."""
    file = measure().folder / "items.jsonl"
    file.write_text(damage(file.read_text()))
    with pytest.raises(InputError, match=r"(has lost lines|has a damaged line).*evaluate again"):
        find_evaluations(file.parent)


def test_a_changed_checkpoint_and_changed_settings_are_refused(measure, model):
    measure()
    with shut(model), pytest.raises(InputError, match="holds answers of the checkpoint with the fingerprint"):
        measure()
    with pytest.raises(InputError, match="was started with limit None"):
        measure(limit=4, output="out")


def test_another_parser_reads_the_kept_answers_again(measure, monkeypatch):
    first = measure()
    assert first.facts["counts"]["unparsed"] == len(first.lines["model"])
    monkeypatch.setattr(run, "answer_batches", lambda *args, is_done, **_: iter(()))
    again = measure(parser="pope")
    assert again.facts["counts"]["unparsed"] == 0
    assert again["yes_ratio"] == 1
    assert {one["parser"] for one in again.lines["model"]} == {"pope"}


def test_another_tokenizer_scores_the_kept_captions_again(measure, monkeypatch, tmp_path):
    root = captions(tmp_path / "captions")
    with pytest.raises(InputError, match="tokenizer=ptb is for captions, and pope has none"):
        measure(tokenizer="ptb", output="refused")
    monkeypatch.setattr(run, "check_java", lambda spice: None)
    monkeypatch.setattr(captions_module, "ptb_words", lambda texts: [text.upper().split() for text in texts])
    # The same two words.
    same = (2, 2, *[0] * 2, 2, 2, *[0] * 15, 2, 2)
    stats = {f"meteor{n}": float(x) for n, x in enumerate(same)}
    monkeypatch.setattr(captions_module, "meteor_stats", lambda pairs: [stats for _ in pairs])
    first = measure("captions", root=root, output="python")
    monkeypatch.setattr(run, "answer_batches", lambda *args, is_done, **_: iter(()))
    again = measure("captions", root=root, output="python", tokenizer="ptb")
    assert again["meteor"] == 1
    assert (
        again.facts["scores"]["nearest_caption"]["cider"] == first.facts["scores"]["nearest_caption"]["cider"]
    )
    assert "by the PTB tokenizer" in again.facts["notes"][-1]
    assert "Unicode NFKC" in first.facts["notes"][-1]
    shutil.copytree(again.folder, tmp_path / "ptb")
    measure("captions", root=root, output="python")
    (found,) = compare_folders(again.folder, tmp_path / "ptb")
    assert "tokenizer differs: 'python' and 'ptb'" in found.notes
    assert set(found.difference) == set(first.facts["scores"]["model"])


def test_captions_in_several_languages_have_groups_prompts_and_a_baseline_of_their_own(
    measure, tmp_path, monkeypatch
):
    names = {"red": "红色", "blue": "蓝色"}
    rows = [
        {"image": f"{color}.png", "caption": caption, "language": language, "subset": "squares"}
        for color, other in names.items()
        for language, caption in (("EN", color), ("zh_hans", other))
    ]
    for color in names:
        image(tmp_path / f"{color}.png", color)
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"en": "What is this?", "zh-Hans": "这是什么"}
    done = measure("captions", root=tmp_path, prompts=prompts)
    assert [line["question"] for line in done.lines["model"]] == [*prompts.values()] * 2
    assert [line["answer"] for line in done.lines["nearest_caption"]] == ["blue", "蓝色", "red", "红色"]
    groups = done.facts["groups"]
    assert groups.keys() == {"subset", "language", "subset, language"}
    assert {name: numbers["exact_match"]["n"] for name, numbers in groups["language"].items()} == {
        "en": 2,
        "zh-Hans": 2,
    }
    assert groups["subset, language"].keys() == {"squares, en", "squares, zh-Hans"}
    # Three bytes, and tokens, for each character.
    assert (
        "2 true answers are longer than max_new_tokens=4, so no answer can match them" in done.facts["notes"]
    )
    monkeypatch.setattr(run, "check_java", lambda *_: None)
    with pytest.raises(InputError, match="captions in zh-Hans; use the tokenizer python"):
        measure("captions", root=tmp_path, prompts=prompts, tokenizer="ptb", output="ptb")
    with pytest.raises(InputError, match="give prompt or prompts, not both"):
        measure("captions", root=tmp_path, prompts=prompts, prompt="What?", output="both")
    with pytest.raises(InputError, match="no prompt for the language 'zh-Hans'"):
        measure("captions", root=tmp_path, prompts={"fr": "Quoi ?"}, output="none")


def test_the_caption_of_the_media_itself_is_not_copied(measure, tmp_path):
    rows = [("red", "one", "en"), ("blue", "two", "en"), ("white", "rouge", "fr")]
    for n, (color, _, _) in enumerate(rows):
        image(tmp_path / f"{n}.png", color)
    table = tmp_path / "captions.jsonl"
    lines = [
        {"image": f"{n}.png", "caption": text, "language": code} for n, (_, text, code) in enumerate(rows)
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in lines))
    done = measure("captions", root=tmp_path)
    assert [one["answer"] for one in done.lines["nearest_caption"]] == ["two", "one", ""]
    for n in range(3):
        image(tmp_path / f"{n}.png", "red")
    done = measure("captions", root=tmp_path, output="same")
    assert "nearest_caption" not in done.lines
    assert "nearest_caption was not measured: all media are the same" in done.facts["notes"]


@pytest.mark.parametrize("name", ["vl_icl", "isekai"])
def test_questions_with_shots_have_the_controls_of_shots(measure, tmp_path, name):
    folder = BUILDERS[name](tmp_path / name)
    done = measure(name, root=folder)
    own = {line["id"]: line for line in done.lines["model"]}
    for variant in ("blank_support", "shuffled_support", "wrong_support"):
        assert {line["id"] for line in done.lines[variant]} <= own.keys()
        assert done.lines[variant]
    shots = {key for key, line in own.items() if line["groups"]["shots"][0] != "0"}
    for variant in ("copy_last", "majority_shot"):
        assert {line["id"] for line in done.lines[variant]} == shots
    assert {line["answer"] for line in done.lines["copy_last"]} <= (
        {"octopus", "octopus vacuum"} if name == "isekai" else {*COLORS, *(str(n) for n in (10, 11, 12, 13))}
    )


@pytest.mark.parametrize("name", ["vl_icl", "isekai"])
def test_wrong_shots_have_other_answers(model, tmp_path, name):
    items = read_items(BENCHMARKS[name], BUILDERS[name](tmp_path / name), prompt="{question}").items
    short = [item for item in items if len(item.row.conversation.messages) < 12]
    samples = [make_sample(item.row, model.tokenizer, 512) for item in short]
    wrong = support_variants(samples, None, model.tokenizer, 500)["wrong_support"]
    for sample in samples:
        changed, before = wrong(sample), sample.conversation.messages
        if len(before) == 2:
            assert changed is None
            continue
        after = changed.conversation.messages
        assert [m.media for m in after] == [m.media for m in before]
        assert after[-1] == before[-1]
        assert changed.conversation.examples == sample.conversation.examples
        shots = zip(before[1:-2:2], after[1:-2:2], strict=True)
        assert all(one.text != other.text for one, other in shots)
    too_long = support_variants(samples, None, model.tokenizer, 1)["wrong_support"]
    assert all(too_long(sample) is None for sample in samples)


def test_a_question_among_its_shots_is_not_asked(measure, tmp_path):
    folder = vl_icl(tmp_path / "vl_icl")
    # A copy under another name.
    shutil.copy(folder / "open_mi/red.png", folder / "open_mi/asked-red.png")
    done = measure("vl_icl", root=folder)
    assert done.facts["skipped"] == {"the question is among its shots": 3}
    assert "open_mi/0/0 shots" in [line["id"] for line in done.lines["model"]]


def test_files_that_have_changed_are_refused(measure, folder):
    measure()
    table = folder / "output/coco/coco_pope_random.json"
    text = table.read_text()
    table.write_text(text.replace("a red dog", "a red cat"))
    with pytest.raises(InputError, match="to another question for 'random/1': the files of the benchmark"):
        measure()
    table.write_text(text)
    # Another image at the same path.
    image(folder / "val2014/COCO_val2014_000000000001.jpg", "white")
    with pytest.raises(
        InputError, match="an answer about other media for 'random/3': the files of the benchmark"
    ):
        measure()


def test_missing_images_are_counted_and_their_questions_are_not_asked(measure, folder):
    (folder / "val2014/COCO_val2014_000000000000.jpg").unlink()
    (folder / "val2014/COCO_val2014_000000000001.jpg").write_text("broken")
    counts = measure().facts["counts"]
    assert (counts["listed"], counts["items"], counts["missing_media"]) == (24, 12, 12)


def test_a_unit_is_asked_as_a_whole_or_not_at_all(tmp_path, measure):
    root = mme(tmp_path / "mme")
    (root / "MME_Benchmark_release_version/existence/red.png").unlink()
    done = measure("mme", root=root)
    assert done.facts["counts"]["items"] == 10
    # All answers of the tiny model are unparsed: the score is 0, not undefined.
    assert done["perception"] == 0
    assert done.facts["notes"][:2] == [
        "perception is 0 to 400, as there are questions of 2 of its 10 tasks only",
        "cognition is 0 to 200, as there are questions of 1 of its 4 tasks only",
    ]
    limited = measure("mme", root=root, limit=3, output="limited", controls=False)
    assert len(limited.lines["model"]) == 4


@pytest.mark.parametrize(
    ("name", "file", "content", "told"),
    [
        ("pope", "output/coco/coco_pope_popular.json", "", "coco_pope_popular.json: it has no question"),
        ("pope", "output/coco/coco_pope_popular.json", '{"question_id": 1, "image": "a", "text": "?", "label": null}',
         "json line 1: the true answer is None, expected yes or no"),
        ("mme", "existence/red.txt", "Is it red?\tYes\n", "red.txt has 1 questions, expected 2"),
        ("mme", "existence/red.txt", "Is it red?\tYes\nA dog?\tMaybe", "red.txt line 2: the true answer is 'Maybe'"),
        ("mme", "existence/red.txt", None, "red.txt does not exist .1 such."),
        ("vl_icl", "open_mi/query.json", "[]", "query.json has no question"),
        ("vl_icl", "open_mi/query.json", "{}", "query.json: expected a list, not dict"),
        ("vl_icl", "operator_induction/support.json", "[]", "the question after operator_induction/0/0 shots"),
    ],
)  # fmt: skip
def test_a_part_of_a_benchmark_that_is_missing_is_an_error(tmp_path, name, file, content, told):
    """A score of the other parts would be called like that of all."""
    folder = BUILDERS[name](tmp_path)
    path = folder / ("MME_Benchmark_release_version" if name == "mme" else "") / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=told):
        read_items(BENCHMARKS[name], folder, prompt="{question}")


def test_images_of_another_task_are_not_taken(tmp_path):
    folder = vl_icl(tmp_path)
    (folder / "open_mi/blue.png").unlink()
    found = read_items(BENCHMARKS["vl_icl"], folder, prompt="{question}")
    assert found.skipped.counts["the file does not exist"] >= 4
    assert not any(
        "operator_induction" in media.name
        for item in found.items
        for media in item.row.media
        if item.groups["task"] == "open_mi"
    )


def test_repeated_ids_are_counted_and_both_questions_are_asked(tmp_path):
    entry = {"image": str(image(tmp_path / "a.png")), "question": "What?", "answer": "x"}
    entries = [Entry(name, entry) for name in ("7", "7", "7#2", "7")]
    repeated = Benchmark("mine", "mine", lambda _: entries, {"whole": whole}, ACCURACY)
    found = read_items(repeated, tmp_path, prompt="{question}")
    assert [item.id for item in found.items] == ["7", "7#2", "7#2#2", "7#3"]
    assert found.duplicates == 3


def test_a_model_without_the_encoder_is_refused_before_the_first_item(measure, tmp_path, model):
    texts = tiny_model(model.config.folder(), encoders=[Words()])
    with pytest.raises(InputError, match="no encoder serves the modality 'image'"):
        measure(model=texts)
    assert not (tmp_path / "out").exists()


def test_without_media_equals_gates_that_are_shut(measure, model):
    controls = measure(limit=24).lines["no_media"]
    with shut(model):
        answers = {one["id"]: one["answer"] for one in measure(output="shut").lines["model"]}
    assert controls
    assert all(one["answer"] == answers[one["id"]] for one in controls)


def test_metrics_of_made_up_answers():
    lines = [
        line(0),
        line(1, parsed="no"),
        line(2, target="no", parsed="no"),
        line(3, target="no"),
        line(4, parsed=None),
    ]
    found = {name: number["value"] for name, number in intervals(lines, YES_NO).items()}
    assert found == pytest.approx(
        {"accuracy": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "yes_ratio": 2 / 5}
    )
    pairs = [line(0, unit="a"), line(1, unit="a", target="no", parsed="no"), line(2, unit="b")]
    pairs += [line(3, unit="b", target="no"), line(4, unit="c", task="code_reasoning")]
    found = {name: number["value"] for name, number in intervals(pairs, MME).items()}
    assert found["perception"] == pytest.approx(75 + 50)
    assert found["cognition"] == pytest.approx(200)


def test_intervals_resample_media_not_questions():
    # Ten questions about each of two images are two observations, not twenty.
    lines = [line(n, media=[f"{n % 2}.png"], parsed="yes" if n % 2 else "no") for n in range(20)]
    apart = [line(n, parsed="yes" if n % 2 else "no") for n in range(20)]
    assert intervals(lines, ACCURACY)["accuracy"] == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 20}
    assert 0.2 < intervals(apart, ACCURACY)["accuracy"]["low"] < 0.4
    # Images in a table have no name, and copies of an image have several.
    for names in ([[]] * 20, [[f"{n}.png"] for n in range(20)]):
        same = [
            one | {"media": own, "media_sha256": str(n % 2)}
            for n, (one, own) in enumerate(zip(apart, names, strict=True))
        ]
        assert intervals(same, ACCURACY) == intervals(lines, ACCURACY)


def test_few_questions_show_little():
    """One image is one observation, and three that agree have p = 0.25 in a sign test."""
    right = [line(n, media=["a.png"]) for n in range(9)]
    wrong = [one | {"score": 0.0} for one in right]
    assert intervals(right, ACCURACY)["accuracy"] == {"value": 1.0, "low": None, "high": None, "n": 9}
    found = differences(wrong, right, ACCURACY)["accuracy"]
    assert found == {"value": 1.0, "low": None, "high": None, "n": 9, "p": 1.0}
    told = media_sentence({"model": right, "no_media": wrong}, ACCURACY)
    assert told.startswith(
        "It is not shown that the score needs the media: accuracy is 1.000 with the media and"
    )
    assert "(difference 1.000, all about the same media, so without an interval, 9 questions)" in told
    right = [line(n) for n in range(3)]
    wrong = [one | {"score": 0.0} for one in right]
    assert differences(wrong, right, ACCURACY)["accuracy"]["p"] == 0.25
    told = media_sentence({"model": right, "no_media": wrong}, ACCURACY)
    assert told.startswith("It is not shown that the score needs the media")


def test_a_sentence_says_whether_the_score_needs_the_media():
    right, wrong = [line(n) for n in range(40)], [line(n, parsed="no") for n in range(40)]
    told = media_sentence({"model": right, "no_media": wrong[:20], "shuffled_media": wrong[:20]}, ACCURACY)
    assert told.startswith(
        "The score needs the media: accuracy is 1.000 with the media and 0.000 without them"
    )
    told = media_sentence({"model": right, "no_media": right[:20], "shuffled_media": wrong[:20]}, ACCURACY)
    assert told.startswith("It is not shown that the score needs the media")
    assert differences(wrong, right, ACCURACY)["accuracy"]["p"] == 1 / 1000
    assert differences(right, right, ACCURACY)["accuracy"]["p"] == 1


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "checkpoint", tmp_path / "decoder")
    return ["--checkpoint", "checkpoint", "--allow", ALLOW[0], "--max_new_tokens", "3"]


def test_the_command_prints_scores_and_writes_a_folder(checkpoint, capsys):
    assert main(["evaluate", "pope", "pope", *checkpoint, "--limit", "10"]) == 0
    told = capsys.readouterr().out
    assert "yes_ratio" in told
    assert "majority_answer" in told
    assert (
        "10 of 10 questions, chosen by hash from 24; 10 answers could not be read by the parser yes_no and are wrong"
        in told
    )
    assert "written to runs/eval/checkpoint/pope" in told
    assert [*find_evaluations("runs/eval/checkpoint")] == ["pope"]


OWN = """
from bindllm.evaluation.benchmarks import Benchmark, Entry
from bindllm.evaluation.benchmarks.metrics import ACCURACY
from bindllm.evaluation.benchmarks.parsers import whole
from bindllm.evaluation.benchmarks.shots import support_variants

def read(folder):
    for n, file in enumerate(sorted(folder.glob("val2014/*.jpg"))):
        yield Entry(str(n), {"image": str(file), "question": "What?", "answer": "x"})

MINE = Benchmark("mine", "mine", read, {"whole": whole}, ACCURACY)
"""


def test_a_benchmark_of_your_own_is_one_file(checkpoint, capsys, monkeypatch):
    Path("my_lab_benchmark.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "my_lab_benchmark", raising=False)
    assert main(["evaluate", "my_lab_benchmark.MINE", "--root", "pope", *checkpoint]) == 0
    assert "4 of 4 questions" in capsys.readouterr().out


def test_processes_of_torchrun_write_the_file_of_one(checkpoint):
    words = ["evaluate", "pope", "pope", *checkpoint, "--batch_size", "2", "--output"]
    assert main([*words, "alone"]) == 0
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}

    def in_pair(*options):
        def work(rank):
            os.environ.update({**started, "RANK": str(rank), "TORCHELASTIC_RUN_ID": "1"})
            return main([*words, "pair", *options])

        return run_pair(work)

    assert in_pair() == [0, 0], told("err", 0)
    assert Path("pair/pope/items.jsonl").read_bytes() == Path("alone/pope/items.jsonl").read_bytes()
    assert "written to pair/pope" in told("out", 0)
    assert not told("out", 1)
    # Only rank 0 reads the folder, and all end with its error.
    assert in_pair("--limit", "4") == [1, 1]
    assert all("was started with limit None (now 4)" in told("err", rank) for rank in (0, 1))


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["pope"], 2, "no folder for pope: bindllm evaluate pope FOLDER"),
        (["popes", "pope"], 2, "unknown benchmark 'popes'. Did you mean 'pope'?"),
        (["audioset", "pope"], 2, "measured from embeddings only: bindllm zero_shot audioset FOLDER"),
        (["sys.path", "pope"], 2, "sys.path is not a Benchmark, but list"),
        (["pope", "pope", "--parser", "letters"], 1, "pope has no parser 'letters'. Known: pope, yes_no"),
        (["pope", "pope", "--prompts", "What is this?"], 2, "prompts"),
        (["pope", "pope", "--unparsed", "random"], 1, "needs options, and pope is not a multiple choice"),
        (["pope", "mme", "pope"], 1, "error: mme: pope has no folder of a task of MME"),
    ],
)
def test_mistakes_are_explained(words, code, told, checkpoint, capsys):
    assert main(["evaluate", *words, *checkpoint]) == code
    assert told in capsys.readouterr().err


def test_the_help_lists_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = capsys.readouterr().out.split()
    assert set(BENCHMARKS) <= set(words)
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())


def test_the_page_has_scores_controls_and_questions_and_escapes_them(measure, folder):
    table = folder / "output/coco/coco_pope_random.json"
    table.write_text(table.read_text().replace("a red dog", "a <b>red</b> dog"))
    done = measure()
    page = write_page(done).read_text()
    assert done.facts["media"].replace("'", "&#39;") in page
    for variant in ("no_media", "shuffled_media", "majority_answer"):
        assert f">{variant}</th>" in page
    assert "By split" in page
    assert "a &lt;b&gt;red&lt;/b&gt; dog" in page
    assert "<b>red" not in page
    assert "data:image/webp;base64," in page
    assert "24 answers unparsed, wrong" in page


def test_a_table_is_a_benchmark_and_its_page_has_the_images(measure, tmp_path):
    done = measure("questions", root=questions(tmp_path / "questions") / "test.jsonl")
    assert done.lines["model"][0]["media"] == ["images/red.png"]
    assert done.home == tmp_path / "questions"
    assert "data:image/webp;base64," in write_page(done).read_text()


def test_a_random_option_only_if_it_is_asked_for_and_the_same_every_time(measure, tmp_path):
    root = scienceqa(tmp_path / "scienceqa")
    wrong = measure("scienceqa", root=root, output="wrong")
    assert wrong.facts["counts"]["unparsed"] == 4
    assert wrong["accuracy"] == 0
    drawn = [
        measure("scienceqa", root=root, output=f"random{n}", unparsed="random", seed=3) for n in range(2)
    ]
    scores = [[line["score"] for line in one.lines["model"]] for one in drawn]
    assert scores[0] == scores[1]
    assert drawn[0].facts["counts"]["unparsed"] == 4
    assert drawn[0].lines["model"][0]["parser"] == "letter, else random with seed 3"
    assert any(scores[0])


def test_rationales_of_a_first_stage_are_matched_by_id(measure, tmp_path):
    root = scienceqa(tmp_path / "scienceqa")
    first = measure("scienceqa", root=root, output="first", controls=False)
    lines = first.lines["model"]
    # In another order, and without the last question.
    file = tmp_path / "some.jsonl"
    file.write_text(
        "".join(json.dumps({**line, "answer": f"R{line['id']}"}) + "\n" for line in lines[-2::-1])
    )
    second = measure("scienceqa", root=root, output="second", rationales=str(file))
    asked = {line["id"]: line["question"] for line in second.lines["model"]}
    assert {name: text.rpartition("\n")[2] for name, text in asked.items()} == {
        line["id"]: f"Rationale: R{line['id']}" for line in lines[:-1]
    }
    assert second.facts["skipped"] == {"no rationale has the id of the row": 1}
    assert "the controls keep the rationales" in "".join(second.facts["notes"])
    with pytest.raises(InputError, match="cannot be read as rationales"):
        measure("scienceqa", root=root, output="third", rationales=str(tmp_path / "missing.jsonl"))


def test_the_most_frequent_of_several_samples_counts(measure, tmp_path, monkeypatch):
    root, asked = scienceqa(tmp_path / "scienceqa"), []
    decode = BindLLM.decode

    def decoded(self, answers):
        texts = decode(self, answers)
        asked.append(texts)
        return [["(A)", "none", "The answer is (B).", "B", "b."][n % 5] for n in range(len(texts))]

    monkeypatch.setattr(BindLLM, "decode", decoded)
    options = {"root": root, "samples": 5, "temperature": 1.5, "controls": False}
    done = measure("scienceqa", output="out", **options)
    assert {line["answer"] for line in done.lines["model"]} == {"The answer is (B)."}
    assert len(asked[0]) == 10
    # Sampled, and the same every time.
    assert len(set(asked[0][:5])) > 1
    first = [*asked]
    asked.clear()
    measure("scienceqa", output="again", **options)
    assert asked == first
    with pytest.raises(InputError, match="voted_by 'letter'"):
        measure("scienceqa", output="again", parser="the_answer_is", **options)
    for wrong in ({"temperature": 1.0}, {"samples": 0}, {"samples": 2, "choose": "likelihood"}, {"limit": 0}):
        with pytest.raises(InputError, match="samples|temperature|limit is 0, expected more than 0"):
            measure("scienceqa", root=root, output="wrong", **wrong)


def test_options_can_be_chosen_by_log_likelihood(measure, tmp_path, model):
    done = measure("scienceqa", root=scienceqa(tmp_path / "scienceqa"), choose="likelihood")
    # One of the two images is drawn for the control, and the answers are no texts that could be too long.
    assert done.facts["notes"][1:] == ["shuffled_media was not measured: its 1 questions show the same media"]
    assert {line["answer"] for line in done.lines["model"]} <= {"The answer is (A).", "The answer is (B)."}
    assert done.facts["counts"]["unparsed"] == 0
    # The likelihood of one answer, token by token.
    (item, *_) = read_items(BENCHMARKS["scienceqa"], tmp_path / "scienceqa", prompt="").items
    found = {}
    for letter in "AB":
        messages = (*item.row.conversation.messages[:-1], Message("assistant", f"The answer is ({letter})."))
        sample = tokenize(
            replace(item.row.conversation, messages=messages), model.tokenizer, 10_000, last_only=True
        )
        ids, own = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.media_index)[None]
        vector = model.encode([item.media])[None]
        logits = model(ids, torch.ones_like(ids), own, vector).logits[0].log_softmax(-1)
        start = sample.prompt_length
        found[letter] = logits[range(start - 1, len(ids[0]) - 1), ids[0, start:]].sum().item()
    (line,) = (line for line in done.lines["model"] if line["id"] == item.id)
    assert line["parsed"] == max(found, key=found.get)


def test_prompts_that_do_not_fit_are_counted(measure, folder):
    table = folder / "output/coco/coco_pope_random.json"
    table.write_text(table.read_text().replace("a red dog", "a " + "very " * 120 + "red dog"))
    done = measure()
    assert done.facts["counts"] | {"listed": 24, "items": 22, "skipped": 2} == done.facts["counts"]
    assert any("longer than the 512 positions of the decoder" in reason for reason in done.facts["skipped"])


def test_rows_of_another_form_are_an_error_that_names_their_place(folder):
    table = folder / "output/coco/coco_pope_popular.json"
    rows = [json.loads(row) for row in table.read_text().splitlines()]
    table.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": "What?"}) + "\n")
    with pytest.raises(InputError, match="coco_pope_popular.json: 1 x no column 'question_id'"):
        read_items(BENCHMARKS["pope"], folder, prompt="{question}")
    gqa_questions = {"1": {"question": "What?", "answer": "x", "imageId": "7"}, "2": {"question": "What?"}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(gqa_questions))
    with pytest.raises(InputError, match=r"the question after 1 of gqa has another form .*imageId"):
        read_items(BENCHMARKS["gqa"], folder, prompt="{question}")


def test_a_full_disk_is_an_error_and_keeps_the_answers(checkpoint, monkeypatch, capsys):
    append, calls = EvaluationFolder.append, []

    def full(self, lines):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        append(self, lines)

    monkeypatch.setattr(EvaluationFolder, "append", full)
    assert main(["evaluate", "pope", "pope", *checkpoint, "--batch_size", "2"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(Path("runs/eval/checkpoint/pope/items.jsonl").read_text().splitlines()) >= 4


def test_a_model_with_context_reads_records_of_other_media(folder, measure, tmp_path):
    context = ContextConfig(records=2, latents=2, width=16, text_length=6)
    model = tiny_model(save_tiny_decoder(tmp_path / "decoder"), context=context)
    torch.nn.init.normal_(model.injection.context_gates, std=2.0)
    media = [Media.image(str(file)) for file in sorted((folder / "val2014").glob("*.jpg"))]
    records = [
        Record((one.content_hash(),), one.name, "image", (f"text {n}",)) for n, one in enumerate(media)
    ]
    fingerprints = [encoder.fingerprint() for encoder in model.encoders]
    model.datastore = Datastore(model.encode(media), records, fingerprints)
    measured = measure(model=model)
    read = measured.lines["model"]
    # Each image has one record, its own.
    assert (
        f"records that show the media of the questions were not read: {len(media)}" in measured.facts["notes"]
    )
    model.datastore = None
    with pytest.raises(InputError, match="was started with records 2 .now 0., datastore"):
        measure(model=model)
    plain = measure(model=model, output="plain").lines["model"]
    assert [line["answer"] for line in read] != [line["answer"] for line in plain]


def test_paths_and_ids_of_a_table_of_questions(tmp_path):
    rows = [
        {"id": 0, "images": ["a.png", "/b.png"], "question": "?"},
        {"image": "file:///c.png", "images": '["a.png"]'},
    ]
    rows += [
        {"image": {"bytes": None, "path": "d.png"}, "split": " test"},
        {"split": "TEST"},
        {"split": "train"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third, fourth = read_questions(tmp_path)
    assert third.record["image"] == {"bytes": None, "path": f"{tmp_path}/d.png"}
    assert fourth.problem.startswith("unknown split 'TEST'")
    assert (first.id, first.record["images"]) == ("0", [f"{tmp_path}/a.png", "/b.png"])
    assert second.record == {"image": "file:///c.png", "images": [f"{tmp_path}/a.png"]}
