"""The command convert: kinds are found, wrong and malicious files are refused, and no partial folder is left."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from bindllm import BindLLM, Media
from bindllm.cli import main
from bindllm.convert.imagebind import convert_imagebind
from bindllm.encoders.imagebind.text import tokenizer_tree
from bindllm.encoders.pointbind import PointBind
from goldens import fill, filled, keys, make_image, make_wave
from imagebind_llm_tiny import ALLOW, published, write_base
from imagebind_small import HEADS, small_state
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def point_state():
    """A Point-Bind checkpoint with a part of the ImageBind in it: the trunk for movements, one block deep."""
    names = {
        name: shape for name, shape in keys("pointbind_pointbert").items() if "bind.modality" not in name
    }
    names |= {
        name: shape
        for name, shape in keys("pointbind_pointbert").items()
        if ("imu" in name or "_point" in name) and not any(f"blocks.{n}." in name for n in range(1, 6))
    }
    made = {name: fill(name, shape) for name, shape in names.items()}
    return {name: torch.tensor(1.0) if value is None else value for name, value in made.items()}


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["convert", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def save(file, content):
    torch.save(content, file)
    return file


def test_an_adapter_becomes_a_folder_that_loads(tmp_path, base, capsys):
    content = {"model": published("finetune"), "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    file = save(tmp_path / "7B.pth", content)
    arguments = ("--output", tmp_path / "m", "--base", base, "--encoder", ALLOW[0])
    code, out, err = run(capsys, file, *arguments)
    assert (code, err) == (0, "")
    assert "imagebind-llm, 104 tensors" in out
    assert "finetune phase, the bridge of the paper, 4 of 4 layers served" in out
    assert "104 tensors converted, 0 dropped by rule, 0 unknown" in out
    assert "GPL-3" in out
    model = BindLLM.from_pretrained(tmp_path / "m", device="cpu", allow=ALLOW)
    assert model.tokenizer.chat_template.count("### Response:") == 2
    code, _, err = run(capsys, file, *arguments)
    assert code == 1
    assert "is not empty; nothing was written" in err


@pytest.fixture(scope="module")
def project(tmp_path_factory, point_state):
    """Everything that a conversion takes, in one folder: base, encoders of size 1024, a published file, media."""
    home = tmp_path_factory.mktemp("project")
    write_base(home / "base")
    base = LlamaForCausalLM.from_pretrained(home / "base")
    # The published base has 96 tokens, the tokenizer more.
    base.resize_token_embeddings(300, mean_resizing=False)
    base.save_pretrained(home / "base")
    trunks = ("vision", "audio")
    state = {name: value for name, value in small_state().items() if name.split(".")[1] in trunks}
    for name in (f"modality_heads.{trunk}.2.weight" for trunk in trunks):
        state[name] = fill(name, (1024, state[name].shape[1]))
    convert_imagebind(state, home / "imagebind", tokenizer_file=None, heads=HEADS)
    save(home / "7B.pth", {"model": published("finetune")})
    save(home / "point.pt", point_state)
    Image.fromarray(make_image("a", 60, 80)).save(home / "a.png")
    np.save(home / "a.npy", np.random.default_rng(0).normal(size=(600, 3)))
    with wave.open(str(home / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(make_wave("a", 16_000, 16_000, 1).tobytes())
    return home


def test_from_published_files_to_answers_and_after_a_move(tmp_path, project, capsys, monkeypatch):
    """Folders are named by bare words, as one does; the whole project is moved, and used from another place."""
    pytest.importorskip("av")
    home = tmp_path / "here"
    shutil.copytree(project, home)
    monkeypatch.chdir(home)
    assert run(capsys, "point.pt", "--output", "pointbind")[0] == 0
    arguments = ("--base", "base", "--encoder", "imagebind", "--encoder", "pointbind", "--output", "model")
    code, _, err = run(capsys, "7B.pth", *arguments)
    assert (code, err) == (0, "")
    card = (home / "model" / "README.md").read_text()
    for words in (
        "# base with",
        "CC-BY-NC 4.0",
        "LLaMA",
        "LoRA of rank 16",
        "learned from its training data",
    ):
        assert words in card
    monkeypatch.chdir(tmp_path)
    home = home.rename(tmp_path / "there")
    assert main(["check", "--folder", "there/model"]) == 0
    capsys.readouterr()
    given = {
        "image": Media.image(str(home / "a.png")),
        "audio": Media.audio(str(home / "a.wav")),
        "point": Media("point", str(home / "a.npy")),
    }
    model = BindLLM.from_pretrained("there/model", device="cpu")
    answers = {}
    for sense, media in given.items():
        ask = ["generate", "there/model", "What?", f"--{sense}", str(media.source), "--max_new_tokens", "12"]
        assert main(ask) == 0
        answers[sense] = capsys.readouterr().out.strip()
        assert answers[sense] == model.generate("What?", [media], max_new_tokens=12)
    assert len(set(answers.values())) == 3
    (home / "imagebind").rename(home / "away")
    assert main(["check", "--folder", "there/model"]) == 1
    assert "it is named under encoders in there/model/bindllm.json" in capsys.readouterr().out


def test_safetensors_are_read_as_well(tmp_path, base, capsys):
    save_file({k: v.contiguous() for k, v in published("pretrain").items()}, tmp_path / "7B.safetensors")
    code, out, _ = run(
        capsys, "imagebind-llm", tmp_path / "7B.safetensors", "--output", tmp_path / "m", "--base", base,
        "--encoder", ALLOW[0],
    )  # fmt: skip
    assert code == 0
    # Two norms in each of four layers, and the last one, are the base's own.
    assert "9 dropped by rule" in out


def test_point_bind_and_the_imagebind_in_it_get_folders_of_their_own(tmp_path, point_state, capsys):
    file = save(tmp_path / "pointbind_pointbert.pt", point_state)
    code, out, err = run(capsys, file, "--output", tmp_path / "point")
    assert (code, err) == (0, "")
    assert "pointbind, " in out
    assert f"bindllm convert imagebind {file}" in out
    assert "CC-BY-NC" in out
    assert PointBind(str(tmp_path / "point")).fingerprint()
    code, out, err = run(capsys, "imagebind", file, "--output", tmp_path / "imagebind")
    assert (code, err) == (0, "")
    assert list(json.loads((tmp_path / "imagebind" / "config.json").read_text())["trunks"]) == ["imu"]
    for folder in ("point", "imagebind"):
        rows = (tmp_path / folder / "conversion.tsv").read_text().splitlines()[1:]
        assert {row.split("\t")[0] for row in rows} == set(point_state)


def test_a_file_with_two_encoders_needs_a_kind(tmp_path, point_state, capsys):
    both = {
        name.removeprefix("bind.") if name.startswith("bind.") else f"point_trunk.{name}": value
        for name, value in point_state.items()
        if "_point" not in name and name != "logit_scale"
    }
    both |= {
        name: fill(name, shape) for name, shape in keys("imagebind_w3d").items() if "heads.point" in name
    }
    both["modality_postprocessors.point.1.log_logit_scale"] = torch.tensor(0.0)
    both = {name: value for name, value in both.items() if name in keys("imagebind_w3d")}
    file = save(tmp_path / "imagebind_w3D.pth", both)
    code, _, err = run(capsys, file, "--output", tmp_path / "m")
    assert code == 1
    assert "two encoders" in err
    for kind in ("imagebind", "pointbind"):
        assert run(capsys, kind, file, "--output", tmp_path / kind)[0] == 0


def test_texts_need_a_tokenizer_or_a_word_that_they_do_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("blocks.0.", "head", "preprocessors", "postprocessors")
    state = {
        name: torch.zeros((), dtype=torch.float16).expand(shape)
        for name, shape in keys("imagebind_huge").items()
        if "text" in name and any(part in name for part in names)
    }
    file = save(tmp_path / "imagebind_huge.pth", state)
    code, _, err = run(capsys, file, "--output", "m")
    assert code == 1
    assert "bindllm fetch clip-vocabulary" in err
    code, _, err = run(capsys, file, "--output", "m", "--tokenizer", "none")
    assert (code, err) == (0, "")
    for tree, words in (("{}", "not a tokenizer.json that can be read"), (None, "not CLIP's vocabulary")):
        if tree is None:
            tiny_tokenizer().save_pretrained(tmp_path)
        else:
            (tmp_path / "tokenizer.json").write_text(tree)
        code, _, err = run(capsys, file, "--output", "n", "--tokenizer", "tokenizer.json")
        assert code == 1
        assert words in err
        assert not (tmp_path / "n").exists()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_tree({})))
    assert run(capsys, file, "--output", "n", "--tokenizer", "tokenizer.json")[0] == 0
    assert (tmp_path / "n" / "tokenizer.json").is_file()
    assert not (tmp_path / "m" / "tokenizer.json").exists()


class _Wicked:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, capsys, legacy):
    torch.save(
        {"model": _Wicked(tmp_path / "ran")}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy
    )
    code, _, err = run(capsys, tmp_path / "w.pth", "--output", tmp_path / "m")
    assert code == 1
    assert "could run code" in err
    assert "system" in err
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(_Wicked(tmp_path / "ran")))
    assert run(capsys, tmp_path / "plain.pkl", "--output", tmp_path / "m")[0] == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "m").exists()


def test_damaged_missing_and_strange_files(tmp_path, capsys):
    def refused(file, words):
        code, _, err = run(capsys, file, "--output", tmp_path / "m")
        assert code == 1
        assert words in err
        assert not (tmp_path / "m").exists()

    whole = save(tmp_path / "whole.pth", published("pretrain")).read_bytes()
    for number, content in enumerate(
        (b"", whole[: len(whole) // 2], whole[:-30], b"\x80\x02nonsense", b"PK\x03\x04")
    ):
        (tmp_path / f"{number}.pth").write_bytes(content)
        refused(tmp_path / f"{number}.pth", f"{number}.pth")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    refused(tmp_path / "x.safetensors", "not a readable safetensors file")
    refused(tmp_path / "nowhere.pth", "has no nowhere.pth")
    refused(tmp_path, "is not a regular file; give the published file itself")
    refused(save(tmp_path / "list.pth", [1, 2]), "holds a list")
    refused(save(tmp_path / "odd.pth", {"epoch": 3, "optimizer": {}}), "epoch (int), optimizer (dict)")
    refused(
        save(tmp_path / "other.pth", {"fc.weight": torch.ones(2)}),
        "none of imagebind, pointbind, imagebind-llm",
    )
    unknown = filled("imagebind_llm_tiny_pretrain") | {"odd": torch.ones(1)}
    code, _, err = run(
        capsys, save(tmp_path / "u.pth", unknown), "--output", tmp_path / "m", "--base", tmp_path,
        "--encoder", ALLOW[0],
    )  # fmt: skip
    assert code == 1
    assert "1 unknown tensors: odd" in err


def test_an_output_that_cannot_be_written_is_refused_before_the_file_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for output, words in (
        (".", "is the folder that this command runs in"),
        ("", "is the folder that this command runs in"),
        ("../empty", "is the folder that this command runs in"),
        (tmp_path / "file", "exists and is not empty"),
        (tmp_path / "file" / "m", "file is a file; choose another folder"),
    ):
        code, _, err = run(capsys, "nowhere.pth", "--output", output)
        assert code == 1
        assert words in err
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    code, _, err = run(capsys, "nowhere.pth", "--output", "m")
    assert code == 1
    assert "is not writable" in err


def test_mistakes_on_the_command_line(tmp_path, capsys, base):
    file = save(tmp_path / "7B.pth", published("pretrain"))
    for arguments, words in (
        ((file, "--output", tmp_path / "m"), "--base FOLDER"),
        ((file, "--output", tmp_path / "m", "--tokenizer", "none"), "is imagebind-llm; leave it out"),
        (("imagebind", file, "--output", tmp_path / "m", "--base", "b"), "--base is for imagebind-llm"),
        (("imagbind", file, "--output", tmp_path / "m"), "Did you mean 'imagebind'"),
        ((file, file, file, "--output", tmp_path / "m"), "one file at a time"),
        ((file,), "--output"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert words in err
    for encoder, expected, words in (
        ("nowhere/imagebind", 2, "does not exist"),
        (base, 1, "takes embeddings of size 1024, the encoders give 64"),
        ("my_lab.Nothing", 1, "my_lab.Nothing cannot be built"),
    ):
        arguments = (file, "--output", tmp_path / "m", "--base", base, "--encoder", encoder)
        code, _, err = run(capsys, *arguments)
        assert code == expected
        assert words in err
    assert not (tmp_path / "m").exists()
