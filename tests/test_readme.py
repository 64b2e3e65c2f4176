"""The README's commands and Python blocks run, in its order, on parts of the right shape and no meaning."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from bindllm import BindLLM
from bindllm.cli import COMMANDS, main
from bindllm.quickstart import ASSETS, easyvqa
from bindllm.testing import check_encoder
from easyvqa_parts import published
from goldens import make_wave
from imagebind_small import write_small_imagebind
from recordings import wav
from tiny import save_tiny_decoder, save_tiny_text_encoder, synthetic_efficientnet
from tiny_run import short_runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="{}" fill="red"/></svg>'


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with what the recipes of the README would have fetched, tiny."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_decoder(folder / "checkpoints/smollm2-135m-instruct")
    (folder / "checkpoints/efficientnet-lite0").mkdir()
    save_file(synthetic_efficientnet(), folder / "checkpoints/efficientnet-lite0/model.safetensors")
    save_tiny_text_encoder(folder / "checkpoints/minilm-l6")
    (folder / "data/openmoji/images").mkdir(parents=True)
    (folder / "data/openmoji/images/1F431.svg").write_text(DRAWING.format(3))
    lines = ["image,caption,split"]
    for number, split in enumerate(("train", "train", "train", "validation", "test")):
        (folder / f"data/openmoji/images/{number}.svg").write_text(DRAWING.format(number + 1))
        lines.append(f"images/{number}.svg,circle {number},{split}")
    (folder / "data/openmoji/captions.csv").write_text("\n".join(lines))
    (folder / "data/scenes/images/new-scenes").mkdir(parents=True)
    scenes = []
    # The last two are in the README.
    splits = {0: "train", 1: "train", 2: "train", 3: "validation", 10: "test", 21: "test"}
    for number, split in splits.items():
        image = f"images/new-scenes/{number:05}.png"
        Image.new("RGB", (32, 32), (12 * number, 99, 0)).save(folder / "data/scenes" / image)
        scenes.append({"image": image, "caption": f"a circle on a {number} background", "split": split})
    asked = [
        {
            "image": row["image"],
            "question": "Which color?",
            "answer": row["caption"][-12:],
            "split": row["split"],
        }
        for row in scenes
    ]
    for name, rows in {"captions": scenes, "seen": asked}.items():
        (folder / f"data/scenes/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data/easyvqa").mkdir()
    easyvqa.build([published(folder, train=40)], folder / "data/easyvqa")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    write_small_imagebind(folder / "checkpoints/imagebind")
    for name, color in (("dog.jpg", "brown"), ("car.jpg", "red")):
        Image.new("RGB", (32, 24), color).save(folder / name)
    (folder / "bark.wav").write_bytes(wav(make_wave("bark", 16_000, 16_000, 1), 16_000))
    return folder


def test_make_knows_every_target():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {words[1] for words in commands() if words[0] == "make"}
    assert {"train", "test"} <= used <= targets


def test_ci_runs_the_readmes_test_command():
    assert ["make", "test"] in commands()
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_commands_and_python_blocks_run(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    plain = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--model.decoder.dtype", "float32"]
    # The tiny decoder has three layers.
    few = ["--model.inject.layers", "2", "--model.adapter.layers", "2", "--trainer.max_steps", "2"]
    few += ["--trainer.val_check_interval", "1"]
    for name, options in {"scenes": few, "openmoji": ["--trainer.max_epochs", "1"]}.items():
        with short_runs():
            assert main(["fit", "--config", f"recipes/{name}.yaml", *plain, *options]) == 0
    told = ""
    ran = [words[1:] for words in commands() if words[0] == "bindllm"]
    assert {words[0] for words in ran} <= {*COMMANDS, "--help"}
    for words in ran:
        if words[0] == "fetch":
            assert set(words[1:]) <= ASSETS.keys()
            continue
        if words[0] == "convert":
            # Nobody may ship the published weights; tests/cli/test_convert.py converts made-up ones.
            with monkeypatch.context() as elsewhere:
                elsewhere.chdir(tmp_path)
                assert main(words) == 1
            assert "is missing" in capsys.readouterr().err
            continue
        trains = words[0] in ("fit", "align")
        extra = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"] if trains else []
        if words[0] == "fit" and "easyvqa" in words[2]:
            extra += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
        with short_runs():
            assert main([*words, *extra]) == 0, words
        told += capsys.readouterr().out
    assert "no problems" in told
    assert "bark.wav" in told
    assert "images/0.svg" in told, "the neighbors of the cache"
    names: dict = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].injection.kind == "cross"
    assert BindLLM.from_pretrained("checkpoints/openmoji").cache is not None


def test_yaml_blocks_are_parts_of_a_recipe():
    keys = yaml.safe_load((ROOT / "recipes/openmoji.yaml").read_text())
    found = [yaml.safe_load(block) for block in blocks("yaml")]
    assert found
    for part in found:
        assert part.keys() <= keys.keys() | keys["model"].keys()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


def test_links_lead_to_files_and_headings():
    # mkdocs checks the pages in docs/, and not these.
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "checkpoints/README.md"):
        page = ROOT / name
        for target in re.findall(r"\]\((?!https?:)([^)]+)", page.read_text(encoding="utf-8")):
            file, _, heading = target.partition("#")
            assert (page.parent / file).is_file(), (name, target)
            assert not heading or heading in anchors(page.parent / file), (name, target)


def test_the_index_lists_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([^)#]+)\)", index)) == pages


def test_the_reading_order_names_files():
    found = re.findall(r"^\d+\. `(src/\S+)`", CONTRIBUTING, flags=re.MULTILINE)
    assert len(found) == 10
    assert all((ROOT / name).is_file() for name in found)


def test_the_encoder_of_the_contributing_guide_keeps_the_contract():
    names: dict = {"__name__": "my_lab"}
    for block in blocks("python", CONTRIBUTING):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    check_encoder(names["QuarterEncoder"]())
