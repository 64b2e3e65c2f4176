"""Checkpoints on the hub, without a network: the calls of huggingface_hub, and a folder in the place of its answers."""

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest

from bindllm import BindLLM
from bindllm.cli import main
from bindllm.errors import CheckpointError
from tiny import save_tiny_decoder, tiny_model

COMMIT = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"


class Api:
    """Keeps the files that are uploaded."""

    repositories: ClassVar[dict] = {}

    def create_repo(self, name, **options):
        if name == "not/mine":
            raise PermissionError("401")
        self.repositories[name] = options

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, Path("hub", repo_id))
        return SimpleNamespace(oid=COMMIT)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder; gives the calls of downloads."""
    calls = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision))
        if not Path("hub", name).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        copy = Path("cache", name)
        for file in Path("hub", name).rglob("*"):
            if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                target = copy / file.relative_to(Path("hub", name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        return str(copy)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    save_tiny_decoder(tmp_path / "decoder")
    return calls


def test_a_model_is_uploaded_and_loaded_by_its_commit(hub, capsys):
    model = tiny_model("decoder")
    assert model.push_to_hub("me/tiny") == COMMIT
    assert Api.repositories["me/tiny"] == {"private": True, "exist_ok": True}
    # Whatever else lies there is not downloaded: pickles and code.
    Path("hub/me/tiny/evil.bin").write_bytes(b"x")
    Path("hub/me/tiny/evil.py").write_bytes(b"x")
    # Both files of an index are.
    Path("hub/me/tiny/index").mkdir()
    for name in ("a.faiss", "a.keys"):
        Path("hub/me/tiny/index", name).write_bytes(b"x")
    loaded = BindLLM.from_pretrained("me/tiny", revision=COMMIT, allow=["tiny.ColorEncoder"], device="cpu")
    assert loaded.generate("What?", max_new_tokens=4) == model.generate("What?", max_new_tokens=4)
    assert hub == [("me/tiny", COMMIT)]
    assert not list(Path("cache").rglob("evil*"))
    assert len(list(Path("cache").rglob("index/a.*"))) == 2
    line = [
        "generate",
        "me/tiny",
        "What?",
        "--revision",
        COMMIT,
        "--allow",
        "tiny.ColorEncoder",
        "--max_new_tokens",
        "4",
    ]
    assert main(line) == 0
    assert capsys.readouterr().out.strip() == model.generate("What?", max_new_tokens=4)


def test_what_is_not_there_is_an_error_with_its_reason(hub):
    # Without a revision, a name is a folder: a misspelled path never asks the network.
    with pytest.raises(CheckpointError, match="'me/tiny' does not exist"):
        BindLLM.from_pretrained("me/tiny")
    assert not hub
    with pytest.raises(CheckpointError, match="could not be downloaded .LocalEntryNotFoundError: no network"):
        BindLLM.from_pretrained("me/other", revision=COMMIT)
    with pytest.raises(CheckpointError, match="the upload to 'not/mine' has failed .PermissionError: 401"):
        tiny_model("decoder").push_to_hub("not/mine")
