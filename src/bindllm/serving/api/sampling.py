"""A question of any endpoint: its request to the engine, and facts that its answer names."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from bindllm.cache.visual_cache import nearest_images
from bindllm.conversation import Conversation
from bindllm.errors import MediaError
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import num_positions
from bindllm.model.generation import shots_limit
from bindllm.report.page import thumbnail
from bindllm.serving.api.content import ContentReader, choose_cache
from bindllm.serving.api.errors import ApiError, shown
from bindllm.serving.api.schema import ChatBody, ResponsesBody, SampledBody
from bindllm.serving.api.tools import CallReader, Tools, read_tools
from bindllm.serving.config import ServeConfig
from bindllm.serving.engine import Engine
from bindllm.serving.request import Request, SettingError
from bindllm.shots import add_shots, fit_shots

THUMBNAIL = 96
"""Longer side of the images of neighbors, in pixels."""


@dataclass(frozen=True)
class Question:
    """A request that was read.

    Args:
        wants_neighbors: whether the answer names the images of the visual cache.
        prompt_field: field of the body that has the conversation, for errors.
        grammar_field: field of the body that sets the grammar of the answer, for errors.
        tools: tools that the answer may call; None: it is only text.
        id: random part of the ids of the answer.
    """

    model: str
    request: Request
    choices: int
    wants_neighbors: bool
    prompt_field: str
    grammar_field: str
    tools: Tools | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def reader(self) -> CallReader | None:
        """Return a reader of the calls of one choice; None: the answer is only text."""
        return None if self.tools is None else CallReader(self.tools)

    def named(self, error: Exception) -> Exception:
        """Return an error of the engine; one about a setting names the field of the body."""
        if not isinstance(error, SettingError):
            return error
        own = {"grammar": self.grammar_field, "prompt": self.prompt_field}
        field = own.get(error.field, error.field)
        # By this code of OpenAI's, programs know that they have to shorten the conversation.
        code = "context_length_exceeded" if error.field == "prompt" else None
        # Many programs cannot change the schemas of their tools.
        hint = (
            "; with strict: false, the arguments of a function are any JSON object"
            if field == "tools"
            else ""
        )
        return ApiError(400, f"{error}{hint}", param=field, code=code)


def read_question(
    body: ChatBody | ResponsesBody,
    model: BindLLM,
    config: ServeConfig,
    *,
    messages: Sequence[Mapping[str, Any]],
    max_tokens: int | None,
    logprobs: int | None,
    grammar_field: str,
    choices: int = 1,
    names: Sequence[str] | None = None,
    **settings: Any,
) -> Question:
    """Turn a body into a request.

    Args:
        body: fields that both endpoints share.
        logprobs: number of alternatives for each token; None: no log-probabilities.
        grammar_field: where the format of the answer is in the body.
        names: where each message is in the body, as for `ContentReader.conversation`.

    Raises:
        ApiError: a field that cannot be used.
        InputError: content that cannot be used.
    """
    # First all that needs no media: a request that is refused anyway costs no decoding and no download.
    check_model(body.model, config)
    body.refuse_unsupported()
    if choices > config.max_choices:
        raise ApiError(
            400, f"n is {choices}; this server gives at most {config.max_choices} choices", param="n"
        )
    tools = read_tools(body, model.tokenizer, has_format=settings.get("grammar") is not None)
    if tools is not None:
        settings["grammar"], grammar_field = tools.grammar, "tools"
    # One reader for messages and shots, since its limits hold for the whole request.
    reader = ContentReader(model.encoders, config, most_media=config.max_media)
    conversation = reader.conversation(messages, names, () if tools is None else tools.tools)
    conversation = _with_shots(conversation, body, reader, model, max_tokens)
    request = Request(
        conversation,
        max_tokens=max_tokens,
        logprobs=logprobs,
        cache=choose_cache(body.cache, model),
        **_sampling(body, choices),
        **settings,
    )
    fields = ("messages" if isinstance(body, ChatBody) else "input", grammar_field)
    return Question(config.model, request, choices, bool(body.neighbors), *fields, tools)


def _sampling(body: SampledBody, choices: int) -> dict[str, Any]:
    """Return the settings that choose the tokens."""
    # As for `BindLLM.generate`: greedy, unless a field asks for sampling. Several greedy choices would be equal.
    samples = body.top_p is not None or choices > 1
    return {
        "temperature": body.temperature if body.temperature is not None else float(samples),
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "seed": body.seed,
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
    }


def check_model(name: str | None, config: ServeConfig) -> None:
    """Raise an ApiError with status 404 if a request names another model."""
    # Not answered by this model under another name: a client might compare the two.
    if name and name != config.model:
        raise ApiError(
            404,
            f"unknown model {shown(name)}; this server has only {config.model!r}",
            param="model",
            code="model_not_found",
        )


def find_neighbors(engine: Engine, request: Request) -> list[list[dict[str, Any]]]:
    """Return the images that the cache blends into each media group of a request, nearest first.

    Returns:
        for each image its similarity, its name, and a thumbnail as a data URI (null if its file cannot be read).
    """
    # None means the cache of the model, and False none, as in `BindLLM.generate`.
    cache = engine.model.cache if request.cache is None else request.cache
    groups = request.conversation.media_groups
    if not cache or not groups:
        return []
    # The cache itself compares the media as they are, before it blends them.
    embeddings, _ = engine.encode(groups, cache=False)
    found: list[list[dict[str, Any]]] = []
    for group, embedding in zip(groups, embeddings, strict=True):
        # A group that the cache skips has an empty list, so that the lists stay those of the messages.
        skipped = {item.modality for item in group} & set(cache.settings.skip)
        images = [] if skipped else nearest_images(cache, embedding[None])
        found.append([_neighbor(similarity, name) for similarity, name in images])
    return found


def _neighbor(similarity: float, name: str) -> dict[str, Any]:
    image = None
    # The file may have been removed since the cache was built.
    with suppress(MediaError):
        image = thumbnail(name, size=THUMBNAIL)
    # Only the last part of the path: a client does not need the folders of this machine.
    return {"similarity": round(similarity, 6), "name": PurePath(name).name, "thumbnail": image}


def _with_shots(
    conversation: Conversation,
    body: SampledBody,
    reader: ContentReader,
    model: BindLLM,
    max_tokens: int | None,
) -> Conversation:
    """Put worked examples before a question; an answer without some of them would be another one."""
    shots = reader.shots(body.shots or [])
    limit = shots_limit({"max_new_tokens": max_tokens}, num_positions(model.decoder.config))
    kept = fit_shots(conversation, shots, model.tokenizer, limit)
    if len(kept) < len(shots):
        raise ApiError(
            400,
            f"only {len(kept)} of {len(shots)} shots fit: a prompt may have {limit:,} tokens, the positions of the "
            "decoder less the longest answer. Give fewer or shorter shots",
            param="shots",
            code="context_length_exceeded",
        )
    return add_shots(conversation, shots)
