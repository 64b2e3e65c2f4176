"""A server that streams scripted answers as /v1/chat/completions does, for tests of the chat page."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bindllm.serving

PAGE = Path(bindllm.serving.__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ALL = ["audio", "depth", "image", "imu", "point", "text", "thermal", "video"]


class ChatServer(ThreadingHTTPServer):
    """Answers each request with the next of `answers`: a list of pieces, or a status with a message.

    Attributes:
        answers: what comes next; a piece that is an `Exception` breaks the connection off, one that is a dict is sent
            as a chunk, and one that is an `Event` is waited for.
        asked: bodies of the requests so far.
        key: the API key, if one is needed.
        modalities: those that the model claims to serve.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked, self.key, self.modalities = [], [], None, list(ALL)
        self.has_cache, self.left = False, threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_) -> None:
        """A page that leaves is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.removeprefix("/") or "index.html"
        if path == "v1/models":
            entry = {"id": "tiny", "modalities": self.server.modalities, "has_cache": self.server.has_cache}
            self._json(*(self._refusal() or (200, {"object": "list", "data": [entry]})))
        elif (file := PAGE / path).parent == PAGE and file.is_file():
            self._send(200, file.read_bytes(), TYPES[file.suffix])
        else:
            self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if refusal := self._refusal():
            return self._json(*refusal)
        self.server.asked.append(body)
        answer = self.server.answers.pop(0)
        if isinstance(answer, tuple):
            status, message = answer
            return self._json(status, {"error": {"message": message}}, {"retry-after": "2"})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        try:
            for piece in answer:
                self._write(piece)
            self.wfile.write(b"data: [DONE]\n\n")
        except (OSError, EOFError):
            self.server.left.set()
        self.close_connection = True

    def _write(self, piece) -> None:
        if isinstance(piece, Exception):
            raise piece
        if isinstance(piece, threading.Event):
            # Comments until then, which fail once the page has left.
            while not piece.wait(0.05):
                self.wfile.write(b": keep-alive\n\n")
            return
        chunk = piece if isinstance(piece, dict) else {"choices": [{"index": 0, "delta": {"content": piece}}]}
        self.wfile.write(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n")

    def _refusal(self) -> tuple[int, dict] | None:
        if self.server.key in (None, self.headers.get("authorization", "").removeprefix("Bearer ")):
            return None
        return 401, {"error": {"message": "a wrong API key"}}

    def _json(self, status: int, value: dict, headers: dict | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, content: bytes, kind: str, headers: dict | None = None) -> None:
        self.send_response(status)
        all_headers = {
            "content-type": kind,
            "content-length": len(content),
            "content-security-policy": POLICY,
        }
        for name, value in {**all_headers, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
