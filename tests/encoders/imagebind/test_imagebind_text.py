"""CLIP's tokenizer against the published ids.

`tests/golden/clip_merges.tsv` holds the merges, with their ranks, that the texts below need: joining pairs by rank
gives the same ids with them alone. The last test takes the whole vocabulary.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from bindllm.encoders.imagebind.text import Tokenizer, clean, tokenizer_tree
from bindllm.errors import EncoderError, InputError, MissingExtraError
from goldens import FOLDER, golden

WHOLE = Path(__file__).parents[3] / "checkpoints" / "clip-vocabulary" / "tokenizer.json"
TEXTS: list[str] = json.loads(str(golden("prep_text")["meta"]))["texts"]
START, END = 49406, 49407


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    rows = (FOLDER / "clip_merges.tsv").read_text(encoding="utf-8").splitlines()[1:]
    cells = [row.split("\t") for row in rows]
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    merges = {int(rank): (left, right) for rank, left, right in cells}
    path.write_text(json.dumps(tokenizer_tree(merges)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(file) -> Tokenizer:
    return Tokenizer(file)


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=lambda number: repr(TEXTS[number][:24]))
def test_ids_are_the_published_ones(tokenizer, number):
    expected = golden("prep_text")
    row = tokenizer.encode(TEXTS[number])
    assert (row.shape, row.dtype) == ((77,), torch.int64)
    assert row.tolist() == expected["ids"][number].tolist()
    assert len(tokenizer.ids(TEXTS[number])) == expected["full_len"][number]


def test_a_long_text_keeps_its_end(tokenizer):
    fits, cut = tokenizer.encode("a " * 75), tokenizer.encode("a " * 76 + "z")
    assert fits[76] == cut[76] == END
    assert torch.equal(fits, cut)
    assert tokenizer.encode("a " * 74)[75:].tolist() == [END, 0]
    assert tokenizer.encode("a" * 100_000)[76] == END


@pytest.mark.parametrize("text", ["", "   \n\t", "\0", "\x07\x08"])
def test_the_empty_text_is_start_and_end(tokenizer, text):
    assert tokenizer.encode(text).tolist() == [START, END] + [0] * 75


def test_a_marker_counts_where_the_splitting_finds_it(tokenizer):
    assert tokenizer.ids("<|endoftext|>") == [START, END, END]
    assert tokenizer.ids("a<|STARTOFTEXT|>") == [START, *tokenizer.ids("a")[1:-1], START, END]
    # A run of signs is one piece, and swallows the marker's first ones.
    assert END not in tokenizer.ids("!!<|endoftext|>")[:-1]


def test_cleaning():
    assert clean("  TOM &amp;amp; Jerry\u00a0\u2028\x00x\x1by ") == "tom & jerry xy"
    assert clean("\ufb01ne \u201cquotes\u201d") == 'fine "quotes"'


@pytest.mark.parametrize("text", ["half \ud83d of a sign", "\udcff"])
def test_lone_surrogates_are_refused(tokenizer, text):
    with pytest.raises(InputError, match=r"lone surrogate at character \d"):
        tokenizer.encode(text)


def test_a_text_must_be_a_str(tokenizer):
    with pytest.raises(InputError, match="a text must be str, not bytes"):
        tokenizer.encode(b"words")


def test_the_file_is_read_at_the_first_text_and_errors_name_it(file, tmp_path):
    missing = Tokenizer(tmp_path / "none.json")
    with pytest.raises(EncoderError, match=r"none\.json: no tokenizer here.*bindllm fetch clip-vocabulary"):
        missing.encode("a")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"bad\.json: not a tokenizer\.json"):
        Tokenizer(tmp_path / "bad.json").encode("a")

    def without_splitting(tree):
        tree["pre_tokenizer"] = None

    def other_ids(tree):
        tree["added_tokens"], vocabulary = [], tree["model"]["vocab"]
        first, last = "<|startoftext|>", "<|endoftext|>"
        vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]

    for change in (without_splitting, other_ids):
        tree = json.loads(file.read_text(encoding="utf-8"))
        change(tree)
        (tmp_path / "other.json").write_text(json.dumps(tree))
        with pytest.raises(EncoderError, match=r"other\.json: not CLIP's vocabulary"):
            Tokenizer(tmp_path / "other.json").encode("a")


def test_without_ftfy_the_error_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[text\]"):
        tokenizer.encode("a dog")


def test_it_travels_to_other_processes(tokenizer):
    tokenizer.encode("a dog.")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy.encode("A dog."), tokenizer.encode("a dog."))


@pytest.mark.skipif(not WHOLE.is_file(), reason="not fetched; run: bindllm fetch clip-vocabulary")
def test_the_whole_vocabulary_gives_the_published_ids():
    tokenizer = Tokenizer(WHOLE)
    rows = [tokenizer.encode(text).tolist() for text in TEXTS]
    assert rows == golden("prep_text")["ids"].tolist()
