"""``bindllm check``: everything that is wrong with a recipe, a checkpoint folder or an encoder, all of it at once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from bindllm.checkpoint.folder import build_object, read_manifest, read_weights
from bindllm.data.datamodule import BindData
from bindllm.data.report import SourceReport
from bindllm.data.sources import Row, SourceConfig, read_source
from bindllm.data.tokenise import tokenise
from bindllm.errors import BindLLMError, DecoderError, InputError
from bindllm.media import open_image
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig, find_folder, fingerprint_decoder, load_tokenizer
from bindllm.model.injection import InjectConfig
from bindllm.model.pretrained import read_parts
from bindllm.testing import check_encoder
from bindllm.training.callbacks import refuse_unmeasured
from bindllm.training.optim import OptimConfig
from bindllm.verbs.recipe import RecipeCLI, quiet
from bindllm.verbs.runs import run_folder
from bindllm.verbs.usage import Arguments, UsageError, read_number

KINDS = {"decoder": DecoderConfig, "bind": BindConfig, "inject": InjectConfig, "optim": OptimConfig}
PREVIEWED_ROWS = 3
MEASURED_ROWS = 2000
"""Rows whose length is counted: enough for the statistics, and seconds at most."""
OPENED_PICTURES = 200
"""Pictures of a source that are opened, evenly spread over its training rows."""


class Problems(list[str]):
    """What is wrong so far."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error of the block and go on after it."""
        try:
            yield
        except BindLLMError as error:
            self.append(str(error))


def check(args: list[str]) -> int:
    """Print all problems; exit code 1 when there are any."""
    parser = Arguments(
        "check", "Find everything that is wrong, before a run does. Nothing is embedded or trained."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="RECIPE", help="a recipe; its keys may follow as options")
    what.add_argument("--folder", metavar="CHECKPOINT", help="a checkpoint folder")
    what.add_argument("--encoder", metavar="CLASS", help="import path of an encoder, built without arguments")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CLASS",
        help="an encoder outside bindllm that the folder names",
    )
    count = read_number(int, "a whole number of at least 0", lambda value: value >= 0)
    parser.add_argument(
        "--rows", type=count, default=PREVIEWED_ROWS, help="rows to show with their label mask"
    )
    if args and not args[0].startswith("-"):
        option = "--folder" if Path(args[0]).is_dir() else "--config"
        parser.error(
            f"{args[0]!r} has no option before it: give a recipe with --config FILE, a checkpoint with --folder "
            f"FOLDER. Here: bindllm check {option} {args[0]}"
        )
    chosen, overrides = parser.parse_known_args(args)
    if overrides and not chosen.config:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    problems, console = Problems(), Console(highlight=False, soft_wrap=True)
    with quiet():
        if chosen.config:
            _check_recipe(chosen.config, overrides, problems, console, rows=chosen.rows)
        elif chosen.folder:
            _check_folder(chosen.folder, problems, allow=chosen.allow)
        else:
            with problems.noted():
                check_encoder(build_object({"class_path": chosen.encoder}, allow=[chosen.encoder]))
    for number, problem in enumerate(problems, start=1):
        console.print(f"{number}. {problem}", markup=False)
    console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problems")
    return 1 if problems else 0


def read_recipe(file: str, overrides: Sequence[str], problems: Problems) -> Any:
    """Read a recipe key by key: what cannot be used is noted and left out, until the rest can be read.

    Returns:
        the resolved recipe, or None when required parts are missing.
    """
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"the recipe {file} cannot be read: {error}")
        return None
    if not isinstance(recipe, dict):
        problems.append(f"the recipe {file} holds {type(recipe).__name__}, expected keys and values")
        return None
    options, removed = list(overrides), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "recipe.yaml"
        while True:
            copy.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            try:
                return RecipeCLI("check", ["--config", str(copy), *options], build=False).config
            except UsageError as error:
                # That a key is missing is no news when it was taken out here.
                if not (error.key and any(f"{error.key}.".startswith(f"{key}.") for key in removed)):
                    problems.append(str(error))
                if not (_remove(recipe, error.key) or _remove_option(options, error.key)):
                    return None
                removed.append(error.key)


def _check_recipe(
    file: str, overrides: Sequence[str], problems: Problems, console: Console, *, rows: int
) -> None:
    config = read_recipe(file, overrides, problems)
    if config is None:
        return
    model, data = config.model.as_dict(), config.data.as_dict()
    with problems.noted():
        run_folder(config.output)
    parts: dict[str, Any] = {}
    for name, kind in KINDS.items():
        with problems.noted():
            parts[name] = _built(kind, model[name])
    encoders = [encoder for entry in model["encoders"] if (encoder := _check_encoder(entry, problems))]
    tokenizer = _check_decoder(parts["decoder"], problems) if "decoder" in parts else None
    if not model["trainable"]:
        problems.append(
            "model.trainable is empty: nothing would be trained; name groups, such as [bind, inject]"
        )
    _check_store(data["store"], problems)
    if tokenizer is not None and parts.keys() == KINDS.keys() and len(encoders) == len(model["encoders"]):
        with problems.noted():
            _check_model(parts, tokenizer, encoders, model["trainable"])
    if model["start_from"] is not None:
        _check_folder(
            model["start_from"], problems, allow=[entry["class_path"] for entry in model["encoders"]]
        )
    sources = []
    for entry in data["sources"]:
        with problems.noted():
            sources.append(_built(SourceConfig, entry))
    num_validation = _check_sources(sources, tokenizer, data["max_length"], problems, console)
    if tokenizer is not None and not problems:
        keys = ("store", "batch_size", "max_length")
        whole = BindData(sources, tokenizer=tokenizer, encoders=encoders, **{key: data[key] for key in keys})
        for line in whole.preview(rows):
            console.print(line, markup=False)
    if not problems:
        with problems.noted():
            trainer = RecipeCLI("check", ["--config", file, *overrides]).make_trainer(logger=False)
            refuse_unmeasured(trainer.callbacks, num_validation=trainer.limit_val_batches and num_validation)


def _check_decoder(config: DecoderConfig, problems: Problems) -> Any:
    """Note what is wrong with a decoder's folder; return its tokenizer, or None."""
    tokenizer = None
    with problems.noted():
        tokenizer = load_tokenizer(config)
    with problems.noted():
        fingerprint_decoder(find_folder(config))
    # A missing folder is one problem, not two.
    problems[:] = dict.fromkeys(problems)
    return tokenizer


def _check_model(
    parts: dict[str, Any], tokenizer: Any, encoders: Sequence[Any], trainable: list[str]
) -> None:
    """Join the parts without their weights: whether the decoder has what the injection needs, and all sizes fit."""
    folder = find_folder(parts["decoder"])
    try:
        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DecoderError(f"{folder} does not hold a causal language model: {error}") from error
    joined = {"encoders": encoders, "bind": parts["bind"], "inject": parts["inject"]}
    BindLLM(decoder, tokenizer, parts["decoder"], **joined).set_trainable(trainable)


def _check_encoder(entry: dict[str, Any], problems: Problems) -> Any:
    """Note what is wrong with an encoder of a recipe; return it, or None."""
    with problems.noted():
        encoder = build_object(
            {"class_path": entry["class_path"], "init_args": entry.get("init_args", {})},
            allow=[entry["class_path"]],
        )
        check_encoder(encoder)
        return encoder
    return None


def _check_sources(
    sources: Sequence[SourceConfig], tokenizer: Any, max_length: int, problems: Problems, console: Console
) -> int:
    """Read every source; say what each gives and what is left out; return the number of validation rows."""
    num_train, num_validation, before = 0, 0, len(problems)
    for number, source in enumerate(sources):
        with problems.noted():
            rows, report = read_source(source, number)
            num_train += len(rows["train"])
            num_validation += len(rows["validation"])
            with problems.noted():
                _open_pictures(rows["train"], report)
            counts = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
            console.print(f"{source.path}: {report.pictures:,} pictures, {counts}", markup=False)
            for line in report.skipped.lines():
                console.print(f"  left out: {line}", markup=False)
            if tokenizer is not None:
                lengths = _lengths(rows["train"], tokenizer, max_length)
                console.print(f"  {lengths}", markup=False)
    if sources and not num_train and len(problems) == before:
        problems.append("the sources have no row to train on")
    return num_validation


def _check_store(store: str, problems: Problems) -> None:
    """Note a place for the store where no folder can be made."""
    there = next(place for place in (Path(store), *Path(store).absolute().parents) if place.exists())
    if not there.is_dir():
        problems.append(f"data.store {store} cannot be a folder: {there} is a file; choose another place")


def _open_pictures(rows: Sequence[Row], report: SourceReport) -> None:
    """Open some pictures of the rows, and count those that cannot be.

    Raises:
        InputError: not one of them can be opened.
    """
    pictures = list(dict.fromkeys(media for row in rows for media in row.media if media.modality == "image"))
    chosen = pictures[:: max(1, len(pictures) // OPENED_PICTURES)][:OPENED_PICTURES]
    failed = []
    for media in chosen:
        try:
            open_image(media.source)
        except BindLLMError as error:
            failed.append(str(error))
            report.skipped.add(f"picture that cannot be opened (of {len(chosen):,} tried)", str(error))
    if failed and len(failed) == len(chosen):
        raise InputError(f"{report.path}: not one picture can be opened: {failed[0]}")


def _lengths(rows: Sequence[Row], tokenizer: Any, max_length: int) -> str:
    """Return a line about the tokens of rows.

    Raises:
        InputError: there are rows, and none of them fits.
    """
    samples, refused = [], 0
    for row in rows[:MEASURED_ROWS]:
        try:
            samples.append(tokenise(row.conversation, tokenizer, max_length))
        except InputError:
            refused += 1
    if not rows:
        return "no rows to train on"
    if not samples:
        raise InputError(
            f"data.max_length {max_length}: none of {refused:,} rows fits into so few tokens; raise it"
        )
    lengths = [len(sample.input_ids) for sample in samples]
    supervised = [sample.num_supervised for sample in samples]
    cut = sum(sample.truncated for sample in samples)
    return (
        f"tokens a row: {median(lengths):.0f} (longest {max(lengths)}), to learn: {median(supervised):.0f} "
        f"(longest {max(supervised)}); of {len(samples) + refused:,} rows {cut} are cut, {refused} do not fit"
    )


def _check_folder(folder: str, problems: Problems, *, allow: Sequence[str]) -> None:
    """Note what is wrong with a checkpoint folder."""
    with problems.noted():
        manifest = read_manifest(folder)
        with problems.noted():
            read_weights(folder, manifest)
        read_parts(folder, decoder=None, dtype=None, allow=allow)
    problems[:] = dict.fromkeys(problems)


def _built(kind: type, values: dict[str, Any]) -> Any:
    """Build one dataclass of a recipe, so that its own complaints can be noted."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser.instantiate(parser.parse_object({"value": values})).value


def _remove(recipe: dict[str, Any], key: str | None) -> bool:
    """Empty a list of a recipe, or remove another value, by its dotted key; return whether there was anything."""
    *parents, last = (key or "").split(".")
    place: Any = recipe
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place or place[last] == []:
        return False
    if isinstance(place[last], list):
        place[last] = []
    else:
        del place[last]
    return True


def _remove_option(options: list[str], key: str | None) -> bool:
    """Remove an option and its value from a command line; return whether it was there."""
    for n, option in enumerate(options):
        if option.partition("=")[0] == f"--{key}":
            del options[n : n + (1 if "=" in option else 2)]
            return True
    return False
