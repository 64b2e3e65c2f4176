"""``/v1/chat/completions``: an answer as one object, or as a stream of chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import count
from typing import Any

from bindllm.model.generation.calls import Call
from bindllm.serving.answers import Answers
from bindllm.serving.api.errors import ApiError, as_api_error, dump, warned
from bindllm.serving.api.sampling import Question
from bindllm.serving.api.schema import ChatBody, answer_grammar
from bindllm.serving.api.tools import CallReader, for_client
from bindllm.serving.request import Piece, TokenLogprob

KEEP_ALIVE = 10.0
"""After this time without a token, in seconds, a stream gets a comment: proxies close silent connections."""
COMMENT = b": keep-alive\n\n"

Neighbors = Callable[[], Awaitable[Any]]
"""Returns the neighbors of a question, or None if it did not ask for them."""


def chat_fields(body: ChatBody) -> dict[str, Any]:
    """Return the arguments of `read_question` that this endpoint has its own fields for.

    Raises:
        ApiError: fields that contradict each other.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if len({body.max_tokens, body.max_completion_tokens} - {None}) > 1:
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens are two names of one limit; give one",
            param="max_tokens",
        )
    form = body.response_format or {"type": "text"}
    return {
        "messages": body.messages,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token): value for token, value in (body.logit_bias or {}).items()},
        "grammar_field": "response_format",
        "grammar": answer_grammar(form, form.get("json_schema"), "response_format"),
        # One of them is missing, or they are equal.
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "choices": body.n or 1,
    }


async def complete_chat(question: Question, answers: Answers, neighbors: Neighbors) -> dict[str, Any]:
    """Return the whole answer as an object; errors as for `Answers.next`."""
    texts, tokens = [""] * question.choices, [[] for _ in range(question.choices)]
    finish: list[str | None] = [None] * question.choices
    called: list[list[Call]] = [[] for _ in range(question.choices)]
    readers = [question.reader() for _ in range(question.choices)]
    async for found in answers.pieces():
        number, piece = found
        text, called[number] = split(piece, readers[number])
        texts[number] += text
        tokens[number] += piece.logprobs
        finish[number] = piece.finish
    choices = []
    for number, (text, calls) in enumerate(zip(texts, called, strict=True)):
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [for_client(call) for call in calls]}
        choices.append(
            {
                "index": number,
                "message": message,
                "logprobs": _logprobs(question, tokens[number]),
                "finish_reason": _finish(finish[number], calls),
            }
        )
    head = _head(question, "chat.completion")
    more = {**warned(answers.warnings), **await _extras(neighbors)}
    return {**head, "choices": choices, "usage": chat_usage(answers), **more}


async def stream_chat(
    question: Question,
    answers: Answers,
    neighbors: Neighbors,
    first: tuple[int, Piece] | None,
    *,
    usage: bool,
) -> AsyncIterator[bytes]:
    """Yield the events of an answer; an error becomes the last one.

    Args:
        usage: whether a last chunk has the numbers of tokens.
    """
    # Id and time are those of the question: clients join chunks by them.
    head = _head(question, "chat.completion.chunk")
    # With usage asked for, each chunk has the key, and only the last one a value.
    rest: dict[str, Any] = {"usage": None} if usage else {}

    def event(index: int, delta: dict[str, Any], *, warnings: Sequence[str] = (), **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return sse({**head, "choices": [choice], **rest, **warned(warnings)})

    readers = [question.reader() for _ in range(question.choices)]
    # Clients take the role from the first chunk of each choice. Chunks that come at the same time are sent together.
    opening = {"role": "assistant", "content": "", "refusal": None}
    held = [event(number, opening) for number in range(question.choices)]
    try:
        if first is None:
            yield _joined(held)
        async for found in answers.pieces(first, seconds=KEEP_ALIVE):
            if found is None:
                yield COMMENT
                continue
            number, piece = found
            text, calls = split(piece, readers[number])
            # The last piece may have neither, and an empty delta would look like a token.
            if text or piece.logprobs:
                held.append(event(number, {"content": text}, logprobs=_logprobs(question, piece.logprobs)))
            if calls:
                held.append(event(number, {"tool_calls": [*map(for_client, calls, count())]}))
            # In a chunk of its own, as OpenAI sends it: clients read text and reason from different chunks.
            if piece.finish is not None:
                ended = {"finish_reason": _finish(piece.finish, calls), "warnings": answers.warnings}
                held.append(event(number, {}, **ended))
            # The end of the answer is sent with what follows, unless neighbors have to be looked for.
            if held and (question.wants_neighbors or not answers.is_finished):
                yield _joined(held)
        if (extras := await _extras(neighbors)) or usage:
            numbers = {"usage": chat_usage(answers)} if usage else {}
            held.append(sse({**head, "choices": [], **numbers, **extras}))
    except Exception as error:
        # The status has been sent. openai-python raises for a chunk with this key.
        held.append(sse(as_api_error(error).body))
    # Also after an error: clients read until this line.
    held.append(b"data: [DONE]\n\n")
    yield _joined(held)


def _joined(held: list[bytes]) -> bytes:
    """Take all chunks out of a list, and return them as one."""
    chunks = b"".join(held)
    held.clear()
    return chunks


def sse(value: Any, *, event: str | None = None) -> bytes:
    """Return a server-sent event with a JSON object."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + dump(value) + b"\n\n"


def chat_usage(answers: Answers) -> dict[str, int]:
    """Return the numbers of tokens; media take none."""
    prompt, completion = answers.prompt_tokens, answers.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def token_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return the tokens of a piece with their log-probabilities, as both endpoints write them."""
    return [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]


def _token(token: TokenLogprob) -> dict[str, Any]:
    # A token that is a part of a character has other bytes than its text shows.
    is_whole = "\ufffd" not in token.token
    content = list(token.token.encode("utf-8", "replace")) if is_whole else None
    return {"token": token.token, "logprob": token.logprob, "bytes": content}


def split(piece: Piece, reader: CallReader | None) -> tuple[str, list[Call]]:
    """Return the text of a piece without parts of calls, and with the last piece the calls of the answer."""
    if reader is None:
        return piece.text, []
    text = reader.add(piece.text)
    if piece.finish is None:
        return text, []
    held, calls = reader.end(is_cut=piece.finish == "length")
    return text + held, calls


def _finish(finish: str | None, calls: Sequence[Call]) -> str | None:
    # An answer that was cut stays one, whatever it called before.
    return "tool_calls" if calls and finish == "stop" else finish


def _head(question: Question, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{question.id}",
        "object": kind,
        "created": question.created,
        "model": question.model,
    }


def _logprobs(question: Question, tokens: Any) -> dict[str, Any] | None:
    if question.request.logprobs is None:
        return None
    return {"content": token_logprobs(tokens), "refusal": None}


async def _extras(neighbors: Neighbors) -> dict[str, Any]:
    found = await neighbors()
    return {} if found is None else {"neighbors": found}
