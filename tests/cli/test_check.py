import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bindllm.cache.index import VectorIndex
from bindllm.cli import main
from bindllm.data.report import SourceReport
from bindllm.errors import BindLLMError, MediaError
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import name_cache
from bindllm.model.decoder import DecoderConfig
from bindllm.training.preflight import Problems, check_sources
from cache_parts import filled_store, save_tiny_model
from store_parts import write_images
from tiny import ColorEncoder, save_tiny_decoder
from tiny_run import run, tiny_recipe

pytestmark = pytest.mark.usefixtures("work")


def test_a_sound_recipe_has_no_problems_and_is_previewed(parts, capsys):
    assert run("check", tiny_recipe(parts)) == 0
    told = capsys.readouterr().out
    assert "no problems" in told
    assert "20 train, 4 validation, 4 test" in told
    assert "learned 'red square<|im_end|>'" in told
    assert not Path("data").exists()


def test_rows_that_the_objective_cannot_learn_from_are_a_problem(parts, capsys):
    options = ("--model.objective", "bindllm.objectives.DPO")
    assert run("check", tiny_recipe(parts), *options) == 1
    told = capsys.readouterr().out
    assert "1. DPO learns from pairs" in told
    assert f"24 of the 24 rows of {parts / 'pictures'} are not" in told
    assert run("check", tiny_recipe(parts), *options, "--model.objective.beta", "-1") == 1
    assert "beta must be finite and above 0" in capsys.readouterr().out


def test_all_problems_are_named_at_once(parts, capsys):
    recipe = tiny_recipe(parts, output=str(parts))
    recipe["outputt"] = 1
    recipe["model"] |= {"bind": {"depth": -1, "expansoin": 2}, "optim": {"lr": "fast", "warmup": -1}}
    recipe["model"]["decoder"]["name"] = "checkpoints/nope"
    recipe["data"]["sources"] += [{"path": "nowhere"}, {"path": str(parts / "pictures"), "weight": -1}]
    recipe["trainer"]["max_epoch"] = 3
    assert run("check", recipe, "--data.batchsize", "4") == 1
    told = capsys.readouterr().out
    for expected in (
        "'output'",
        "'expansion'",
        "model.optim.lr",
        "warmup is -1",
        "'max_epochs'",
        "'batch_size'",
        "depth -1",
        "not a bindllm checkpoint",
        "'checkpoints/nope'",
        "nowhere",
        "weight must be",
    ):
        assert expected in told, expected
    assert "11 problems" in told


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("xlm", {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "n_words": 259}, "no list of layers"),
        ("mamba2", {"num_heads": 8, "n_groups": 1}, "needs an attention with query"),
    ],
)
def test_a_decoder_that_cannot_be_injected_is_found_without_its_weights(
    parts, tmp_path, capsys, family, changes, words
):
    folder = save_tiny_decoder(tmp_path / family, family, **changes)
    recipe = tiny_recipe(parts)
    assert run("check", recipe, "--model.decoder.name", str(folder), "--model.inject.kind", "value") == 1
    told = capsys.readouterr().out
    assert words in told
    assert "1 problem\n" in told


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("bind", "depth", 10**9, "depth must be 0 to 1000"),
        ("bind", "depth", 1e9, "depth must be 0 to 1000"),
        ("bind", "depth", 20, "missing bind.blocks.1"),
        ("bind", "expansion", 1000, "expected [32000, 32]"),
        ("bind", "expansion", 10**9, "expansion 1 to 1000"),
        ("inject", "layers", 2, "injection.gates has shape [3, 4], expected [2, 4]"),
        ("inject", "layers", 1.5, "expected a whole number"),
    ],
)
def test_a_manifest_that_does_not_fit_its_tensors_is_a_problem(tmp_path, capsys, section, key, value, words):
    save_tiny_model(tmp_path / "model", save_tiny_decoder(tmp_path / "decoder"))
    file = tmp_path / "model" / "bindllm.json"
    manifest = json.loads(file.read_text())
    manifest[section][key] = value
    file.write_text(json.dumps(manifest))
    line = ["check", "--folder", "model", "--allow", "cache_parts.Multimodal"]
    assert main(line) == 1
    assert words in capsys.readouterr().out
    with pytest.raises(BindLLMError, match=re.escape(words)):
        BindLLM.from_pretrained("model", allow=["cache_parts.Multimodal"])


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"])
def test_a_decoder_without_all_its_weights_is_a_problem(parts, tmp_path, capsys, content):
    folder = save_tiny_decoder(tmp_path / "decoder")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    assert run("check", tiny_recipe(parts), "--model.decoder.name", str(folder)) == 1
    told = capsys.readouterr().out
    assert (
        "no weights for lm_head.weight" if content is None else "model.safetensors: not a readable"
    ) in told


def test_a_stage_before_that_was_made_for_another_base(parts, capsys):
    torch.manual_seed(0)
    decoder = DecoderConfig(str(parts / "decoder"), dtype="float32")
    first = BindLLM.build(decoder, device="cpu", encoders=[ColorEncoder()])
    first.save_pretrained("first")
    recipe = tiny_recipe(parts)
    recipe["model"] |= {"init_from": "first", "adapter": {"rank": 2}, "trainable": ["adapter"]}
    assert run("check", recipe) == 0
    assert run("check", recipe, "--model.decoder.quantize", "nf4") == 0
    assert "decoder.quantize null, this run has nf4" in " ".join(capsys.readouterr().out.split())
    assert run("check", recipe, "--model.inject.kind", "residual") == 1
    assert "inject.kind is value there and residual here" in " ".join(capsys.readouterr().out.split())
    assert run("check", recipe, "--output", "first") == 1
    assert "output first is model.init_from too" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model.trainable", "[]"], "model.trainable is empty"),
        (["--model.trainable", "[bnd]", "--data.store", "recipe.yaml"], "Did you mean 'bind'?"),
        (["--data.max_length", "2"], "none of 20 rows can be used: 20 x the prompt leaves no room"),
        (["--data.store", "recipe.yaml/store"], "recipe.yaml is a file"),
        (["--trainer.precision", "bf16-true"], "trainer.precision is bf16-true"),
        (
            ["--model.optim.optimizer", "torch.optim.NAdam", "--model.optim.options", "{speed_up: 1}"],
            "1. model.optim: torch.optim.NAdam refuses its arguments",
        ),
    ],
)
def test_a_recipe_that_cannot_train_has_problems(options, told, parts, capsys):
    assert run("check", tiny_recipe(parts), *options) == 1
    assert told in capsys.readouterr().out


def test_pictures_are_opened(tmp_path, parts, capsys):
    picture = parts / "pictures/images/red0.png"
    (tmp_path / "damaged.png").write_bytes(picture.read_bytes()[:40])
    damaged, sound = {"image": "damaged.png", "caption": "x"}, {"image": str(picture), "caption": "red"}
    recipe = tiny_recipe(parts, data={"sources": [{"path": "rows.jsonl", "split": "train"}]})
    for rows, code in (([damaged, sound], 0), ([damaged], 1)):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run("check", recipe) == code
        told = capsys.readouterr().out
        assert f"1 x image that cannot be opened (of {len(rows)} tried)" in told
        assert ("not one image can be opened" in told) == bool(code)


def test_sources_without_training_rows_are_a_problem(parts, capsys):
    source = {"path": str(parts / "pictures"), "split": "test"}
    assert run("check", tiny_recipe(parts, data={"sources": [source]})) == 1
    assert "no row to train on" in capsys.readouterr().out


def test_faults_of_rows_that_are_used_are_named_and_of_a_whole_source_are_problems():
    report = SourceReport("rows.jsonl", warning="33 of 40 rows share media; set split_by: row")
    report.remarks.add("a caption with control characters, removed", "line 1")
    problems, said = Problems(), []
    check_sources([({"train": []}, report)], None, None, 128, problems, said.append)
    assert "  note: 1 x a caption with control characters, removed (line 1)" in said
    assert problems == ["rows.jsonl: 33 of 40 rows share media; set split_by: row"]


def test_rows_that_are_left_out_are_counted_with_examples(tmp_path, parts, capsys):
    rows = [
        {"image": "a.png", "caption": "x"},
        {"image": str(parts / "pictures/images/red0.png"), "caption": "red"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(parts, data={"sources": [{"path": "rows.jsonl", "split": "train"}]})
    assert run("check", recipe) == 0
    assert "1 x no such image file" in capsys.readouterr().out


def test_a_checkpoint_folder(parts, capsys):
    assert run("fit", tiny_recipe(parts, trainer={"max_epochs": 1, "limit_train_batches": 1})) == 0
    allow = ["--allow", "tiny.ColorEncoder"]
    assert main(["check", "--folder", "checkpoints/tiny", *allow]) == 0
    manifest = Path("checkpoints/tiny/bindllm.json")
    content = json.loads(manifest.read_text())
    content["decoder"]["fingerprint"] = "0" * 64
    manifest.write_text(json.dumps(content))
    weights = Path("checkpoints/tiny/bind.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    assert main(["check", "--folder", "checkpoints/tiny", *allow]) == 1
    told = capsys.readouterr().out
    assert "2 problems" in told
    assert "decoder" in told
    assert "bind.safetensors" in told


def test_an_encoder(capsys):
    assert main(["check", "--encoder", "tiny.ColorEncoder"]) == 0
    assert main(["check", "--encoder", "collections.OrderedDict"]) == 1
    assert "it lacks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--config", "nope.yaml"], "nope.yaml"),
        (["--folder", "nope"], "'nope' does not exist"),
        (["--encoder", "tiny.ColourEncoder"], "Did you mean 'ColorEncoder'?"),
        (["--encoder", "Nope"], "'Nope' is not the import path of a class"),
    ],
)
def test_what_does_not_exist_is_a_problem_and_not_a_traceback(line, told, capsys):
    assert main(["check", *line]) == 1
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["--folder", "f", "--rows", "1"], "are about a recipe"),
        (["--encoder", "tiny.ColorEncoder", "--memory"], "are about a recipe"),
        (["--config", "a.yaml", "--media", "a.png"], "are about an encoder"),
        (["--folder", "f", "--encoder.grid", "2"], "are about an encoder"),
        (["--config", "a.yaml", "--allow", "tiny.ColorEncoder"], "the classes of a recipe are allowed"),
        ([], "nothing to check"),
    ],
)
def test_options_without_an_effect_are_refused(line, told, capsys):
    assert main(["check", *line]) == 2
    assert told in capsys.readouterr().err


def test_a_recipe_that_is_not_yaml(capsys):
    for content, told in (
        ("a: [1, 2\nb: {", "cannot be read: while parsing"),
        ("a: " + "[" * 1000, "cannot be read: maximum recursion depth"),
        ("- 1", "holds list, expected keys and values"),
    ):
        Path("broken.yaml").write_text(content)
        for line in (["check", "--config"], ["fetch"]):
            assert main([*line, "broken.yaml"]) == 1
            assert told in "".join(capsys.readouterr())


def test_every_item_of_a_list_and_every_field_is_checked(parts, capsys):
    recipe = tiny_recipe(parts)
    recipe["data"]["sources"] = [
        {"path": str(parts / "pictures"), "wieght": 1, "limit": "x"},
        {"path": "b", "weight": -1, "held_out": 3, "limit": 0},
        {"paht": "c"},
        {"path": "nowhere"},
    ]
    recipe["model"]["encoders"] = [
        {"class_path": "tiny.ColorEncoder", "init_args": {"gird": 1, "embedding_size": "z"}},
        {"class_path": "tiny.Nope"},
    ]
    recipe["model"]["bind"] = {"depth": -1, "expansion": -2}
    assert run("check", recipe) == 1
    told = capsys.readouterr().out
    source = "Problem with given class_path 'bindllm.data.source_config.SourceConfig': "
    for expected in (
        f"data.sources, item 1: {source}limit: Expected int",
        f"data.sources, item 1: {source}Option 'wieght' is not accepted\nDid you mean 'weight'?",
        "b: weight must be",
        "b: held_out must be",
        "b: limit must be",
        f"data.sources, item 3: {source}Option 'paht' is not accepted",
        f"data source nowhere does not exist in {Path.cwd()}",
        "model.encoders, item 1: Problem with given class_path 'tiny.ColorEncoder': Option 'gird' is not accepted",
        "model.encoders, item 1: Problem with given class_path 'tiny.ColorEncoder': embedding_size: Expected int",
        "model.encoders, item 2: Problem with given class_path 'tiny.Nope': module 'tiny' has no attribute 'Nope'",
        "depth -1",
        "expansion -2",
        f"relative paths start from {Path.cwd()}",
        "12 problems",
    ):
        assert expected in told, expected


class Two(ColorEncoder):
    def __init__(self, first: int, second: int, third: int = 1) -> None:
        super().__init__()


def test_one_mistake_next_to_several_required_arguments_is_one_problem(parts, capsys):
    recipe = tiny_recipe(parts)
    arguments = {"first": 1, "second": 2, "thirdd": 3}
    recipe["model"]["encoders"] = [{"class_path": "test_check.Two", "init_args": arguments}]
    assert run("check", recipe) == 1
    told = capsys.readouterr().out
    assert "Did you mean 'third'?" in told
    assert "are required" not in told
    assert "no encoder" not in told
    del arguments["thirdd"], arguments["second"]
    assert run("check", recipe) == 1
    assert "the following arguments are required: second" in capsys.readouterr().out


def test_a_mistake_in_a_required_key_does_not_hide_another(parts, capsys):
    recipe = tiny_recipe(parts)
    recipe["model"] |= {"encoders": [recipe["model"]["encoders"]], "objective": 5}
    assert run("check", recipe) == 1
    told = capsys.readouterr().out
    assert "model.encoders, item 1: Not a valid subclass" in told
    assert "model.objective: " in told


def test_a_list_on_the_command_line_is_checked_too(parts, capsys):
    assert run("check", tiny_recipe(parts), "--data.sources", '[{"paht": "c"}]') == 1
    told = capsys.readouterr().out
    assert "Did you mean 'path'?" in told
    assert "\n1 problem\n" in told


class Ears(ColorEncoder):
    modalities = ("audio",)

    def prepare(self, media):
        if not isinstance(media.source, np.ndarray):
            raise MediaError(f"{media.name}: expected an array")
        return torch.from_numpy(np.resize(media.source, 48))


def test_a_modality_without_readable_media_is_no_fault_of_its_encoder(parts, capsys):
    recipe = tiny_recipe(parts)
    recipe["model"]["encoders"] = [{"class_path": "test_check.Sonar"}]
    recipe["data"]["sources"][0]["modality"] = "sonr"
    assert run("check", recipe) == 1
    told = capsys.readouterr().out
    assert "test_check.Sonar is not tried on sonar: no source has two different media of it" in told
    assert "no column 'sonr'" in told
    assert "breaks the contract" not in told


class Sonar(ColorEncoder):
    modalities = ("sonar",)


def test_encoders_that_were_never_trained_together_are_warned_of(parts, capsys):
    recipe = tiny_recipe(parts)
    recipe["model"]["encoders"] += [{"class_path": "test_check.Ears"}]
    assert run("check", recipe) == 0
    assert "warning: Ears (audio; no space named) was never trained together" in capsys.readouterr().out


def test_an_encoder_with_arguments_and_media(capsys, parts):
    picture = str(parts / "pictures/images/red0.png")
    media = ["--media", picture, "--media", str(parts / "pictures/images/blue0.png")]
    line = ["check", "--encoder", "tiny.ColorEncoder"]
    assert main([*line, *media, "--encoder.grid", "2"]) == 0
    assert main([*line, "--media", picture]) == 1
    assert "at least two different samples" in capsys.readouterr().out
    assert main([*line, "--encoder.gird", "2"]) == 1
    assert "Did you mean 'grid'?" in capsys.readouterr().out


def test_the_cache_of_a_recipe(parts, capsys):
    pytest.importorskip("faiss")
    assert run("check", tiny_recipe(parts), "--model.cache.folder", "caches/a") == 0
    assert "bindllm index caches/a --checkpoint checkpoints/tiny" in capsys.readouterr().out
    assert (
        run("check", tiny_recipe(parts), "--model.cache.folder", "caches/a", "--model.cache.weight", "2") == 1
    )
    assert "weight is 2.0, expected a number from 0 to 1" in capsys.readouterr().out
    assert run("check", tiny_recipe(parts), "--model.cache", "caches/a") == 0
    assert "the visual cache caches/a does not exist" in capsys.readouterr().out
    assert run("check", tiny_recipe(parts), "--model.cache", "caches/a.db") == 0
    assert "bindllm index --milvus caches/a.db --checkpoint checkpoints/tiny" in capsys.readouterr().out
    assert run("check", tiny_recipe(parts), "--model.cache", "{fodler: caches/a}") == 1
    assert "expected the path of a folder, or a mapping with the keys folder" in capsys.readouterr().out
    recipe = tiny_recipe(parts)
    recipe["model"]["cache"] = {"folder": "caches/a", "topk": 3, "formula": "releasedd"}
    assert run("check", recipe) == 1
    told = capsys.readouterr().out
    assert "Did you mean 'top_k'?" in told
    assert "Did you mean 'released'?" in told
    Path("caches/a").mkdir(parents=True)
    assert run("check", tiny_recipe(parts), "--model.cache.folder", "caches/a") == 1
    assert "caches/a is not the folder of an index" in capsys.readouterr().out
    store = filled_store(Path("store"), write_images(Path("pictures"), 3), ColorEncoder(grid=3))
    VectorIndex.build("caches/other", store)
    assert run("check", tiny_recipe(parts), "--model.cache.folder", "caches/other") == 1
    assert f"built with the encoder {ColorEncoder(grid=3).fingerprint()[:16]}" in capsys.readouterr().out


def test_the_cache_of_a_checkpoint(parts, capsys):
    pytest.importorskip("faiss")
    save_tiny_model(Path("checkpoints/model"), parts / "decoder")
    line = ["check", "--folder", "checkpoints/model", "--allow", "cache_parts.Multimodal"]
    name_cache("checkpoints/model", {"folder": "caches/own"})
    assert main(line) == 1
    told = capsys.readouterr().out
    assert "1 problem\n" in told
    assert "bindllm index caches/own --checkpoint checkpoints/model" in told
    VectorIndex.build("caches/own", filled_store(Path("store"), write_images(Path("pictures"), 3)))
    assert main(line) == 0
    next(Path("caches/own").glob("vectors-*.faiss")).write_bytes(b"")
    # Told beside what else is wrong.
    (parts / "decoder").rename(parts / "moved")
    assert main(line) == 1
    (parts / "moved").rename(parts / "decoder")
    assert "2 problems" in capsys.readouterr().out


def test_the_folder_of_an_encoder_is_told_from_a_checkpoint(tmp_path, capsys):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model": "imagebind"}))
    assert main(["check", "--folder", "encoder"]) == 1
    assert "not a checkpoint: bindllm check --encoder encoder" in capsys.readouterr().out
    (tmp_path / "encoder" / "config.json").write_text("{}")
    assert main(["check", "--folder", "encoder"]) == 1
    assert "has no bindllm.json" in capsys.readouterr().out


def test_escape_sequences_in_names_of_untrusted_files_are_not_printed(parts, capfd):
    """A name in a table, of a source that cannot be read, and of a folder in an error."""
    evil = "a\x1b]0;owned\x07"
    folder = Path("set")
    folder.mkdir()
    rows = [{"image": f"{evil}.png", "caption": "red"}, {"image": "b.png", "caption": 7}]
    folder.joinpath("captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.joinpath(f"{evil}.png").write_text("no image")
    for source in ("set", evil):
        assert run("check", tiny_recipe(parts, data={"sources": [{"path": source}]})) == 1
        assert run("fit", tiny_recipe(parts, data={"sources": [{"path": source}]})) == 1
    assert main(["generate", evil, "Hello"]) == 1
    assert main(["report", evil]) == 1
    told = "".join(capfd.readouterr())
    assert "owned" in told
    assert not {"\x1b", "\x07"} & set(told)


def test_stored_embeddings_that_the_encoder_no_longer_makes_are_a_problem(parts, capsys, monkeypatch):
    images = [Media.image(str(file)) for file in sorted((parts / "pictures/images").glob("*.png"))]
    filled_store(Path("data/store"), images, ColorEncoder())
    files = {file: file.stat().st_mtime_ns for file in Path("data").rglob("*")}
    assert run("check", tiny_recipe(parts)) == 0
    assert files == {file: file.stat().st_mtime_ns for file in Path("data").rglob("*")}
    capsys.readouterr()
    # Another color order, as after an edit of `prepare`, and the same fingerprint.
    prepare = ColorEncoder.prepare
    monkeypatch.setattr(ColorEncoder, "prepare", lambda self, media: prepare(self, media).flip(0))
    assert run("check", tiny_recipe(parts)) == 1
    told = capsys.readouterr().out
    assert "is stored with another embedding than ColorEncoder makes now (cosine " in told
    assert "change the revision in its `fingerprint`, or delete that folder" in told
    assert "\n1 problem" in told
