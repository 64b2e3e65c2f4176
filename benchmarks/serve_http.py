"""The HTTP part of `benchmarks.serve`: clients that stream, the time to their first text, and the cost of the layer."""

from __future__ import annotations

import base64
import gc
import io
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from PIL import Image

from benchmarks.measure import Metric, seconds, used_bytes
from bindllm import Conversation
from bindllm.serving.app import build_app
from bindllm.serving.config import ServeConfig
from bindllm.serving.engine import Engine
from bindllm.serving.server import build_server


def request_bodies(prompts: Sequence[Conversation], max_tokens: int) -> bytes:
    """Return streaming requests for conversations of images and texts, one a line."""
    lines = []
    for prompt in prompts:
        content = [_part(part) for message in prompt.messages for part in message.content]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "stream": True}
        lines.append(json.dumps(body))
    return "\n".join(lines).encode()


def _part(part: object) -> object:
    if isinstance(part, str):
        return part
    stream = io.BytesIO()
    Image.fromarray(part.source).save(stream, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()},
    }


def http_metrics(
    engine: Engine, prompts: Sequence[Conversation], *, new_tokens: int, static: Callable[[], object]
) -> list[Metric]:
    """Measure the server around an engine with one streaming client for each prompt.

    Args:
        engine: answers; it stays open.
        prompts: one for each client.
        new_tokens: of each answer.
        static: answers the same prompts as one static batch, whose answers come all at its end.
    """
    bodies, count = request_bodies(prompts, new_tokens), len(prompts)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = build_server(build_app(engine, ServeConfig("model")), engine, bound, drain=1, name="model")
    # As `bindllm.serving.server.run` does: a collection in the event loop would look at the whole model.
    gc.freeze()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    # The event loop reads HTTP, writes JSON, and does nothing else, so its processor time is the cost of both.
    clock = time.pthread_getcpuclockid(thread.ident)
    command = [sys.executable, "-m", "benchmarks.serve_client", str(bound.getsockname()[1])]
    shares, firsts, found = [], [], []

    def crowd() -> None:
        done = subprocess.run(command, input=bodies, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        found[:] = sorted(json.loads(done.stdout))

    # The first run, which is not counted, encodes the images.
    crowd()
    gc.collect()
    memory = used_bytes()
    for _ in range(3):
        before, used = time.clock_gettime(clock), time.process_time()
        crowd()
        # Both are processor time: a busy machine stretches the time of the clock only.
        shares.append((time.clock_gettime(clock) - before) / (time.process_time() - used))
        # In turn with the batch, so that a drift of the machine's speed does not favor one side.
        firsts.append((statistics.median(found), found[round(0.99 * (count - 1))], seconds(static)))
    gc.collect()
    memory = (used_bytes() - memory) / 2**20
    server.should_exit = True
    thread.join()
    gc.unfreeze()
    share, (half, most, whole) = statistics.median(shares), map(statistics.median, zip(*firsts, strict=True))
    to_half, to_most = (statistics.median(one[n] / one[2] for one in firsts) for n in (0, 1))
    note = f"{whole:.2f} s of one static batch, whose answers come at its end; {count} clients at once"
    return [
        Metric(
            "serve_http_share",
            share,
            "share of processor time",
            0.0,
            f"HTTP and JSON, of the whole server, for {count} streams of {new_tokens} tokens; below 0.02",
        ),
        Metric(
            "serve_memory_growth",
            memory,
            "MiB",
            0.0,
            f"memory after three crowds of {count} clients, less that after the first; an idle engine keeps no cache",
        ),
        Metric("serve_first_text_p50", to_half, "ratio of seconds", None, f"{half:.2f} s over {note}"),
        Metric("serve_first_text_p99", to_most, "ratio of seconds", None, f"{most:.2f} s over {note}"),
    ]
