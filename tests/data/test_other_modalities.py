"""Sources of other modalities than image: their tables and folders, and a tiny run on one that we do not ship."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bindllm import BindLLM
from bindllm.data.sources import SourceConfig, read_source
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import InputError, MediaError
from bindllm.media import Media
from tiny import ColorEncoder
from tiny_run import run, tiny_parts, tiny_recipe

PLACES = ("near", "far")


class SpectrumEncoder(ColorEncoder):
    """Magnitudes of the Fourier transform of a signal in an .npy file."""

    modalities = ("radar",)

    def prepare(self, media):
        try:
            signal = media.source if isinstance(media.source, np.ndarray) else np.load(media.source)
        except (OSError, ValueError) as error:
            raise MediaError(f"{media.name}: not a signal ({error})") from error
        return torch.from_numpy(np.abs(np.fft.rfft(signal, 94))[:48].astype(np.float32) / 47)


def write_sweeps(folder: Path, *, count: int = 12) -> Path:
    """Tones of two pitches, with `captions.jsonl` (radar, caption, split)."""
    folder.mkdir(parents=True)
    rows, random = [], np.random.default_rng(0)
    for number in range(count):
        place = PLACES[number % 2]
        tone = np.sin(2 * np.pi * {"near": 0.05, "far": 0.3}[place] * np.arange(94))
        np.save(folder / f"{number}.npy", tone + 0.1 * random.standard_normal(94))
        split = {0: "test", 1: "test", 2: "validation", 3: "validation"}.get(number, "train")
        rows.append({"radar": f"{number}.npy", "caption": f"something {place}", "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_column_is_called_like_the_modality(tmp_path):
    folder = write_sweeps(tmp_path / "radar")
    rows, report = read_source(SourceConfig(str(folder), modality="radar"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 8, "validation": 2, "test": 2}
    assert rows["train"][0].media == (Media("radar", str(folder / "4.npy")),)
    assert report.counted == "12 radar media, 12 captions"
    with pytest.raises(InputError, match=r"no column 'image'"):
        read_source(SourceConfig(str(folder)))
    (folder / "5.npy").unlink()
    _, report = read_source(SourceConfig(str(folder), modality="radar"))
    assert list(report.skipped.lines()) == ["1 x no such radar file (captions.jsonl line 6: 5.npy)"]


def test_a_folder_of_files_with_texts_next_to_them(tmp_path):
    for name, text in {"a.npy": "something near", "b.bin": "something far"}.items():
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text(text)
    (tmp_path / "unlabelled.npy").write_bytes(b"x")
    rows, _ = read_source(SourceConfig(str(tmp_path), modality="radar", split="train"))
    assert [Path(row.media[0].source).name for row in rows["train"]] == ["a.npy", "b.bin"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match="no radar files with a .txt file"):
        read_source(SourceConfig(str(tmp_path), modality="radar"))


def test_texts_are_their_own_content(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("text,caption\na dog/cat?,an animal\n,nothing\n")
    rows, report = read_source(SourceConfig(str(table), modality="text", split="train"))
    assert [row.media for row in rows["train"]] == [(Media.text("a dog/cat?"),)]
    assert list(report.skipped.lines()) == ["1 x no text (rows.csv line 3)"]


def test_a_modality_is_a_lower_case_word():
    with pytest.raises(
        InputError, match=r"x: a modality is a lower-case word, not 'Audio'. Did you mean 'audio'"
    ):
        SourceConfig("x", modality="Audio")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = tiny_parts(tmp_path / "parts")
    write_sweeps(tmp_path / "radar")
    recipe = tiny_recipe(parts, data={"sources": [{"path": "radar", "modality": "radar"}]})
    recipe["model"]["encoders"] = [{"class_path": "test_other_modalities.SpectrumEncoder"}]
    return recipe


def test_a_recipe_trains_on_radar_and_answers(recipe, capsys):
    assert run("check", recipe) == 0
    assert "radar: 12 radar media, 12 captions; 8 train, 2 validation, 2 test" in capsys.readouterr().out
    assert run("fit", recipe) == 0
    store = EmbeddingStore.for_encoder("data/store", SpectrumEncoder())
    assert len(store) == 12
    model = BindLLM.from_pretrained("checkpoints/tiny", allow=["test_other_modalities.SpectrumEncoder"])
    assert isinstance(
        model.generate("What is there?", [Media("radar", "radar/0.npy")], max_new_tokens=2), str
    )
    near, other, far = model.encode([Media("radar", f"radar/{n}.npy") for n in (0, 2, 1)])
    assert near @ other > near @ far + 0.1
    with pytest.raises(InputError, match=r"no encoder serves the modality 'rader'; .* Did you mean 'radar'"):
        model.generate("What is there?", [Media("rader", "radar/0.npy")])


def test_what_cannot_train_is_found_before(recipe, capsys):
    Path("radar/4.npy").write_bytes(b"nothing")
    recipe["data"]["sources"] = [
        {"path": "radar", "modality": "rader"},
        {"path": "gone", "modality": "radar"},
    ]
    assert run("check", recipe) == 1
    told = capsys.readouterr().out
    for part in ("no column 'rader'", f"data source gone does not exist in {Path.cwd()}"):
        assert part in told, part
