"""Encoders for processes that are killed in the middle: each media is embedded alone, after a while, and written."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import torch

from bindllm.embeddings import embedder, precompute
from tiny import ColorEncoder

# In the processes that the tests start each embedding is written at once; a mere import changes nothing.
if "EMBED_AT_ONCE" in os.environ:
    precompute.FLUSH_SECONDS = 0.0
    embedder.PREPARED_BYTES = 2


class SlowEncoder(ColorEncoder):
    """Notes its process's number in ``process-<rank>``; each media takes SLOW_SECONDS, and FAILING_RANK fails."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        rank = os.environ.get("LOCAL_RANK", "0")
        Path(f"process-{rank}").write_text(str(os.getpid()))
        time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
        self.done += 1
        # A broken device stays broken: a single failure would be that of one file.
        if self.done >= 3 and rank == os.environ.get("FAILING_RANK"):
            raise OSError("this device is broken")
        return super().embed(modality, inputs)


class HeatEncoder(SlowEncoder):
    """Serves another modality, in the same space."""

    modalities = ("thermal",)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"HeatEncoder").hexdigest()
