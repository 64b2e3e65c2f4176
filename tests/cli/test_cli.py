"""The command line: output, exit codes, and the closest known name for mistakes."""

import json
import math
import signal
from pathlib import Path

import pytest

from bindllm.cli import COMMANDS, RECIPES, main
from bindllm.cli.arguments import read_command
from bindllm.cli.encode import encode
from bindllm.errors import InputError
from tiny_run import run, tiny_recipe, write_recipe

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """A folder with a finished run in it; the tests go there."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("fit", tiny_recipe(parts, trainer={"max_epochs": 1})) == 0
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"usage: bindllm {name}" in told
    # The keys of a recipe are explained too.
    assert ("Highest learning rate" in told) == (name in RECIPES)


def test_an_unknown_command_gets_the_closest_one(capsys):
    assert main(["trainn"]) == 2
    assert main(["fti"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "Did you mean 'fit'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["fit", "recipes/x.yaml"], "bindllm fit --config recipes/x.yaml"),
        (["fit"], "bindllm fit --config FILE"),
        (["embed", "--data.batch_size", "4"], "bindllm embed --config FILE"),
        (["check", "recipes/x.yaml"], "bindllm check --config recipes/x.yaml"),
        (["check", "."], "bindllm check --folder ."),
        (["check", "--config", "x.yaml", "--rows", "-1"], "--rows: -1 does not conform to restriction v>=0"),
    ],
)
def test_a_command_line_without_its_recipe_says_how_to_give_it(line, told, capsys):
    assert main(line) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--temperature", "0"], "--temperature: does not conform to restriction v>0 and v<inf"),
        (["--temperature", "nan"], "v>0 and v<inf; Given value: nan"),
        (["--temperature", "inf"], "v>0 and v<inf; Given value: inf"),
        (["--temperature", "warm"], "Given value: warm"),
        (["--top_p", "1.5"], "v>0 and v<=1; Given value: 1.5"),
        (["--max_new_tokens", "0"], "--max_new_tokens: 0 does not conform to restriction v>0"),
        (["--num_beams", "0"], "--num_beams: does not conform to restriction v>0; Given value: 0"),
        (["--stream", "--num_beams", "2"], "--stream cannot show"),
    ],
)
def test_generate_refuses_numbers_that_cannot_be(options, told, capsys):
    assert main(["generate", "nowhere", "What?", *options]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "files", "others"),
    [
        ("a.png --text dog b.png", ("a.png", "b.png"), []),
        ("--text dog a.png b.png", ("a.png", "b.png"), []),
        (
            "a.png --encoder.size 3 b.png --text dog --encoder.name=x",
            ("a.png", "b.png"),
            ["size=3", "name=x"],
        ),
        ("--text dog -- --a.png", ("--a.png",), []),
    ],
)
def test_positional_arguments_may_be_between_and_after_options(line, files, others):
    found = read_command("encode", encode, line.split())
    assert (found["files"], found["text"]) == (files, ("dog",))
    assert found["overrides"] == [f"--encoder.{other}" for other in others]


MISTAKES = {
    "a misspelt section": ({"modelz": {"bind": 1}}, [], "Did you mean 'model'?"),
    "a misspelt key": ({"model": {"bind": {"dpeth": 2}}}, [], "Did you mean 'depth'?"),
    "a misspelt key of a source": (
        {"data": {"sources": [{"path": "x", "formatt": "caption"}]}},
        [],
        "'format'",
    ),
    "a misspelt key in an item of a list": (
        {"data": {"sources": [{"path": "pictures", "columns": {"imge": "file"}}]}},
        [],
        "Did you mean 'image'? Known: ",
    ),
    "a misspelt trainer option": ({"trainer": {"max_epoch": 2}}, [], "Did you mean 'max_epochs'?"),
    "a misspelt option": ({}, ["--model.optim.weight_deacy", "1"], "Did you mean 'weight_decay'?"),
    "an abbreviated option": ({}, ["--model.bind.dept", "1"], "Did you mean 'depth'?"),
    "a misspelt class": (
        {"model": {"encoders": [{"class_path": "tiny.ColourEncoder"}]}},
        [],
        "'ColorEncoder'",
    ),
    "a misspelt module": ({"model": {"encoders": [{"class_path": "tny.X"}]}}, [], "full import path"),
    "a misspelt argument of a class": (
        {"model": {"encoders": [{"class_path": "tiny.ColorEncoder", "init_args": {"gridd": 2}}]}},
        [],
        "Did you mean 'grid'?",
    ),
    "a misspelt argument of a class of ours": (
        {
            "model": {
                "encoders": [
                    {"class_path": "bindllm.encoders.EfficientNetLite", "init_args": {"weightz": "x"}}
                ]
            }
        },
        [],
        "Did you mean 'weights'?",
    ),
    "a misspelt class of ours": (
        {"model": {"encoders": [{"class_path": "bindllm.encoders.EfficientNet"}]}},
        [],
        "Did you mean 'EfficientNetLite'?",
    ),
    "a misspelt callback": (
        {"trainer": {"callbacks": [{"class_path": "EarlyStoping"}]}},
        [],
        "error: trainer.callbacks: Expected a dot import path string: EarlyStoping\nDid you mean 'EarlyStopping'?",
    ),
    "a misspelt callback with its path": (
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStoping"}]}},
        [],
        "no attribute 'EarlyStoping'\nDid you mean 'EarlyStopping'?",
    ),
    "a misspelt argument of a callback": (
        {"trainer": {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitr": "val_loss"}}]}},
        [],
        "Option 'monitr' is not accepted\nDid you mean 'monitor'?",
    ),
    "a misspelt logger": (
        {"trainer": {"logger": {"class_path": "CSVLoger"}}},
        [],
        "Did you mean 'CSVLogger'?",
    ),
    "an encoder without its module": (
        {"model": {"encoders": [{"class_path": "ColorEncoder"}]}},
        [],
        "Expected a dot import path string: ColorEncoder\nGive the full import path",
    ),
    "a misspelt choice among several types": (
        {"trainer": {"precision": "bf17"}},
        [],
        "Given value: bf17\nDid you mean 'bf16'? Known: 16, 16-mixed, 16-true, 32,",
    ),
    "a misspelt choice": ({"model": {"inject": {"kind": "residul"}}}, [], "Did you mean 'residual'?"),
    "a wrong type": ({"data": {"batch_size": "many"}}, [], "data.batch_size: Expected int"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_recipe_is_named_with_the_closest_name(mistake, parts, capsys):
    sections, options, told = MISTAKES[mistake]
    recipe = tiny_recipe(parts)
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    assert run("fit", recipe, *options) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert "Subtypes" not in error
    assert not Path("runs").exists()


def test_a_missing_recipe_is_named(capsys):
    assert main(["fit", "--config", "nope.yaml"]) == 2
    assert "nope.yaml" in capsys.readouterr().err


def test_a_missing_decoder_is_one_clear_error(parts, monkeypatch, capsys):
    assert run("fit", tiny_recipe(parts), "--model.decoder.name", "checkpoints/nope") == 1
    error = capsys.readouterr().err
    assert "checkpoints/nope" in error
    assert "Traceback" not in error
    monkeypatch.setenv("BINDLLM_DEBUG", "1")
    assert run("fit", tiny_recipe(parts), "--model.decoder.name", "checkpoints/nope") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_trainer_that_this_machine_cannot_make_is_one_clear_error(parts, capsys):
    assert run("fit", tiny_recipe(parts), "--trainer.accelerator", "nope") == 1
    assert "error: trainer: " in capsys.readouterr().err
    assert not Path("runs").exists()


def test_an_output_folder_with_other_content_is_not_replaced(parts, capsys):
    Path("photos").mkdir()
    Path("photos/a.txt").write_text("mine")
    assert run("fit", tiny_recipe(parts, output="photos")) == 1
    assert "Choose another" in capsys.readouterr().err
    assert Path("photos/a.txt").read_text() == "mine"


def test_print_config_shows_every_default_and_loads_nothing(parts, capsys):
    recipe = tiny_recipe(parts)
    recipe["model"]["decoder"]["name"] = "nowhere"
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(write_recipe(recipe)), "--model.bind.depth", "2", "--print_config"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "depth: 2" in told
    assert "expansion: 4" in told
    assert "accumulate_grad_batches: 1" in told


def test_ctrl_c_while_embedding_is_no_traceback(parts, monkeypatch, capsys):

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("bindllm.data.datamodule.BindData.prepare_data", stop)
    # The handler of whoever called is back afterwards, whatever it was.
    for handler in (signal.default_int_handler, lambda *_: None):
        earlier = signal.signal(signal.SIGINT, handler)
        try:
            assert run("fit", tiny_recipe(parts)) == 130
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, earlier)
        assert "stopped" in capsys.readouterr().err


def test_embed_fills_the_store_once(parts, capsys):
    assert run("embed", tiny_recipe(parts)) == 0
    assert "28 encoded, 0 from the store" in capsys.readouterr().out
    assert run("embed", tiny_recipe(parts)) == 0
    assert "0 encoded, 28 from the store" in capsys.readouterr().out


def test_validate_and_test_measure_the_trained_folder(here, parts, capsys):
    metrics = json.loads(Path("checkpoints/tiny/metrics.json").read_text())
    held_out = metrics["tasks"]["captions"]["model"]["loss"]
    assert run("test", tiny_recipe(parts)) == 0
    name, loss = capsys.readouterr().out.split()
    assert name == "test_loss"
    assert float(loss) == pytest.approx(held_out, abs=1e-3)
    assert run("validate", tiny_recipe(parts)) == 0
    assert capsys.readouterr().out.startswith("val_loss ")


def test_validate_without_a_trained_folder_says_what_to_do(parts, capsys):
    assert run("validate", tiny_recipe(parts)) == 1
    assert "bindllm fit" in capsys.readouterr().err


def test_a_second_stage_is_measured_as_it_ended_not_as_it_began(here, parts, capsys):
    second = tiny_recipe(parts, model={"init_from": "checkpoints/tiny"}, output="checkpoints/second")
    assert run("test", second) == 1
    assert "checkpoints/second holds no trained model" in capsys.readouterr().err
    assert run("test", second, "--model.init_from", "checkpoints/tiny") == 0
    assert capsys.readouterr().out.startswith("test_loss ")


def test_a_split_without_rows_is_named(here, parts, capsys):
    source = {"path": str(parts / "pictures"), "split": "train"}
    assert run("test", tiny_recipe(parts, data={"sources": [source]})) == 1
    assert "no source of the recipe has any rows of split test" in capsys.readouterr().err


def test_what_a_part_says_of_its_arguments_is_told(parts, capsys):
    objective = {
        "class_path": "bindllm.objectives.DPO",
        "init_args": {"label_smoothing": 0.7},
    }
    assert run("fit", tiny_recipe(parts, model={"objective": objective})) == 1
    assert capsys.readouterr().err.strip() == (
        "error: DPO: label_smoothing must be from 0 to below 0.5, not 0.7"
    )


@pytest.mark.parametrize("options", [[], ["--stream"], ["--temperature", "0.7", "--top_p", "0.9"]])
def test_generate_answers(options, here, parts, capsys):
    picture = str(parts / "pictures" / "images" / "red0.png")
    line = ["generate", "checkpoints/tiny", "What?", "--image", picture, "--max_new_tokens", "4", *options]
    assert main([*line, "--allow", "tiny.ColorEncoder"]) == 0
    assert capsys.readouterr().out
    assert main(line) == 1
    assert "tiny.ColorEncoder" in capsys.readouterr().err


def test_report_is_written_again(here):
    page = Path("checkpoints/tiny/report.html")
    page.unlink()
    assert main(["report", "checkpoints/tiny"]) == 0
    assert page.is_file()
    assert main(["report", "checkpoints/nope"]) == 1


def test_version_names_the_packages(capsys):
    assert main(["version"]) == 0
    assert "torch " in capsys.readouterr().out


def test_after_a_loss_that_is_not_finite_the_advice_works(parts, monkeypatch, capsys):
    recipe = tiny_recipe(parts, trainer={"max_epochs": 1})
    with monkeypatch.context() as patch:
        patch.setattr(
            "bindllm.objectives.base.next_token_loss",
            lambda logits, _: logits.sum() * math.nan,
        )
        assert run("fit", recipe) == 1
    error = capsys.readouterr().err
    assert "the loss is not finite at step 1" in error
    advice = error.split("learning rate: ")[1].split()
    assert advice[0] == "--model.init_from"
    assert run("fit", recipe, *advice) == 0


def test_a_run_without_held_out_rows_leaves_its_folder(parts, capsys):
    source = {"path": str(parts / "pictures"), "split": "train"}
    assert run("fit", tiny_recipe(parts, data={"sources": [source]}, trainer={"max_epochs": 1})) == 0
    assert "no held-out rows" in capsys.readouterr().out
    assert Path("checkpoints/tiny/bind.safetensors").is_file()


def test_a_callback_without_anything_to_watch_is_refused_before_training(parts, capsys):
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}
    source = {"path": str(parts / "pictures"), "split": "train"}
    recipe = tiny_recipe(parts, data={"sources": [source]}, trainer={"callbacks": [stopping]})
    assert run("fit", recipe) == 1
    assert "EarlyStopping monitors val_loss, but there are no validation rows" in capsys.readouterr().err
    assert run("check", recipe) == 1
    assert "EarlyStopping monitors val_loss" in capsys.readouterr().out
    recipe["data"]["sources"][0].pop("split")
    assert run("check", recipe) == 0
    assert run("check", recipe, "--trainer.limit_val_batches", "0") == 1


def test_a_run_that_would_train_nothing_is_refused(parts, capsys):
    assert run("fit", tiny_recipe(parts), "--model.trainable", "[]") == 1
    assert "trainable is empty" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_whose_measurement_fails_keeps_the_trained_folder(parts, monkeypatch, capsys):

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bindllm.training.run.evaluate_held_out", fail)
    recipe = tiny_recipe(parts, trainer={"max_epochs": 1})
    with pytest.raises(RuntimeError, match="out of memory"):
        run("fit", recipe)
    assert Path("checkpoints/tiny/bind.safetensors").is_file()
    assert "trained model: checkpoints/tiny" in capsys.readouterr().out


def test_an_error_is_printed_with_its_notes(monkeypatch, capsys):
    """They name the media at which an encoder failed."""

    def broken() -> int:
        error = InputError("no weights")
        error.add_note("while embedding a.png")
        raise error

    monkeypatch.setattr("bindllm.cli.folders.version", broken)
    assert main(["version"]) == 1
    assert capsys.readouterr().err == "error: no weights\nwhile embedding a.png\n"
