"""`bindllm index`: builds, renews and refuses, and names the cache in a checkpoint."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bindllm import VisualCache
from bindllm.cache.index import VectorIndex
from bindllm.cli import main
from bindllm.model.checkpoint import read_manifest
from bindllm.model.pretrained import read_cache_config
from cache_parts import ALLOW, Multimodal, enter_copy, filled_store, make_project
from store_parts import write_images
from tiny import ColorEncoder

pytest.importorskip("faiss")

BY_CLASS = ("--encoder", "cache_parts.Multimodal")
OF_MODEL = ("--checkpoint", "checkpoints/model", "--allow", "cache_parts.Multimodal")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("project")
    make_project(home)
    return home


@pytest.fixture
def project(made, tmp_path, monkeypatch, capsys) -> Path:
    capsys.readouterr()
    return enter_copy(made, tmp_path, monkeypatch)


def run(capsys, *line: str, code: int = 0) -> str:
    """Run the command; return its output on one line, or its error."""
    assert main(["index", *line]) == code
    printed = capsys.readouterr()
    return " ".join(re.sub("[│┃]", " ", printed.err if code else printed.out).split())


def test_it_builds_from_the_store_of_the_checkpoints_encoder(project, capsys):
    told = run(capsys, "caches/a", *OF_MODEL)
    assert "visual cache caches/a" in told
    assert "images 12 (built)" in told
    assert "kind Flat" in told
    index = VectorIndex.open("caches/a")
    assert (len(index), index.info.fingerprint) == (12, Multimodal().fingerprint())
    assert f"bytes {index.info.num_bytes:,}" in told


def test_where_it_is_there_already_it_is_renewed(project, capsys):
    run(capsys, "caches/a", *BY_CLASS)
    (first,) = Path("caches/a").glob("vectors-*.faiss")
    assert "images 12 (updated: 0 added, 0 removed)" in run(capsys, "caches/a", *BY_CLASS)
    assert [*Path("caches/a").glob("vectors-*.faiss")] == [first]
    filled_store(Path("data/store"), write_images(Path("pictures"), 5, start=12))
    capsys.readouterr()
    assert "images 17 (updated: 5 added, 0 removed)" in run(capsys, "caches/a", *BY_CLASS)
    (second,) = Path("caches/a").glob("vectors-*.faiss")
    assert second != first
    assert "kind SQfp16" in run(capsys, "caches/a", *BY_CLASS, "--factory", "SQfp16")
    assert VectorIndex.open("caches/a").info.factory == "SQfp16"
    told = run(capsys, "caches/a", *BY_CLASS)
    assert "kind SQfp16" in told
    assert "a new index would be of the kind Flat: --factory 'Flat' builds it" in told


def test_pictures_of_a_folder_are_embedded_and_no_others_are_indexed(project, capsys):
    write_images(Path("mine/deep"), 4, start=10)
    assert "images 4 (built)" in run(capsys, "caches/a", *BY_CLASS, "--images", "mine")
    assert len(filled_store(Path("data/store"), [])) == 14
    Path("mine/deep/010.png").unlink()
    write_images(Path("mine"), 2, start=20)
    told = run(capsys, "caches/a", *BY_CLASS, "--images", "mine")
    assert "images 5 (updated: 2 added, 1 removed)" in told
    told = run(capsys, "caches/a", *BY_CLASS)
    assert "images 5 (updated: 0 added, 0 removed)" in told
    assert "To index the whole store, add --rebuild" in told
    told = run(capsys, "caches/a", *BY_CLASS, "--factory", "SQfp16")
    assert "images 5 (rebuilt, Flat before)" in told
    assert "To index the whole store, add --rebuild" in told
    VectorIndex.remove("caches/a", VectorIndex.open("caches/a").keys(np.array([0])))
    assert "images 4 (rebuilt, SQfp16 before)" in run(capsys, "caches/a", *BY_CLASS, "--factory", "Flat")
    assert "images 16 (built)" in run(capsys, "caches/a", *BY_CLASS, "--rebuild")


def test_a_checkpoint_is_told_of_it_and_answers_with_it(project, capsys):
    assert "named in checkpoints/model" in run(
        capsys, "caches/a", "--name_in", "checkpoints/model", "--allow", ALLOW[0]
    )
    assert read_manifest("checkpoints/model")["cache"] == {
        "folder": "caches/a",
        "top_k": 10,
        "temperature": 100.0,
        "weight": 0.5,
        "formula": "released",
        "skip": ["image"],
    }
    ask = ["generate", "checkpoints/model", "?", "--text", "a dog", "--allow", ALLOW[0]]
    ask += ["--max_new_tokens", "8"]
    answers = []
    for options in ([], ["--no_cache"], ["--cache_weight", "0"], ["--cache", "caches/a"]):
        assert main([*ask, *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[3] != answers[1] == answers[2]


def test_settings_of_a_checkpoint_stay_when_it_is_told_of_another_cache(project, capsys):
    file = Path("checkpoints/model/bindllm.json")
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "cache": {"folder": "caches/gone", "weight": 0.25}}))
    run(capsys, "checkpoints/model/cache", *BY_CLASS, "--name_in", "checkpoints/model")
    after = read_manifest("checkpoints/model")
    assert (after["cache"]["folder"], after["cache"]["weight"]) == ("cache", 0.25)
    assert {**after, "cache": None} == before
    assert len(VisualCache.open("checkpoints/model/cache")) == 12
    # A damaged entry is mended.
    file.write_text(json.dumps({**before, "cache": "caches/a"}))
    run(capsys, "caches/a", *BY_CLASS, "--name_in", "checkpoints/model")
    assert read_manifest("checkpoints/model")["cache"]["folder"] == "caches/a"


def test_a_full_disk_leaves_the_checkpoint_as_it_was(project, capsys, monkeypatch):
    before = Path("checkpoints/model/bindllm.json").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bindllm.atomic.os.replace", fail)
    monkeypatch.setattr("bindllm.cli.index._build_folder", lambda *_: {})
    told = run(capsys, "caches/a", *BY_CLASS, "--name_in", "checkpoints/model", code=1)
    assert "No space left" in told
    assert Path("checkpoints/model/bindllm.json").read_bytes() == before
    names = {file.name for file in Path("checkpoints/model").iterdir()}
    assert names == {"README.md", "bind.safetensors", "bindllm.json"}


def test_an_index_of_another_encoder_is_refused_and_stays(project, capsys):
    other = filled_store(Path("data/store"), write_images(Path("pictures"), 3), ColorEncoder(grid=3))
    VectorIndex.build("caches/other", other)
    told = run(capsys, "caches/other", *BY_CLASS, code=1)
    assert f"built with the encoder {ColorEncoder(grid=3).fingerprint()[:16]}" in told
    assert "replace it with --rebuild" in told
    assert len(VectorIndex.open("caches/other")) == 3
    assert "images 12 (built)" in run(capsys, "caches/other", *BY_CLASS, "--rebuild")


def test_a_checkpoint_of_another_encoder_is_not_told_of_it(project, capsys):
    before = Path("checkpoints/model/bindllm.json").read_bytes()
    line = ("--encoder", "tiny.ColorEncoder", "--encoder.grid", "3", "--images", "pictures")
    told = run(capsys, "caches/a", *line, "--name_in", "checkpoints/model", code=1)
    assert "it cannot use a cache of another encoder" in told
    assert Path("checkpoints/model/bindllm.json").read_bytes() == before
    assert not Path("caches/a").exists()


def test_a_place_inside_a_checkpoint_that_a_save_would_empty(project, capsys):
    told = run(capsys, "checkpoints/model/mine", *BY_CLASS, "--name_in", "checkpoints/model", code=2)
    assert "inside a checkpoint the cache is called checkpoints/model/cache" in told
    assert not Path("checkpoints/model/mine").exists()


def test_a_damaged_index_is_built_again_when_asked(project, capsys):
    run(capsys, "caches/a", *BY_CLASS)
    part = next(Path("caches/a").glob("vectors-*.faiss"))
    part.write_bytes(part.read_bytes()[:-9])
    assert "To build it from scratch, add --rebuild" in run(capsys, "caches/a", *BY_CLASS, code=1)
    Path("caches/a/index.json").write_text("{")
    assert "To build it from scratch, add --rebuild" in run(capsys, "caches/a", *BY_CLASS, code=1)
    assert "images 12 (built)" in run(capsys, "caches/a", *BY_CLASS, "--rebuild")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (("caches/a",), 2, "which encoder"),
        ((*BY_CLASS,), 2, "one place"),
        (("caches/a", *BY_CLASS, "--milvus", "a.db"), 2, "one place"),
        (("caches/a.db", *BY_CLASS), 2, "caches/a.db is a place for Milvus: give --milvus caches/a.db"),
        (("--milvus", "a.db", *BY_CLASS, "--images", "pictures"), 2, "all images of the store"),
        (("--milvus", "http://there:19530", *BY_CLASS, "--name_in", "checkpoints/model"), 1, "must not name"),
        (("caches/a", *BY_CLASS, "--facory", "Flat"), 2, "Did you mean '--factory'"),
        (("caches/a", *BY_CLASS, "--store", "data/stores"), 1, "data/stores has nothing of the encoder"),
        (("caches/a", *BY_CLASS, "--factory", "Flatt"), 1, "'Flat' is exact"),
        (("caches/a", *BY_CLASS, "--images", "nowhere"), 1, "nowhere"),
        (("caches/a", "--encoder", "cache_parts.Words"), 1, "no encoder serves the modality 'image'"),
        (("caches/a", "--encoder", "checkpoints/model"), 2, "--checkpoint checkpoints/model"),
        (("caches/a", "--encoder", "pictures"), 2, "does not name its encoder"),
        (("caches/a", "--encoder", "no/where"), 2, "the folder does not exist"),
        (("caches/a", "--checkpoint", "checkpoints/mode"), 1, "Did you mean 'model'"),
        (("pictures", *BY_CLASS), 1, "not an index"),
        (("caches/a", *BY_CLASS, "--device", "abacus"), 2, "torch cannot compute there"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(project, capsys, line, code, words):
    before = set(project.rglob("*"))
    assert words in run(capsys, *line, code=code)
    assert set(project.rglob("*")) == before


def test_a_mistake_is_told_ahead_of_the_pictures_and_so_is_a_missing_faiss(project, capsys, monkeypatch):
    monkeypatch.setattr("bindllm.cache.build.embed_images", lambda *_: pytest.fail("embedded"))
    line = ("caches/a", *BY_CLASS, "--images", "pictures")
    assert "cannot build an index 'Flatt'" in run(capsys, *line, "--factory", "Flatt", code=1)
    assert "pictures exists and is not an index" in run(capsys, "pictures", *line[1:], code=1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "bindllm[cache]" in run(capsys, *line, code=1)


def test_a_checkpoint_that_is_reached_by_a_link_finds_its_cache_from_anywhere(project, capsys, monkeypatch):
    shutil.move("checkpoints", project.parent / "disk")
    Path("checkpoints").symlink_to(project.parent / "disk", target_is_directory=True)
    run(capsys, "caches/a", *OF_MODEL, "--name_in", "checkpoints/model")
    (project.parent / "other").mkdir()
    monkeypatch.chdir(project.parent / "other")
    folder = "../disk/model"
    found = read_cache_config(folder, read_manifest(folder))
    assert Path(found.folder).resolve() == project / "caches/a"


def test_a_checkpoint_has_no_file_but_the_cache_in_its_folder(project, capsys):
    before = set(project.rglob("checkpoints/**/*"))
    run(capsys, "checkpoints/model/cache", *OF_MODEL, "--name_in", "checkpoints/model")
    new = set(project.rglob("checkpoints/**/*")) - before
    assert {file.relative_to(project / "checkpoints/model").parts[0] for file in new} == {"cache"}


def test_a_collection_of_milvus(project, capsys):
    pytest.importorskip("pymilvus")
    told = run(capsys, "--milvus", "caches/a.db", *BY_CLASS, "--name_in", "checkpoints/model")
    assert "images 12" in told
    assert read_manifest("checkpoints/model")["cache"]["folder"] == "caches/a.db"
