"""Only the caller allows classes outside bindllm: no value of a file adds to it, at any depth."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from align_parts import LetterEncoder
from bindllm import BindLLM
from bindllm.cli import main
from bindllm.encoders import Aligned
from bindllm.encoders.aligned import HEAD, AlignedManifest, Head, HeadConfig, write_aligned
from bindllm.encoders.trainable import build_tower
from bindllm.errors import BindLLMError, InputError
from bindllm.model.checkpoint import MANIFEST, build_object, build_own, read_manifest
from bindllm.model.pretrained import read_encoders
from cache_parts import save_tiny_model
from tiny import save_tiny_decoder

TRAP = "trap_lab.Encoder"
ALIGNED = "bindllm.encoders.Aligned"
VALUES = {
    "null": None,
    "bool": True,
    "number": 1,
    "string": TRAP,
    "list": [TRAP],
    "nested list": [[TRAP]],
    "mapping": {TRAP: 1},
    "mapping of mappings": {TRAP: {TRAP: {}}, "allow": {TRAP: {}}},
}
PLACES = ("entry", "tower", "tower of a tower")
CLASSES = (ALIGNED, "bindllm.encoders.aligned.Aligned")


def save_aligned(folder: Path, class_path: str, init_args: dict, *, fingerprint: str = "0" * 64) -> str:
    """Write an aligned encoder that names a tower."""
    head, size = HeadConfig(depth=1, width=10), 12 if class_path == TRAP else 16
    manifest = AlignedManifest(
        modality="text",
        embedding_size=16,
        space="colors",
        tower={"class_path": class_path, "init_args": init_args, "fingerprint": fingerprint},
        tower_size=size,
        head=head,
        target={"class_path": "tiny.ColorEncoder", "init_args": {}, "fingerprint": "0" * 64},
        sha256={},
    )
    write_aligned(folder, manifest, {HEAD: Head(size, 16, head).state_dict()}, metrics={}, texts={})
    return str(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_tiny_decoder(folder / "decoder")
    save_tiny_model(folder / "model", folder / "decoder")
    return folder


@pytest.fixture
def work(parts, tmp_path, monkeypatch) -> Path:
    """A working directory, also on sys.path, with a module that leaves a file when it is imported."""
    shutil.copytree(parts / "model", tmp_path / "model")
    (tmp_path / "trap_lab.py").write_text(
        "from pathlib import Path\nfrom align_parts import LetterEncoder\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n\nclass Encoder(LetterEncoder):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trap_lab", raising=False)
    yield tmp_path
    sys.modules.pop("trap_lab", None)


def lay(work: Path, place: str, value, class_path: str = ALIGNED) -> dict:
    """Write a checkpoint whose encoder leads to the trap, with ``allow: value`` in one place; return its entry."""
    depth = PLACES.index(place)
    weights = save_aligned(work / "a0", TRAP, {}, fingerprint=LetterEncoder().fingerprint())
    for number in range(1, depth + 1):
        init_args = {"weights": weights} | ({"allow": value} if number == 1 else {})
        weights = save_aligned(work / f"a{number}", class_path, init_args)
    init_args = {"weights": weights} | ({} if depth else {"allow": value})
    entry = {"class_path": class_path, "init_args": init_args, "fingerprint": "0"}
    file = work / "model" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "encoders": [entry]}))
    return entry


@pytest.mark.parametrize("class_path", CLASSES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_no_value_of_a_file_allows_a_class(work, place, value, class_path):
    lay(work, place, value, class_path)
    for load in (
        lambda: read_encoders("model", read_manifest("model"), allow=[]),
        lambda: BindLLM.from_pretrained("model", device="cpu"),
    ):
        with pytest.raises(BindLLMError, match=rf"would run code from there.*--allow {TRAP}"):
            load()
    assert not (work / "imported").exists()


def test_a_text_allows_its_own_class_and_no_part_of_it(work):
    entry = lay(work, PLACES[0], [], TRAP)
    with pytest.raises(BindLLMError, match=rf"would run code from there.*--allow {TRAP}"):
        build_object(entry, allow=f"my_{TRAP}s")
    assert not (work / "imported").exists()


LINES = {
    "generate": ["generate", "model", "What?"],
    "check": ["check", "--folder", "model"],
    "check of an encoder": ["check", "--encoder", "a0"],
    "encode": ["encode", "--checkpoint", "model", "text:a", "text:b"],
    "index": ["index", "cache", "--checkpoint", "model", "--images", "pictures"],
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_no_command_imports_a_class_that_a_file_allows(work, place, value, line, capsys):
    lay(work, place, value)
    (work / "pictures").mkdir()
    assert main(line) == 1
    assert "would run code from there" in "".join(capsys.readouterr())
    assert not (work / "imported").exists()


def test_what_the_caller_allows_reaches_every_depth(work):
    entry = lay(work, "tower of a tower", None)
    with pytest.raises(BindLLMError, match="was aligned with the tower"):
        read_encoders("model", read_manifest("model"), allow=[TRAP])
    assert (work / "imported").exists()
    innermost = Aligned("a0", allow=[TRAP])
    assert innermost.fingerprint()
    assert build_tower(ALIGNED, {"weights": "a0", "allow": None}, allow=[TRAP]).fingerprint()
    assert entry["init_args"]["weights"].endswith("a2")


def test_what_the_user_writes_into_a_recipe_counts(work):
    save_aligned(work / "a0", TRAP, {}, fingerprint=LetterEncoder().fingerprint())
    entry = {"class_path": ALIGNED, "init_args": {"weights": "a0", "allow": [TRAP]}}
    assert build_own(entry).fingerprint()
    with pytest.raises(BindLLMError, match="allow must be a list of import paths"):
        build_own({**entry, "init_args": {"weights": "a0", "allow": {TRAP: 1}}})


@pytest.mark.parametrize("allow", [TRAP, {TRAP: 1}, [1], [[TRAP]], 1, ""])
def test_allow_is_a_list_of_import_paths(allow):
    with pytest.raises(InputError, match="allow must be a list of import paths"):
        Aligned("nowhere", allow=allow)
