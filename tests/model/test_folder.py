import os

import pytest
import torch

from bindllm.errors import CheckpointError
from bindllm.imports import resolve_path
from bindllm.model.checkpoint import (
    build_object,
    check_keys,
    home_of,
    name_cache,
    read_manifest,
    read_weights,
    resolve_cache,
    write_checkpoint,
)

TENSORS = {"bind.a": torch.arange(6.0).reshape(2, 3), "injection.gates": torch.zeros(2)}


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model", {"decoder": {"name": "d"}}, TENSORS, "# card")
    return tmp_path / "model"


def test_round_trip(folder):
    manifest = read_manifest(folder)
    assert manifest["decoder"] == {"name": "d"}
    found = read_weights(folder, manifest)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "bind.safetensors", "bindllm.json"]


def test_saving_again_replaces_a_checkpoint_and_nothing_else(folder, tmp_path):
    write_checkpoint(folder, {"decoder": {"name": "e"}}, TENSORS, "")
    assert read_manifest(folder)["decoder"]["name"] == "e"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    # A file in the place of a folder is no less precious.
    for output in (tmp_path / "home", tmp_path / "home" / "thesis.tex"):
        with pytest.raises(CheckpointError, match="not a bindllm checkpoint"):
            write_checkpoint(output, {}, TENSORS, "")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_disk_full_while_saving_leaves_the_old_checkpoint(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(folder, {"decoder": {"name": "new"}}, TENSORS, "")
    assert read_manifest(folder)["decoder"]["name"] == "d"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_missing_folder_names_the_closest(folder):
    with pytest.raises(CheckpointError, match="Did you mean 'model'"):
        read_manifest(folder.parent / "mode")


def test_a_killed_save_is_told_with_the_place_of_the_earlier_checkpoint(folder):
    folder.rename(folder.parent / ".model.old")
    with pytest.raises(CheckpointError, match=r"killed.*\.model\.old.*rename it to model"):
        read_manifest(folder)


NOT_A_MANIFEST = "not the description of a checkpoint"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format": 99}', "format 99.*upgrade"),
        ('{"format": 1,', "cannot be read as JSON"),
        ("[" * 1_000_000, "cannot be read as JSON"),
        *((content, NOT_A_MANIFEST) for content in ("[]", '"x"', '{"format": "2"}', "null")),
    ],
    ids=lambda text: text[:14],
)
def test_a_manifest_that_cannot_be_used_is_refused(content, words, folder):
    (folder / "bindllm.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        read_manifest(folder)


def test_a_missing_manifest_and_what_is_no_regular_file_are_refused(folder):
    file = folder / "bindllm.json"
    with pytest.raises(CheckpointError, match="is a file; give its folder"):
        read_manifest(file)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"no bindllm\.json; without it a folder is not a bindllm checkpoint"
    ):
        read_manifest(folder)
    for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
        make(file)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            read_manifest(folder)
        file.unlink()


def test_a_checkpoint_with_a_pickle_is_refused(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights\.pt.*run code"):
        read_manifest(folder)
    # Without a manifest it is another folder, whose pickles are in order.
    (folder / "bindllm.json").unlink()
    with pytest.raises(CheckpointError, match="without it a folder is not a bindllm checkpoint"):
        read_manifest(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    write_checkpoint(folder, {}, {**TENSORS, "injection.gates": torch.tensor([0.0, value])}, "")
    with pytest.raises(CheckpointError, match=r"not finite .injection\.gates"):
        read_weights(folder, read_manifest(folder))


def test_damaged_and_missing_weights_are_refused(folder):
    file = folder / "bind.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-8], whole[:-1] + b"x", b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or exchanged|not a readable safetensors file"):
            read_weights(folder, read_manifest(folder))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no bind\.safetensors"):
        read_weights(folder, read_manifest(folder))


def test_every_key_is_accounted_for():
    found = {"bind.a": torch.zeros(3, 2), "bind.b": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"missing injection\.gates; unexpected bind\.b; bind\.a has shape \[3, 2\]"
    ):
        check_keys(TENSORS, found, source="it")
    check_keys(TENSORS, dict(TENSORS), source="it")
    with pytest.raises(CheckpointError, match=r"injection\.gates holds torch\.int64"):
        check_keys(TENSORS, {name: tensor.long() for name, tensor in TENSORS.items()}, source="it")
    # Of another model thousands may differ.
    with pytest.raises(CheckpointError, match=r"missing 19 and 80 more$"):
        check_keys({f"{n:02}": torch.zeros(1) for n in range(100)}, {}, source="it")


def test_paths_are_found_from_another_directory(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "checkpoints" / "decoder").mkdir(parents=True)
    monkeypatch.chdir(project)
    write_checkpoint("checkpoints/model", {}, TENSORS, "")

    def find(path, project=""):
        folder = os.path.join(project, "checkpoints/model")
        return resolve_path(path, home_of(folder, read_manifest(folder)))

    assert find("checkpoints/decoder") == "checkpoints/decoder"
    monkeypatch.chdir(tmp_path)
    assert find("checkpoints/decoder", "project") == "project/checkpoints/decoder"
    project.rename(tmp_path / "moved")
    assert find("checkpoints/decoder", "moved") == "moved/checkpoints/decoder"
    (tmp_path / "moved" / "whole").mkdir()
    # Neither a path, nor one that is there.
    for value in ("not/there", "whole", 7):
        assert find(value, "moved") == value


def test_classes_outside_bindllm_need_permission():
    entry = {"class_path": "tiny.ColorEncoder", "init_args": {"grid": 2}}
    with pytest.raises(
        CheckpointError,
        match=r"allow=\['tiny.ColorEncoder'\], or --allow tiny\.ColorEncoder on the command line",
    ):
        build_object(entry)
    assert build_object(entry, allow=["tiny.ColorEncoder"]).grid == 2
    with pytest.raises(
        CheckpointError, match=r"tiny.ColorEncoder cannot be built with .*TypeError: .*'grids'"
    ):
        build_object({**entry, "init_args": {"grids": 2}}, allow=["tiny.ColorEncoder"])
    with pytest.raises(CheckpointError, match="cannot be built.*Did you mean 'ColorEncoder'"):
        build_object({"class_path": "tiny.ColorEncodr"}, allow=["tiny.ColorEncodr"])


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("bindllm.atomic.write_json", "not a class"),
        ("bindllm.atomic.Path", "a class without fingerprint, to, prepare, embed"),
        ("bindllm.encoders.efficientnet.EfficientNetLite.config", "cannot be built"),
        ("bindllm.embeddings.store.EmbeddingStore", "a class without fingerprint"),
    ],
)
def test_a_strangers_folder_calls_nothing_but_encoders(tmp_path, monkeypatch, path, what):
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "written.json", "value": 1}
    with pytest.raises(CheckpointError, match=what):
        build_object({"class_path": path, "init_args": arguments})
    assert not list(tmp_path.iterdir())


def test_a_module_that_is_not_there_is_told_from_one_that_lacks_a_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_lab.py").write_text("import no_such_package\n")
    for path, told in (
        ("tiny_lab.Encoder", "the module 'tiny_lab' was not found. The command line searches "),
        ("half_lab.Encoder", "it needs 'no_such_package', which is not installed"),
    ):
        with pytest.raises(CheckpointError, match=f"{path} cannot be built: {told}"):
            build_object({"class_path": path}, allow=[path])


@pytest.mark.parametrize("path", ["", "Encoder", ".Encoder", "tiny.", None])
def test_what_is_no_import_path_is_refused(path):
    with pytest.raises(CheckpointError, match="is not the import path of a class"):
        build_object({"class_path": path}, allow=[path])


@pytest.mark.parametrize("has_links", [True, False])
def test_a_cache_inside_stays_when_the_checkpoint_is_saved_again(folder, has_links, monkeypatch):
    def fail(*_):
        raise OSError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr("bindllm.model.checkpoint.os.link", fail)
    (folder / "cache").mkdir()
    (folder / "cache" / "part-a.faiss").write_bytes(b"vectors")
    write_checkpoint(folder, {"cache": {"folder": str(folder / "cache"), "top_k": 3}}, TENSORS, "")
    assert read_manifest(folder)["cache"] == {"folder": "cache", "top_k": 3}
    # Also where the new model names none.
    write_checkpoint(folder, {"cache": None}, TENSORS, "")
    assert (folder / "cache" / "part-a.faiss").read_bytes() == b"vectors"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_naming_a_cache_changes_nothing_else(folder, monkeypatch):
    before = read_manifest(folder)
    monkeypatch.chdir(folder.parent)
    name_cache("model", {"folder": "caches/a"})
    root = (folder / before["root"]).resolve()
    expected = os.path.relpath(folder.parent / "caches/a", root)
    assert read_manifest(folder) == {**before, "cache": {"folder": expected}}
    name_cache("model", None)
    assert read_manifest(folder) == {**before, "cache": None}
    with pytest.raises(CheckpointError, match="Did you mean 'model'"):
        name_cache("mode", {"folder": "caches/a"})


def test_a_cache_is_looked_up_inside_then_here_then_where_the_checkpoint_was_made(folder, monkeypatch):
    home = folder.parent / "home"
    (home / "here").mkdir(parents=True)
    monkeypatch.chdir(home / "here")
    manifest = {"root": "../home"}
    assert resolve_cache("caches/a", folder, manifest) == "caches/a"
    (home / "caches/a").mkdir(parents=True)
    assert resolve_cache("caches/a", folder, manifest) == "../caches/a"
    (home / "here/caches/a").mkdir(parents=True)
    assert resolve_cache("caches/a", folder, manifest) == "caches/a"
    (folder / "caches/a").mkdir(parents=True)
    assert resolve_cache("caches/a", folder, manifest) == "../../model/caches/a"
    assert resolve_cache("http://there:19530", folder, manifest) == "http://there:19530"
