"""`bindllm encode`: the table of cosines, what files are taken for, and bad files among good ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm.cli import main
from bindllm.cli.encode import embed_files, softmax_tables
from bindllm.cli.options import build_encoder, read_media
from bindllm.errors import CheckpointError, UsageError
from bindllm.media import Media
from tiny import ColorEncoder

ENCODER = ["--encoder", "tiny.ColorEncoder", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in {"red": (200, 0, 0), "dark": (180, 10, 10), "blue": (0, 0, 200)}.items():
        Image.new("RGB", (20, 20), colour).save(f"{name}.png")


def numbers(text: str) -> list[list[float]]:
    """The rows of numbers in what was printed."""
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")[1:]] for line in text.splitlines()]
    return [
        [float(cell) for cell in row] for row in rows if row and all(c.lstrip("-")[:1].isdigit() for c in row)
    ]


def test_the_table_holds_the_cosines(capsys):
    assert main(["encode", "red.png", "dark.png", "blue.png", *ENCODER]) == 0
    found = np.array(numbers(capsys.readouterr().out))
    encoder = ColorEncoder()
    rows = encoder.embed("image", [encoder.prepare(Media.image(f"{n}.png")) for n in ("red", "dark", "blue")])
    np.testing.assert_allclose(found, (rows @ rows.T).numpy(), atol=6e-4)
    assert found[0, 1] > found[0, 2]


@pytest.mark.parametrize("name", ["pipe.png", "pipe.npy"])
def test_a_pipe_is_refused_and_does_not_block(name, capsys):
    os.mkfifo(name)
    assert main(["encode", name, "red.png", *ENCODER]) == 1
    assert name in capsys.readouterr().err


def test_bad_files_do_not_lose_the_others(capsys):
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Path("map.npy").write_bytes(b"")
    files = ["red.png", "broken.png", "nowhere.jpg", "map.npy", "bark.wav", "blue.png"]
    assert main(["encode", *files, *ENCODER]) == 1
    told = capsys.readouterr()
    assert np.array(numbers(told.out)).shape == (2, 2)
    for part in ("broken.png", "nowhere.jpg", "depth:map.npy", "no encoder serves the modality 'audio'"):
        assert part in told.err, part
    assert main(["encode", "nowhere.jpg", *ENCODER]) == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a/dog.JPG", Media.image("a/dog.JPG")),
        ("clip.webm", Media.video("clip.webm")),
        ("bark.flac", Media.audio("bark.flac")),
        ("chair.ply", Media.point("chair.ply")),
        ("depth:room.png", Media.depth("room.png")),
        ("imu:walk.csv", Media.imu("walk.csv")),
        ("text:a dog: sitting", Media.text("a dog: sitting")),
        ("radar:sweep.npy", Media("radar", "sweep.npy")),
        (r"C:\dog.png", Media.image(r"C:\dog.png")),
        ("file:a%20dog.png", Media.image("a dog.png")),
        ("file:///data/dog.png", Media.image("/data/dog.png")),
        ("depth:file:///data/room.png", Media.depth("/data/room.png")),
        ("text:file:a", Media.text("file:a")),
    ],
)
def test_what_a_file_is_taken_for(word, expected):
    assert read_media(word) == expected


def test_ambiguous_files_have_to_be_named():
    Image.fromarray(np.zeros((4, 4), np.uint16)).save("wide.png")
    Path("a:b.png").write_bytes(Path("red.png").read_bytes())
    for name in ("walk.csv", "cloud.npy", "noending"):
        Path(name).touch()
    for word in ("wide.png", "walk.csv", "cloud.npy", "noending"):
        with pytest.raises(UsageError, match=f"name its modality, as in depth:{word}"):
            read_media(word)
    assert read_media("a:b.png") == Media.image("a:b.png")


def test_folders_and_words_are_not_files():
    Path("pets.v2").mkdir()
    with pytest.raises(UsageError, match=r"pets\.v2: this is a folder; give its files, as in pets\.v2.\*"):
        read_media("pets.v2")
    with pytest.raises(UsageError, match="a dog: no such file; a text is given as text:a dog"):
        read_media("a dog")
    for word in ("https://example.org/dog.png", "depth:http://example.org/room.png"):
        with pytest.raises(UsageError, match="a web address; download it first and give its path"):
            read_media(word)


def test_softmax_is_along_each_row():
    media = [Media.image("a.png"), Media.text("x"), Media.text("y")]
    cosines = torch.tensor([[1.0, 0.3, 0.2], [0.3, 1.0, 0.0], [0.2, 0.0, 1.0]])
    (table,) = softmax_tables(media, cosines, scale=10.0)
    shown = [float(next(iter(column.cells))) for column in table.columns[1:]]
    np.testing.assert_allclose(shown, [0.731, 0.269], atol=1e-3)


def test_several_encoders_serve_their_own_modalities():
    class Letters(ColorEncoder):
        modalities = ("text",)

        def prepare(self, media):
            return torch.tensor([float(ord(c)) for c in media.source[:48].ljust(48)]) / 64 - 1

    failed = []
    media = [Media.text("a dog"), Media.image("red.png"), Media.image("nowhere.png")]
    kept, rows = embed_files(media, [ColorEncoder(), Letters()], device="cpu", failed=failed)
    assert (kept, rows.shape, len(failed)) == (media[:2], (2, 16), 1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_the_encoders_of_a_checkpoint(capsys):
    Path("folder").mkdir()
    entry = {"class_path": "tiny.ColorEncoder", "init_args": {"grid": 2}}
    entry["fingerprint"] = ColorEncoder(grid=2).fingerprint()
    Path("folder/bindllm.json").write_text(json.dumps({"format": 1, "encoders": [entry]}))
    line = ["encode", "red.png", "blue.png", "--checkpoint", "folder", "--device", "cpu"]
    assert main(line) == 1
    assert "--allow tiny.ColorEncoder" in capsys.readouterr().err
    assert main([*line, "--allow", "tiny.ColorEncoder"]) == 0


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["red.png"], 1, "no encoder to use: checkpoints/imagebind is not in "),
        ([*ENCODER], 2, "nothing to encode"),
        (["red.png", *ENCODER, "--encoder.gird", "3"], 2, "has no argument 'gird'. Did you mean 'grid'?"),
        (["red.png", *ENCODER, "--encoder.grid"], 2, "has no value"),
        (
            ["red.png", *ENCODER[:2], "--device", "gpu"],
            2,
            "--device gpu: torch cannot compute there (Expected one of cpu",
        ),
        (["red.png", *ENCODER, "--sofmax"], 2, "Did you mean '--softmax'?"),
        (["red.png", "--encoder", "tiny.Nope"], 1, "tiny has no 'Nope'"),
    ],
)
def test_mistakes_are_explained(line, code, told, capsys):
    assert main(["encode", *line]) == code
    assert told in capsys.readouterr().err


def test_arguments_of_an_encoder_are_read_as_its_types():
    encoder = build_encoder("tiny.ColorEncoder", ["--encoder.grid", "2", "--encoder.embedding_size=8"])
    assert encoder.config == {"embedding_size": 8, "grid": 2}
    # A text stays one, whatever it looks like.
    other = build_encoder(
        "bindllm.encoders.HuggingFace", ["--encoder.name", "7", "--encoder.revision", "0e1"]
    )
    assert (other.config["name"], other.config["revision"]) == ("7", "0e1")
    with pytest.raises(CheckpointError, match="not the import path"):
        build_encoder("Nope", ["--encoder.grid", "2"])
    with pytest.raises(UsageError, match="cannot be built without name: add --encoder.name VALUE"):
        build_encoder("bindllm.encoders.HuggingFace", ["--encoder.dtype", "float32"])
