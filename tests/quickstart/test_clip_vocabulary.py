"""CLIP's vocabulary from a wheel: its order, and that another list is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from bindllm.encoders.imagebind import text
from bindllm.encoders.imagebind.text import tokenizer_tree, write_tokenizer
from bindllm.errors import AssetError
from bindllm.quickstart.wheels import OPEN_CLIP, build_clip_vocabulary

LICENSE = "open_clip_torch-3.3.0.dist-info/licenses/LICENSE"


@pytest.fixture
def packed(monkeypatch) -> bytes:
    """A list of two used merges and an unused one, in place of the published list."""
    data = gzip.compress(b"#version\ni n\nin g</w>\nt h\n")
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(text, "NUM_MERGES", 2)
    return data


def wheel(folder: Path, packed: bytes) -> Path:
    path = folder / OPEN_CLIP.file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("open_clip/bpe_simple_vocab_16e6.txt.gz", packed)
        archive.writestr(LICENSE, "MIT")
    return path


def test_the_folder_holds_a_tokenizer_and_the_license(packed, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    facts = build_clip_vocabulary([wheel(tmp_path, packed)], folder)
    assert facts["sha256"] == text.SHA256
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "tokenizer.json"]
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert tree["model"]["merges"] == [["i", "n"], ["in", "g</w>"]]
    assert list(tree["model"]["vocab"])[-4:] == ["in", "ing</w>", "<|startoftext|>", "<|endoftext|>"]
    write_file = tmp_path / "again.json"
    write_tokenizer(packed, write_file)
    assert json.loads(write_file.read_text(encoding="utf-8")) == tree


def test_another_list_is_refused(tmp_path):
    with pytest.raises(AssetError, match="sha256 .*, expected 924691ac"):
        build_clip_vocabulary([wheel(tmp_path, gzip.compress(b"#version\ni n\n"))], tmp_path)


def test_the_order_of_the_vocabulary():
    ids = tokenizer_tree({0: ("i", "n"), 48893: ("j", "ing</w>")})["model"]["vocab"]
    assert sorted(ids.values()) == [*range(513), 512 + 48893, 49406, 49407]
    assert (ids["!"], ids["~"], ids["¡"], ids["ÿ"]) == (0, 93, 94, 187)
    assert (ids["Ā"], ids["Ġ"], ids["Ń"]) == (188, 220, 255)  # bytes 0, 32 and 173
    assert (ids["!</w>"], ids["in"], ids["jing</w>"]) == (256, 512, 49405)
    assert (ids["<|startoftext|>"], ids["<|endoftext|>"]) == (49406, 49407)
