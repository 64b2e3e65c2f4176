"""The processes of a run watch each other: when one is gone, the others say so and stop.

A process that waits for a lost one inside a collective operation may wait for half an hour before the library gives
up, and then speaks of sockets. So each keeps a connection to the first process, which the system closes at the death
of either end, however it died.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable

from bindllm.errors import TrainingError

GRACE_SECONDS = 20.0
"""Time in which a process may finish what it is writing, after it has learnt that another one is gone."""

NOTICE_SECONDS = 5.0
"""How long a failed operation waits to hear that another process is the reason."""

ALIKE_SECONDS = 1.0
"""How long a process waits to see whether it fails in the same way as another one, and then says so itself."""

MEETING_SECONDS = 300.0
"""How long the processes wait for each other to connect."""

GO_ON = "What was saved last is whole: run the same command again, with as many processes, and it goes on from there"

# A node that loses its power closes nothing: after half a minute of silence the system takes it for gone.
_KEEPALIVE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_BYE, _FAILED, _GONE = "bye", "failed", "gone"


class Watch:
    """One process's end of the connections; made by all processes of a run at the same moment.

    Args:
        rank: number of this process.
        count: of all processes.
        host: name of the machine of the first process.
        broadcast: gives the first process's value to all.

    Raises:
        TrainingError: the processes do not reach each other.
    """

    def __init__(
        self, rank: int, count: int, *, host: str, broadcast: Callable[[list[str]], list[str]]
    ) -> None:
        self.rank, self.count = rank, count
        self.lost = threading.Event()
        self._ended = threading.Event()
        self._buffers: dict[int, bytes] = {}
        try:
            self._peers = self._accept(broadcast) if rank == 0 else self._connect(host, broadcast)
        except OSError as error:
            raise TrainingError(
                f"process {rank + 1} of {count} cannot reach the first process on {host} ({error}); the processes "
                "of a run must be able to connect to each other on any port"
            ) from error
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def stop(self) -> None:
        """Leave in order: from now on nobody misses this process, and it misses nobody."""
        self._ended.set()
        self._tell({"kind": _BYE, "rank": self.rank})

    def fail(self, reason: str) -> None:
        """Tell the others that this process ends, and why."""
        self._ended.set()
        self._tell({"kind": _FAILED, "rank": self.rank, "reason": reason})

    def explains(self, error: BaseException) -> bool:
        """Return whether an operation failed because another process is gone; it may take a moment to be known."""
        return isinstance(error, RuntimeError) and self.lost.wait(NOTICE_SECONDS)

    def _accept(self, broadcast: Callable[[list[str]], list[str]]) -> dict[int, socket.socket]:
        """Let every other process connect; one that does not know the word is nobody of ours."""
        word, peers = secrets.token_hex(16), {}
        with socket.create_server(("", 0), backlog=self.count) as server:
            broadcast([str(server.getsockname()[1]), word])
            server.settimeout(MEETING_SECONDS)
            while len(peers) < self.count - 1:
                peer, _ = server.accept()
                peer.settimeout(MEETING_SECONDS)
                told = peer.makefile("rb").readline(100).decode(errors="replace").split()
                if len(told) == 2 and secrets.compare_digest(told[0], word) and told[1].isdecimal():
                    peers[int(told[1])] = peer
                else:
                    peer.close()
        return {rank: _kept_alive(peer) for rank, peer in peers.items()}

    def _connect(self, host: str, broadcast: Callable[[list[str]], list[str]]) -> dict[int, socket.socket]:
        port, word = broadcast([])
        peer = socket.create_connection((host, int(port)), timeout=MEETING_SECONDS)
        peer.sendall(f"{word} {self.rank}\n".encode())
        return {0: _kept_alive(peer)}

    def _listen(self) -> None:
        """Hear what the peers say, until all have left or one is gone (in a thread)."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    message = self._read(key.fileobj, key.data)
                    if message is None:
                        continue
                    if message["kind"] == _BYE:
                        selector.unregister(key.fileobj)
                    else:
                        self._end(message)
                        return

    def _read(self, peer: socket.socket, rank: int) -> dict | None:
        """Return what a peer says; None: not a whole line yet."""
        try:
            content = peer.recv(4096)
        except OSError:
            content = b""
        if not content:
            return {"kind": _GONE, "rank": rank}
        line, end, self._buffers[rank] = (self._buffers.get(rank, b"") + content).partition(b"\n")
        if not end:
            self._buffers[rank] = line
            return None
        return json.loads(line)

    def _end(self, message: dict) -> None:
        """Say what has happened and stop this process, unless it is ending by itself (in a thread)."""
        if self._ended.wait(ALIKE_SECONDS if message["kind"] == _FAILED else 0):
            return
        # The first process hears of everything; the others hear it from there.
        if self.rank == 0:
            self._tell(message)
        what = "has ended" if message["kind"] == _GONE else f"has failed ({message['reason']})"
        print(
            f"error: process {message['rank'] + 1} of {self.count} {what} before the run was done. {GO_ON}",
            file=sys.stderr,
            flush=True,
        )
        self.lost.set()
        if not self._ended.wait(GRACE_SECONDS):
            os._exit(1)

    def _tell(self, message: dict) -> None:
        for peer in self._peers.values():
            try:
                peer.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                # It is gone already, and hears nothing.
                continue


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if name in vars(socket):
            peer.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
    return peer
