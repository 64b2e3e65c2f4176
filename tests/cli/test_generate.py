"""`bindllm generate`: the media of a command line reach the model, each as what it was said to be."""

import json
import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bindllm import VisualCache
from bindllm.cache.blend import CacheSettings
from bindllm.cache.folder import IndexInfo, StoreState
from bindllm.cache.visual_cache import image_names
from bindllm.cli import main
from bindllm.cli.generate import MediaOptions
from bindllm.cli.options import encoder_folder
from bindllm.media import MODALITIES, Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import name_cache
from cache_parts import ALLOW, TEXT, Multimodal, filled_store, save_tiny_model
from store_parts import write_images


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked, instead of an answer."""
    calls = []

    class Listener:
        cache = None

        def generate(self, prompt, media, **options):
            calls.append((prompt, media))
            return "heard"

    monkeypatch.setattr(BindLLM, "from_pretrained", lambda *args, **options: Listener())
    return calls


def test_there_is_an_option_for_each_modality():
    assert {field.name for field in fields(MediaOptions)} == {*MODALITIES, "media"}


def test_media_of_all_kinds(asked, capsys):
    line = ["generate", "folder", "What?", "--audio", "bark.wav", "--image", "file:a.png", "--image", "b.png"]
    assert main([*line, "--text", "a dog", "--imu", "walk.csv", "--media", "radar:sweep.npy"]) == 0
    expected = [Media.image("a.png"), Media.image("b.png"), Media.audio("bark.wav"), Media.text("a dog")]
    assert asked == [("What?", [*expected, Media.imu("walk.csv"), Media("radar", "sweep.npy")])]
    assert capsys.readouterr().out == "heard\n"


def test_media_that_do_not_say_what_they_are(asked, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("walk.csv").touch()
    assert main(["generate", "folder", "What?", "--media", "walk.csv"]) == 2
    assert "name its modality, as in depth:walk.csv" in capsys.readouterr().err
    assert not asked


@pytest.fixture
def loaded(monkeypatch):
    """What the model is loaded with; it has a cache, unless it is told that there is none."""
    calls = []

    def load(folder, **options):
        calls.append(options)
        cache = None if options["cache"] is False else SimpleNamespace(settings=CacheSettings())
        return SimpleNamespace(cache=cache, generate=lambda *_, **__: str(cache and cache.settings))

    monkeypatch.setattr(BindLLM, "from_pretrained", load)
    return calls


def test_the_cache_that_is_asked_for(loaded, capsys):
    assert main(["generate", "folder"]) == 0
    assert main(["generate", "folder", "--cache", "caches/a", "--cache_weight", "0.3"]) == 0
    assert main(["generate", "folder", "--no_cache"]) == 0
    assert [options["cache"] for options in loaded] == [None, "caches/a", False]
    told = capsys.readouterr().out.splitlines()
    assert told == [str(CacheSettings()), str(CacheSettings(weight=0.3)), "None"]


def test_the_decoder_in_fewer_bits(loaded):
    for options in ([], ["--quantize", "none"], ["--quantize", "nf4"]):
        assert main(["generate", "folder", *options]) == 0
    assert [options["quantize"] for options in loaded] == [None, False, "nf4"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no_cache", "--cache", "a"], "cannot be given together"),
        (["--no_cache", "--cache_top_k", "3"], "--cache_top_k needs a visual cache"),
        (["--no_cache", "--show_neighbors"], "--show_neighbors needs a visual cache"),
        (["--cache_weight", "1.5"], "does not conform to restriction v>=0 and v<=1; Given value: 1.5"),
        (["--cache_wieght", "1"], "Did you mean '--cache_weight'?"),
        (["--encoder.grid", "3"], "--encoder.grid needs exactly one --encoder"),
        (["--encoder", "tiny.ColorEncoder", "--encoder.gird", "3"], "Did you mean 'grid'?"),
        (["--encoder", "no/where"], "the folder does not exist"),
    ],
)
def test_mistakes_about_caches_and_encoders(loaded, capsys, options, words):
    assert main(["generate", "folder", *options]) == 2
    assert words in capsys.readouterr().err


def test_further_encoders_by_class_and_by_folder(loaded, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert main(["generate", "folder", "--encoder", "tiny.ColorEncoder", "--encoder", str(tmp_path)]) == 0
    assert main(["generate", "folder", "--encoder", "tiny.ColorEncoder", "--encoder.grid", "3"]) == 0
    (first, second), (third,) = (options["encoders"] for options in loaded)
    assert (first.config["grid"], third.config["grid"]) == (4, 3)
    assert second.config["name"] == str(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", {"model_type": "bert"}, ("bindllm.encoders.HuggingFace", "name")),
        ("config.json", {"model": "imagebind"}, ("bindllm.encoders.ImageBind", "weights")),
        ("config.json", {"model": "pointbind"}, ("bindllm.encoders.PointBind", "weights")),
        ("SOURCE.json", {"asset": "efficientnet-lite0"}, ("bindllm.encoders.EfficientNetLite", "weights")),
        ("align.json", {}, ("bindllm.encoders.Aligned", "weights")),
        ("config.json", ["imagebind"], None),
        ("config.json", {"model": ["imagebind"]}, None),
    ],
)
def test_a_folder_tells_its_encoder(tmp_path, file, content, expected):
    (tmp_path / file).write_text(json.dumps(content))
    assert encoder_folder(tmp_path) == expected


def test_a_pipe_that_is_called_as_a_description_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert encoder_folder(tmp_path) is None


def test_the_pictures_that_are_mixed_in_are_named(tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_model(Path("checkpoints/model"), Path("decoder"))
    store = filled_store(Path("store"), pictures := write_images(Path("pictures"), 6))
    cache = VisualCache.build("caches/a", store, top_k=2)
    name_cache(folder, {"folder": "caches/a", "top_k": 2})
    line = ["generate", str(folder), "?", "--allow", ALLOW[0], "--max_new_tokens", "2", "--show_neighbors"]
    assert main([*line, "--text", "a dog"]) == 0
    told = capsys.readouterr().out
    query = Multimodal().embed("text", [Multimodal().prepare(TEXT)])
    similarities = [
        (float(query @ Multimodal().embed("image", [Multimodal().prepare(item)]).T), item.name)
        for item in pictures
    ]
    for similarity, name in sorted(similarities, reverse=True)[:2]:
        assert re.search(rf"{similarity:.3f} +. {name}", told), told
    assert told.count(".png") == 2
    assert main([*line, "--text", "a dog", "--image", pictures[0].name]) == 0
    assert "no images were retrieved: media with image" in capsys.readouterr().out
    assert main(line) == 0
    assert "the prompt has no media" in capsys.readouterr().out
    # Without its store only content hashes are known.
    keys = cache.index.keys(cache.neighbors(query)[0].numpy())
    shutil.rmtree("store")
    assert main([*line, "--text", "a dog"]) == 0
    told = capsys.readouterr().out
    assert ".png" not in told
    assert all(key in told for key in keys)


def test_names_are_looked_up_without_writing_where_an_index_of_a_stranger_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    state = StoreState("../home", "0" * 64, chosen=False)
    index = SimpleNamespace(info=IndexInfo("a1" * 32, 1, 16, store=state), source="index")
    (tmp_path / "index").mkdir()
    assert image_names(index, ["0" * 64, None])[0] == f"content hash {'0' * 64}"
    # Nor where the folder has the right name: what is no store is not made one.
    (tmp_path / ("a1" * 8)).mkdir()
    index.info = replace(index.info, store=replace(state, path=f"../{'a1' * 8}"))
    image_names(index, ["0" * 64])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a1" * 8, "home", "index"]
