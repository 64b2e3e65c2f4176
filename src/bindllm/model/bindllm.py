"""`BindLLM`: a frozen decoder, frozen encoders, and the small trainable parts between them.

media -> Encoder -> embedding [E] -> BindNetwork -> [D] -> Injection -> decoder -> text
                    tokens [n, C]                   [N, D], with more than one bind token

After ImageBind-LLM (arXiv 2309.03905).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bindllm.cache.blend import CacheConfig
from bindllm.cache.visual_cache import CacheChoice, VisualCache, check_cache
from bindllm.embeddings.datastore import Datastore
from bindllm.embeddings.embedder import GroupEmbeddings, RecentEmbeddings, embed_groups
from bindllm.encoders import Encoder, alignment_warnings, skipped_encoders
from bindllm.encoders.fusion import common_size
from bindllm.encoders.tokens import token_size
from bindllm.errors import InputError
from bindllm.media import Media, check_media
from bindllm.model.adapter import Adapter, AdapterConfig
from bindllm.model.bind_network import BindConfig, BindNetwork
from bindllm.model.checkpoint import check_keys, describe_model, push_model, save_model
from bindllm.model.context import ContextConfig, build_context
from bindllm.model.context.records import CONTEXT_INPUTS, find_records, read_records
from bindllm.model.decoder import (
    BindOutput,
    DecoderConfig,
    choose_positions,
    load_decoder,
    load_tokenizer,
    num_positions,
    projecting,
    without_weights,
)
from bindllm.model.generation import (
    Prompt,
    answer_settings,
    check_options,
    check_stream,
    decode_answers,
    generate_options,
    is_one,
    part_modalities,
    prepare_batch,
    seeded,
    shots_limit,
    stream_text,
)
from bindllm.model.generation.scores import log_probability, replace_unsure
from bindllm.model.generation.shared import Prompts, generate_ids
from bindllm.model.groups import ENCODERS, parameter_groups, set_trainable
from bindllm.model.injection import InjectConfig, Injection, check_kind
from bindllm.model.injection.attend import checkpointed
from bindllm.model.injection.probe import probe
from bindllm.model.layers import find_layers
from bindllm.model.pretrained import load_model


class BindLLM(nn.Module):
    """A language model with new modalities.

    Args:
        decoder: a frozen Hugging Face causal language model; hooks are placed on its layers.
        tokenizer: its tokenizer, with a chat template.
        config: the decoder's name, as it is written to checkpoints.
        encoders: the frozen encoders; all must have the same embedding size.
        bind: shape of the bind network, and the number of bind tokens.
        inject: kind of injection; more than one bind token needs ``attend`` or ``cross``.
        adapter: the tuned tensors of the decoder. None: the decoder stays as it is.
        context: shape of the context perceivers (docs/context.md). None: the model reads no retrieved records.
        cache_config: the visual cache that checkpoints name. Only `from_pretrained` opens it.
        origin: source and license of the trained tensors, for the model cards of all folders.
        is_probed: whether this injection was tried in this decoder before, as that of a checkpoint was.

    Attributes:
        cache: the default visual cache of all calls, or None.
        datastore: the default datastore of all calls, or None.

    Example:
        model = BindLLM.from_pretrained("checkpoints/scenes")
        model.generate("Describe this image.", media=[Media.image("cat.png")])
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: DecoderConfig,
        *,
        encoders: Sequence[Encoder],
        bind: BindConfig | None = None,
        inject: InjectConfig | None = None,
        adapter: AdapterConfig | None = None,
        context: ContextConfig | None = None,
        cache_config: CacheConfig | None = None,
        origin: str = "",
        is_probed: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.cache_config, self.origin = config, cache_config, origin
        self.cache: VisualCache | None = None
        self.datastore: Datastore | None = None
        self.bind_config, self.inject_config = bind or BindConfig(), inject or InjectConfig()
        self.tokenizer, self.encoders = tokenizer, tuple(encoders)
        # Composite configs (image-text models) hold the language model's sizes in a text config.
        width = decoder.config.get_text_config().hidden_size
        size, sizes = None, (common_size(self.encoders), width)
        if self.bind_config.reads_tokens:
            check_kind(self.inject_config, self.bind_config.tokens)
            size = token_size(self.encoders, self.bind_config.token_modalities)
        self.bind = BindNetwork(*sizes, self.bind_config, size).to(decoder.device)
        self.context = context and build_context(*sizes, context, self.inject_config.kind).to(decoder.device)
        # Before the injection: its term then passes through the adapter of the output projection.
        self.adapter = None if adapter is None else Adapter(decoder, adapter)
        # After the adapter, since hooks must see the final modules. Gates start at zero, so nothing changes yet.
        size = None if context is None else self.context.output_size
        self.injection = Injection(decoder, self.inject_config, context_width=size).to(decoder.device)
        self.decoder = decoder.eval()
        # DDP adds up the gradients of parameters that it finds here.
        self.tuned = nn.ParameterList(value for _, value in self.parameter_groups().get(ENCODERS, ()))
        if (head := decoder.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(choose_positions)
        # `check` probes a model without weights itself, since loading a checkpoint builds one too.
        if decoder.device.type != "meta":
            for warning in (*alignment_warnings(self.encoders), *skipped_encoders(self.encoders)):
                logging.getLogger("bindllm").warning(warning)
            if not is_probed:
                probe(decoder, self.injection)

    @classmethod
    def build(cls, decoder: DecoderConfig, *, device: str | None = None, **parts: Any) -> Self:
        """Load the decoder and join untrained parts to it: the model answers exactly like the plain decoder.

        Args:
            decoder: name and dtype of the decoder.
            device: by default the accelerator that torch finds, else the CPU.
            **parts: ``encoders``, ``bind``, ``inject``, ``adapter`` and ``context`` as for the class.
        """
        return cls(load_decoder(decoder, device=device), load_tokenizer(decoder), decoder, **parts)

    @classmethod
    def build_empty(
        cls, decoder: DecoderConfig, tokenizer: PreTrainedTokenizerBase | None = None, **parts: Any
    ) -> Self:
        """Build a model on the meta device, with names and shapes only, to check that its parts fit.

        Args:
            decoder: only its config is read.
            tokenizer: the decoder's tokenizer; None: no texts are rendered.
            **parts: as for `build`.
        """
        network = without_weights(decoder.folder())
        with torch.device("meta"):
            return cls(network, tokenizer, decoder, **parts)

    @property
    def device(self) -> torch.device:
        """The device of the decoder."""
        return self.decoder.device

    @cached_property
    def settings(self) -> GenerationConfig:
        """The generation settings of the model, see `answer_settings`; options of a call win over them."""
        return answer_settings(self.decoder, self.tokenizer)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the trainable parts; the frozen decoder stays in eval mode."""
        super().train(mode)
        self.decoder.eval()
        return self

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return the trainable groups: names, and the parameters under the names of the checkpoint."""
        return parameter_groups(self)

    def set_trainable(self, names: Sequence[str]) -> None:
        """Let the named groups be trained and freeze everything else."""
        set_trainable(self, names)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the tensors of all groups by name, as a checkpoint holds them."""
        return {name: value.detach() for group in self.parameter_groups().values() for name, value in group}

    @torch.no_grad()
    def load_trainable_state(self, tensors: dict[str, Tensor], *, source: str = "the state") -> None:
        """Copy tensors into the groups; names and shapes must match exactly.

        Raises:
            CheckpointError: lists every missing, unexpected and misshapen tensor.
        """
        self.check_trainable_state(tensors, source=source)
        for name, tensor in self.trainable_state().items():
            tensor.copy_(tensors[name])

    def check_trainable_state(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Raise a `CheckpointError` if names or shapes of tensors are not those of the groups."""
        check_keys(self.trainable_state(), tensors, source=source)

    def encode(
        self,
        media: Sequence[Media] | Sequence[Sequence[Media]],
        *,
        cache: CacheChoice = None,
        recent: RecentEmbeddings | None = None,
    ) -> Tensor:
        """Embed media.

        Args:
            media: one embedding is made of each item; an item that is itself a list is fused into one (weighted
                mean of its unit embeddings, normalized again unless `BindConfig.fusion` is ``mean``).
            cache: mixes the nearest images into each embedding (by default, of items without an image); None:
                the model's own, False: none.
            recent: embeddings kept in memory by content, so media that come again are not encoded again.

        Returns:
            embeddings, [N, E], float32, on the CPU; unit norm, but for several media fused by a plain mean.

        Raises:
            MediaError: a file that cannot be read.
            InputError: no encoder of this model serves the modality.
            StoreError: the cache was built with another encoder.
        """
        if isinstance(media, Media) or not media:
            raise InputError(f"encode takes a list of Media with at least one in it, not {media!r}")
        # A single media is a group of one.
        groups = [(item,) if isinstance(item, Media) else check_media(item) for item in media]
        return self._encode(groups, cache, recent=recent).embeddings

    @torch.no_grad()
    def _encode(self, groups: Sequence[Sequence[Media]], cache: CacheChoice, **more: Any) -> GroupEmbeddings:
        """Return the embeddings of media groups, [N, E], and tokens, [N, n, C]; ``more`` as for `embed_groups`."""
        normalize = self.bind_config.fusion == "unit"
        found = embed_groups(groups, self.encoders, device=self.device, normalize=normalize, **more)
        cache = check_cache(self.cache if cache is None else cache)
        if not cache:
            return found
        # The cache holds pooled embeddings of other images; tokens stay those of the media.
        return found._replace(embeddings=cache.blend_groups(found.embeddings, groups, self.encoders))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        media_index: Tensor,
        embeddings: Tensor,
        labels: Tensor | None = None,
        tokens: Tensor | None = None,
        **records: Tensor | None,
    ) -> BindOutput:
        """Run the decoder with the media bound to its tokens.

        Args:
            input_ids: [B, T].
            attention_mask: 1 for tokens, 0 for padding on either side, [B, T].
            media_index: the media group that each token listens to, or -1, [B, T].
            embeddings: unit-norm embedding of each media group, [B, M, E]; rows that no token names are ignored.
            labels: the token ids that are supervised at their own position, -100 elsewhere, [B, T]. With labels the
                vocabulary projection runs at the positions that predict a supervised token, and nowhere else.
            tokens: encoder tokens of each media group, [B, M, n, C], rows of zeros where it has fewer; only read with
                more than one bind token (`BindConfig.tokens`). None: no group has any.
            **records: records of each media group, as for `read_records`; by default none.
        """
        # How to read this: the mask is passed only if it is needed, and logits are computed only at the positions
        # that predict a supervised token. Both save time, and neither changes a result. Training runs the decoder's
        # own forward, as generation does, so it learns from the logits that the model answers with.
        padded_left = not bool(attention_mask[:, 0].all())
        bound = self._bound(media_index, embeddings, tokens, **records)
        inputs = {"input_ids": input_ids, "use_cache": False, **bound}
        if padded_left:
            inputs["attention_mask"] = attention_mask
            # Positions count tokens, not columns, so padding does not shift the rotary embedding.
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_(min=0)
        # Else neither: causal attention never looks at padding on the right, and runs faster without a mask.
        if labels is None:
            return BindOutput(self.decoder(**inputs).logits)
        # Token t is predicted at position t - 1.
        rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        # The projection to V logits is the largest product of a step; most positions need none.
        with projecting(rows, columns):
            logits = self.decoder(**inputs).logits
        # Three axes: a decoder without a projection of the usual shape has computed all positions.
        logits = logits[rows, columns] if logits.ndim == 3 else logits
        return BindOutput(logits, labels[rows, columns + 1], rows)

    def _bound(self, index: Tensor, embeddings: Any = None, tokens: Any = None, **records: Any) -> dict:
        """Return the keywords of the decoder's forward for media as in `forward`; none without embeddings."""
        if embeddings is None:
            return {}
        context = read_records(self, embeddings, **records)
        return {"bind": self.bind(embeddings, tokens), "media_index": index, "context": context}

    @torch.no_grad()
    def generate_from(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        media_index: Tensor,
        embeddings: Tensor | None,
        tokens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Generate answers for a left-padded batch.

        Args:
            input_ids: prompts up to the header of the answer, [B, T].
            attention_mask: [B, T].
            media_index: [B, T].
            embeddings: [B, M, E], or None for a batch without media.
            tokens: [B, M, n, C], as for `forward`, or None.
            **options: as for Hugging Face ``generate``; nothing else but `answer_settings` holds. Also ``seed`` of
                sampling, and records, as for `forward`.

        Returns:
            ids of the answers only, [B * returned sequences, at most max_new_tokens].

        Raises:
            InputError: the prompt leaves no position of the decoder for an answer.
        """
        # Hugging Face fills options that a call leaves out from here.
        self.decoder.generation_config = self.settings
        records = {name: options.pop(name) for name in CONTEXT_INPUTS if name in options}
        seed = options.pop("seed", None)
        options = generate_options(
            options, width=input_ids.shape[1], positions=num_positions(self.decoder.config)
        )
        # Stop strings need the tokenizer.
        options["tokenizer"] = self.tokenizer
        media = {} if embeddings is None else {"embeddings": embeddings, "tokens": tokens, **records}
        media = {name: value.to(self.device) for name, value in media.items() if value is not None}
        prompts = Prompts(*(x.to(self.device) for x in (input_ids, attention_mask, media_index)), media)
        with seeded(seed, self.device):
            return generate_ids(self.decoder, prompts, options, self._bound, self.injection.holding)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        media: Sequence[Any] | None = None,
        *,
        shots: Sequence[Any] | None = None,
        cache: CacheChoice = None,
        datastore: Datastore | bool | None = None,
        recent: RecentEmbeddings | None = None,
        **options: Any,
    ) -> str | list[str]:
        """Answer one prompt, or a batch of prompts each with its own media.

        Args:
            prompt: a text, a `Conversation` or OpenAI-style messages (`read_conversation`), or a list of them.
            media: for one prompt the list of its media, fused into one embedding; for several prompts one such list
                each (empty: no media). With messages, they go to parts and placeholders without media.
            shots: worked examples (`Shot`) before the question: one list for all prompts, or one for each. Those that
                do not fit are skipped with a warning, the first ones first (docs/few-shot.md).
            cache: the visual cache, as for `encode`.
            datastore: the records that a model with context reads; None: the model's own, False: none.
            recent: embeddings kept in memory, as for `encode`.
            **options: as for Hugging Face ``generate`` (``max_new_tokens``, ``do_sample``, ``temperature``,
                ``top_p``, ``num_beams``, ``stop_strings``, ...), and ``seed``, with which sampling gives the same
                answers again, and ``min_probability``: an answer about media with a less likely token becomes "I do not
                recognize this.". Without any, the answer is greedy and at most 128 tokens long, whatever the decoder's
                folder recommends (docs/answers.md).

        Returns:
            the answer, or a list of answers in the order of the prompts.

        Raises:
            InputError: prompts and media that do not pair up.
            MediaError: a file that cannot be read.
        """
        options = check_options(options)
        batch = self.prepare(prompt, media, cache, shots, recent=recent, **options)
        least = options.pop("min_probability", None)
        records = find_records(self, batch[3], datastore)
        answers = self.generate_from(*batch, **records, **options)
        texts = self.decode(answers)
        if least:
            stop = options.get("stop_strings")
            texts = replace_unsure(self, batch, records, answers, texts, least, stop)
        # Several returned sequences of one prompt stay a list.
        return texts[0] if is_one(prompt) and len(texts) == 1 else texts

    # Its first argument is the model.
    log_probability = log_probability

    def decode(self, answers: Tensor) -> list[str]:
        """Return the texts of generated ids, [N, A], without control tokens and surrounding white space."""
        return decode_answers(answers, self.tokenizer, self.settings.eos_token_id)

    def stream(
        self,
        prompt: Prompt,
        media: Sequence[Media] | None = None,
        *,
        shots: Sequence[Any] | None = None,
        cache: CacheChoice = None,
        datastore: Datastore | bool | None = None,
        recent: RecentEmbeddings | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answer to one prompt piece by piece; ``recent`` as for `encode`, the others as for `generate`."""
        options = check_options(options)
        check_stream(prompt, options)
        batch = self.prepare(prompt, media, cache, shots, recent=recent, **options)
        run = partial(self.generate_from, *batch, **find_records(self, batch[3], datastore), **options)
        yield from stream_text(run, self.tokenizer, self.settings.eos_token_id)

    def prepare(
        self, prompt: Any, media: Any, cache: CacheChoice = None, shots: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the arguments of `generate_from`; takes those of `generate`, and ``recent`` as for `encode`."""
        # With one bind token, no token of an encoder is read.
        modalities = self.bind_config.token_modalities if self.bind.num_tokens > 1 else ()
        own = {"cache": cache, "token_modalities": modalities, "recent": options.pop("recent", None)}
        limit, encode = shots_limit(options, num_positions(self.decoder.config)), partial(self._encode, **own)
        more = {"tokenizer": self.tokenizer, "modalities": part_modalities(self.encoders)}
        return prepare_batch(prompt, media, shots, limit=limit, encode=encode, **more)

    def describe(self) -> dict[str, Any]:
        """Return the manifest of the model: its configs, its decoder and encoders with their fingerprints."""
        return describe_model(self)

    def save_pretrained(
        self, folder: str | Path, *, data: list[str] | None = None, files: Mapping[str, str] | None = None
    ) -> None:
        """Write a checkpoint folder, in one step.

        Args:
            folder: the output folder. An existing checkpoint is replaced, any other non-empty folder is refused.
            data: folders or tables of the training data, for the model card.
            files: text of further files by name, such as the recipe.
        """
        save_model(self, folder, data=data, files=files)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Upload the checkpoint folder, and return its commit; options as for `push_model`."""
        return push_model(self, name, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        decoder: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        allow: Sequence[str] = (),
        encoders: Sequence[Encoder] = (),
        cache: CacheChoice | str | Path = None,
        quantize: str | bool | None = None,
        tokens: int | None = None,
        datastore: Datastore | str | Path | bool | None = None,
        records: int | None = None,
    ) -> Self:
        """Load a checkpoint folder.

        Args:
            folder: a folder written by `save_pretrained`, or with a revision the id of a model on the hub.
            revision: commit on the hub; None: the folder is a local one.
            decoder: folder of the decoder, if it is not at the path that the checkpoint names.
            dtype: another precision of the decoder than the one in the checkpoint.
            device: by default the accelerator that torch finds, else the CPU.
            allow: import paths of encoder classes outside bindllm that may be imported.
            encoders: additional encoders, for modalities that the checkpoint's encoders do not serve.
            cache: a visual cache, or the path of one, mixed in with the checkpoint's settings. None: the cache that the
                checkpoint names, False: no cache. `save_pretrained` keeps the entry of the checkpoint.
            quantize: ``nf4`` or ``int8`` (see `DecoderConfig`); None: as in training, False: full precision.
            tokens: bind tokens of a media group, at most as many as in training (docs/bind-tokens.md); None: all.
            datastore: a datastore that a model with context reads, or its folder; None: that of the checkpoint,
                False: none.
            records: number of records for each media, as ``model.context.num_records``; None: as many as in training.

        Raises:
            CheckpointError: another decoder or encoder than the one it was trained with, a newer format, missing
                or extra tensors, a pickle in the folder, a class that is not allowed.
            InputError: an additional encoder has another embedding size, or all its modalities are served already; or
                more bind tokens than in training.
            StoreError: the cache or the datastore is missing or damaged, or was built with another encoder.
        """
        parts = {"decoder": decoder, "dtype": dtype, "allow": allow, "encoders": encoders}
        parts |= {"quantize": quantize, "revision": revision}
        choices = {"cache": cache, "tokens": tokens, "datastore": datastore, "records": records}
        return load_model(cls, folder, parts, device=device, **choices)

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input in training and compute the rest again in the backward pass."""
        # Not the switch of transformers: it needs layers in training mode, where some families have dropout.
        for _, layer in find_layers(self.decoder):
            layer.forward = checkpointed(layer.forward)
