"""docs/zero-shot.md: its commands and its Python run on tiny data sets, and its table of layouts is whole."""

import json
import re
import shlex
from pathlib import Path

import pytest

import bindllm.encoders
import tiny_layouts as tiny
from bindllm.cli import main, options
from bindllm.evaluation.layouts import LAYOUTS

PAGE = (Path(__file__).parents[1] / "docs/zero-shot.md").read_text(encoding="utf-8")
FOLDERS = {"esc50": "ESC-50-master", "modelnet40": "ModelNet40"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for name, write_it in tiny.LAYOUTS.items():
        write_it(folder / "data" / FOLDERS.get(name, name))
    tiny.write(folder / "data/imagenet/classes.tsv", "n00000001\tdog\tbird\nn00000002\tcat\n")
    for name in ("dog", "cat"):
        tiny.write(folder / f"data/pets/val/{name}/a.png", name)
    rows = [
        {"image": f"{n}.png", "sound": f"{n}.ogg", "caption": n, "split": "test"} for n in ("dog", "rain")
    ]
    for name in ("openmoji", "stamps"):
        tiny.write(folder / "data" / name / "captions.jsonl", "\n".join(map(json.dumps, rows)))
        for row in rows:
            tiny.write(folder / "data" / name / row["image"], row["caption"])
            tiny.write(folder / "data" / name / row["sound"], row["caption"])
    return folder


@pytest.fixture(autouse=True)
def _here(project, monkeypatch):
    """Every encoder of the page is the one that reads words."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(options, "build_encoder", lambda path, options, **others: tiny.WordEncoder())
    monkeypatch.setattr(bindllm.encoders, "ImageBind", lambda weights: tiny.WordEncoder(), raising=False)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_runs(words, capsys):
    assert words[:2] == ["bindllm", "zero_shot"]
    assert main([*words[1:], "--device", "cpu"]) == 0
    assert " media measured" in capsys.readouterr().out


def test_the_python_runs(capsys):
    (block,) = blocks("python")
    exec(compile(block, "docs/zero-shot.md", "exec"), {})
    assert capsys.readouterr().out == "1.0 2 []\n"


def test_every_layout_is_in_the_table_and_has_a_command():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == set(LAYOUTS)
    assert {words[2] for words in COMMANDS} == set(LAYOUTS)


def test_the_names_of_clips_are_those_that_are_found():
    from bindllm.evaluation.layouts.dataset import clip_stems

    told = {"id", "Yid", "id_20", "id_20000", "id_20_30"}
    assert told <= set(clip_stems("id", 20, 30))
