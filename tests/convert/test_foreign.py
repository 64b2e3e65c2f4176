"""Reading published files: tensors and nothing else, and never an error that does not name the file."""

from __future__ import annotations

import argparse
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from bindllm.convert.foreign import SafetensorsFolder, read_foreign
from bindllm.errors import CheckpointError

TENSORS = {f"layers.{n}.weight": torch.arange(12.0).reshape(3, 4) + n for n in range(3)}


def write(folder, kind):
    file = folder / f"{kind}.{'safetensors' if kind == 'safetensors' else 'pth'}"
    match kind:
        case "new":
            torch.save({"model": TENSORS, "args": argparse.Namespace(lr=0.1), "epoch": 2}, file)
        case "old":
            torch.save({"state_dict": TENSORS}, file, _use_new_zipfile_serialization=False)
        case "safetensors":
            save_file(TENSORS, file)
    return file


@pytest.mark.parametrize("kind", ["new", "old", "safetensors"])
def test_tensors_are_found_in_every_kind_of_file(tmp_path, kind):
    found = read_foreign(write(tmp_path, kind))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["new", "old", "safetensors"])
def test_changed_bytes_are_refused_by_name_or_harmless(tmp_path, kind):
    whole = write(tmp_path, kind).read_bytes()
    chance, refused, harmless = random.Random(0), 0, 0
    file = write(tmp_path, kind).with_stem("changed")
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8, 40])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        file.write_bytes(content[: chance.randrange(len(content))] if chance.random() < 0.3 else content)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_foreign(file).values())
        except CheckpointError as error:
            refused += str(file) in str(error) and "weights_only" not in str(error)
        else:
            harmless += 1
    assert refused + harmless == 150
    assert refused > 75


def test_an_archive_that_would_grow_is_refused(tmp_path):
    with (
        zipfile.ZipFile(write(tmp_path, "new")) as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry) + bytes(1_000_000 if "data/" in entry else 0))
    with pytest.raises(CheckpointError, match="a compressed archive of 4,0"):
        read_foreign(tmp_path / "packed.pth")


def test_shards_are_one_folder(tmp_path):
    for number, (name, tensor) in enumerate(TENSORS.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert all(name in folder and torch.equal(folder[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(CheckpointError, match="no tensor lm_head"):
        folder["lm_head"]
    (tmp_path / "model-9.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match=r"model-9\.safetensors: not a readable"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="holds no"):
        SafetensorsFolder(tmp_path / "none")
