"""A brain behind any OpenAI-compatible URL. Only texts and the handles of media are sent, never media or paths."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from bindllm.errors import BindLLMError, InputError, needs_extra, printable
from bindllm.model.generation.calls import STRICT_JSON
from bindllm.reasoning.brain import Dicts, Reply

MOST_BYTES = 4 << 20
"""Largest answer that is read."""

_MOST_SHOWN = 300


class EndpointError(BindLLMError):
    """An endpoint that is down, slow, or answers with an error or something unreadable."""


class Endpoint:
    """An OpenAI-compatible chat endpoint as a brain.

    Args:
        url: address up to the version, such as ``http://localhost:8000/v1``.
        model: name of the model there.
        key: API key; None: without one.
        **fields: further fields of each request, such as ``temperature``.

    Raises:
        InputError: not the address of an endpoint.
        MissingExtraError: httpx is not installed.

    Example:
        ```python
        Solver(Endpoint("http://localhost:8000/v1", "qwen3"), model_tools(eyes)).run("How many cats?", [image])
        ```
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, **fields: Any) -> None:
        with needs_extra("httpx", extra="solve", purpose="ask an endpoint"):
            import httpx
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the endpoint is {url!r}, expected an address such as http://localhost:8000/v1")
        self.name = model
        self._url, self._fields, self._httpx = url.rstrip("/"), fields, httpx
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def reply(self, messages: Dicts, tools: Dicts, *, required: bool, seconds: float, tokens: int) -> Reply:
        """Ask for the next step, see `Brain.reply`."""
        body = {"model": self.name, "messages": list(messages), "max_tokens": tokens, **self._fields}
        if tools:
            body |= {"tools": list(tools), "tool_choice": "required" if required else "auto"}
        answer = self._post(body, seconds)
        match answer:
            case {"choices": [{"message": {**message}, **choice}, *_]}:
                pass
            case _:
                raise EndpointError(f"the endpoint {self._url} answers without choices: {_shown(answer)}")
        match answer.get("usage"):
            case {"completion_tokens": int() as used} if used >= 0:
                pass
            case _:
                # Unknown, so counted as the most that it can be.
                used = tokens
        reply = _read(message)
        problem = reply.problem
        if choice.get("finish_reason") == "length":
            problem = f"the reply was cut after {tokens} tokens; write less"
        elif choice.get("finish_reason") == "content_filter":
            problem = "the reply was cut by the endpoint's filter"
        return Reply(reply.text, reply.calls, used, problem)

    def _post(self, body: Mapping[str, Any], seconds: float) -> Any:
        """Send a request and return the object of the answer."""
        deadline, url = time.monotonic() + seconds, f"{self._url}/chat/completions"
        try:
            with (
                self._httpx.Client(timeout=seconds, headers=self._headers) as client,
                client.stream("POST", url, json=body) as response,
            ):
                content = bytearray()
                for part in response.iter_bytes():
                    content += part
                    # The time-out of httpx starts again with each part, so a server that drips would never end.
                    if time.monotonic() > deadline:
                        raise EndpointError(
                            f"the endpoint {url} has not ended its answer in {seconds:.1f} seconds"
                        )
                    if len(content) > MOST_BYTES:
                        raise EndpointError(f"the endpoint {url} answers with more than {MOST_BYTES:,} bytes")
                status = response.status_code
        except self._httpx.TimeoutException as error:
            raise EndpointError(f"the endpoint {url} has not answered in {seconds:.1f} seconds") from error
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            raise EndpointError(
                f"the endpoint {url} cannot be reached ({error}); check address and server"
            ) from error
        if status != 200:
            text = content.decode("utf-8", "replace")
            raise EndpointError(f"the endpoint {url} answers with status {status}: {_shown(text)}")
        try:
            return STRICT_JSON.decode(content.decode())
        except (ValueError, RecursionError) as error:
            raise EndpointError(
                f"the endpoint {url} does not answer in JSON: {_shown(content[:999])}"
            ) from error


def _read(message: Mapping[str, Any]) -> Reply:
    """Return the text and the calls of a message."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        return Reply(json.dumps(content), problem="the content of the reply is not a text")
    # Thoughts are no part of the answer; some endpoints leave them in the text.
    text, calls = content.rpartition("</think>")[2], []
    given = message.get("tool_calls") or []
    for call in given if isinstance(given, list) else [given]:
        match call:
            case {"function": {"name": str() as name, "arguments": str() as written}}:
                try:
                    arguments = STRICT_JSON.decode(written or "{}")
                except (ValueError, RecursionError):
                    arguments = None
                if isinstance(arguments, dict):
                    calls.append((name, arguments))
                    continue
        shown = json.dumps(call, ensure_ascii=False)
        return Reply(
            text or shown, problem=f"the arguments of a call are not a JSON object: {shown[:_MOST_SHOWN]}"
        )
    refusal = message.get("refusal")
    problem = f"the model refuses: {_shown(refusal)}" if refusal and not (text or calls) else ""
    return Reply(text, tuple(calls), problem=problem)


def _shown(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes | bytearray) else str(value)
    return printable(" ".join(text[: 2 * _MOST_SHOWN].split()))[:_MOST_SHOWN]
