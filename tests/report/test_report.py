"""The report: its files, a page that loads nothing else, and text that cannot become markup."""

import copy
import json
import os
import re
import subprocess
from contextlib import suppress
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm.data.report import DataReport, SourceReport
from bindllm.errors import CheckpointError, InputError
from bindllm.evaluation.captions import CaptionRow
from bindllm.report import page, report
from bindllm.report.page import SHEET_SIZE
from bindllm.report.report import RunFacts, git_revision, rebuild_report, software_versions, write_report
from tiny import color_images, save_gates

NUMBERS = {"loss": 3.5, "perplexity": 33.1, "cider": 1.2, "bleu4": 0.0, "rouge_l": 0.3, "exact_match": 0.25}
METRICS = {
    "tasks": {
        "captions": {
            "model": NUMBERS,
            "no_media": {**NUMBERS, "loss": 8.2, "perplexity": 3641.0, "cider": 0.0},
            "shuffled_media": {**NUMBERS, "loss": 4.9, "cider": 0.1},
            "nearest_caption": {**NUMBERS, "loss": None, "perplexity": None, "cider": 0.9},
        }
    },
    "seconds": {"embed": 1.5, "train": 336.0, "evaluate": 70.2},
    "trainable_parameters": 12_345_678,
}
LOG = "epoch,step,train_loss,val_loss,lr\n0,10,7.5,,0.1\n0,20,5.5,,0.1\n0,30,nan,,0.1\n0,30,,4.0,\n"


class Page(HTMLParser):
    """Collects tags, texts and what the page would fetch; fails on tags that are not closed."""

    VOID = frozenset(["meta", "img", "path", "use", "rect", "image"])

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def drawn():
    """Figures drawn so far, by their data: most pages here have the same ones."""
    return {}


@pytest.fixture(autouse=True)
def _draw_once(drawn, monkeypatch):
    def once(draw):
        def drawing(*data):
            key = f"{draw.__name__} {data}"
            if key not in drawn:
                drawn[key] = draw(*data)
            return drawn[key]

        return drawing

    monkeypatch.setattr(page, "gate_figure", once(page.gate_figure))
    monkeypatch.setattr(page, "loss_figure", once(page.loss_figure))


@pytest.fixture
def folder(work):
    """A checkpoint folder next to images."""
    color_images(work / "pictures")
    return save_gates(work / "checkpoint")


def row(colour, number=0, **changes):
    usual = CaptionRow(
        media=f"pictures/images/{colour}{number}.png",
        modality="image",
        references=[f"{colour} square"],
        model="a guess",
        no_media="blind words",
        nearest_caption="copied words",
        nearest_media="pictures/images/red2.png",
        nearest_modality="image",
    )
    return {**asdict(usual), **changes}


def write(folder, captions=None, *, metrics=METRICS, log=LOG, **facts):
    (folder.parent / "log.csv").write_text(log or "")
    captions = [row("red"), row("green"), row("blue")] if captions is None else captions
    return write_report(
        folder,
        metrics=metrics,
        rows={"captions": captions},
        facts=RunFacts(**facts),
        log=folder.parent / "log.csv" if log else None,
    ).read_text(encoding="utf-8")


def test_metrics_json_is_what_was_given(folder):
    write(folder)
    assert json.loads((folder / "metrics.json").read_text()) == METRICS


def test_the_page_loads_nothing(folder):
    text = write(folder, title="A run")
    parsed = Page(text)
    assert "http" not in text
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert "@import" not in text
    assert "url(" not in text.replace('clip-path="url(#', "")
    assert len([source for source in parsed.sources if source.startswith("data:image/webp")]) == 6
    assert all(source.startswith(("data:image/", "#")) for source in parsed.sources)
    assert len(text) < 200_000


def test_the_page_shows_numbers_captions_and_facts(folder):
    (folder / "recipe.yaml").write_text("seed_everything: 0\n")
    skipped = DataReport(sources=[SourceReport("pictures", 16, 17)], rows={"train": 8, "test": 4})
    skipped.skipped.add("empty caption", "captions.jsonl, line 7")
    text = write(
        folder,
        [row("red", exact=True, model="Red square!"), row("blue", model="")],
        title="A run",
        parameters=[{"group": "bind", "tensors": 19, "parameters": 12_000, "trainable": True}],
        data=asdict(skipped),
        licenses=[{"part": "training data", "name": "pictures", "license": "CC BY-SA 4.0"}],
        device="one old CPU",
    )
    words = " ".join(" ".join(Page(text).texts).split())
    for expected in (
        "On 2 held-out images the loss is 3.50",
        "trained in 5 min 36 s",
        "12,345,678 trainable parameters",
        "one old CPU",
        "3,641",
        "Without images the model always says: blind words",
        "Red square! ✓ right",
        "(nothing)",
        "copied words",
        "empty caption 1 captions.jsonl, line 7",
        "bind 19 12,000 yes",
        "CC BY-SA 4.0",
        "seed_everything: 0",
        f"Mean {np.tanh(0.5):.3f}",
    ):
        assert expected in words
    assert words.count("✓ right") == 2  # the legend and one caption


@pytest.mark.parametrize(("kind", "size"), [("attend", np.tanh(0.5)), ("cross", 0.5)])
def test_gates_are_shown_as_their_kind_applies_them(kind, size, folder):
    manifest = json.loads((folder / "bindllm.json").read_text())
    manifest["inject"]["kind"] = kind
    (folder / "bindllm.json").write_text(json.dumps(manifest))
    assert f"Mean {size:.3f}" in write(folder, [row("red")])


def test_text_cannot_break_out(folder):
    evil = "<script>alert('x')</script>"
    data = DataReport(sources=[SourceReport(evil)])
    data.skipped.add(evil, evil)
    (folder / "recipe.yaml").write_text(evil)
    text = write(
        folder,
        [
            row(
                "red",
                references=[evil],
                model=evil,
                nearest_caption=evil,
                no_media=evil,
                media=f'"><img {evil}',
            )
        ],
        title=evil,
        device=evil,
        problems={evil: evil},
        data=asdict(data),
        licenses=[{"part": evil, "name": evil, "license": evil}],
        parameters=[{"group": evil, "tensors": 1, "parameters": 1, "trainable": False}],
        software={evil: evil},
        revision=evil,
    )
    assert "script" not in Page(text).tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 10


def test_the_page_can_be_made_again(folder):
    text = write(folder, title="A run")
    (folder / "report.html").unlink()
    assert rebuild_report(folder).read_text(encoding="utf-8") == text


def test_missing_images_become_tiles(folder, tmp_path):
    (tmp_path / "pictures/images/red0.png").unlink()
    (tmp_path / "pictures/images/green0.png").write_bytes(b"")
    text = write(folder)
    assert re.findall(r'class="missing"[^>]*>([^<]*)<', text) == ["red0.png", "green0.png"]


def test_a_page_that_is_made_again_opens_no_file_that_the_folder_names(folder, tmp_path):
    """The rows may come from someone else, and the page may be published."""
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    write(folder)
    sources = ["data:image/svg+xml;base64,aa", "http://tracker", 'data:image/webp;base64,aa" onload=x', 7]
    rows = [row("red", media=str(tmp_path / "private.png"))]
    rows += [row("red", media=f"{n}.png", nearest_caption=None) for n in range(len(sources))]
    (folder / "report/captions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    thumbnails = {f"{n}.png": source for n, source in enumerate(sources)}
    (folder / "report/thumbnails.json").write_text(json.dumps(thumbnails))
    text = rebuild_report(folder).read_text(encoding="utf-8")
    assert not any(word in text for word in ("image/webp", "svg+xml", "tracker", "onload"))
    (folder / "report/thumbnails.json").unlink()
    assert "private.png" in rebuild_report(folder).read_text(encoding="utf-8")


def test_media_without_an_image_are_tiles_with_their_name(folder):
    source = asdict(SourceReport("sweeps", 16, 17, modality="radar"))
    captions = [
        row("red", media="a/5.npy", modality="radar", nearest_media="a/7.npy", nearest_modality="radar"),
        row("blue", media="'a <b> dog'", modality="text"),
    ]
    text = write(folder, captions, data={**asdict(DataReport(embeddings="16 encoded")), "sources": [source]})
    tiles = re.findall(r'class="missing"[^>]*>([^<]*)<', text)
    assert sorted(tiles) == ["&#39;a &lt;b&gt; dog&#39;", "radar: 5.npy", "radar: 7.npy"]
    assert "expected JPEG" not in text
    body = re.sub("<style>.*</style>", "", text, flags=re.DOTALL)
    words = " ".join(" ".join(Page(body).texts).split())
    assert "image" not in words
    for told in (
        "2 of 2 held-out media",
        "Without media the model always says: blind words",
        "16 radar",
        "16 encoded",
    ):
        assert told in words


def test_images_are_found_from_another_directory(folder, tmp_path, monkeypatch):
    text = write(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert rebuild_report(folder).read_text(encoding="utf-8") == text


def test_the_sheet_is_a_fixed_sample_of_all_rows(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    captions = [
        row("red", media="one.png", nearest_caption=None, references=[f"<{n}>"])
        for n in range(SHEET_SIZE + 40)
    ]
    first, second = write(folder, captions, finished=""), write(folder, captions, finished="")
    assert first == second
    assert first.count("<article") == SHEET_SIZE
    assert f"{SHEET_SIZE} of {SHEET_SIZE + 40} held-out images, drawn with a fixed seed" in first
    shown = [int(n) for n in re.findall(r'<dd dir="auto">&lt;(\d+)&gt;</dd>', first)]
    assert shown == sorted(shown) != list(range(SHEET_SIZE))
    assert len((folder / "report/captions.jsonl").read_text().splitlines()) == SHEET_SIZE + 40


def test_missing_measurements_are_shown_as_such(folder):
    metrics = copy.deepcopy(METRICS)
    metrics["tasks"]["captions"]["shuffled_media"] = dict.fromkeys(NUMBERS)
    text = write(
        folder,
        [row("red", model=None, no_media=None, nearest_caption=None, nearest_media=None)],
        metrics=metrics,
        log=None,
        problems={"shuffled": "OutOfMemoryError: no memory left"},
    )
    words = " ".join(" ".join(Page(text).texts).split())
    assert "Problems shuffled : OutOfMemoryError: no memory left" in words
    assert "always says" not in words
    assert "Loss per token by optimizer step" not in words
    assert "Not recorded." in words


def test_variants_of_retrieved_context_are_shown_if_they_were_measured(folder):
    metrics = copy.deepcopy(METRICS)
    assert "random records" not in write(folder)
    for name in ("no_context", "random_context", "context_as_text", "copied_context"):
        metrics["tasks"]["captions"][name] = dict.fromkeys(NUMBERS, 0.625)
    text = write(folder, metrics=metrics)
    for title in ("no records", "random records", "records as text", "nearest record"):
        assert title in text
    assert text.count("0.625") >= 4
    del metrics["tasks"]["captions"]["random_context"]["cider"]
    with pytest.raises(InputError, match=r"lacks tasks.captions.random_context.cider"):
        write(folder, metrics=metrics)


def test_an_earlier_log_is_removed(folder):
    assert "Loss per token by optimizer step" in write(folder)
    assert "Loss per token by optimizer step" not in write(folder, log=None)


def test_captions_with_unusual_characters_are_kept(folder):
    odd = "one\u2028two\x85three\x00four\x0bfive"
    text = write(folder, [row("red", model=odd)])
    assert "one two three\ufffdfour five" in text
    assert json.loads((folder / "report/captions.jsonl").read_text(encoding="utf-8"))["model"] == odd


def test_captions_of_other_scripts_are_apart_from_their_marks(folder):
    # An override of the direction would turn the mark around, too.
    for said in ("مبنى أحمر", "\u202eabc", "e" + "\u0301" * 30, "消防車"):
        text = write(folder, [row("red", model=said, exact=True)])
        assert f'<dd class="model" dir="auto"><bdi>{said}</bdi> <span class="mark">' in text


def test_languages_and_subsets_are_rows_of_the_table(folder):
    captions = METRICS["tasks"]["captions"]
    part = {"count": 1200, "cider": 1.5, "exact_match": 0.25}
    model = {**captions["model"], "by_language": {"en": part, "<zh>": {**part, "exact_match": 0.5}}}
    model["by_subset"] = {"new": {**part, "by_language": {"en": part}}}
    text = write(folder, metrics={**METRICS, "tasks": {"captions": {**captions, "model": model}}})
    for title in ("new", "new, en", "en"):
        assert f'<th scope="row">Exact match: {title} (1,200)</th><td>25.0%</td><td>-</td>' in text
    assert "By language, exact match: 25.0% in en, 50.0% in &lt;zh&gt;." in text


def test_file_names_that_are_not_utf8(folder):
    text = write(folder, [row("red", media="pictures/\udc80.png")], problems={"\udc80": "no name"})
    assert "\\udc80.png" in text
    assert json.loads((folder / "report/captions.jsonl").read_text())["media"] == "pictures/\udc80.png"


def test_long_captions_are_cut_only_on_the_page(folder):
    text = write(folder, [row("red", model="word " * 500)])
    assert "word word…" in text
    assert text.count("word") < 60
    assert (folder / "report/captions.jsonl").read_text().count("word") > 500


def test_a_log_without_finite_losses(folder):
    assert (
        report._series([{"step": "1", "a": "nan"}, {"step": "2", "a": "inf"}, {"step": "", "a": "1"}], "a")
        == []
    )
    assert report._series([{"step": "3", "a": "2.5"}, {"step": "4", "a": ""}], "a") == [(3, 2.5)]


def test_a_missing_metric_is_refused_before_anything_is_written(folder):
    metrics = copy.deepcopy(METRICS)
    del (
        metrics["tasks"]["captions"]["shuffled_media"]["cider"],
        metrics["seconds"]["embed"],
        metrics["trainable_parameters"],
    )
    with pytest.raises(
        InputError, match=r"captions\.shuffled_media\.cider, seconds\.embed, trainable_parameters"
    ):
        write(folder, metrics=metrics)
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize("name", ["metrics.json", "report/captions.jsonl", "report/facts.json"])
def test_missing_and_damaged_files_are_named(folder, name):
    write(folder)
    for content in ("{", "[1]\n", "7\n"):
        (folder / name).write_text(content)
        with pytest.raises(InputError, match="damaged|cannot be read as JSON"):
            rebuild_report(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        rebuild_report(folder)


@pytest.mark.parametrize("name", ["metrics.json", "report/facts.json"])
def test_values_of_any_shape_are_one_error(folder, name):
    """The folder may come from someone else."""
    write(folder, data=asdict(DataReport(sources=[SourceReport("pictures", 16, 17)])))
    whole, refused = json.loads((folder / name).read_text()), set()
    keys = {"tasks", "seconds", "data", "parameters", "licenses", "problems"} & whole.keys()
    for key in keys:
        for value in (7, "x", [7], {"captions": 7}, {"sources": [7]}):
            (folder / name).write_text(json.dumps({**whole, key: value}))
            # Some wrong values do not matter to the page. An error of another type fails the test.
            with suppress(InputError):
                rebuild_report(folder)
                continue
            refused.add(key)
    assert refused == keys


@pytest.mark.parametrize("name", ["metrics.json", "report/captions.jsonl", "report/log.csv", "recipe.yaml"])
def test_only_regular_files_are_opened(folder, name):
    """Opening a FIFO waits forever."""
    write(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        rebuild_report(folder)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"bindllm\.json"):
        rebuild_report(tmp_path)


def test_facts_of_an_older_report_may_be_fewer(folder):
    write(folder)
    (folder / "report/facts.json").write_text('{"title": "Old run"}')
    assert "git revision: unknown" in rebuild_report(folder).read_text(encoding="utf-8")


def test_versions_and_revision(tmp_path):
    assert software_versions()["torch"] == torch.__version__
    assert git_revision(tmp_path) is None
    assert git_revision(tmp_path / "gone") is None


def test_a_hostile_repository_runs_nothing(tmp_path):
    """Git runs these commands when it compares files with a commit."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitattributes").write_text("* filter=evil\n")
    git("add", ".")
    git("commit", "-m", "a")
    ran = tmp_path / "ran"
    script = f"touch {ran}"
    for key in (
        "core.fsmonitor",
        "filter.evil.clean",
        "filter.evil.process",
        "core.pager",
        "core.sshCommand",
    ):
        git("config", key, script)
    (tmp_path / ".gitattributes").write_text("* filter=evil \n")
    assert re.fullmatch("[0-9a-f]{12}", git_revision(tmp_path))
    assert not ran.exists()
