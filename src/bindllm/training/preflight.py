"""Checks of a recipe, a checkpoint or an encoder before a run; they note every problem instead of the first.

Nothing is trained or written; a few stored media are embedded again. Rows that cannot be used, media that cannot be
opened and texts that are too long are counted for each source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import ArgumentParser

from bindllm.cache.blend import CacheConfig, index_command
from bindllm.cache.visual_cache import choose_cache, open_cache
from bindllm.conversation import check_vocabulary
from bindllm.data.datamodule import BindData
from bindllm.data.embeddings import check_store
from bindllm.data.episodes.draw import PREVIEW, check_episodes, draw_episodes
from bindllm.data.preview import legend
from bindllm.data.report import Skipped, SourceReport, count_languages
from bindllm.data.rows import Row, Sample, make_sample, spread
from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.data.stream.loader import check_streams, is_training_stream
from bindllm.data.stream.samples import read_stream
from bindllm.data.stream.shards import expand_shards, is_stream
from bindllm.embeddings.datastore import open_datastore
from bindllm.embeddings.precompute import check_stored
from bindllm.encoders import Encoder, HasExamples, alignment_warnings, encoder_for, skipped_encoders
from bindllm.encoders.tokens import reduce_tokens, token_size
from bindllm.errors import BindLLMError, InputError, own_cause
from bindllm.media import MODALITIES, Media, open_image
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.checkpoint import DATASTORE, build_own, read_manifest, read_weights
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig, check_weights, fingerprint_decoder, load_tokenizer
from bindllm.model.injection import InjectConfig
from bindllm.model.injection.probe import probe
from bindllm.model.pretrained import encoder_fingerprints, read_cache_config, read_decoder, read_parts
from bindllm.testing import check_encoder, synthetic_media
from bindllm.training.memory import MEASURED_ROWS
from bindllm.training.optim import OptimConfig
from bindllm.training.run import run_folder
from bindllm.training.stages import check_base

PARTS = {"decoder": DecoderConfig, "bind": BindConfig, "inject": InjectConfig, "optim": OptimConfig}
"""Sections of a recipe's model that become dataclasses."""

PREVIEWED_ROWS = 3
"""Training rows that are printed with their label mask."""

SAMPLES = 3
"""Media of the sources that an encoder of a new modality is checked with if it has no examples of its own."""

OPENED_IMAGES, OPENED_MEDIA = 200, 20
"""Images of a source, or media of another modality, that are opened, evenly spread over its training rows."""

STREAMED_ROWS = 200
"""First rows of a stream that are read; their media are in memory."""

Read = list[tuple[dict[str, list[Row]], SourceReport]]
"""The rows of each source by split, and the report of each source."""


class Problems(list[str]):
    """The problems so far."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an error of the block instead of raising it."""
        try:
            yield
        except BindLLMError as error:
            self.append(str(error))


@dataclass
class CheckedParts:
    """The parts of a recipe that could be built.

    Attributes:
        parts: the dataclasses of the model by name.
        tokenizer: the decoder's tokenizer, or None.
        is_whole: no part is missing.
    """

    parts: dict[str, Any]
    encoders: list[Encoder]
    sources: list[SourceConfig]
    read: Read
    tokenizer: Any
    is_whole: bool

    def rows(self, split: str) -> list[Row]:
        """Return the rows of all sources in a split."""
        return [row for rows_of, _ in self.read for row in rows_of[split]]


def check_recipe(
    recipe: Mapping[str, Any],
    problems: Problems,
    say: Callable[[str], Any],
    *,
    previewed: int = PREVIEWED_ROWS,
) -> CheckedParts:
    """Note the problems of a recipe.

    Args:
        recipe: the resolved recipe: keys and values of `output`, `model` and `data`.
        previewed: number of training rows to print with their label mask.
    """
    # How to read this: parts first, then checks of several parts together. A part that failed is skipped in all later
    # checks, so that each problem is printed once.
    model, data, output = recipe["model"], recipe["data"], recipe["output"]
    with problems.noted():
        run_folder(output, store=data["store"], init_from=model["init_from"])
    checked = _build_parts(model, data, problems, say)
    parts, encoders = checked.parts, checked.encoders
    for warning in (*alignment_warnings(encoders), *skipped_encoders(encoders)):
        say(f"warning: {warning}")
    if not model["trainable"]:
        problems.append(
            "model.trainable is empty: nothing would be trained; name groups, such as [bind, inject]"
        )
    _check_store(data["store"], checked, problems)
    # Sizes are checked together only if each part is valid by itself: one mistake, one message.
    if checked.is_whole and checked.tokenizer is not None:
        with problems.noted():
            _check_model(checked, model["trainable"])
            _check_tokens(checked, data["store"], say)
    # None: an encoder could not be built, so a modality without an encoder is not a second problem.
    served = encoders if len(encoders) == len(model["encoders"]) else None
    if model["cache"] is not None:
        _check_cache(model["cache"], served, problems, say, output=output)
    if model["init_from"] is not None:
        check_checkpoint(model["init_from"], problems, allow=_trusted(model["encoders"]))
        if checked.is_whole and not problems:
            own = {name: parts.get(name) for name in ("decoder", "bind", "inject", "adapter", "context")}
            with problems.noted():
                for remark in check_base(model["init_from"], encoders=encoders, **own):
                    say(f"warning: {remark}")
    check_sources(checked.read, served, checked.tokenizer, data["max_length"], problems, say)
    if checked.tokenizer is not None and not problems:
        # Through the data module itself, so that the label mask is the one of training.
        keys = {key: data[key] for key in ("store", "batch_size", "max_length")}
        whole = BindData(checked.sources, tokenizer=checked.tokenizer, encoders=encoders, **keys)
        for line in (legend(), *whole.preview(previewed)) if previewed else ():
            say(line)
    return checked


def check_checkpoint(folder: str, problems: Problems, *, allow: Sequence[str]) -> None:
    """Note the problems of a checkpoint folder.

    Args:
        allow: import paths of classes outside bindllm that it may name.
    """
    known = len(problems)
    with problems.noted():
        manifest = read_manifest(folder)
        # Each check is noted by itself: one broken file must not hide the others.
        with problems.noted():
            read_weights(folder, manifest)
        with problems.noted():
            fingerprints = encoder_fingerprints(folder, manifest)
            choose_cache(None, read_cache_config(folder, manifest), fingerprints, checkpoint=folder)
        with problems.noted():
            _check_decoder(read_decoder(folder, manifest), problems)
        # Built on the meta device: shapes are compared without a copy of the decoder.
        config, parts, tensors = read_parts(folder, decoder=None, dtype=None, allow=allow)
        model = BindLLM.build_empty(config, **parts)
        model.check_trainable_state(tensors, source=folder)
        if parts["context"] is not None:
            open_datastore(None, parts["encoders"], own=Path(folder, DATASTORE))
        probe(model.decoder, model.injection)
    problems[known:] = dict.fromkeys(problems[known:])


def read_sources(sources: Sequence[SourceConfig], problems: Problems) -> Read:
    """Read every source that can be read; only the first rows of a stream for training."""
    read = []
    for check in (check_episodes, check_streams):
        with problems.noted():
            check(sources)
    # The first rows of a stream are enough: reading all shards may take hours.
    for number, source in enumerate(sources):
        with problems.noted():
            if is_training_stream(source):
                rows, report = read_stream(source, number, limit=STREAMED_ROWS)
                report.shards = len(expand_shards(source.path))
            else:
                rows, report = (read_stream if is_stream(source.path) else read_source)(source, number)
            if source.episodes is not None and source.episodes.negatives == "hard":
                report.remarks.add(PREVIEW, source.path)
            read.append((draw_episodes(rows, sources, report.skipped), report))
    return read


def check_sources(
    read: Read,
    encoders: Sequence[Encoder] | None,
    tokenizer: Any,
    max_length: int,
    problems: Problems,
    say: Callable[[str], Any],
) -> None:
    """Print the rows of each source and the skipped ones.

    Args:
        encoders: they open media other than images; None if they are not known.
        tokenizer: counts tokens; None if it is not known.
    """
    # Sources that cannot be read are problems already: no row to train on is not a second one.
    num_train, known = 0, len(problems)
    for rows, report in read:
        # Counted before media are opened, which may raise.
        num_train += len(rows["train"])
        with problems.noted():
            _open_media(rows["train"], report, encoders)
        counts = ", ".join(f"{len(part):,} {split}" for split, part in rows.items())
        if report.shards:
            counts = f"the first {len(rows['train']):,} rows were read"
        say(f"{report.path}: {report.counted}; {counts}")
        # Printed after the skipped rows, which tokenizing adds to.
        lengths = None
        if tokenizer is not None:
            with problems.noted():
                lengths = _lengths(rows["train"], report.skipped, tokenizer, max_length)
        for kind, found in (("skipped", report.skipped), ("note", report.remarks)):
            for line in found.lines():
                say(f"  {kind}: {line}")
        if report.warning:
            problems.append(f"{report.path}: {report.warning}")
        if lengths is not None:
            say(f"  {lengths}")
    if read and not num_train and len(problems) == known:
        problems.append("the sources have no row to train on")


def _build_parts(
    model: Mapping[str, Any], data: Mapping[str, Any], problems: Problems, say: Callable[[str], Any]
) -> CheckedParts:
    """Build the parts of a model, read the data and try the encoders."""
    further = {"adapter": AdapterConfig, "context": ContextConfig}
    kinds = {**PARTS, **{name: kind for name, kind in further.items() if model[name] is not None}}
    # A wrong part becomes None, and the others are still built and checked.
    built = {name: _build(kind, model[name], problems) for name, kind in kinds.items()}
    parts = {name: part for name, part in built.items() if part is not None}
    tokenizer = _check_decoder(parts["decoder"], problems) if "decoder" in parts else None
    sources = [_build(SourceConfig, entry, problems) for entry in data["sources"]]
    sources = [source for source in sources if source is not None]
    read = read_sources(sources, problems)
    media = [item for rows_of, _ in read for row in rows_of["train"] for item in row.media]
    tried = [_check_encoder(entry, media, problems, say) for entry in model["encoders"]]
    encoders = [encoder for encoder in tried if encoder is not None]
    is_whole = parts.keys() == kinds.keys() and len(encoders) == len(tried)
    return CheckedParts(parts, encoders, sources, read, tokenizer, is_whole)


def _build(kind: type, values: Mapping[str, Any], problems: Problems) -> Any:
    """Build a dataclass of a recipe; note the complaints about each of its fields; None if there are any."""
    # jsonargparse converts the values as for a run; `__post_init__` of the dataclass checks them.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)

    def build(chosen: Mapping[str, Any]) -> Any:
        try:
            return parser.instantiate(parser.parse_object({"value": dict(chosen)})).value
        except ValueError as error:
            # jsonargparse wraps the error of a part that may also be null, such as the episodes of a source.
            raise own_cause(error) or error from error

    try:
        return build(values)
    except BindLLMError as error:
        whole = str(error)
    without_default = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    required = {name: values[name] for name in without_default}
    # A dataclass raises at its first wrong field: each field is tried with the required ones only.
    single = Problems()
    for name, value in values.items():
        with single.noted():
            build({**required, name: value})
    # A field may be wrong only without the others, such as the options of another optimizer.
    problems += dict.fromkeys(single if len(single) > 1 or whole in single else [whole])
    return None


def _check_store(store: str | None, checked: CheckedParts, problems: Problems) -> None:
    """Note a store whose folder cannot be created, or whose embeddings are no longer those of their encoder."""
    with problems.noted():
        check_store(store, checked.encoders)
    if store is None:
        return
    # The nearest ancestor that exists decides: missing folders are created by the run.
    there = next(path for path in (Path(store), *Path(store).absolute().parents) if path.exists())
    if not there.is_dir():
        problems.append(f"data.store {store} cannot be a folder: {there} is a file; choose another folder")
    media = [item for row in checked.rows("train") for item in row.media]
    for encoder in checked.encoders:
        with problems.noted():
            check_stored(store, encoder, media)


def _check_decoder(config: DecoderConfig, problems: Problems) -> Any:
    """Note the problems of a decoder's folder; return its tokenizer, or None."""
    tokenizer, known = None, len(problems)
    with problems.noted():
        tokenizer = load_tokenizer(config)
    with problems.noted():
        fingerprint_decoder(config.folder())
        check_weights(config.folder())
    # A missing folder is one problem, not two.
    problems[known:] = dict.fromkeys(problems[known:])
    return tokenizer


def _check_model(checked: CheckedParts, trainable: list[str]) -> None:
    """Build the model without its weights: the injection finds its layers, and all sizes fit."""
    parts, tokenizer = checked.parts, checked.tokenizer
    joined = {name: parts.get(name) for name in ("bind", "inject", "adapter", "context")}
    # On the meta device: seconds, also for a decoder of many gigabytes.
    model = BindLLM.build_empty(parts["decoder"], tokenizer, encoders=checked.encoders, **joined)
    probe(model.decoder, model.injection)
    check_vocabulary(tokenizer, model.decoder.get_input_embeddings().num_embeddings)
    model.set_trainable(trainable)
    if model.adapter is not None:
        # With the biases that this decoder gets.
        parts["adapter"] = model.adapter.config


def _check_tokens(checked: CheckedParts, store: str | None, say: Callable[[str], Any]) -> None:
    """Print how much of the disk the tokens of the media take, if the model has more than one bind token."""
    bind, encoders = checked.parts["bind"], checked.encoders
    if bind.tokens == 1:
        return
    token_size(encoders, bind.token_modalities)
    # Media that are streamed for training are not stored.
    stored = [
        rows for parts, report in checked.read if store and not report.shards for rows in parts.values()
    ]
    media = list(dict.fromkeys(item for rows in stored for row in rows for item in row.media))
    for modality in bind.token_modalities:
        own = [item for item in media if item.modality == modality]
        for item in [*synthetic_media(modality), *own][: min(1, len(own))]:
            encoder = encoder_for(modality, encoders)
            (tokens,) = encoder.embed(modality, [encoder.prepare(item)], tokens=True).tokens
            size = len(own) * reduce_tokens(tokens).nbytes
            say(f"tokens of {len(own):,} {modality} media: about {size / 1e6:,.1f} MB in {store}")


def _check_encoder(
    entry: Mapping[str, Any], media: Sequence[Media], problems: Problems, say: Callable[[str], Any]
) -> Encoder | None:
    """Note the problems of an encoder of a recipe; return it, or None.

    The whole contract is checked for classes outside bindllm. Ours pass it in our tests, and may be large: for these,
    weights and one embedding are enough.
    """
    path = entry["class_path"]
    with problems.noted():
        encoder = build_own(entry)
        if path.startswith("bindllm."):
            encoder.fingerprint()
            first = next((item.modality for item in media if item.modality in encoder.modalities), None)
            for item in synthetic_media(first or encoder.modalities[0])[:1]:
                encoder.embed(item.modality, [encoder.prepare(item)])
            return encoder
        # Modalities that we cannot synthesize are tried with media of the sources.
        own = [
            name
            for name in encoder.modalities
            if name not in MODALITIES and not isinstance(encoder, HasExamples)
        ]
        samples = {name: _some(media, name, SAMPLES) for name in own}
        # A source that cannot be read is a problem of its own.
        untried = [name for name, some in samples.items() if len(some) < 2]
        for name in untried:
            say(f"{path} is not tried on {name}: no source has two different media of it")
        chosen = [item for some in samples.values() for item in some]
        check_encoder(
            encoder, chosen, modalities=[name for name in encoder.modalities if name not in untried]
        )
        return encoder
    return None


def _trusted(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the classes that a recipe trusts: its encoders, and the classes that it allows them to import."""
    allowed = [entry.get("init_args", {}).get("allow") or [] for entry in entries]
    return [entry["class_path"] for entry in entries] + [path for own in allowed for path in own]


def _check_cache(
    cache: str | Mapping[str, Any],
    encoders: Sequence[Encoder] | None,
    problems: Problems,
    say: Callable[[str], Any],
    *,
    output: str,
) -> None:
    """Note a visual cache that is damaged or built with another encoder; a missing one can be built later."""
    config = _build(CacheConfig, {"folder": cache} if isinstance(cache, str) else cache, problems)
    if config is None or encoders is None:
        return
    if not Path(config.folder).exists():
        say(
            f"warning: the visual cache {config.folder} does not exist. Training does not need it, the trained model "
            f"does; once trained: {index_command(config.folder, output)}"
        )
        return
    with problems.noted():
        known = [encoder.fingerprint() for encoder in encoders]
        open_cache(config.folder, known, checkpoint=output, settings=config)


def _some(media: Sequence[Media], modality: str, count: int) -> list[Media]:
    """Return at most this many different media of a modality, evenly spread."""
    # Different ones: a source may repeat an image for each of its questions.
    return spread(list(dict.fromkeys(item for item in media if item.modality == modality)), count)


def _open_media(rows: Sequence[Row], report: SourceReport, encoders: Sequence[Encoder] | None) -> None:
    """Open some media of each modality of a source, and count those that cannot be opened.

    Raises:
        InputError: none of the media of a modality can be opened, or no encoder serves it.
    """
    # A sample is enough to find a wrong folder or format; single broken files are counted by the run itself.
    media = [item for row in rows for item in row.media]
    for modality in dict.fromkeys(item.modality for item in media):
        encoder = None if encoders is None else encoder_for(modality, encoders)
        # Images are opened by us, all others only by the encoder that knows their files.
        noun = "image" if modality == "image" else f"{modality} media"
        chosen = _some(media, modality, OPENED_IMAGES if modality == "image" else OPENED_MEDIA)
        failed = []
        for item in chosen:
            try:
                if modality == "image":
                    open_image(item.source)
                elif encoder is not None:
                    encoder.prepare(item)
            except BindLLMError as error:
                failed.append(str(error))
                report.skipped.add(f"{noun} that cannot be opened (of {len(chosen):,} tried)", str(error))
        # All of them: the folder or the format is wrong, not a few files.
        if failed and len(failed) == len(chosen):
            raise InputError(f"{report.path}: not one {noun} can be opened: {failed[0]}")


def _lengths(rows: Sequence[Row], skipped: Skipped, tokenizer: Any, max_length: int) -> str:
    """Return a line about the tokens of rows; rows that cannot be used are counted in ``skipped``.

    Raises:
        InputError: none of the rows can be used.
    """
    if not rows:
        return "no rows to train on"
    samples, refused = list[Sample](), Skipped()
    for row in spread(rows, MEASURED_ROWS):
        try:
            samples.append(make_sample(row, tokenizer, max_length))
        except InputError as error:
            refused.add(str(error), row.name)
    skipped.update(refused)
    if not samples:
        reasons = "; ".join(refused.lines())
        raise InputError(
            f"with data.max_length {max_length} none of {refused.total:,} rows can be used: {reasons}"
        )
    # The longer side of a pair counts.
    sides = [(sample, sample.rejected or sample) for sample in samples]
    lengths = [max(len(side.input_ids) for side in both) for both in sides]
    supervised = [max(side.num_supervised for side in both) for both in sides]
    cut = sum(sample.truncated for sample in samples)
    return (
        f"tokens per row: {median(lengths):.0f} (longest {max(lengths)}), supervised: {median(supervised):.0f} "
        f"(longest {max(supervised)}); of {len(samples) + refused.total:,} rows {cut} are truncated, {refused.total} "
        "cannot be used" + "".join(f"\n  {name}: {words}" for name, words in count_languages(samples).items())
    )
