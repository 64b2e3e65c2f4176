"""The command ``bindllm``: a table of verbs. Help comes from the table; a verb's code is imported when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from bindllm import __version__
from bindllm.cli.usage import UsageError
from bindllm.errors import BindLLMError, known_names
from bindllm.imports import find_named_modules

VERBS = {
    "fetch": ("fetch", "fetch and verify the embedded default: decoder, encoder, pictures"),
    "check": ("check", "find everything that is wrong with a recipe, a checkpoint folder or an encoder"),
    "embed": ("embed", "fill the embedding store for a recipe"),
    "fit": ("fit", "train as a recipe says; goes on with an interrupted run by itself"),
    "validate": ("measure", "measure the loss of a trained recipe on its validation split"),
    "test": ("measure", "measure the loss of a trained recipe on its test split"),
    "generate": ("generate", "ask a checkpoint folder about pictures, sounds, texts, ..."),
    "encode": ("encode", "print how alike files and texts are in an encoder's joint space"),
    "convert": ("convert", "turn published weights into our folders, every key accounted for"),
    "index": ("index", "build or renew the visual cache: an index of picture embeddings"),
    "align": ("align", "teach a modality to the joint space of an encoder, from pairs"),
    "evaluate": ("evaluate", "classify and retrieve across modalities, from embeddings alone"),
    "export": ("export", "merge the adapter into a plain Hugging Face folder, for other programs"),
    "report": ("report", "write the report of a checkpoint folder again"),
    "version": ("report", "print the versions of bindllm and of what it stands on"),
}
"""Each verb: the file of `bindllm.cli` that holds its function, and what it does."""

SYNONYMS = {"train": "fit", "eval": "evaluate", "predict": "generate"}
"""What other programs call a verb."""

EXAMPLES = """\
examples:
  bindllm fit --config recipes/quickstart.yaml
  bindllm fit --config recipes/quickstart.yaml --trainer.max_epochs 5 --model.bind.depth 2
  bindllm check --config recipes/quickstart.yaml
  bindllm generate checkpoints/quickstart "Describe this image." --image cat.png
  bindllm convert imagebind_huge.pth --output checkpoints/imagebind
  bindllm encode dog.jpg bark.wav --text "a dog"

Each verb explains itself: bindllm VERB --help. BINDLLM_DEBUG=1 shows where an error was raised."""


def help_text() -> str:
    """Return the help of the command."""
    verbs = "\n".join(f"  {verb:<10}{purpose}" for verb, (_, purpose) in VERBS.items())
    purpose = "bindllm gives a language model new senses."
    return f"usage: bindllm VERB [options]\n\n{purpose}\n\nverbs:\n{verbs}\n\n{EXAMPLES}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and return its exit code.

    0: done. 1: an error that the message explains. 2: a mistake on the command line or in a recipe. 130: stopped
    by the user.
    """
    verb, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(__version__)
        return 0
    if verb not in VERBS:
        print(
            f"error: unknown verb {verb!r}. {known_names(SYNONYMS.get(verb, verb), VERBS)}", file=sys.stderr
        )
        return 2
    # A recipe may name an encoder in a file of this folder. No other file here may be imported.
    find_named_modules()
    try:
        home = importlib.import_module(f"bindllm.cli.{VERBS[verb][0]}")
        return vars(home)[verb](arguments)
    except (BindLLMError, OSError) as error:
        if os.environ.get("BINDLLM_DEBUG"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept, and the same command goes on from it", file=sys.stderr)
        return 130
