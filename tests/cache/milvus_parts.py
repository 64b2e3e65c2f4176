"""Stores of images for Milvus, and a proxy that can cut or stall the connection to a server."""

import socket
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from bindllm import EmbeddingStore, Media
from bindllm.cache.blend import unit_rows
from index_stores import extend
from store_parts import FINGERPRINT, keys_of

WIDTH = 24


def image_store(folder: Path, count: int, *, start: int = 0) -> EmbeddingStore:
    """A store with that many image embeddings, of any length, and one text."""
    store = EmbeddingStore(folder, FINGERPRINT, WIDTH)
    extend(store, *range(start, start + count))
    text = [Media.text("a text")]
    store.append(keys_of(text), torch.ones(1, WIDTH), text)
    return store


def unit_queries(count: int, seed: int = 1) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, WIDTH)))


def expected_rows(store: EmbeddingStore) -> np.ndarray:
    """What an index of the images must hold, in the order of its numbers."""
    return unit_rows(store.get(store.keys("image")).numpy())


class Proxy:
    """A TCP server that forwards to another, until it is told to cut or to stall.

    Attributes:
        cut_after: bytes to forward before every connection is cut, once; None: never.
    """

    def __init__(self, port: int) -> None:
        self.cut_after: int | None = None
        self._target, self._stalled, self._sockets = port, threading.Event(), []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Refuse new connections and cut those that are open."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._sockets.clear()

    def stall(self) -> None:
        """Keep the connections open and forward nothing any more."""
        self._stalled.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._stalled.is_set():
                    return
                if self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after < 0:
                        self.cut_after = None
                        self.cut()
                        return
                sink.sendall(data)
