"""The command ``bindllm``: a table of commands. A command's module is imported only when the command runs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from bindllm import __version__
from bindllm.errors import BindLLMError, UsageError, did_you_mean, printable_lines
from bindllm.imports import find_named_modules

COMMANDS = {
    "fetch": ("folders", "download and verify the parts of a recipe: decoder, encoder, images"),
    "check": ("recipes.check", "find all problems of a recipe, a checkpoint or an encoder"),
    "embed": ("recipes.fit", "precompute the embeddings of a recipe's media"),
    "fit": ("recipes.fit", "train a model from a recipe; resumes interrupted runs"),
    "validate": ("recipes.fit", "print the loss of a trained model on the validation split"),
    "test": ("recipes.fit", "print the loss of a trained model on the test split"),
    "generate": ("generate", "ask a checkpoint about images, audio, texts, ..."),
    "chat": ("chat", "talk with a checkpoint in the terminal, with media of every kind"),
    "serve": ("serve", "serve a checkpoint: a chat page, and OpenAI's API for programs"),
    "solve": ("solve", "answer in several steps, with tools that look at media"),
    "encode": ("encode", "print pairwise cosine similarities of files and texts"),
    "imagine": ("unclip.imagine", "draw media of any modality, through an unCLIP pipeline"),
    "fit_map": ("unclip.fit_map", "fit a linear map from an encoder's space to that of an unCLIP pipeline"),
    "convert": ("folders", "convert published weights; every tensor is accounted for"),
    "index": ("index", "build or update a visual cache: an index of image embeddings"),
    "datastore": ("index", "build a datastore: records that a model with context retrieves"),
    "align": ("recipes.align", "train an encoder of a new modality for a joint space, from pairs"),
    "evaluate": ("evaluate", "measure a checkpoint on published benchmarks, with controls"),
    "compare": ("evaluate", "paired test of two evaluations, and the questions won and lost"),
    "zero_shot": ("zero_shot", "zero-shot classification and retrieval from embeddings"),
    "few_shot": ("zero_shot", "few-shot evaluation with controls, on held-out rows of a table"),
    "export": ("folders", "write the tuned decoder as a plain Hugging Face folder"),
    "report": ("folders", "write the report of a checkpoint again"),
    "card": ("card", "write the model card of a checkpoint, with licenses and limits"),
    "version": ("folders", "print the versions of bindllm and its dependencies"),
}
"""Each command: the module of `bindllm.cli` that holds its function, and its purpose."""

RECIPES = ("embed", "fit", "validate", "test", "align")
"""Commands whose options are the keys of a recipe, read by LightningCLI; the others are typed functions."""

SYNONYMS = {"train": "fit", "eval": "evaluate", "predict": "generate"}
"""Names that other programs use for a command."""

EXAMPLES = """\
examples:
  bindllm fit --config recipes/scenes.yaml
  bindllm fit --config recipes/scenes.yaml --trainer.max_epochs 5
  bindllm check --config recipes/scenes.yaml
  bindllm generate checkpoints/scenes "Describe this image." --image cat.png
  bindllm chat checkpoints/scenes
  bindllm convert imagebind_huge.pth --output checkpoints/imagebind
  bindllm encode dog.jpg bark.wav --text "a dog"

Options of a command: bindllm COMMAND --help. BINDLLM_DEBUG=1 prints tracebacks."""


def help_text() -> str:
    """Return the help of the command."""
    commands = "\n".join(f"  {name:<10}{purpose}" for name, (_, purpose) in COMMANDS.items())
    purpose = "bindllm gives a language model new modalities."
    return f"usage: bindllm COMMAND [options]\n\n{purpose}\n\ncommands:\n{commands}\n\n{EXAMPLES}"


def print_error(title: str, error: Exception) -> None:
    """Print an error, and its notes, which name the media at which an encoder failed."""
    lines = [f"{title}: {error}", *getattr(error, "__notes__", ())]
    print(printable_lines("\n".join(lines)), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code.

    0: success. 1: an error that the message explains. 2: a mistake on the command line or in a recipe. 130: stopped
    by the user.
    """
    # Help and version answer at once: nothing heavy has been imported yet.
    name, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        # A synonym is not accepted silently: scripts should use one name.
        hint = did_you_mean(SYNONYMS.get(name, name), COMMANDS)
        print(f"error: unknown command {name!r}. {hint}", file=sys.stderr)
        return 2
    # A recipe may name an encoder in a file of this folder. No other file here may be imported.
    find_named_modules()
    try:
        # Only the module of this command, so that --help of one does not load the libraries of all.
        function = vars(importlib.import_module(f"bindllm.cli.{COMMANDS[name][0]}"))[name]
        # LightningCLI reads these; the signature of any other command is its schema.
        if name in RECIPES:
            return function(words)
        from bindllm.cli.arguments import read_command

        return function(**read_command(name, function, words))
    except (BindLLMError, OSError) as error:
        if os.environ.get("BINDLLM_DEBUG"):
            traceback.print_exc()
        print_error("error", error)
        # As argparse: 2 is a mistake of the caller, which a retry cannot repair.
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        # A new line first: the terminal has printed ^C.
        print("\nstopped; finished work is kept, and the same command resumes from it", file=sys.stderr)
        return 130
