"""Training from tar shards: samples per second against the same samples in memory, and waiting times."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Metric, paired, seconds
from benchmarks.parts import DECODER, bound_loss, bound_model
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.chunks import ChunkReader, StreamOptions
from bindllm.data.stream.loader import StreamLoader
from bindllm.data.stream.plan import Mixture, Position, ShardStream, StreamState
from bindllm.data.stream.shards import TarSample, read_shard
from bindllm.encoders import EfficientNetLite, Encoder
from bindllm.media import Media
from bindllm.model.decoder import default_device, load_tokenizer
from bindllm.parallel import SINGLE_PROCESS, RunContext

ON_GPU = torch.cuda.is_available()
SHARDS, SAMPLES, SIDE = 4, 512, 256
CHUNK, BATCH, MAX_LENGTH = 512, 16, 96
READ, EMBEDDED = 2048, 1024 if ON_GPU else 128
WARM, STEPS = 8, 128 if ON_GPU else 24
WORDS = "a photo of the small red house with two old trees by a quiet lake under gray clouds in winter"


class Instant:
    """An encoder that costs nothing, so that only reading, tokenizing and batching are timed."""

    modalities, embedding_size, config = ("image",), 1280, {}

    def fingerprint(self) -> str:
        return "instant"

    def to(self, device: torch.device | str) -> Instant:
        return self

    def prepare(self, media: Media) -> torch.Tensor:
        return torch.zeros(1)

    def embed(self, modality: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.ones(len(inputs), self.embedding_size), dim=-1)


class Timed(EfficientNetLite):
    """An encoder that adds up the time that it computes."""

    seconds = 0.0

    def embed(self, modality: str, inputs: Sequence[torch.Tensor], **options: Any) -> torch.Tensor:
        results = []
        self.seconds += seconds(lambda: results.append(super(Timed, self).embed(modality, inputs, **options)))
        return results[0]


class InMemory:
    """Replaces a `Mixture`: the samples of all shards, already in memory."""

    def __init__(self, samples: Sequence[TarSample]) -> None:
        self.samples = samples

    def read(
        self, positions: Sequence[Position], bad: list[str]
    ) -> Iterator[tuple[int, TarSample, tuple[Position, ...]]]:
        pass_index = 0
        while True:
            for number, sample in enumerate(self.samples, start=1):
                yield 0, sample, (Position(pass_index, 0, number, pass_index * len(self.samples) + number),)
            pass_index += 1


def write_shards(folder: Path) -> list[str]:
    """Write 256 x 256 JPEGs of smooth noise with captions of 5 to 15 words, packed like img2dataset."""
    draw, shards = np.random.default_rng(0), []
    for shard in range(SHARDS):
        shards.append(str(folder / f"{shard:05}.tar"))
        with tarfile.open(shards[-1], "w") as tar:
            for number in range(SAMPLES):
                rough = draw.integers(0, 256, (SIDE // 16, SIDE // 16, 3), np.uint8)
                image = io.BytesIO()
                Image.fromarray(rough).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(image, "JPEG")
                caption = " ".join(draw.choice(WORDS.split(), draw.integers(5, 16)))
                facts = json.dumps({"caption": caption, "key": f"{shard:05}{number:04}"})
                for end, content in (
                    ("jpg", image.getvalue()),
                    ("txt", caption.encode()),
                    ("json", facts.encode()),
                ):
                    entry = tarfile.TarInfo(f"{shard:05}{number:04}.{end}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return shards


def drain(
    mixture: Mixture | InMemory, tokenizer: Any, encoder: Encoder, source: SourceConfig, samples: int
) -> None:
    """Make chunks at full speed until ``samples`` samples are in batches."""
    options = StreamOptions(BATCH, MAX_LENGTH, seed=0, chunk=min(CHUNK, samples))
    context = RunContext(device=default_device())
    reader = ChunkReader(mixture, [(0, source)], tokenizer, [encoder], options, context)
    with closing(reader.read(StreamState(0, 0, (Position(),)))) as chunks:
        done = 0
        while done < samples:
            done += len(next(chunks).embedded.samples)


def throughput(shards: Sequence[str], source: SourceConfig) -> list[Metric]:
    """Compare reading from shards with reading from memory, without and with an encoder."""
    stream = Mixture([ShardStream(source.path, shards)], [1.0])
    memory = InMemory([sample for shard in shards for sample in read_shard(shard)])
    metrics, tokenizer = [], load_tokenizer(DECODER)
    for name, encoder, count in (("", Instant(), READ), ("_embedded", EfficientNetLite(), EMBEDDED)):
        ratio, ours, floor = paired(
            lambda encoder=encoder, count=count: drain(stream, tokenizer, encoder, source, count),
            lambda encoder=encoder, count=count: drain(memory, tokenizer, encoder, source, count),
            repeats=5,
        )
        work = "EfficientNet-Lite0 embeds" if name else "read, parsed, tokenized and grouped; no encoder"
        metrics.append(
            Metric(
                f"stream{name}_samples_per_second",
                count / ours,
                "samples/s",
                count / floor,
                f"{work}; JPEGs of {SIDE} x {SIDE}; floor: the same samples in memory; takes {ratio:.2f} times that",
            )
        )
    timed = Timed()
    whole = seconds(lambda: drain(stream, tokenizer, timed, source, EMBEDDED))
    metrics.append(
        Metric(
            "stream_encoder_waiting", 1 - timed.seconds / whole, "share", 0.0,
            "of its time the encoder has nothing to embed while chunks are made at full speed "
            f"({SINGLE_PROCESS.num_threads} threads decode)",
        )
    )  # fmt: skip
    return metrics


def waiting(source: SourceConfig) -> list[Metric]:
    """Return the share of time that training waits for a batch, and the slowdown of a step while embedding."""
    model = bound_model()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> float:
        """Train on a batch, synchronized, and return the seconds."""

        def run() -> None:
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "numbers"}
            bound_loss(model, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        return seconds(run)

    options = StreamOptions(batch_size=BATCH, max_length=MAX_LENGTH, seed=0, chunk=128)
    loader = StreamLoader(
        [source], tokenizer=load_tokenizer(DECODER), encoders=[EfficientNetLite()],
        options=options, length=STEPS, context=RunContext(device=default_device()),
    )  # fmt: skip
    batches = iter(loader)
    kept = list(islice(batches, WARM))
    for batch in kept:
        step(batch)
    before = loader.report.seconds_waited
    streamed = [step(batch) for batch in islice(batches, STEPS)]
    waited = loader.report.seconds_waited - before
    batches.close()
    undisturbed = [step(batch) for batch in (kept * STEPS)[:STEPS]]
    slower = np.median(streamed) / np.median(undisturbed)
    return [
        Metric(
            "stream_training_waiting", waited / (waited + sum(streamed)), "share", 0.0,
            f"of {STEPS} steps of {BATCH} rows while EfficientNet-Lite0 embeds the next; such a step "
            f"takes {slower:.2f} times one that has the device to itself",
        )
    ]  # fmt: skip


def metrics() -> list[Metric]:
    """Measure synthetic shards in a temporary folder, so that they are read from the disk cache."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder))
        source = SourceConfig(f"{folder}/{{00000..{SHARDS - 1:05}}}.tar")
        return [*throughput(shards, source), *waiting(source)]
