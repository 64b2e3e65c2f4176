"""docs/encoders.md: its images are drawn by its command, its commands and Python blocks run, its tables are true."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

import encoder_families
from bindllm.cli import main
from bindllm.encoders import (
    EfficientNetLite,
    HuggingFace,
    ImageBind,
    Padded,
    PointBind,
    SentenceTransformers,
    Tuned,
)
from bindllm.encoders.imagebind.clips import video_input
from bindllm.encoders.imagebind.config import HUGE
from bindllm.encoders.imagebind.inputs import depth_input, image_input, imu_input, thermal_input
from bindllm.encoders.imagebind.text import Tokenizer, tokenizer_tree
from bindllm.media.maps import open_depth
from bindllm.model.checkpoint import build_own
from goldens import FOLDER
from imagebind_small import write_small_imagebind

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/encoders.md").read_text(encoding="utf-8")
IMAGES = sorted(Path(name).name for name in re.findall(r"!\[[^]]+\]\((encoders/\w+\.png)\)", PAGE))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    table = re.search(r"(?:^\|.*\n)+", PAGE.split(f"{heading}\n")[1], flags=re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()[2:]]


@pytest.fixture(scope="module")
def docs():
    """The modules of docs/, importable while this file runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        import draw_encoders
        import synthetic_media

        yield draw_encoders, synthetic_media
    for name in ("draw_encoders", "synthetic_media", "drawing"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def project(docs, tmp_path_factory):
    """A directory with a small ImageBind of made-up weights and the files that the page's commands name."""
    folder = tmp_path_factory.mktemp("project")
    write_small_imagebind(folder / "checkpoints/imagebind")
    made = docs[1]
    made.write_photograph(folder / "dog.jpg")
    made.write_melody(folder / "bark.wav")
    made.write_depth(folder / "room.png")
    made.write_heat(folder / "heat.png")
    made.write_walk(folder / "walk.csv")
    with pytest.MonkeyPatch.context() as patch:
        # Enough for the two frames of a clip; each is traced ray by ray.
        patch.setattr(made, "FRAME_RATE", 4)
        made.write_video(folder / "ball.mp4")
    Image.fromarray(made.look(64, 48).image).save(folder / "car.jpg")
    return folder


def test_the_page_shows_what_is_committed():
    committed = sorted((ROOT / "docs/encoders").iterdir())
    assert [file.name for file in committed] == IMAGES
    for file in committed:
        assert file.stat().st_size < 150_000, file
        with Image.open(file) as image:
            assert image.width >= 900, file


@pytest.mark.slow
def test_the_command_draws_exactly_the_pictures_of_the_page(docs, tmp_path):
    docs[0].main(["--output", str(tmp_path)])
    assert sorted(file.name for file in tmp_path.iterdir()) == IMAGES
    for name in IMAGES:
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "docs/encoders" / name) as old:
            shrunk = [
                np.asarray(image.convert("L").resize((90, 60)), dtype=np.float64) for image in (new, old)
            ]
        # Fonts and versions of matplotlib move single pixels; another content moves more.
        assert np.abs(shrunk[0] - shrunk[1]).mean() < 6, name


def test_the_fastest_picture_is_the_same_every_time(docs, tmp_path):
    for name in "ab":
        docs[0].main(["imu", "--output", str(tmp_path / name)])
    assert (tmp_path / "a/imu.png").read_bytes() == (tmp_path / "b/imu.png").read_bytes()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["imu.png"]


def test_the_media_are_what_the_pictures_say(project):
    upright = image_input(project / "dog.jpg").float()
    # The even wall is at the top, and nothing else, only when the EXIF orientation is applied.
    assert upright[:, :60].std(dim=(1, 2)).max() < 2
    meters = open_depth(project / "room.png")
    assert (meters == 0).mean() > 0.02
    assert meters.max() == 7
    assert thermal_input(project / "heat.png").unique().numel() > 100
    signal = imu_input(project / "walk.csv")
    assert signal.shape == (6, 2000)
    assert 9 < signal[2].mean() < 11
    views = video_input(project / "ball.mp4", coverage="published", max_clips=64)
    assert views.shape == (15, 3, 2, 224, 224)
    # The ball rolls: the first and the last frame of a clip differ.
    assert (views[6, :, 0] - views[6, :, 1]).abs().max() > 1


def test_near_is_large_and_unmeasured_is_least(project):
    seen = depth_input(project / "room.png", baseline=0.075, focal=518.86)[0]
    assert seen[-1].mean() > seen[0].mean() > seen.min()


def test_python_blocks_run(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    first, second = blocks("python")
    exec(compile(first, "encoders.md", "exec"), {"__name__": "page"})
    assert "Media.audio('bark.wav') [3, 1, 128, 204] torch.Size([1, 32])" in capsys.readouterr().out
    exec(compile(second, "encoders.md", "exec"), {"__name__": "page"})
    told = capsys.readouterr().out
    assert told.startswith("torch.Size([8192, 3]) tensor(1")


def test_commands_are_those_of_the_program(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    lines = commands()
    assert {line[1] for line in lines} == {"fetch", "convert", "encode"}
    for line in lines:
        if line[1] == "encode":
            assert main([*line[1:], "--device", "cpu"]) == 0, (line, capsys.readouterr())
        if line[1] == "convert":
            # The published file is not here; a mistake on the command line would give 2.
            assert main([*line[1:-1], str(project / "new")]) == 1
            assert line[2] in capsys.readouterr().err
    assert (ROOT / "docs/draw_encoders.py").is_file()
    assert "python docs/draw_encoders.py" in PAGE


def test_the_tables_of_encoders_trunks_and_options_are_true():
    # Modalities and widths of the first three are those of a model or of another encoder.
    of_models = (HuggingFace, SentenceTransformers, Padded, Tuned)
    classes = {kind.__name__: kind for kind in (ImageBind, PointBind, EfficientNetLite, *of_models)}
    for name, modalities, size, space, _ in rows("# Encoders"):
        kind = classes.pop(re.search(r"`(\w+)`", name)[1])
        if kind not in of_models:
            encoder = kind()
            assert set(encoder.modalities) == set(modalities.split(", "))
            assert (str(encoder.embedding_size), f"`{encoder.space}`") == (size, space)
    assert not classes
    trunks = {trunk: (str(size.width), str(size.num_blocks)) for trunk, size in HUGE.trunks.items()}
    assert {trunk: tuple(sizes) for trunk, _, *sizes, _ in rows("## ImageBind")} == trunks
    options = {}
    for names, values, _ in rows("### Options"):
        options |= zip(names.split(", "), values.split(", "), strict=True)
    told = {name.strip("`"): value.strip("`") for name, value in options.items()}
    config = {name: str(value) for name, value in ImageBind().config.items()} | {
        "modalities": "all of the folder"
    }
    assert told == config


def test_the_table_of_families_is_current():
    start, end = encoder_families.MARKS
    assert PAGE.split(start)[1].split(end)[0] == f"\n{encoder_families.table()}\n"


def test_the_ids_of_texts_are_true(tmp_path):
    lines = (FOLDER / "clip_merges.tsv").read_text(encoding="utf-8").splitlines()[1:]
    merges = {int(rank): (left, right) for rank, left, right in (line.split("\t") for line in lines)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_tree(merges)), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    for text, pieces, ids in rows("### Texts"):
        assert [str(number) for number in tokenizer.ids(text.strip("`"))] == ids.split()
        assert len(pieces.split(", ")) == len(ids.split()) - 2


def test_the_yaml_blocks_are_parts_of_a_recipe():
    parts = [yaml.safe_load(block) for block in blocks("yaml")]
    built = [build_own(encoder) for part in parts for encoder in part["model"]["encoders"]]
    assert [type(encoder) for encoder in built] == [HuggingFace, SentenceTransformers, Padded, Padded, Tuned]
    assert built[0].config["modalities"] == ["image"]
    # The parts of the two widths lie next to each other.
    assert [(one.config["start"], one.embedding_size) for one in built[2:4]] == [(0, 1664), (1280, 1664)]
    assert EfficientNetLite().embedding_size == built[3].config["start"]


def test_a_converted_folder_holds_what_the_page_lists(project):
    folder = project / "checkpoints/imagebind"
    files = {file.name for file in folder.iterdir()}
    told = {"config.json", "tokenizer.json", "README.md", "SOURCE.json", "conversion.tsv"}
    assert files == told | {f"{trunk}.safetensors" for trunk in HUGE.trunks}
    for name in told:
        assert f"`{name}`" in PAGE
    assert "log_scale" in load_file(folder / "text.safetensors")
