"""``bindllm check``: everything that is wrong with a recipe, a checkpoint folder or an encoder, all of it at once."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bindllm.cache.settings import CacheConfig
from bindllm.cache.visual_cache import choose_cache, open_cache
from bindllm.cli.media import build_encoder, build_own, encoder_folder, read_media
from bindllm.cli.problems import Problems, build_part, read_recipe
from bindllm.cli.recipe import RecipeCLI, quiet
from bindllm.cli.runs import run_folder
from bindllm.cli.sources import check_sources, check_store, read_sources, spread
from bindllm.cli.usage import Arguments, add_allow, read_number
from bindllm.conversation import check_vocabulary
from bindllm.data.datamodule import BindData
from bindllm.data.preview import legend
from bindllm.data.rows import Row
from bindllm.data.source_config import SourceConfig
from bindllm.encoders import HasExamples, alignment_warnings, skipped_encoders
from bindllm.errors import CheckpointError
from bindllm.media import MODALITIES, Media
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import MANIFEST, read_manifest, read_weights
from bindllm.model.decoder import (
    DecoderConfig,
    fingerprint_decoder,
    load_tokenizer,
    read_config,
    without_weights,
)
from bindllm.model.injection import InjectConfig
from bindllm.model.pretrained import encoder_fingerprints, read_cache_config, read_decoder, read_parts
from bindllm.testing import check_encoder, synthetic_media
from bindllm.training.callbacks import check_monitors
from bindllm.training.memory import RunPlan, memory_lines, plan_run
from bindllm.training.optim import OptimConfig
from bindllm.training.stages import check_base

KINDS = {"decoder": DecoderConfig, "bind": BindConfig, "inject": InjectConfig, "optim": OptimConfig}
PREVIEWED_ROWS = 3
SAMPLES = 3
"""Media of the sources that an encoder of a modality of its own is checked with, when it brings no examples."""


def check(args: list[str]) -> int:
    """Print all problems; exit code 1 when there are any."""
    parser = _arguments()
    if args and not args[0].startswith("-"):
        option = "--folder" if Path(args[0]).is_dir() else "--config"
        parser.error(
            f"{args[0]!r} has no option before it: give a recipe with --config FILE, a checkpoint with --folder "
            f"FOLDER. Here: bindllm check {option} {args[0]}"
        )
    chosen, overrides = parser.parse_known_args(args)
    if overrides and not (chosen.config or chosen.encoder):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if (chosen.memory or chosen.memory_limit) and not chosen.config:
        parser.error("--memory is about a recipe: give one with --config FILE")
    problems, console = Problems(), Console(highlight=False, soft_wrap=True)
    with quiet():
        if chosen.config:
            _check_recipe(chosen, overrides, problems, console)
        elif chosen.folder:
            _check_folder(chosen.folder, problems, allow=chosen.allow)
        else:
            with problems.noted():
                samples = [read_media(text) for text in chosen.media]
                check_encoder(build_encoder(chosen.encoder, overrides, allow=chosen.allow), samples)
    for number, problem in enumerate(problems, start=1):
        console.print(f"{number}. {problem}", markup=False)
    if problems and chosen.config:
        console.print(f"relative paths are looked up from {Path.cwd()}", markup=False)
    console.print(f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problems")
    return 1 if problems else 0


def _arguments() -> Arguments:
    parser = Arguments(
        "check", "Find everything that is wrong, before a run does. Nothing is embedded or trained."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="RECIPE", help="a recipe; its keys may follow as options")
    what.add_argument("--folder", metavar="CHECKPOINT", help="a checkpoint folder")
    what.add_argument(
        "--encoder",
        metavar="CLASS_OR_FOLDER",
        help="import path or folder of an encoder; --encoder.NAME VALUE are arguments of its constructor",
    )
    parser.add_argument(
        "--media",
        action="append",
        default=[],
        metavar="[MODALITY:]FILE",
        help="check the encoder with this; repeat it, at least two of a modality",
    )
    add_allow(parser)
    count = read_number(int, "a whole number of at least 0", lambda value: value >= 0)
    parser.add_argument(
        "--rows", type=count, default=PREVIEWED_ROWS, help="rows to show with their label mask"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="estimate what a recipe needs on each device, before a weight is loaded",
    )
    parser.add_argument(
        "--memory_limit", metavar="SIZE", help="of a device, such as 24GB; by default what this machine has"
    )
    return parser


def _check_recipe(chosen: Namespace, overrides: Sequence[str], problems: Problems, console: Console) -> None:
    config = read_recipe(chosen.config, overrides, problems)
    if config is None:
        return
    model, data = config.model.as_dict(), config.data.as_dict()
    with problems.noted():
        run_folder(config.output, init_from=config.model.init_from)
    built = {name: build_part(kind, model[name], problems) for name, kind in KINDS.items()}
    if model["adapter"] is not None:
        built["adapter"] = build_part(AdapterConfig, model["adapter"], problems)
    parts = {name: part for name, part in built.items() if part is not None}
    tokenizer = _check_decoder(parts["decoder"], problems) if "decoder" in parts else None
    sources = [build_part(SourceConfig, entry, problems) for entry in data["sources"]]
    sources = [source for source in sources if source is not None]
    read = read_sources(sources, problems)
    media = [item for rows_of, _ in read for row in rows_of["train"] for item in row.media]
    built_encoders = [_check_encoder(entry, media, problems, console) for entry in model["encoders"]]
    encoders = [encoder for encoder in built_encoders if encoder is not None]
    for warning in (*alignment_warnings(encoders), *skipped_encoders(encoders)):
        console.print(f"warning: {warning}", markup=False)
    if not model["trainable"]:
        problems.append(
            "model.trainable is empty: nothing would be trained; name groups, such as [bind, inject]"
        )
    check_store(data["store"], problems)
    all_encoders = len(encoders) == len(model["encoders"])
    if tokenizer is not None and parts.keys() == built.keys() and all_encoders:
        with problems.noted():
            _check_model(parts, tokenizer, encoders, model["trainable"])
    if model["cache"] is not None:
        entry = {"folder": model["cache"]} if isinstance(model["cache"], str) else model["cache"]
        cache = build_part(CacheConfig, entry, problems)
        if cache is not None and all_encoders:
            _check_cache(cache, encoders, problems, console, output=config.output)
    if model["init_from"] is not None:
        _check_folder(model["init_from"], problems, allow=_trusted(model["encoders"]))
        if parts.keys() == built.keys() and all_encoders and not problems:
            own = {name: parts.get(name) for name in ("decoder", "bind", "inject", "adapter")}
            with problems.noted():
                for remark in check_base(model["init_from"], encoders=encoders, **own):
                    console.print(f"warning: {remark}", markup=False)
    served = encoders if all_encoders else None
    check_sources(read, served, tokenizer, data["max_length"], problems, console)
    if tokenizer is not None and not problems:
        keys = ("store", "batch_size", "max_length")
        whole = BindData(sources, tokenizer=tokenizer, encoders=encoders, **{key: data[key] for key in keys})
        if chosen.rows:
            console.print(legend())
        for line in whole.preview(chosen.rows):
            console.print(line, markup=False)
        if chosen.memory or chosen.memory_limit:
            rows = [row for rows_of, _ in read for row in rows_of["train"]]
            with problems.noted():
                plan = plan_run(config.as_dict(), parts, encoders, rows, tokenizer)
                _check_memory(plan, chosen.memory_limit, problems, console)
    if not problems:
        with problems.noted():
            cli = RecipeCLI("check", ["--config", chosen.config, *overrides])
            _check_run(cli, sources, [rows_of for rows_of, _ in read], problems)


def _check_run(
    cli: RecipeCLI, sources: list[SourceConfig], read: Sequence[Mapping[str, list[Row]]], problems: Problems
) -> None:
    """Note what the objective and the trainer of a recipe find wrong, with the rows of each source by split."""
    validation = [row for rows in read for row in rows["validation"]]
    with problems.noted():
        cli.model.objective.check_rows([row for rows in read for row in rows["train"]] + validation, sources)
    trainer = cli.make_trainer(logger=False)
    check_monitors(trainer.callbacks, num_validation=trainer.limit_val_batches and len(validation))


def _check_decoder(config: DecoderConfig, problems: Problems) -> Any:
    """Note what is wrong with a decoder's folder; return its tokenizer, or None."""
    tokenizer = None
    with problems.noted():
        tokenizer = load_tokenizer(config)
    with problems.noted():
        fingerprint_decoder(config.folder())
        read_config(config.folder())
    # A missing folder is one problem, not two.
    problems[:] = dict.fromkeys(problems)
    return tokenizer


def _check_model(
    parts: dict[str, Any], tokenizer: Any, encoders: Sequence[Any], trainable: list[str]
) -> None:
    """Join the parts without their weights: whether the decoder has what the injection needs, and all sizes fit."""
    decoder = without_weights(parts["decoder"].folder())
    check_vocabulary(tokenizer, decoder.get_input_embeddings().num_embeddings)
    joined = {"encoders": encoders, **{name: parts.get(name) for name in ("bind", "inject", "adapter")}}
    BindLLM(decoder, tokenizer, parts["decoder"], **joined).set_trainable(trainable)


def _check_memory(plan: RunPlan, limit: str | None, problems: Problems, console: Console) -> None:
    """Show what a run needs; that it does not fit is a problem, with what would."""
    lines, problem = memory_lines(plan, limit)
    for line in lines:
        console.print(line, markup=False)
    if problem:
        problems.append(problem)


def _check_encoder(
    entry: dict[str, Any], media: Sequence[Media], problems: Problems, console: Console
) -> Any:
    """Note what is wrong with an encoder of a recipe; return it, or None.

    A stranger's class is held to the whole contract. Ours are, by our tests, and may be large: of these, weights and
    one embedding are enough.
    """
    with problems.noted():
        encoder = build_own(entry)
        if entry["class_path"].startswith("bindllm."):
            encoder.fingerprint()
            first = next((item.modality for item in media if item.modality in encoder.modalities), None)
            for item in synthetic_media(first or encoder.modalities[0])[:1]:
                encoder.embed(item.modality, [encoder.prepare(item)])
        else:
            own = [
                name
                for name in encoder.modalities
                if name not in MODALITIES and not isinstance(encoder, HasExamples)
            ]
            samples = {name: spread(media, name, SAMPLES) for name in own}
            # A source that cannot be read is a problem of its own.
            untried = [name for name, some in samples.items() if len(some) < 2]
            for name in untried:
                line = (
                    f"{entry['class_path']} is not tried on {name}: no source has two different media of it"
                )
                console.print(line, markup=False)
            check_encoder(
                encoder,
                [item for some in samples.values() for item in some],
                modalities=[name for name in encoder.modalities if name not in untried],
            )
        return encoder
    return None


def _trusted(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the classes that a recipe trusts: its encoders, and the classes that it allows them to import."""
    allowed = [entry.get("init_args", {}).get("allow") or [] for entry in entries]
    return [entry["class_path"] for entry in entries] + [path for own in allowed for path in own]


def _check_cache(
    config: CacheConfig, encoders: Sequence[Any], problems: Problems, console: Console, *, output: str
) -> None:
    """Note a visual cache of a recipe that is damaged or made with another encoder; a missing one can be made later."""
    if not Path(config.folder).exists():
        line = (
            f"warning: the visual cache {config.folder} is not there. Training does without, the trained model does "
            f"not; once trained: bindllm index {config.folder} --checkpoint {output}"
        )
        console.print(line, markup=False)
        return
    with problems.noted():
        known = [encoder.fingerprint() for encoder in encoders]
        open_cache(config.folder, known, checkpoint=output, settings=config)


def _check_folder(folder: str, problems: Problems, *, allow: Sequence[str]) -> None:
    """Note what is wrong with a checkpoint folder."""
    with problems.noted():
        if Path(folder).is_dir() and not Path(folder, MANIFEST).is_file() and encoder_folder(folder):
            raise CheckpointError(
                f"{folder} is the folder of an encoder and no checkpoint: bindllm check --encoder {folder}"
            )
        manifest = read_manifest(folder)
        with problems.noted():
            read_weights(folder, manifest)
        with problems.noted():
            known = encoder_fingerprints(folder, manifest)
            choose_cache(None, read_cache_config(folder, manifest), known, checkpoint=folder)
        with problems.noted():
            _check_decoder(read_decoder(folder, manifest), problems)
        read_parts(folder, decoder=None, dtype=None, allow=allow)
    problems[:] = dict.fromkeys(problems)
