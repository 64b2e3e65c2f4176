"""``/v1/embeddings``: embeddings of texts and media in the joint space of the model's encoders."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.serving.api.content import ContentReader, choose_cache
from bindllm.serving.api.errors import ApiError, located, shown, warned
from bindllm.serving.api.sampling import check_model
from bindllm.serving.api.schema import EmbeddingsBody
from bindllm.serving.config import ServeConfig
from bindllm.serving.engine import Engine


def read_groups(body: EmbeddingsBody, model: BindLLM, config: ServeConfig) -> list[list[Media]]:
    """Return the media of each embedding.

    Raises:
        ApiError: token ids, too many inputs, or a field that cannot be used.
        InputError: media that cannot be used.
    """
    check_model(body.model, config)
    body.refuse_unsupported()
    size = model.encoders[0].embedding_size
    # The first numbers of an embedding are not an embedding: no encoder here was trained for that.
    if body.dimensions not in (None, size):
        raise ApiError(400, f"dimensions is {body.dimensions}; this model has {size}", param="dimensions")
    if body.encoding_format not in (None, "float", "base64"):
        raise ApiError(
            400,
            f"encoding_format is {shown(body.encoding_format)}, expected 'float' or 'base64'",
            param="encoding_format",
        )
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if not 0 < len(inputs) <= config.max_inputs:
        raise ApiError(400, f"{len(inputs)} inputs, expected 1 to {config.max_inputs}", param="input")
    # Each part with its name for errors; an empty list has no embedding.
    groups = [
        [(part, f"input[{number}][{inner}]") for inner, part in enumerate(item or [None])]
        if isinstance(item, list)
        else [(item, f"input[{number}]")]
        for number, item in enumerate(inputs)
    ]
    # All of them before the first is decoded.
    for part, name in (pair for group in groups for pair in group):
        with located(name):
            _check_part(part)
    reader = ContentReader(model.encoders, config, most_media=config.max_inputs)
    return [[reader.media(part, name) for part, name in group] for group in groups]


def embed(body: EmbeddingsBody, engine: Engine, config: ServeConfig) -> dict[str, Any]:
    """Return the answer to a request for embeddings; errors as for `read_groups`, and those of the encoders."""
    groups = read_groups(body, engine.model, config)
    rows, warnings = engine.encode(groups, cache=choose_cache(body.cache, engine.model))
    # openai-python asks for base64 unless its caller chose a format.
    write = _base64 if body.encoding_format == "base64" else Tensor.tolist
    data = [
        {"object": "embedding", "index": index, "embedding": write(row)}
        for index, row in enumerate(rows.float())
    ]
    # Encoders have no tokens of the decoder.
    return {
        "object": "list",
        "data": data,
        "model": config.model,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
        **warned(warnings),
    }


def _check_part(part: Any) -> None:
    # Before other types: openai clients of other servers send tokens, and the reason must name them.
    if isinstance(part, int | float):
        raise ApiError(
            400,
            "an input is a list of token ids, which mean nothing to the encoders: send texts (in LangChain: "
            "check_embedding_ctx_length=False)",
            param="input",
            code="token_ids_not_supported",
        )
    if not isinstance(part, str | Mapping):
        raise ApiError(400, f"an input is {shown(part)}, expected a text or a content part", param="input")


def _base64(row: Tensor) -> str:
    """Return an embedding as OpenAI writes it: the bytes of little-endian float32, in base64."""
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii")
