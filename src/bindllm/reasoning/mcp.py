"""Tools of MCP servers, through the official SDK: https://modelcontextprotocol.io, revision 2026-07-28.

A server is a program that is not trusted: its texts are shown to the planner and never evaluated, it gets no media and
no path, and its schemas are checked.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shlex
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Self

from bindllm.errors import BindLLMError, needs_extra
from bindllm.media import Media
from bindllm.reasoning.tools import Tool

CONNECT_SECONDS = 30.0
"""Longest time of a connection, with the list of tools."""

MOST_TOOLS = 64

_LONGEST_DESCRIPTION = 500


class McpError(BindLLMError):
    """An MCP server that cannot be reached, or a tool of it that failed."""


class McpTools:
    """A connection to an MCP server, with its tools.

    Args:
        server: address of a server (``https://...``), or the command line of one, which is run without a shell.

    Raises:
        McpError: no connection, or too many tools.
        MissingExtraError: the SDK is not installed.

    Attributes:
        tools: the tools of the server. Their names follow the rule of OpenAI's API: other characters become ``_``.

    Example:
        ```python
        with McpTools("uvx mcp-server-time") as server:
            Solver(brain, [*model_tools(eyes), *server.tools]).run("...", media)
        ```
    """

    def __init__(self, server: str) -> None:
        with needs_extra("mcp", extra="mcp", purpose="call tools of MCP servers"):
            from mcp import Client, StdioServerParameters
            from mcp.client.stdio import stdio_client
        # What a server prints may hold escape sequences.
        self._log, target = open(os.devnull, "w"), server  # noqa: SIM115 (closed in `close`)
        if not server.startswith(("http://", "https://")):
            command, *arguments = shlex.split(server) or [""]
            target = stdio_client(StdioServerParameters(command=command, args=arguments), errlog=self._log)
        # The SDK is asynchronous: a loop in a thread of its own serves all calls.
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        threading.Thread(target=self._loop.run_forever, name="bindllm-mcp", daemon=True).start()
        ready: Future[list[Any]] = Future()
        self._task = asyncio.run_coroutine_threadsafe(self._serve(Client(target), ready), self._loop)
        try:
            listed = ready.result(CONNECT_SECONDS)
        # The SDK and the server may raise anything.
        except Exception as error:
            self.close()
            raise McpError(f"the MCP server {server!r} cannot be used: {_innermost(error)}") from error
        try:
            if len(listed) > MOST_TOOLS:
                raise McpError(f"the MCP server {server!r} has more than {MOST_TOOLS} tools")
            self.tools: Sequence[Tool] = [self._tool(one) for one in listed]
        except BindLLMError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and the server if it is a command."""
        self._loop.call_soon_threadsafe(self._stop.set)
        try:
            self._task.result(CONNECT_SECONDS)
        # It has been reported when it happened, and nothing is left to close.
        except Exception:
            self._task.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._log.close()

    async def _serve(self, client: Any, ready: Future[list[Any]]) -> None:
        """Hold the connection open: one task must enter and leave it."""
        try:
            async with client:
                self._client, found, cursor = client, [], None
                while cursor is not None or not found:
                    page = await client.list_tools(cursor=cursor)
                    found += page.tools
                    cursor = page.next_cursor
                    if cursor is None or len(found) > MOST_TOOLS:
                        break
                ready.set_result(found)
                await self._stop.wait()
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    def _tool(self, described: Any) -> Tool:
        name = re.sub("[^A-Za-z0-9_-]", "_", described.name)[:64]
        text = " ".join((described.description or described.title or name).split())[:_LONGEST_DESCRIPTION]
        run = partial(self._call, described.name)
        return Tool(name, text, described.input_schema, run, returns=("image", "audio"))

    def _call(self, name: str, /, **arguments: Any) -> Any:
        """Call a tool, in a thread that the scheduler gives up at its limit."""
        work: Coroutine[Any, Any, Any] = self._client.call_tool(name, arguments)
        try:
            result = asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except Exception as error:
            raise McpError(f"the MCP server failed: {_innermost(error)}") from error
        texts = "\n".join(filter(None, map(_words, result.content)))
        if result.is_error:
            raise McpError(texts or "the tool failed without a word")
        shown = [part for part in result.content if part.type in ("image", "audio")]
        media = [Media(part.type, base64.b64decode(part.data, validate=True)) for part in shown]
        if len(media) > 1 or (media and texts):
            raise McpError(
                f"the tool returned {len(media)} media, and {len(texts)} characters; expected one of them"
            )
        if media:
            return media[0]
        value = texts if result.structured_content is None else result.structured_content
        # Servers of the SDK wrap values that are no objects.
        return value["result"] if isinstance(value, dict) and value.keys() == {"result"} else value


def _words(part: Any) -> str | None:
    """Return the text of a part of a result; None for media."""
    if part.type in ("image", "audio"):
        return None
    # A resource of text has its text inside; a link and a resource of bytes have none.
    text = getattr(getattr(part, "resource", part), "text", None)
    if not isinstance(text, str):
        raise McpError(f"the tool returned a {part.type}, expected text, an image or audio")
    return text


def _innermost(error: BaseException) -> str:
    """Return the first error of a group, which the SDK's tasks raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
