"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, also inside a stream."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from bindllm.errors import EngineBusy, EngineClosed, InputError, MissingExtraError, printable

logger = logging.getLogger("bindllm.serving")

RETRY = {"retry-after": "2"}
"""Header that names the seconds after which a refused client should try again."""

NO_RETRY = {"x-should-retry": "false"}
"""Header that tells openai-python not to send the same request again."""

request_id: ContextVar[str] = ContextVar("request_id", default="none")
"""Id of the request that is being served; the guard sets it."""
# Characters of a given value that a message shows.
_MOST_SHOWN = 80
# The beginning of a message about media, whose name is that of their part; see `located`.
_PART = re.compile(r"((?:messages|input|shots)\[\S*\])(?: \([a-z_]+\))?: ")
_FIELD = re.compile("[a-z_]{1,32}")
# Made once, as every token of a stream is written with it.
_WRITER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# FastAPI has no words for a body that Python's parser gives up on.
_MESSAGES = {
    400: "the body cannot be read as JSON: it must be UTF-8, not nested deeply, without numbers of thousands of digits",
    404: "this path does not exist; the API is under /v1",
    405: "this path does not take this method",
}


class ApiError(HTTPException):
    """An error with the status and the fields of an answer.

    Args:
        message: text for people: given, expected, next step.
        code: short name for programs, such as ``model_not_found``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """The object of the answer."""
        kind = _TYPES.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


@contextmanager
def located(param: str, kind: object = None) -> Iterator[str]:
    """Name the part of a request before the message of every fault that is found in it.

    Args:
        param: where it is, such as ``messages[1].content[0]``.
        kind: its type, if it has one; shown if it is a word.

    Yields:
        the name, with the type.

    Raises:
        ApiError: the fault.

    Examples:
        >>> with located("messages[1].content[0]", "image_url"):
        ...     raise InputError("not an image")
        Traceback (most recent call last):
        bindllm.serving.api.errors.ApiError: 400: messages[1].content[0] (image_url): not an image
    """
    name = f"{param} ({kind})" if isinstance(kind, str) and _FIELD.fullmatch(kind) else param
    try:
        yield name
    except ApiError as error:
        # The same object: its status, code and headers stay.
        error.detail, error.param = f"{name}: {error.detail}", error.param or param
        raise
    except InputError as error:
        # Media have the name of their part already, if they were decoded inside.
        message = str(error).removeprefix(f"{name}: ")
        raise ApiError(400, f"{name}: {message}", param=param) from error


def as_api_error(error: BaseException) -> ApiError:
    """Return the answer for an error: faults of a request are explained, those of the server are only logged."""
    match error:
        case ApiError():
            return error
        # FastAPI would answer {"detail": ...}, which no client of this API can read.
        case RequestValidationError():
            return _validation_error(error)
        case StarletteHTTPException():
            message = _MESSAGES.get(error.status_code, str(error.detail))
            return ApiError(error.status_code, message, headers=dict(error.headers or {}))
        # Status 429 and not 503: clients wait and try again, and a proxy does not take the server out.
        case EngineBusy():
            return ApiError(
                429, "too many requests are waiting; try again later", code="queue_full", headers=RETRY
            )
        case EngineClosed():
            return draining_error()
        # Another server may have the package, this one will not get it by itself.
        case MissingExtraError():
            return ApiError(501, str(error), headers=NO_RETRY)
        case InputError():
            part = _PART.match(str(error))
            return ApiError(400, str(error), param=part and part[1])
        case _:
            # The message of an unexpected error may hold paths or texts of others, so only the log has it.
            logger.error("a request failed: %s", request_id.get(), exc_info=error)
            return ApiError(
                500, "the server failed at this request; its log has the reason under the request id"
            )


def warned(warnings: Sequence[str]) -> dict[str, list[str]]:
    """Return the field of an answer that has warnings about its media, if there are any."""
    return {"warnings": list(warnings)} if warnings else {}


def draining_error() -> ApiError:
    """Return the answer of a server that is about to end."""
    return ApiError(503, "the server is shutting down; try again later", headers=RETRY)


def dump(value: Any) -> bytes:
    """Return a value as JSON; half of a surrogate pair, which UTF-8 cannot carry, becomes a question mark."""
    return _WRITER.encode(value).encode("utf-8", "replace")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, for ``object_pairs_hook``.

    Raises:
        ApiError: a key occurs twice, and one of its values would be lost.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        message = f"the key {shown(key)} occurs more than once in one object of the body; give it once"
        raise ApiError(400, message, param=key if _FIELD.fullmatch(key) else None)
    return found


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer with a JSON body."""
    return Response(dump(value), status, headers, media_type="application/json")


def error_response(error: BaseException) -> Response:
    """Return the answer for an error."""
    answer = as_api_error(error)
    return json_response(answer.body, answer.status_code, dict(answer.headers or {}))


async def handle(request: Request, error: Exception) -> Response:
    """Answer an error that a route raised; FastAPI calls it."""
    return error_response(error)


def _validation_error(error: RequestValidationError) -> ApiError:
    """Return the first fault that validation found in a body."""
    # Pydantic lists a fault for each type of a union that the value does not have.
    faults = error.errors()
    # Of the types that a field may have, the given value comes closest to the one whose fault lies deepest.
    first = max(
        (one for one in faults if one["loc"][:2] == faults[0]["loc"][:2]), key=lambda one: len(one["loc"])
    )
    # The first word of a location is "body". In a union the names of types follow, which say nothing to a client.
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:] if _is_field(part)
    ]
    path = "".join(parts).removeprefix(".")
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON ({first['ctx']['error']} at character {first['loc'][-1]})"
        )
    if not path:
        return ApiError(400, "the body must be a JSON object, with the header Content-Type: application/json")
    given = "" if first["type"] == "missing" else f", not {shown(first.get('input'))}"
    return ApiError(400, f"{path}: {first['msg']}{given}", param=path)


def _is_field(part: str | int) -> bool:
    if isinstance(part, int):
        return True
    return _FIELD.fullmatch(part) is not None and part not in ("str", "bool", "int", "float", "list")


def shown(value: Any) -> str:
    """Return a given value for a message: in one line, and not all of a long one."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of length {len(value)}"
    # ``repr`` shows the quotes of a text, so that "5" and 5 differ, and escapes line breaks.
    text = repr(value)
    return printable(text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "...")
