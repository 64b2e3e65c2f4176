"""``/v1/responses`` in its stateless form: each request brings the whole conversation, and nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from bindllm.model.generation.calls import Call
from bindllm.serving.answers import Answers
from bindllm.serving.api.chat import COMMENT, KEEP_ALIVE, Neighbors, split, sse, token_logprobs
from bindllm.serving.api.errors import ApiError, as_api_error, shown, warned
from bindllm.serving.api.sampling import Question
from bindllm.serving.api.schema import FunctionChoice, ResponsesBody, answer_grammar
from bindllm.serving.api.tools import function_of, uses_tools
from bindllm.serving.request import Piece

_LOGPROBS = "message.output_text.logprobs"
_TEXT = {"type": "text"}


def _messages(body: ResponsesBody) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the input as messages of chat completions, each with its place in the request.

    Raises:
        ApiError: an item that is neither a message nor a call of a function nor its result.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    if body.instructions:
        found.append(("instructions", {"role": "system", "content": body.instructions}))
    if isinstance(body.input, str):
        return [*found, ("input", {"role": "user", "content": body.input})]
    for number, item in enumerate(body.input):
        name = f"input[{number}]"
        match item.get("type", "message"):
            case "message" if not uses_tools(item):
                found.append((name, item))
            case "function_call":
                function = {key: item.get(key) for key in ("name", "arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                # Text and calls of one answer are items of their own here, and one message for the chat template.
                last = found[-1][1] if found else {}
                if last.get("role") == "assistant":
                    name, _ = found.pop()
                else:
                    last = {"role": "assistant"}
                found.append((name, {**last, "tool_calls": [*last.get("tool_calls", ()), call]}))
            case "function_call_output":
                result = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
                found.append((name, {"role": "tool", **result}))
            # Silently dropping an item would answer another question.
            case kind:
                kind = "in the form of chat completions" if kind == "message" else f"of type {shown(kind)}"
                raise ApiError(
                    400,
                    f"{name} is {kind}, expected a message, or an item of type function_call or "
                    "function_call_output",
                    param=name,
                )
    return found


def response_fields(body: ResponsesBody) -> dict[str, Any]:
    """Return the arguments of `read_question` that this endpoint has its own fields for.

    Raises:
        ApiError: an input or an output that is not supported.
    """
    if not isinstance(form := (body.text or {}).get("format") or _TEXT, dict):
        raise ApiError(400, f"text.format is {shown(form)}, expected an object", param="text")
    if unknown := [name for name in body.include or [] if name != _LOGPROBS]:
        raise ApiError(
            400, f"include has {shown(unknown[0])}; only {_LOGPROBS!r} can be given", param="include"
        )
    wanted = _LOGPROBS in (body.include or [])
    if wanted and body.tools:
        # They belong to a text, and the tokens of a call have no text here.
        raise ApiError(
            400,
            f"include has {_LOGPROBS!r}, which cannot be given with tools; /v1/chat/completions has both",
            param="include",
        )
    if body.top_logprobs is not None and not wanted:
        raise ApiError(400, f"top_logprobs needs include: [{_LOGPROBS!r}]", param="top_logprobs")
    names, messages = zip(*_messages(body), strict=True)
    return {
        "names": names,
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "logprobs": (body.top_logprobs or 0) if wanted else None,
        "grammar_field": "text",
        "grammar": answer_grammar(form, form, "text.format"),
    }


class ResponseWriter:
    """Writes the object of one response, and its events.

    Args:
        body: the request, whose settings the object repeats.
    """

    def __init__(
        self, body: ResponsesBody, question: Question, answers: Answers, neighbors: Neighbors
    ) -> None:
        self._body, self._question, self._answers, self._neighbors = body, question, answers, neighbors
        self._text, self._tokens, self._finish, self._events = "", [], "", 0
        self._reader, self._calls = question.reader(), []

    async def complete(self) -> dict[str, Any]:
        """Return the whole answer as an object; errors as for `Answers.next`."""
        async for found in self._answers.pieces():
            self._add(found[1])
        return await self._finished()

    async def stream(self, first: tuple[int, Piece] | None) -> AsyncIterator[bytes]:
        """Yield the events of the answer; an error becomes the last one."""
        # A message has one text, and comes before the calls, so all of its events have the same indices.
        part = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        has_begun = False
        try:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self._object("in_progress"))
            # This API has one answer only, so the number of the choice says nothing.
            async for found in self._answers.pieces(first, seconds=KEEP_ALIVE):
                if found is None:
                    yield COMMENT
                    continue
                piece = found[1]
                # Text that is not certain yet, such as half of a character, comes with a later piece.
                if text := self._add(piece):
                    # An answer that only calls has no message, so one begins with its first text.
                    for event in () if has_begun else self._begin(part):
                        yield event
                    has_begun = True
                    logprobs = token_logprobs(piece.logprobs)
                    yield self._event("response.output_text.delta", **part, delta=text, logprobs=logprobs)
            done = await self._finished()
            for event in self._end(done, part, has_begun=has_begun):
                yield event
        except Exception as error:
            fault = as_api_error(error).body["error"]
            # The documented fields are at the top; openai-python looks for the object.
            yield self._event(
                "error", **{key: fault[key] for key in ("code", "message", "param")}, error=fault
            )

    def _begin(self, part: dict[str, Any]) -> Iterator[bytes]:
        """Yield the events that open the message."""
        item = self._item("in_progress", [])
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **part, part=_content("", []))

    def _end(self, done: dict[str, Any], part: dict[str, Any], *, has_begun: bool) -> Iterator[bytes]:
        """Yield the events that close the message, those of the calls, and the last one."""
        for index, item in enumerate(done["output"]):
            if item["type"] == "message":
                # From inside out: the part, the item, and at last the whole response.
                yield from () if has_begun else self._begin(part)
                (content,) = item["content"]
                fields = {"text": self._text, "logprobs": content["logprobs"]}
                yield self._event("response.output_text.done", **part, **fields)
                yield self._event("response.content_part.done", **part, part=content)
            else:
                # A call is known as a whole only, so its arguments are one piece.
                place, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
                begun = {**item, "status": "in_progress", "arguments": ""}
                yield self._event("response.output_item.added", output_index=index, item=begun)
                yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
                fields = {"name": item["name"], "arguments": arguments}
                yield self._event("response.function_call_arguments.done", **place, **fields)
            yield self._event("response.output_item.done", output_index=index, item=item)
        yield self._event(f"response.{done['status']}", response=done)

    def _add(self, piece: Piece) -> str:
        """Take a piece, and return its text without parts of calls."""
        text, calls = split(piece, self._reader)
        self._text += text
        self._calls += calls
        self._tokens += piece.logprobs
        # Only the last piece has a reason.
        self._finish = piece.finish or self._finish
        return text

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
        message = self._item(status, [_content(self._text, token_logprobs(self._tokens))])
        return {
            **self._object(status),
            # An empty answer is a message too.
            "output": [*([message] if self._text or not self._calls else []), *map(_call, self._calls)],
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            # Media take no tokens, and nothing is cached between requests.
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
            **warned(self._answers.warnings),
            **({} if found is None else {"neighbors": found}),
        }

    def _object(self, status: str) -> dict[str, Any]:
        request, body = self._question.request, self._body
        choice = body.tool_choice
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
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": (body.text or {}).get("format") or _TEXT},
            "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _content(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call(call: Call) -> dict[str, Any]:
    # Two ids: that of the item, and that by which the result names the call.
    identity = "fc_" + call.id.removeprefix("call_")
    return {
        "id": identity,
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        **function_of(call),
    }
