"""``bindllm generate``: ask a checkpoint folder about images, audio and every other modality of its encoders."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from bindllm.cli.arguments import refuse_together
from bindllm.cli.options import (
    CacheOptions,
    PositiveNumber,
    Probability,
    build_encoders,
    named_media,
    print_whole,
    read_media,
)
from bindllm.data.source_config import CAPTION_FORMATS, Format, SourceConfig
from bindllm.errors import UsageError, printable, printable_lines
from bindllm.media import Media
from bindllm.shots import RETRIEVED, Shot, ShotsBy

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM
    from bindllm.parallel import RunContext

NUM_SHOTS = 4


@dataclass(frozen=True)
class MediaOptions:
    """Media (each option may be repeated)."""

    image: tuple[str, ...] = ()
    """an image file"""
    video: tuple[str, ...] = ()
    """a video file"""
    audio: tuple[str, ...] = ()
    """an audio file, or a video for its audio"""
    text: tuple[str, ...] = ()
    """a text that the encoder embeds like an image; the decoder does not read it"""
    point: tuple[str, ...] = ()
    """a point cloud or a mesh"""
    depth: tuple[str, ...] = ()
    """a depth map"""
    thermal: tuple[str, ...] = ()
    """a thermal image"""
    imu: tuple[str, ...] = ()
    """the signal of an inertial measurement unit"""
    media: tuple[str, ...] = ()
    """MODALITY:FILE, for any other modality that an encoder of the checkpoint serves, such as radar:sweep.npy"""

    def read(self) -> list[Media]:
        """Return the media in the order of the modalities."""
        files = {name: values for name, values in asdict(self).items() if name != "media"}
        # One option per modality of ImageBind; others go through MODALITY:FILE.
        named = [named_media(modality, source) for modality, sources in files.items() for source in sources]
        return named + [read_media(text) for text in self.media]


@dataclass(frozen=True)
class SamplingOptions:
    """Decoding."""

    max_new_tokens: PositiveInt = 64
    """length of the longest answer"""
    temperature: PositiveNumber | None = None
    """sample at this temperature (default: the most likely answer)"""
    top_p: Probability | None = None
    """sample from the most likely tokens that sum to this probability"""
    seed: int = 0
    """seed of sampling"""

    @property
    def given(self) -> dict[str, Any]:
        """The options of `BindLLM.generate` that have a value."""
        # Seed and streaming belong to the command; all others have the names of Hugging Face.
        options = {name: value for name, value in asdict(self).items() if name not in ("seed", "stream")}
        given = {name: value for name, value in options.items() if value not in (None, ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


@dataclass(frozen=True)
class DecodingOptions(SamplingOptions):
    """Decoding."""

    num_beams: PositiveInt | None = None
    """number of beams of a beam search"""
    stream: bool = False
    """print the answer while it is generated"""
    min_probability: Probability | None = None
    """answer "I do not recognize this." if a token of an answer about media is less likely than this"""
    stop_strings: tuple[str, ...] = ()
    """a text that ends the answer and is its last part; may be repeated"""


@dataclass(frozen=True)
class TableOptions:
    """Table of questions (docs/generate.md)."""

    input: str | None = None
    """table of questions in any format of docs/data.md, with or without answers; needs --output"""
    output: str | None = None
    """file for the answers, such as answers.jsonl: one line for each row of the table, in its order. An interrupted
    command resumes"""
    prompts: dict[str, str] | None = None
    """instead of the prompt, one for each language of the column language, such as '{"en": "What is this?", "es": "¿Qué
    es esto?"}'"""
    batch_size: PositiveInt = 16
    """rows of the table that are answered at the same time"""
    devices: PositiveInt = 1
    """number of devices that share the rows"""
    log_probability: bool = False
    """also write the log-probability of each answer"""
    inside_only: bool = False
    """refuse files outside of the folder of the table: for tables that you do not trust"""

    def check(self, **others: Any) -> None:
        """Refuse options that contradict each other.

        Args:
            **others: options about a single question.
        """
        if self.input is None and self != TableOptions():
            raise UsageError(
                "--output, --devices and the other options of a table need one: give --input TABLE"
            )
        if self.input is not None and self.output is None:
            raise UsageError("--input needs a file for the answers: give --output answers.jsonl")
        for name, value in others.items() if self.input is not None else ():
            refuse_together(input=self.input, **{name: value})


@dataclass(frozen=True)
class ShotOptions:
    """Worked examples before the question (docs/few-shot.md)."""

    shots: str | None = None
    """table of worked examples, such as shots.jsonl"""
    shots_format: Format = "caption"
    """format of its rows, as of a data source (docs/data.md)"""
    shots_modality: str = "image"
    """modality of its files, as of a data source"""
    shots_inside_only: bool = False
    """skip rows that name files outside of the folder of the table: for tables that you do not trust"""
    num_shots: NonNegativeInt = NUM_SHOTS
    """number of shots"""
    shots_by: ShotsBy = "order"
    """order of the table, at random (by --seed), or nearest to the question: by media, by text, or by media and then
    text"""
    nearest_first: bool = False
    """put the nearest shot first (default: last, next to the question)"""
    store: str = "data/store"
    """folder of the embedding store, for the nearest shots"""

    def read(self, prompt: str) -> list[Shot]:
        """Return the shots of the table; the question of a caption is the prompt.

        Raises:
            UsageError: an option without effect.
        """
        default = asdict(ShotOptions())
        if given := [name for name, value in asdict(self).items() if value != default[name]]:
            if self.shots is None:
                raise UsageError(f"--{given[0]} needs worked examples: give --shots TABLE")
            if self.shots_by not in RETRIEVED and not {"nearest_first", "store"}.isdisjoint(given):
                raise UsageError(
                    f"--{given[-1]} needs the nearest shots: give --shots_by media, text or media_text"
                )
        if self.shots is None:
            return []

        from bindllm.evaluation.support import read_shots

        config = SourceConfig(
            self.shots,
            format=self.shots_format,
            modality=self.shots_modality,
            allow_outside=not self.shots_inside_only,
        )
        # In vqa, the prompt of a source is a frame around the question of each row.
        if self.shots_format in CAPTION_FORMATS:
            config = replace(config, prompt=prompt)
        shots, report = read_shots(config)
        _print_notes(f"{self.shots}: skipped {line}" for line in report.skipped.lines())
        return shots

    def choose(
        self, shots: Sequence[Shot], model: BindLLM, prompt: str, media: Sequence[Media], *, seed: int
    ) -> list[Shot]:
        """Return the shots of the question, in the order of the prompt.

        Raises:
            UsageError: nearest by media or text, which the question or the model lacks.
        """
        from bindllm.data.embeddings import MediaEmbeddings
        from bindllm.embeddings.embedder import embed_groups
        from bindllm.encoders import prepare
        from bindllm.evaluation.support import Support
        from bindllm.parallel import RunContext

        support = Support(shots, self.shots_by, seed=seed, nearest_first=self.nearest_first)
        if self.shots_by in RETRIEVED:
            self._check_nearest(model, media)
            context = RunContext(device=model.device, progress=sys.stderr.isatty())
            failed = support.embed([], MediaEmbeddings(model.encoders, self.store), context)
            _print_notes(f"{self.shots}: skipped a shot: {reason}" for reason in failed.values())
            # Not in the store: a cache of its images would count each question as a new one.
            embed = partial(embed_groups, encoders=model.encoders, device=model.device)
            support.ask = lambda groups: embed(groups).embeddings
        if not support.knows_media:
            # A file that cannot be read costs a shot, not the answer.
            support.read = partial(prepare, encoders=model.encoders)
        chosen, num_excluded, failed = support.choose(prompt, media, self.num_shots)
        _print_notes(f"{self.shots}: skipped a shot: {reason}" for reason in failed)
        if num_excluded:
            _print_notes([f"{self.shots}: skipped {num_excluded} x the question itself"])
        if len(chosen) < self.num_shots:
            _print_notes([f"{self.shots}: only {len(chosen)} of {self.num_shots} shots were found"])
        return chosen

    def _check_nearest(self, model: BindLLM, media: Sequence[Media]) -> None:
        if self.shots_by != "text" and not media:
            raise UsageError(
                f"--shots_by {self.shots_by} compares media, and the question has none: give it one, as --image FILE"
            )
        check_texts(self.shots_by, model)


def check_texts(shots_by: ShotsBy, model: BindLLM) -> None:
    """Refuse to compare texts if no encoder of the model serves them."""
    served = sorted({name for encoder in model.encoders for name in encoder.modalities})
    if shots_by in ("text", "media_text") and "text" not in served:
        raise UsageError(
            f"--shots_by {shots_by} compares texts, and no encoder of the model serves texts, only "
            f"{', '.join(served)}: use --shots_by media"
        )


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    revision: str | None = None
    """commit of a checkpoint on the hub, whose id is given as the checkpoint"""
    decoder: str | None = None
    """folder of the decoder, if it has moved since training"""
    quantize: Literal["nf4", "int8", "none"] | None = None
    """load the decoder in 4 or 8 bits, or in full (default: as in training)"""
    tokens: PositiveInt | None = None
    """bind tokens of an image, at most as many as in training (default: all)"""
    datastore: str | None = None
    """folder of records that a model with context reads (default: those of its training)"""
    records: NonNegativeInt | None = None
    """number of records for each media; 0: none (default: as in training)"""
    encoder: tuple[str, ...] = ()
    """import path or folder of a further encoder, for a modality that those of the checkpoint do not serve; may be
    repeated. Arguments of its constructor are given as --encoder.NAME VALUE"""
    allow: tuple[str, ...] = ()
    """import path of a class outside bindllm that the checkpoint may name; may be repeated"""

    def load(
        self,
        checkpoint: str,
        overrides: Sequence[str],
        *,
        cache: str | bool | None,
        device: str | None = None,
    ) -> BindLLM:
        """Load a checkpoint; ``overrides`` as for `build_encoders`, the others as for `BindLLM.from_pretrained`."""
        from bindllm.model.bindllm import BindLLM

        return BindLLM.from_pretrained(
            checkpoint,
            revision=self.revision,
            decoder=self.decoder,
            device=device,
            allow=self.allow,
            encoders=build_encoders(self.encoder, overrides, allow=self.allow),
            cache=cache,
            quantize=False if self.quantize == "none" else self.quantize,
            tokens=self.tokens,
            # Without records no datastore is read, also if the checkpoint has none.
            datastore=self.datastore if self.records != 0 else False,
            records=self.records,
        )


@dataclass(frozen=True)
class LoadCacheOptions(CacheOptions):
    """Visual cache (docs/cache.md; default: the cache that the checkpoint names)."""

    no_cache: bool = False
    """do not use a visual cache"""

    @property
    def needing_cache(self) -> str | None:
        """A given option that has no effect without a cache."""
        return f"--cache_{next(iter(self.settings))}" if self.settings else None


@dataclass(frozen=True)
class ModelCacheOptions(LoadCacheOptions):
    """Visual cache (docs/cache.md; default: the cache that the checkpoint names)."""

    show_neighbors: bool = False
    """after the answer, print the retrieved images"""

    @property
    def needing_cache(self) -> str | None:
        """A given option that has no effect without a cache."""
        return super().needing_cache or ("--show_neighbors" if self.show_neighbors else None)


def generate(
    checkpoint: str,
    prompt: str = "Describe this image.",
    *,
    media: MediaOptions = MediaOptions(),
    table: TableOptions = TableOptions(),
    examples: ShotOptions = ShotOptions(),
    decoding: DecodingOptions = DecodingOptions(),
    model: ModelOptions = ModelOptions(),
    cache: ModelCacheOptions = ModelCacheOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Ask a checkpoint about images, audio and other media, or all questions of a table.

    Several media are fused into one embedding.

    Args:
        checkpoint: folder that bindllm fit wrote
        prompt: the question; with a table, that of rows which have media and no question

    Example:
        bindllm generate checkpoints/scenes "Describe this image." --image cat.png
    """
    # How to read this: contradictions first, since loading takes long; then the answer; then the neighbors.
    refuse_together(cache=cache.cache, no_cache=cache.no_cache)
    if decoding.stream and (decoding.num_beams or 1) > 1:
        raise UsageError("--stream cannot show a beam search: its answer is known only at its end")
    # Files are named here and opened by the encoders.
    shown, shots = media.read(), examples.read(prompt)
    table.check(
        media=tuple(shown), shots=examples.shots, stream=decoding.stream, show_neighbors=cache.show_neighbors
    )
    if table.input is not None:
        return _answer_table(checkpoint, prompt, table, decoding, model, cache, overrides)
    loaded = load_with_cache(checkpoint, model, cache, overrides)
    given = {**decoding.given, "seed": decoding.seed}
    if shots:
        given["shots"] = examples.choose(shots, loaded, prompt, shown, seed=decoding.seed)
    if decoding.stream:
        # Control characters are escaped in each piece: a model may print any byte.
        for piece in loaded.stream(prompt, shown, **given):
            print(printable_lines(piece), end="", flush=True)
        print()
    else:
        print(printable_lines(loaded.generate(prompt, shown, **given)))
    if cache.show_neighbors:
        print_neighbors(loaded, shown)
    return 0


def _answer_table(
    checkpoint: str,
    prompt: str,
    table: TableOptions,
    decoding: DecodingOptions,
    model: ModelOptions,
    cache: LoadCacheOptions,
    overrides: Sequence[str],
) -> int:
    """Answer the rows of a table, on one device or several; return the exit code."""
    # Imported late, so that --help and wrong options answer at once.
    from bindllm.cli.recipes.fit import launch
    from bindllm.cli.recipes.recipe import quiet
    from bindllm.evaluation.answering.table import generate_table

    counts = []

    def work(context: RunContext) -> None:
        loaded = load_with_cache(checkpoint, model, cache, overrides, device=str(context.device))
        source = SourceConfig(table.input, prompts=table.prompts, allow_outside=not table.inside_only)
        options = {"batch_size": table.batch_size, "log_probability": table.log_probability, "prompt": prompt}
        options |= {"context": context, "seed": decoding.seed, **decoding.given}
        counts.append(generate_table(loaded, source, table.output, **options))

    own = {"table": table, "decoding": decoding, "model": model, "cache": cache, "overrides": overrides}
    with quiet():
        # The other processes run this command again, from its start.
        is_first = launch(
            {"devices": table.devices}, work, again=partial(generate, checkpoint, prompt, **own)
        )
    if not is_first or not counts:
        return 0
    rows, errors = counts[0]
    print(
        f"{table.output}: {rows - errors:,} answers" + (f", {errors:,} rows with an error" if errors else "")
    )
    return 1 if rows and errors == rows else 0


def _print_notes(lines: Iterable[str]) -> None:
    """Print facts about the shots next to the answer, not into it."""
    for line in lines:
        print(printable_lines(line), file=sys.stderr)


def load_with_cache(
    checkpoint: str,
    options: ModelOptions,
    cache: LoadCacheOptions,
    overrides: Sequence[str],
    *,
    device: str | None = None,
) -> BindLLM:
    """Load the checkpoint, and change how its cache is blended in as the options say."""
    # None: the cache that the checkpoint names.
    model = options.load(checkpoint, overrides, cache=False if cache.no_cache else cache.cache, device=device)
    # An option without effect would give an answer other than the user expects.
    if model.cache is None and cache.needing_cache:
        raise UsageError(
            f"{cache.needing_cache} needs a visual cache, and {checkpoint} names none: give --cache FOLDER"
        )
    # Only the given settings replace those of the checkpoint.
    if cache.settings:
        model.cache.settings = replace(model.cache.settings, **cache.settings)
    return model


def print_neighbors(model: BindLLM, media: Sequence[Media], **options: Any) -> None:
    """Print the images that the model's cache blends into the embedding of media, nearest first."""
    from rich.table import Table
    from rich.text import Text

    from bindllm.cache.visual_cache import nearest_images

    cache = model.cache
    if not media:
        print("no images were retrieved: the prompt has no media")
        return
    if skipped := sorted({item.modality for item in media} & set(cache.settings.skip)):
        print(f"no images were retrieved: media with {', '.join(skipped)} are not blended")
        return
    table = Table(
        title=f"retrieved images, blended with weight {cache.settings.weight:g}", title_justify="left"
    )
    table.add_column("similarity", justify="right")
    table.add_column("image", no_wrap=True)
    # Not blended: the neighbors are those of the media themselves.
    for similarity, name in nearest_images(cache, model.encode([list(media)], cache=False, **options)):
        table.add_row(f"{similarity:.3f}", Text(printable(name)))
    print_whole(table)
