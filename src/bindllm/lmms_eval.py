"""Checkpoints as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), named ``bindllm`` there.

lmms-eval finds `manifest` through the entry-point group ``lmms_eval.models``. bindllm does not depend on lmms-eval, so
nothing of it is imported before it asks: its base class is joined to `Adapter` when one of `MODELS` is looked up.
"""

from __future__ import annotations

import io
import logging
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import IGNORE
from bindllm.embeddings.embedder import RecentEmbeddings
from bindllm.errors import InputError
from bindllm.media import SUFFIXES, Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.context.records import find_records
from bindllm.model.generation import check_options

MODELS = {"ChatModel": False, "SimpleModel": True}
"""The classes that lmms-eval builds, and whether each takes its older form of requests. Only that form has
log-likelihoods (``--force_simple``)."""

_SAMPLING = ("temperature", "top_p", "top_k")
_OPTIONS = ("max_new_tokens", "num_beams", "repetition_penalty", *_SAMPLING)
_FULL_SCALE = 2**31 - 1
_BATCH_SIZE = 8

logger = logging.getLogger(__name__)


def manifest() -> Any:
    """Return the description of the model for lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "bindllm", simple_class_path=f"{__name__}.SimpleModel", chat_class_path=f"{__name__}.ChatModel"
    )


def __getattr__(name: str) -> type:
    if name not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    return type(name, (Adapter, lmms), {"is_simple": MODELS[name]})


class Adapter:
    """Answers the requests of lmms-eval.

    Args:
        pretrained: a checkpoint folder.
        batch_size: answers generated at the same time; None, ``auto`` or ``auto:N``: 8.
        max_batch_size: ignored, as no size is searched.
        device: by default the accelerator that torch finds.
        allow: import path of an encoder class outside bindllm that the checkpoint names.
        **options: ``decoder``, ``quantize`` and ``tokens`` as for `BindLLM.from_pretrained`.
    """

    is_simple = False
    task_dict: dict[str, Any]

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        allow: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := options.keys() - {"decoder", "quantize", "tokens"}:
            raise InputError(
                f"unknown model_args {', '.join(sorted(unknown))}; expected allow, decoder, quantize or tokens"
            )
        self.batch_size = _BATCH_SIZE if str(batch_size or "auto").startswith("auto") else int(batch_size)
        self.model = BindLLM.from_pretrained(
            pretrained, device=device, allow=[allow] if allow else (), **options
        ).eval()
        # The options of a multiple choice and the rounds of a conversation share their media.
        self.recent = RecentEmbeddings()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the answer to each request; requests with the same settings share batches."""
        conversations, settings = [], {}
        for n, request in enumerate(requests):
            given, conversation = self._read(request.args)
            conversations.append(conversation)
            # Dictionaries have no hash; those with equal entries have one text.
            settings.setdefault(repr(sorted(given.items())), (given, []))[1].append(n)
        answers = [""] * len(conversations)
        for given, rows in settings.values():
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                texts = self._generate([conversations[n] for n in batch], given)
                for n, text in zip(batch, texts, strict=True):
                    answers[n] = text
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Return the answers of all rounds of each request; the task makes the messages of each round."""
        if self.is_simple:
            raise InputError(
                "tasks of several rounds need the newer form of requests: leave out --force_simple"
            )
        return [self._rounds(*request.args) for request in requests]

    def _rounds(
        self, context: str, messages: Any, given: Mapping[str, Any], number: int, *task: str
    ) -> list[str]:
        doc = self._doc(number, *task)
        answers: list[str] = []
        turns, info = messages(doc), None
        while True:
            answers += self._generate([_conversation(turns)], given)
            more = messages(
                doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info
            )
            # A task with a single round returns messages again.
            if not isinstance(more, tuple) or more[1]:
                return answers
            turns, _, _, info = more

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Return for each continuation its negative log-likelihood, and whether it is the greedy answer.

        lmms-eval chooses the option with the smallest value. The token that ends an answer does not count. White space
        at the start of a continuation belongs to plain text, not to a chat template, and is removed.
        """
        from lmms_eval.api.instance import GenerationResult

        found = []
        for request in requests:
            context, target, *rest = request.args
            # Without a document there are no media: the probability of a choice by itself.
            doc = self._doc(*rest[1:]) if rest else None
            target = target if isinstance(target, str) else target(doc)
            prompt = _asked(rest[0](doc) if rest else None, context)
            # lmms-eval 0.7 makes a text of a plain pair, which its own metrics cannot read.
            found.append(GenerationResult(self._likelihood(prompt, target.lstrip())))
        return found

    def _likelihood(self, prompt: Conversation, answer: str) -> tuple[float, bool]:
        ids, _, index, embeddings, tokens = self.model.prepare([prompt], None, recent=self.recent)
        own = self.model.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids
        width = own.shape[1]
        if not width:
            raise InputError("an empty continuation has no log-probability")
        joined = torch.cat([ids, own], 1)  # [1, T + A]
        labels = joined.clone()
        labels[:, :-width] = IGNORE
        # The answer listens to the same media as the header before it.
        index = torch.cat([index, index[:, -1:].expand(-1, width)], 1)
        records = find_records(self.model, embeddings, None)
        if embeddings is None:
            embeddings = torch.zeros(1, 1, self.model.encoders[0].embedding_size)
        inputs = dict(
            input_ids=joined, attention_mask=torch.ones_like(joined), media_index=index, labels=labels
        )
        inputs |= {"embeddings": embeddings, "tokens": tokens, **records}
        output = self.model(**{k: v.to(self.model.device) for k, v in inputs.items() if v is not None})
        likely = output.logits.float().log_softmax(-1)  # [A, V]
        is_greedy = bool((likely.argmax(-1) == output.targets).all())
        return -float(likely.gather(1, output.targets[:, None]).sum()), is_greedy

    def _read(self, args: Sequence[Any]) -> tuple[Mapping[str, Any], Conversation]:
        """Return the settings and the prompt of a request, in either form."""
        context, first, second, *place = args
        if self.is_simple:
            return first, _asked(second(self._doc(*place)), context)
        return second, _conversation(first(self._doc(*place)))

    def _doc(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _generate(self, conversations: list[Conversation], given: Mapping[str, Any]) -> list[str]:
        chosen = {name: given[name] for name in _OPTIONS if given.get(name) is not None}
        if not (given.get("do_sample") and chosen.get("temperature", 1)):
            # Tasks write a temperature of 0 for greedy answers.
            chosen = {name: value for name, value in chosen.items() if name not in _SAMPLING}
        if ignored := given.keys() - {*_OPTIONS, "do_sample", "until"}:
            logger.warning("ignored settings of the task: %s", ", ".join(sorted(ignored)))
        options = check_options(chosen)
        batch = self.model.prepare(conversations, None, recent=self.recent, **options)
        records = find_records(self.model, batch[3], None)
        texts = self.model.decode(self.model.generate_from(*batch, **records, **options))
        until = given.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            # An empty stop would cut everything.
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts


def _conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Return the messages of lmms-eval as a conversation."""
    made = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        content = [part["text"] if part["type"] == "text" else _media(part) for part in parts]
        made.append(Message(message["role"], content))
    return Conversation(tuple(made))


def _asked(visuals: Sequence[Any] | None, context: str) -> Conversation:
    """Return a question about media, as the older form of requests gives it."""
    return Conversation((Message("user", [*map(_media, visuals or ()), context]),))


def _media(source: Any) -> Media:
    """Return media in one of the forms that tasks give: an image, a path, decoded audio, or one of them with a type."""
    kind = None
    if isinstance(source, Mapping) and "type" in source:
        kind, source = source["type"], source.get("url") or source.get("path") or source
    if isinstance(source, Image.Image):
        return Media.image(source)
    if isinstance(source, str | Path):
        ending = Path(source).suffix.lower()
        kind = kind or next((name for name, endings in SUFFIXES.items() if ending in endings), "video")
        return Media(kind, str(source))
    try:
        # A dict or a decoder of Hugging Face datasets.
        return Media.audio(_wav(np.asarray(source["array"], dtype=np.float64), int(source["sampling_rate"])))
    except (TypeError, KeyError) as error:
        raise InputError(
            f"media of type {type(source).__name__} cannot be read; expected an image, a path, or audio with array and "
            "sampling_rate"
        ) from error


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Return samples [N] or [C, N], -1..1, as a WAV file, which keeps their rate."""
    samples = np.atleast_2d(samples)
    values = np.round(np.clip(samples, -1, 1) * _FULL_SCALE).astype("<i4")  # [C, N]
    file = io.BytesIO()
    with wave.open(file, "wb") as stream:
        stream.setnchannels(len(values))
        stream.setsampwidth(4)
        stream.setframerate(rate)
        stream.writeframes(values.T.tobytes())
    return file.getvalue()
