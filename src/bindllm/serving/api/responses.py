"""``/v1/responses`` in its stateless form: each request brings the whole conversation, and nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from bindllm.serving.answers import Answers
from bindllm.serving.api.chat import COMMENT, KEEP_ALIVE, Neighbors, sse, token_logprobs
from bindllm.serving.api.errors import ApiError, as_api_error, shown
from bindllm.serving.api.sampling import Question
from bindllm.serving.api.schema import ResponsesBody, answer_grammar
from bindllm.serving.request import Piece

_LOGPROBS = "message.output_text.logprobs"
_TEXT = {"type": "text"}


def response_messages(body: ResponsesBody) -> list[Mapping[str, Any]]:
    """Return the input as messages.

    Raises:
        ApiError: an item that is not a message, such as the output of a tool.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    # Silently dropping the output of a tool would answer another question.
    for item in items:
        if (kind := item.get("type", "message")) != "message":
            raise ApiError(
                400, f"an input item of type {shown(kind)}; only messages are supported", param="input"
            )
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return [*instructions, *items]


def response_fields(body: ResponsesBody) -> dict[str, Any]:
    """Return the arguments of `read_question` that this endpoint has its own fields for.

    Raises:
        ApiError: an output that is not supported.
    """
    if not isinstance(form := (body.text or {}).get("format") or _TEXT, dict):
        raise ApiError(400, f"text.format is {shown(form)}, expected an object", param="text")
    if unknown := [name for name in body.include or [] if name != _LOGPROBS]:
        raise ApiError(
            400, f"include has {shown(unknown[0])}; only {_LOGPROBS!r} can be given", param="include"
        )
    wanted = _LOGPROBS in (body.include or [])
    if body.top_logprobs is not None and not wanted:
        raise ApiError(400, f"top_logprobs needs include: [{_LOGPROBS!r}]", param="top_logprobs")
    items = ["input"] if isinstance(body.input, str) else [f"input[{n}]" for n in range(len(body.input))]
    return {
        # As `response_messages` orders them.
        "names": [*(["instructions"] if body.instructions else []), *items],
        "max_tokens": body.max_output_tokens,
        "logprobs": (body.top_logprobs or 0) if wanted else None,
        "grammar": answer_grammar(form, form, "text.format"),
    }


class ResponseWriter:
    """Writes the object of one response, and its events.

    Args:
        body: the request, whose settings the object repeats.
        question: its request and ids.
        answers: its pieces.
        neighbors: of the question.
    """

    def __init__(
        self, body: ResponsesBody, question: Question, answers: Answers, neighbors: Neighbors
    ) -> None:
        self._body, self._question, self._answers, self._neighbors = body, question, answers, neighbors
        self._text, self._tokens, self._finish, self._events = "", [], "", 0

    async def complete(self) -> dict[str, Any]:
        """Return the whole answer as an object; errors as for `Answers.next`."""
        async for found in self._answers.pieces():
            self._add(found[1])
        return await self._finished()

    async def stream(self, first: tuple[int, Piece] | None) -> AsyncIterator[bytes]:
        """Yield the events of the answer; an error becomes the last one.

        Args:
            first: the first piece, if it is there already.
        """
        # One message with one text, so all events have the same two indices.
        place = {"item_id": self._item_id, "output_index": 0}
        part = {**place, "content_index": 0}
        try:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self._object("in_progress"))
            item = self._item("in_progress", [])
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **part, part=_content("", []))
            # This API has one answer only, so the number of the choice says nothing.
            async for found in self._answers.pieces(first, seconds=KEEP_ALIVE):
                if found is None:
                    yield COMMENT
                    continue
                piece = found[1]
                self._add(piece)
                # Text that is not certain yet, such as half of a character, comes with a later piece.
                if piece.text:
                    logprobs = token_logprobs(piece.logprobs)
                    yield self._event(
                        "response.output_text.delta", **part, delta=piece.text, logprobs=logprobs
                    )
            done = await self._finished()
            for event in self._end(done, place, part):
                yield event
        except Exception as error:
            fault = as_api_error(error).body["error"]
            # The documented fields are at the top; openai-python looks for the object.
            yield self._event(
                "error", **{key: fault[key] for key in ("code", "message", "param")}, error=fault
            )

    def _end(self, done: dict[str, Any], place: dict[str, Any], part: dict[str, Any]) -> Iterator[bytes]:
        """Yield the events that close an answer."""
        # From inside out: the part, the item, and at last the whole response.
        (item,) = done["output"]
        (content,) = item["content"]
        yield self._event("response.output_text.done", **part, text=self._text, logprobs=content["logprobs"])
        yield self._event("response.content_part.done", **part, part=content)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)
        yield self._event(f"response.{done['status']}", response=done)

    def _add(self, piece: Piece) -> None:
        self._text += piece.text
        self._tokens += piece.logprobs
        # Only the last piece has a reason.
        self._finish = piece.finish or self._finish

    @property
    def _item_id(self) -> str:
        return f"msg_{self._question.id}"

    def _event(self, kind: str, **fields: Any) -> bytes:
        # Clients put the events in order by their number, which starts at 0.
        self._events += 1
        return sse({"type": kind, "sequence_number": self._events - 1, **fields}, event=kind)

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    async def _finished(self) -> dict[str, Any]:
        # Cut by the limit on tokens: the client must be able to tell.
        status = "incomplete" if self._finish == "length" else "completed"
        prompt, completion = self._answers.prompt_tokens, self._answers.completion_tokens
        found = await self._neighbors()
        return {
            **self._object(status),
            "output": [self._item(status, [_content(self._text, token_logprobs(self._tokens))])],
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            # Media take no tokens, and nothing is cached between requests.
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
            **({} if found is None else {"neighbors": found}),
        }

    def _object(self, status: str) -> dict[str, Any]:
        request = self._question.request
        # The classes of openai-python need nearly all of these keys; some say that the server keeps no state.
        return {
            "id": f"resp_{self._question.id}",
            "object": "response",
            "created_at": self._question.created,
            "status": status,
            "model": self._question.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": (self._body.text or {}).get("format") or _TEXT},
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _content(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
