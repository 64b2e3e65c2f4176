"""A whole training run on tiny parts, through the real command line."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from bindllm.cli import main
from bindllm.cli.recipes.recipe import RecipeCLI
from bindllm.evaluation.captions import captions_task
from bindllm.report import page
from bindllm.training.callbacks import SampleCaptions
from bindllm.training.module import BindModule
from tiny import color_images, save_tiny_decoder


def tiny_parts(folder: Path) -> Path:
    """Write a tiny decoder and colored images, once for many runs."""
    save_tiny_decoder(folder / "decoder")
    color_images(folder / "pictures", per_color=7)
    return folder


def tiny_recipe(parts: Path, **sections: dict) -> dict:
    """A recipe of 2 epochs with 5 steps each; the sections given replace keys of the sections here."""
    recipe = {
        "seed_everything": 0,
        "output": "checkpoints/tiny",
        "save_every_seconds": 0,
        "model": {
            "decoder": {"name": str(parts / "decoder"), "dtype": "float32"},
            "encoders": [{"class_path": "tiny.ColorEncoder"}],
            "optim": {"lr": 0.01},
        },
        "data": {"sources": [{"path": str(parts / "pictures")}], "store": "data/store", "batch_size": 4},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "gradient_clip_val": 1.0, "logger": False},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe[name], **section} if isinstance(section, dict) else section
    return copy.deepcopy(recipe)


def with_bind_tokens(recipe: dict, count: int | str) -> dict:
    """The same recipe with several bind tokens, from an encoder that has tokens."""
    parts = {
        "encoders": [{"class_path": "tiny.TokenEncoder"}],
        "bind": {"tokens": count},
        "inject": {"kind": "cross" if count == "all" else "attend"},
    }
    return {**recipe, "model": {**recipe["model"], **parts}}


def write_recipe(recipe: dict) -> Path:
    """Write a recipe into the current folder, in one step: of two processes one may read while the other writes."""
    part = Path(f"recipe{os.getpid()}.yaml")
    part.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    # Not `os.replace`: tests count the calls of it.
    os.rename(part, "recipe.yaml")
    return Path("recipe.yaml")


_build_parser = RecipeCLI.setup_parser
_parsers: dict = {}


def _parser_once(cli: RecipeCLI, *arguments) -> None:
    """Take the parser of an earlier run of the command: it keeps nothing of what it has parsed."""
    kind = type(cli), cli.command
    if kind not in _parsers:
        _build_parser(cli, *arguments)
        _parsers[kind] = cli.parser
    cli.parser = _parsers[kind]


_draw = page._svg
_figures: dict[str, str] = {}


def _figure_once(axes, *, name: str) -> str:
    """Take the figure of an earlier run: drawing both takes a quarter of a tiny run. tests/report looks at them."""
    if name not in _figures:
        _figures[name] = _draw(axes, name=name)
    return _figures[name]


# A model that is hardly trained writes as long as it may, which takes a third of a tiny run.
SHORT = {
    "bindllm.evaluation.held_out.captions_task": partial(captions_task, max_new_tokens=4),
    "bindllm.cli.recipes.fit.SampleCaptions": partial(SampleCaptions, max_new_tokens=4),
}


@contextmanager
def short_runs(*, figures: bool = False) -> Iterator[None]:
    """Within the block runs write short captions, and take parsers and figures of earlier runs.

    Args:
        figures: draw the figures of each run; else its page may have those of an earlier one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "setup_parser", _parser_once)
        for name, short in SHORT.items():
            patch.setattr(name, short)
        if not figures:
            patch.setattr(page, "_svg", _figure_once)
        yield


def run(command: str, recipe: dict, *options: str, figures: bool = False) -> int:
    """Run a command with a recipe from the current folder; return the exit code.

    Args:
        command: the command.
        recipe: its recipe.
        options: further words of the command line.
        figures: draw the figures of this run, see `short_runs`.
    """
    with short_runs(figures=figures):
        return main([command, "--config", str(write_recipe(recipe)), *options])


def make_trainer(folder: Path, **options) -> Trainer:
    """A silent trainer on the CPU, whose run is in a folder."""
    silent = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**silent | {"default_root_dir": folder} | options)


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it, so the disk stays as it was at that moment."""


def count_calls(monkeypatch, owner, name, *, at=0, before=lambda: None, after=lambda: None) -> list[str]:
    """Record the calls of a method, and act before or after the work of one of them."""
    original, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            before()
        result = original(*args, **kwargs)
        if len(calls) == at:
            after()
        return result

    monkeypatch.setattr(owner, name, counting)
    return calls


def die():
    raise Killed


def run_and_die(recipe, monkeypatch, owner=BindModule, name="training_step", *, at, when="before"):
    """Run until a call of a method, which dies before or after its work."""
    with monkeypatch.context() as patch:
        count_calls(patch, owner, name, at=at, **{when: die})
        with pytest.raises(Killed):
            run("fit", recipe)
