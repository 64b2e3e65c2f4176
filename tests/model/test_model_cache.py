"""The cache that a checkpoint names, and encoders beside its own: what is opened, used, refused and saved."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from bindllm import BindLLM, VisualCache
from bindllm.cache.blend import CacheConfig
from bindllm.cache.visual_cache import open_index
from bindllm.errors import CheckpointError, InputError, StoreError
from bindllm.model.checkpoint import name_cache, read_manifest
from cache_parts import (
    ALLOW,
    TEXT,
    Multimodal,
    Words,
    enter_copy,
    filled_store,
    make_project,
    save_tiny_model,
    write_images,
)
from tiny import ColorEncoder

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project folder: checkpoint, store, cache and pictures."""
    home = tmp_path_factory.mktemp("project")
    store = make_project(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        VisualCache.build("caches/own", store)
        other = filled_store(Path("data/store"), write_images(Path("pictures"), 3), ColorEncoder(grid=3))
        VisualCache.build("caches/other", other)
    return home


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current directory."""
    return enter_copy(made, tmp_path, monkeypatch)


def load(folder="checkpoints/model", **options) -> BindLLM:
    return BindLLM.from_pretrained(folder, device="cpu", allow=ALLOW, **options)


def test_a_cache_that_the_checkpoint_names_is_used_and_saved(project):
    name_cache("checkpoints/model", {"folder": "caches/own", "top_k": 3, "weight": 0.25})
    model, picture = load(), write_images(Path("pictures"), 1)[0]
    plain = model.encode([picture, TEXT], cache=False)
    expected = VisualCache.open("caches/own", top_k=3, weight=0.25).blend(plain[1:])
    assert torch.equal(model.encode([picture, TEXT]), torch.cat([plain[:1], expected]))
    asked = {"media": [TEXT], "max_new_tokens": 8}
    answer = model.generate("?", **asked)
    assert answer != model.generate("?", cache=False, **asked)
    assert "".join(model.stream("?", **asked)).strip() == answer
    asked["media"] = [picture]
    assert model.generate("?", **asked) == model.generate("?", cache=False, **asked)
    model.save_pretrained("checkpoints/again")
    again = load("checkpoints/again")
    assert again.cache_config == CacheConfig("caches/own", top_k=3, weight=0.25)
    assert torch.equal(again.encode([TEXT]), expected)


def test_what_the_caller_says_goes_before_what_the_checkpoint_names(project):
    name_cache("checkpoints/model", {"folder": "caches/nowhere", "weight": 0.25})
    model = load(cache=False)
    assert model.cache is None
    plain = model.encode([TEXT])
    whole = VisualCache.open("caches/own", weight=1.0)
    assert torch.equal(model.encode([TEXT], cache=whole), whole.blend(plain))
    # Settings are those of the checkpoint where only the place is given.
    model = load(cache="caches/own")
    assert torch.equal(model.encode([TEXT]), VisualCache.open("caches/own", weight=0.25).blend(plain))
    assert load(cache=whole).cache is whole
    model.save_pretrained("checkpoints/again")
    assert read_manifest("checkpoints/again")["cache"]["folder"] == "caches/nowhere"


def test_without_a_cache_nothing_is_blended(project):
    model = load()
    assert model.cache is None
    assert read_manifest("checkpoints/model")["cache"] is None
    assert torch.equal(model.encode([TEXT]), model.encode([TEXT], cache=False))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_cache_that_is_missing_or_damaged_tells_both_ways_out(project, damage):
    name_cache("checkpoints/model", {"folder": "caches/own"})
    if damage == "missing":
        shutil.rmtree("caches/own")
    else:
        Path("caches/own/index.json").write_text("{")
    with pytest.raises(StoreError) as raised:
        load()
    assert "bindllm index caches/own --checkpoint checkpoints/model" in str(raised.value)
    assert "cache=False, on the command line --no_cache" in str(raised.value)
    assert load(cache=False).generate("?", media=[TEXT], max_new_tokens=2) is not None


@pytest.mark.parametrize("how", ["named", "path", "object"])
def test_a_cache_of_another_encoder_is_refused_ahead_of_the_decoder(project, how, monkeypatch):
    monkeypatch.setattr("bindllm.model.bindllm.load_decoder", lambda *_, **__: pytest.fail("loaded"))
    asked = {"path": "caches/other", "object": VisualCache.open("caches/other")}.get(how)
    if how == "named":
        name_cache("checkpoints/model", {"folder": "caches/other"})
    with pytest.raises(StoreError, match=f"{ColorEncoder(grid=3).fingerprint()[:16]}, the model has"):
        load(cache=asked)


def test_a_checkpoint_travels_with_the_cache_inside_it(project, tmp_path, monkeypatch):
    shutil.move("caches/own", "checkpoints/model/cache")
    name_cache("checkpoints/model", {"folder": "checkpoints/model/cache"})
    assert read_manifest("checkpoints/model")["cache"]["folder"] == "cache"
    expected = load().encode([TEXT])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(project / "checkpoints/model", "moved")
    model = load("moved", decoder=str(project / "decoder"))
    assert torch.equal(model.encode([TEXT]), expected)


def test_saving_again_keeps_the_cache_inside_the_checkpoint(project):
    shutil.move("caches/own", "checkpoints/model/cache")
    name_cache("checkpoints/model", {"folder": "checkpoints/model/cache"})
    model = load()
    expected = model.encode([TEXT])
    model.save_pretrained("checkpoints/model")
    assert read_manifest("checkpoints/model")["cache"]["folder"] == "cache"
    # The files that were mapped before are still there for it, and those of the new folder for another.
    assert torch.equal(model.encode([TEXT]), expected)
    assert torch.equal(load().encode([TEXT]), expected)
    assert [path.name for path in Path("checkpoints").iterdir()] == ["model"]


def test_the_path_is_found_from_another_directory(project, monkeypatch):
    monkeypatch.chdir(project / "pictures")
    name_cache("../checkpoints/model", {"folder": "../caches/own"})
    assert read_manifest("../checkpoints/model")["cache"]["folder"] == "caches/own"
    assert len(load("../checkpoints/model", decoder="../decoder").cache) == 12
    monkeypatch.chdir(project)
    assert len(load().cache) == 12
    name_cache("checkpoints/model", {"folder": str(project / "caches/own")})
    assert read_manifest("checkpoints/model")["cache"]["folder"] == str(project / "caches/own")
    name_cache("checkpoints/model", None)
    assert load().cache is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "folder"),
        ({"folder": 3}, "argument"),
        ({"folder": "caches/own", "topk": 3}, "topk"),
        ({"folder": "http://there:19530"}, "address of a server"),
        ({"folder": "caches/own", "weight": 2}, "from 0 to 1"),
        ("caches/own", "not a mapping"),
    ],
)
def test_a_damaged_entry_of_a_checkpoint(project, entry, words):
    file = Path("checkpoints/model/bindllm.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "cache": entry}))
    with pytest.raises(CheckpointError, match=f"(?s)cache is damaged.*{words}.*--name_in checkpoints/model"):
        load()


def test_what_is_no_cache(project):
    with pytest.raises(InputError, match="cache is 3, expected"):
        load(cache=3)


def test_places_of_milvus_are_told_from_folders(monkeypatch):
    milvus = pytest.importorskip("bindllm.cache.milvus")
    monkeypatch.setattr(milvus.MilvusIndex, "open", lambda place, token: f"{place} {token}")
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    assert open_index("caches/a.db") == "caches/a.db secret"
    monkeypatch.delenv("MILVUS_TOKEN")
    assert open_index("http://there:19530") == "http://there:19530 None"


def test_the_defaults_are_those_of_the_cache(project):
    cache, config = VisualCache.open("caches/own"), CacheConfig("caches/own")
    assert {"folder": "caches/own", **asdict(cache.settings)} == asdict(config)
    with pytest.raises(StoreError, match="was built with the encoder"):
        cache.check_encoders(["ab" * 32])


def test_a_further_encoder_serves_what_the_checkpoint_does_not(project, caplog):
    save_tiny_model(Path("checkpoints/eyes"), Path("decoder"), encoder=ColorEncoder())
    with pytest.raises(InputError, match="no encoder serves the modality 'text'"):
        load("checkpoints/eyes").encode([TEXT])
    with caplog.at_level(logging.WARNING, "bindllm"):
        model = load("checkpoints/eyes", encoders=[Words()])
    assert "Words (text; space 'colours') was never trained together" in caplog.text
    expected = nn.functional.normalize(model.encode([TEXT]), dim=1)
    assert torch.equal(model.encode([TEXT]), Words().embed("text", [Words().prepare(TEXT)]))
    assert model.generate("?", media=[TEXT], max_new_tokens=4) is not None
    # A saved model names all of its encoders.
    model.save_pretrained("checkpoints/both")
    torch.testing.assert_close(load("checkpoints/both").encode([TEXT]), expected)


def test_further_encoders_of_one_space_are_not_warned_of(project, caplog):
    class Radar(Words):
        modalities = ("radar",)

    with caplog.at_level(logging.WARNING, "bindllm"):
        assert [type(encoder).__name__ for encoder in load(encoders=[Radar()]).encoders] == [
            "Multimodal",
            "Radar",
        ]
    assert not caplog.text


def test_a_further_encoder_that_would_never_be_asked_or_does_not_fit_is_refused(project, monkeypatch, caplog):
    monkeypatch.setattr("bindllm.model.bindllm.load_decoder", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match="Words would never be asked: text is served already"):
        load(encoders=[Words()])

    class Radar(Words):
        modalities = ("radar", "text")

    with pytest.raises(InputError, match="Multimodal 16, Radar 8"):
        load(encoders=[Radar(embedding_size=8)])
    monkeypatch.undo()
    monkeypatch.chdir(project)
    with caplog.at_level(logging.WARNING, "bindllm"):
        model = load(encoders=[Radar()])
    assert "Radar is not asked for text: Multimodal comes before it" in caplog.text
    assert torch.equal(model.encode([TEXT]), Multimodal().embed("text", [Multimodal().prepare(TEXT)]))
