"""Clients of `benchmarks.serve`, in a process of their own so that their work does not count as the server's.

``python -m benchmarks.serve_client PORT < BODIES`` sends one request for each line at the same time, and prints the
seconds until the first text of each answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def first_text(port: int, body: bytes) -> float:
    """Send a request, read its whole stream, and return the seconds until the first text."""
    started, first, received = time.perf_counter(), None, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"Host: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
    while part := await reader.read(1 << 16):
        received += part
        # The event before it has the role, and no text.
        if first is None and b'"delta":{"content":' in received:
            first = time.perf_counter() - started
    writer.close()
    # An error after the first text is an event of the stream, which ends as usual.
    if first is None or b"data: [DONE]" not in received or b'data: {"error"' in received:
        raise SystemExit(f"serve_client: {received[-500:]!r}")
    return first


async def main(port: int, bodies: list[bytes]) -> None:
    """Send all requests at once, and print their times as JSON."""
    print(json.dumps(await asyncio.gather(*(first_text(port, body) for body in bodies))))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.stdin.buffer.read().splitlines()))
