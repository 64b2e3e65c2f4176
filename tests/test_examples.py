"""docs/new-encoder.md and examples/: the page's blocks run in its order, and the example's encoder is a real one."""

import csv
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from bindllm.cli import main
from bindllm.errors import CheckpointError, MediaError
from bindllm.media import Media
from bindllm.testing import check_encoder
from tiny import save_tiny_decoder
from tiny_run import short_runs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/new-encoder.md").read_text(encoding="utf-8")
TINY = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.max_epochs", "1"]
TINY += ["--trainer.limit_train_batches", "4", "--model.decoder.dtype", "float32"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with a tiny decoder in the quickstart's place, the examples, and what they make."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_decoder(folder / "checkpoints/smollm2-135m-instruct")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        from examples.make_radar import main as make_radar

        make_radar()
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        del sys.modules[name]


@pytest.fixture
def encoder(project):
    from examples.radar_encoder import RadarEncoder

    return RadarEncoder()


@pytest.fixture
def rows(project):
    with open("data/radar/captions.csv", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def radar(row) -> Media:
    return Media("radar", f"data/radar/{row['radar']}")


def test_the_page_shows_the_file_and_it_is_short():
    text = (ROOT / "examples/radar_encoder.py").read_text(encoding="utf-8")
    assert blocks("python")[0] == text
    assert len(text.splitlines()) < 40


def test_the_encoder_keeps_the_contract(encoder, rows):
    check_encoder(encoder, [radar(row) for row in rows[:4]])
    sweep = np.load("data/radar/sweeps/0.npy")
    assert encoder.prepare(Media("radar", sweep)).equal(encoder.prepare(radar(rows[0])))


def test_the_embeddings_mean_something(encoder, rows):
    embedded = encoder.embed("radar", [encoder.prepare(radar(row)) for row in rows])
    train = [n for n, row in enumerate(rows) if row["split"] == "train"]
    held = [n for n, row in enumerate(rows) if row["split"] != "train"]
    nearest = (embedded[held] @ embedded[train].T).argmax(1).tolist()
    right = [rows[train[n]]["caption"] == rows[h]["caption"] for h, n in zip(held, nearest, strict=True)]
    # The page says how often; chance is one in nine.
    told = int(re.search(r"right one of nine for (\d+)\s+of 100", PAGE)[1])
    assert abs(100 * np.mean(right) - told) < 5


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"words"])
def test_bad_files_are_media_errors(content, encoder, tmp_path):
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(MediaError, match=r"bad\.npy"):
        encoder.prepare(Media("radar", tmp_path / "bad.npy"))
    np.save(tmp_path / "small.npy", np.zeros((2, 2)))
    with pytest.raises(MediaError, match=r"small\.npy: expected finite numbers"):
        encoder.prepare(Media("radar", tmp_path / "small.npy"))
    with pytest.raises(MediaError, match=r"nowhere\.npy"):
        encoder.prepare(Media("radar", tmp_path / "nowhere.npy"))


def test_the_recipe_is_what_the_page_says():
    recipe = yaml.safe_load((ROOT / "examples/radar.yaml").read_text())
    (shown,) = (yaml.safe_load(block) for block in blocks("yaml"))
    for section, values in shown.items():
        for key, value in values.items():
            assert recipe[section][key] == value


def test_the_commands_of_the_page_run(project, capsys):
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert lines[0] == ["python", "-m", "examples.make_radar"]
    assert {line[1] for line in lines[1:]} == {"check", "encode", "fit", "generate"}
    for line in lines[1:]:
        extra = TINY if line[1] == "fit" else []
        with short_runs():
            assert main([*line[1:], *extra]) == 0, (line, capsys.readouterr())
    told = capsys.readouterr().out
    assert told.count("no problems") == 2
    assert "data/radar: 360 radar media, 360 captions; 288 train, 36 validation, 36 test" in told
    exec(compile(blocks("python")[1], "new-encoder.md", "exec"), {"__name__": "page"})

    from bindllm import BindLLM

    with pytest.raises(CheckpointError, match=r"allow=\['examples.radar_encoder.RadarEncoder'\]"):
        BindLLM.from_pretrained("checkpoints/radar")


def test_the_encoder_with_tokens_keeps_the_contract():
    page = {"__name__": "page"}
    (block,) = (text for text in blocks("python") if "class QuarterTokens" in text)
    exec(compile(block, "new-encoder.md", "exec"), page)
    check_encoder(page["QuarterTokens"]())


def test_what_the_check_finds(project, capsys):
    line = ["check", "--encoder", "examples.radar_encoder.RadarEncoder"]
    assert main(line) == 1
    assert "radar: at least two different samples are needed" in capsys.readouterr().out
    media = ["--media", "radar:data/radar/sweeps/0.npy", "--media", "radar:data/radar/sweeps/1.npy"]
    assert main([*line, *media, "--encoder.weights", "nowhere.safetensors"]) == 1
    assert "nowhere.safetensors" in capsys.readouterr().out
    assert main([*line, *media, "--encoder.wieghts", "x"]) == 1
    assert "Did you mean 'weights'?" in capsys.readouterr().out
