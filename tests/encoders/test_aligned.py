"""An aligned encoder's folder: written and read back to the same bits, and nothing else let in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align_parts import BeatTower, LetterEncoder
from bindllm.encoders import Aligned, HasSpace
from bindllm.encoders.aligned import HEAD, TOWER, AlignedManifest, Head, HeadConfig, write_aligned
from bindllm.encoders.trainable import build_tower
from bindllm.errors import CheckpointError, EncoderError, InputError, MediaError
from bindllm.media import Media
from bindllm.model.pretrained import read_encoders
from bindllm.testing import check_encoder

LETTERS, BEATS = "align_parts.LetterEncoder", "align_parts.BeatTower"


def save(folder: Path, tower, class_path: str, *, head: HeadConfig | None = None, **changes) -> Path:
    """Write a folder with fixed weights."""
    head = head or HeadConfig(depth=2, width=10)
    torch.manual_seed(0)
    weights = {HEAD: Head(tower.embedding_size, 16, head).state_dict()}
    entry = {"class_path": class_path, "init_args": dict(tower.config)}
    if isinstance(tower, BeatTower):
        weights[TOWER] = tower.state_dict()
        entry["revision"] = tower.revision
    else:
        entry["fingerprint"] = tower.fingerprint()
    manifest = AlignedManifest(
        modality=tower.modality if isinstance(tower, BeatTower) else "text",
        embedding_size=16,
        space="colors",
        tower=entry,
        tower_size=tower.embedding_size,
        head=head,
        target={"class_path": "tiny.ColorEncoder", "init_args": {}, "fingerprint": "0" * 64},
        sha256={},
        **changes,
    )
    write_aligned(folder, manifest, weights, metrics={}, texts={"README.md": "a card\n"})
    return folder


@pytest.fixture
def letters(tmp_path) -> Path:
    return save(tmp_path / "letters", LetterEncoder(), LETTERS)


@pytest.fixture
def beats(tmp_path) -> Path:
    torch.manual_seed(1)
    return save(tmp_path / "beats", BeatTower(), BEATS)


def change_manifest(folder: Path, **changes) -> None:
    file = folder / "align.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_it_keeps_the_contract_of_an_encoder_with_a_frozen_tower(letters):
    encoder = Aligned(str(letters), allow=[LETTERS])
    check_encoder(encoder)
    assert (encoder.modalities, encoder.embedding_size, encoder.space) == (("text",), 16, "colors")
    assert isinstance(encoder, HasSpace)


def test_it_keeps_the_contract_of_an_encoder_with_a_trained_tower(beats):
    rng = np.random.default_rng(0)
    samples = [Media("radar", rng.normal(n, 1, 30 + n)) for n in range(20)]
    check_encoder(Aligned(str(beats), allow=[BEATS]), samples)


def test_the_head_is_on_top_of_the_tower_with_the_weights_of_the_folder(letters):
    encoder, tower = Aligned(str(letters), allow=[LETTERS]), LetterEncoder()
    inputs = [encoder.prepare(Media.text(words)) for words in ("a dog", "two cats")]
    head = Head(12, 16, HeadConfig(depth=2, width=10)).eval()
    head.load_state_dict(load_file(letters / HEAD))
    assert torch.equal(encoder.embed("text", inputs), head(tower.embed("text", inputs)))


def test_the_fingerprint_tells_every_part(letters, beats, tmp_path):
    seen = {
        Aligned(str(letters), allow=[LETTERS]).fingerprint(),
        Aligned(str(beats), allow=[BEATS]).fingerprint(),
    }
    torch.manual_seed(9)
    seen.add(Aligned(str(save(tmp_path / "a", BeatTower(), BEATS)), allow=[BEATS]).fingerprint())
    seen.add(Aligned(str(save(tmp_path / "b", LetterEncoder(4), LETTERS)), allow=[LETTERS]).fingerprint())
    other = save(tmp_path / "c", LetterEncoder(), LETTERS, head=HeadConfig(depth=1))
    seen.add(Aligned(str(other), allow=[LETTERS]).fingerprint())
    assert len(seen) == 5
    moved = shutil.copytree(letters, tmp_path / "moved")
    assert Aligned(str(moved), allow=[LETTERS]).fingerprint() in seen


def test_another_tower_than_that_of_the_training_is_refused(letters):
    content = json.loads((letters / "align.json").read_text())
    change_manifest(letters, tower={**content["tower"], "init_args": {"seed": 4}})
    encoder = Aligned(str(letters), allow=[LETTERS])
    message = r"was aligned with the tower align_parts\.LetterEncoder of fingerprint .{16}; the one here"
    with pytest.raises(EncoderError, match=message):
        encoder.fingerprint()
    with pytest.raises(EncoderError, match=message):
        encoder.embed("text", [encoder.prepare(Media.text("a"))])


def test_a_class_of_somebody_else_is_imported_only_when_allowed(letters):
    encoder = Aligned(str(letters))
    with pytest.raises(EncoderError, match=r"not part of bindllm .* allow=\['align_parts\.LetterEncoder'\]"):
        encoder.prepare(Media.text("a dog"))
    with pytest.raises(EncoderError, match="not part of bindllm"):
        Aligned(str(letters), allow=[BEATS]).fingerprint()


def test_a_checkpoint_cannot_allow_classes_by_itself(letters, tmp_path):
    fingerprint = Aligned(str(letters), allow=[LETTERS]).fingerprint()
    entry = {
        "class_path": "bindllm.encoders.Aligned",
        "init_args": {"weights": str(letters), "allow": [LETTERS]},
        "fingerprint": fingerprint,
    }
    with pytest.raises(CheckpointError, match=r"not part of bindllm .* --allow align_parts\.LetterEncoder"):
        read_encoders(tmp_path, {"encoders": [entry]}, allow=[])
    (encoder,) = read_encoders(tmp_path, {"encoders": [entry]}, allow=[LETTERS])
    assert encoder.fingerprint() == fingerprint


@pytest.mark.parametrize(
    "path", ["subprocess.Popen", "os.system", "pathlib.Path", "bindllm.atomic.write_json"]
)
def test_only_towers_are_called_even_where_their_name_is_allowed(path):
    with pytest.raises(EncoderError, match="is not the class of a tower"):
        build_tower(path, {}, allow=[path])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bindllm.nothing.Tower", r"the module 'bindllm\.nothing' was not found"),
        ("bindllm.encoders.Nothing", "bindllm.encoders has no 'Nothing'"),
    ],
)
def test_a_class_that_is_not_there_is_named(path, message):
    with pytest.raises(EncoderError, match=message):
        build_tower(path, {}, allow=[])


def test_a_tower_that_cannot_be_built_is_named():
    with pytest.raises(
        EncoderError, match=r"align_parts\.BeatTower cannot be built with \{'depth': 3\}: TypeError"
    ):
        build_tower(BEATS, {"depth": 3}, allow=[BEATS])


def test_a_modality_that_was_not_taught_is_refused(letters):
    encoder = Aligned(str(letters), allow=[LETTERS])
    with pytest.raises(InputError, match="embeds text media, not 'image'"):
        encoder.prepare(Media.image("a.png"))
    with pytest.raises(InputError, match="embeds text media, not 'audio'"):
        encoder.embed("audio", [torch.ones(3)])


def test_damaged_weights_are_refused(beats):
    for name in (HEAD, TOWER):
        whole = (beats / name).read_bytes()
        save_file({key: value + 1 for key, value in load_file(beats / name).items()}, beats / name)
        encoder = Aligned(str(beats), allow=[BEATS])
        with pytest.raises(EncoderError, match=rf"{name} is not the file that its folder was written with"):
            encoder.fingerprint()
        with pytest.raises(EncoderError, match="damaged or exchanged"):
            encoder.embed("radar", [encoder.prepare(Media("radar", np.arange(9.0)))])
        (beats / name).write_bytes(whole)
    (beats / TOWER).unlink()
    with pytest.raises(EncoderError, match=r"has no tower\.safetensors; copy the whole folder"):
        Aligned(str(beats), allow=[BEATS]).fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe{", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "is not the description of an aligned encoder"),
        (b'{"format": 99}', "has format 99, this bindllm reads up to 1: upgrade"),
        (b'{"format": 1, "head": {"depth": 0}}', "is not the description"),
        (b'{"format": 1, "head": 5}', "is not the description"),
    ],
)
def test_a_damaged_description_is_refused(letters, text, message):
    (letters / "align.json").write_bytes(text)
    with pytest.raises(EncoderError, match=message):
        Aligned(str(letters)).fingerprint()


@pytest.mark.parametrize("changes", [{"space": 3}, {"tower": {}}, {"sha256": {}}, {"embedding_size": -1}])
def test_a_description_with_wrong_parts_is_refused(letters, changes):
    change_manifest(letters, **changes)
    with pytest.raises(EncoderError, match="is not the description of an aligned encoder"):
        Aligned(str(letters)).modalities  # noqa: B018


def test_a_folder_that_is_none_says_what_to_run(tmp_path):
    with pytest.raises(EncoderError, match=r"does not exist\. Make one with: bindllm align"):
        Aligned(str(tmp_path / "none")).fingerprint()
    with pytest.raises(EncoderError, match=r"has no align\.json, so it holds no aligned encoder"):
        Aligned(str(tmp_path)).fingerprint()


def test_the_constructor_reads_nothing():
    assert Aligned("nowhere").config == {"weights": "nowhere"}
    assert Aligned("nowhere", allow=[BEATS]).config == {"weights": "nowhere", "allow": [BEATS]}


def test_other_content_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not an aligned encoder \(no align\.json\)"):
        save(tmp_path / "mine", LetterEncoder(), LETTERS)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_paths_are_found_from_where_the_run_was(tmp_path, monkeypatch):
    """A tower's relative path is looked up from the run's directory when it is not below this one."""
    monkeypatch.chdir(tmp_path)
    folder = save(Path("checkpoints/letters"), LetterEncoder(), LETTERS)
    Path("weights").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tower = {"class_path": LETTERS, "init_args": {"path": "./weights", "word": "weights"}, "fingerprint": "0"}
    change_manifest(tmp_path / folder, tower=tower)
    with pytest.raises(EncoderError, match=r"with \{'path': '\.\./weights', 'word': 'weights'\}"):
        Aligned(str(tmp_path / folder), allow=[LETTERS]).fingerprint()


def test_an_unreadable_media_is_a_media_error(beats, tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"bad")
    with pytest.raises(MediaError, match=r"bad\.npy"):
        Aligned(str(beats), allow=[BEATS]).prepare(Media("radar", str(tmp_path / "bad.npy")))


def test_a_folder_cannot_allow_a_class_to_itself(letters):
    path, arguments = "bindllm.encoders.Aligned", {"weights": str(letters), "allow": [LETTERS]}
    with pytest.raises(EncoderError, match="would run code"):
        build_tower(path, arguments, allow=[]).fingerprint()
    assert build_tower(path, arguments, allow=[LETTERS]).modalities == ("text",)
