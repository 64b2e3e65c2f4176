"""`python -m benchmarks.scale [--pairs 3e6 --gpus 8 ...]`: computes the tables of docs/scale.md.

Every number comes from one of three sources: an assumption below, which an option of the same name changes; a small
measurement made now (the size of a row of the store, the time of a lookup); or a result of another benchmark in
benchmarks/results/. ``--write`` writes the tables into docs/scale.md, between its two marks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import tracemalloc
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.cache import table as cells_table
from benchmarks.cache_cell import SIZE, keys_of, open_store
from benchmarks.measure import RESULTS, machine_kind, seconds
from bindllm import Media
from bindllm.atomic import atomic_file
from bindllm.cache.factories import choose
from bindllm.embeddings.shards import KEY, KEY_BYTES, MANY_SMALL, SMALL_BYTES, Shards
from bindllm.model.bind_network import BindConfig, BindNetwork

PAGE = Path("docs/scale.md")
START, END = "<!-- made by: python -m benchmarks.scale --write -->", "<!-- until here -->"


def _assumed(value: float, words: str) -> float:
    return field(default=value, metadata={"words": words})


@dataclass(frozen=True)
class Assumptions:
    """The planned run and its machines."""

    pairs: float = _assumed(940e6, "image-text pairs of stage 1 (arXiv 2309.03905)")
    epochs: float = _assumed(3, "epochs of training; images are embedded once")
    batch: float = _assumed(1024, "samples in a step")
    cached: float = _assumed(3e6, "images in the cache (CC3M)")
    image_bytes: float = _assumed(60e3, "bytes of an image file: JPEG, short side about 256 to 512")
    caption_bytes: float = _assumed(100, "bytes of a caption")
    source_bytes: float = _assumed(40, "bytes of a path, kept as the source in the store")
    flush_rows: float = _assumed(4096, "rows that `bindllm embed` writes at a time, before they are merged")
    gpus: float = _assumed(64, "GPUs: H100 SXM")
    gpus_per_node: float = _assumed(8, "GPUs in a node")
    gpu_rate: float = _assumed(989e12, "FLOP/s of a GPU: dense bfloat16, from the data sheet")
    gpu_bytes: float = _assumed(80e9, "bytes of memory of a GPU")
    encoder_share: float = _assumed(0.4, "share of that rate that the encoder reaches")
    decoder_share: float = _assumed(0.35, "share of that rate that training reaches")
    reading_rate: float = _assumed(150, "images that one core reads, decodes and resizes in a second")
    node_cores: float = _assumed(96, "cores in a node")
    disk_rate: float = _assumed(2e9, "bytes/s that a node reads from the shared file system")
    network_rate: float = _assumed(50e9, "bytes/s between nodes for each GPU: 400 Gbit/s")
    tokens: float = _assumed(64, "tokens in a sample: the prompt and a caption")
    decoder_parameters: float = _assumed(6.74e9, "parameters of the decoder: LLaMA 7B, frozen, bfloat16")
    decoder_width: float = _assumed(4096, "D")
    decoder_layers: float = _assumed(32, "L")


@dataclass(frozen=True)
class Measured:
    """Measurements made now, on this machine.

    Args:
        row_bytes: of one embedding in a store on disk.
        look_up: seconds for one key in one shard, at the size after compacting.
        media_bytes: of memory for one image whose embedding a training run looks up: media, path and key.
    """

    row_bytes: float
    look_up: float
    media_bytes: float


def vision_flops() -> float:
    """Operations for one image in ImageBind's vision trunk: 32 blocks of width 1280 over 257 tokens."""
    width, blocks, tokens = 1280, 32, 257
    return blocks * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def measure(plan: Assumptions) -> Measured:
    """Create a small store and a few shards, and measure them."""
    with tempfile.TemporaryDirectory() as folder:
        return Measured(_row_bytes(Path(folder), plan), _look_up(Path(folder), plan), _media_bytes(plan))


def _media(plan: Assumptions, count: int) -> list[Media]:
    digits = int(plan.source_bytes) - len(".jpg")
    return [Media.image(f"{n:0{digits}}.jpg") for n in range(count)]


def _row_bytes(folder: Path, plan: Assumptions, rows: int = 4096) -> float:
    store = open_store(folder / "store")
    store.append(keys_of(0, rows), torch.ones(rows, SIZE), _media(plan, rows))
    return sum(file.stat().st_size for file in store.folder.glob("embeddings-*.arrow")) / rows


def _shard_rows(plan: Assumptions, row_bytes: float) -> float:
    """Rows of a shard that is not merged any more: `MANY_SMALL` small ones together."""
    return MANY_SMALL * min(plan.flush_rows, SMALL_BYTES / row_bytes)


def _look_up(folder: Path, plan: Assumptions, shards: int = 32) -> float:
    """Look up a batch that no shard has: nearly all shards lack a given key."""
    schema = pa.schema([("key", pa.binary(KEY_BYTES)), ("value", pa.binary(1))])
    rows, draw = int(_shard_rows(plan, 4 * SIZE)), np.random.default_rng(0)
    (folder / "shards").mkdir()
    store = Shards(folder / "shards", kind="files", schema=schema)
    for _ in range(shards):
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(
                field.type, rows, [None, pa.py_buffer(draw.bytes(rows * field.type.byte_width))]
            )
            for field in schema
        ]
        store.append(pa.table(columns, schema=schema))
    batch = np.frombuffer(draw.bytes(int(plan.batch) * KEY_BYTES), KEY)
    store.has(batch)
    return min(seconds(lambda: store.has(batch)) for _ in range(5)) / len(batch) / shards


def _media_bytes(plan: Assumptions, count: int = 20_000) -> float:
    tracemalloc.start()
    # As `MediaEmbeddings` holds them.
    held = dict(zip(_media(plan, count), keys_of(0, count), strict=True))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(held)


Rows = list[tuple[str, str]]


def assumptions_table(plan: Assumptions) -> Rows:
    """Every assumption with its option and its value."""
    return [
        (f"`--{part.name}` {part.metadata['words']}", f"{getattr(plan, part.name):,.6g}")
        for part in fields(plan)
    ]


def embedding_table(plan: Assumptions, found: Measured) -> Rows:
    """From image files to the store."""
    a_gpu = plan.gpu_rate * plan.encoder_share / vision_flops()
    a_node = min(
        plan.gpus_per_node * a_gpu,
        plan.node_cores * plan.reading_rate,
        plan.disk_rate / plan.image_bytes,
    )
    nodes = plan.gpus / plan.gpus_per_node
    rows = [
        ("image files", _bytes(plan.pairs * plan.image_bytes)),
        ("captions", _bytes(plan.pairs * plan.caption_bytes)),
        ("operations for an image", f"{vision_flops() / 1e9:.0f} GFLOP"),
        ("images/s of a GPU", f"{a_gpu:,.0f}"),
        ("images/s of a node: limit of GPUs; cores; disk", " ; ".join(
            f"{value:,.0f}" for value in (
                plan.gpus_per_node * a_gpu, plan.node_cores * plan.reading_rate, plan.disk_rate / plan.image_bytes
            )
        )),
        ("cores that keep a GPU busy", f"{a_gpu / plan.reading_rate:.0f}"),
        ("one GPU, if nothing else is slower", _time(plan.pairs / a_gpu)),
        (f"{nodes:.0f} nodes, at the smallest of the three", _time(plan.pairs / a_node / nodes)),
        ("images of the cache on one GPU", _time(plan.cached / a_gpu)),
    ]  # fmt: skip
    if (here := _metric("imagebind_image_per_second")) is not None:
        rows += [
            (f"images/s measured here ({machine_kind()})", f"{here:.2f}"),
            ("all pairs on this machine", _time(plan.pairs / here)),
            ("images of the cache on this machine", _time(plan.cached / here)),
        ]
    return rows


def store_table(plan: Assumptions, found: Measured) -> Rows:
    """The size of the store, and the time to find a row in it."""
    shards = plan.pairs / _shard_rows(plan, found.row_bytes)
    # A key is found half way through the shards, on average.
    step = plan.batch * shards / 2 * found.look_up
    return [
        ("bytes of a row on disk (measured)", f"{found.row_bytes:,.0f}"),
        ("for the vector and its key", f"{4 * SIZE} + {KEY_BYTES}"),
        ("the store", _bytes(plan.pairs * found.row_bytes)),
        ("its keys, which every lookup searches", _bytes(plan.pairs * KEY_BYTES)),
        ("the store for the images of the cache", _bytes(plan.cached * found.row_bytes)),
        ("rows of a shard that is not merged any more", f"{_shard_rows(plan, found.row_bytes):,.0f}"),
        ("shards", f"{shards:,.0f}"),
        ("lookup of a key in a shard (measured)", f"{found.look_up * 1e6:.2f} µs"),
        ("lookup of a batch, half of the shards for each key", _time(step)),
        ("all lookups of the run", _time(step * steps(plan))),
        (
            "... if each shard held its own range of keys",
            _time(plan.batch * found.look_up * steps(plan)),
        ),
        ("shards for the images of the cache", f"{plan.cached / _shard_rows(plan, found.row_bytes):,.0f}"),
        ("memory for an image in the lists of a run (measured)", f"{found.media_bytes:,.0f} bytes"),
        ("memory for these lists, in every process", _bytes(plan.pairs * found.media_bytes)),
    ]


def steps(plan: Assumptions) -> float:
    """Steps of training."""
    return plan.pairs * plan.epochs / plan.batch


def training_table(plan: Assumptions, found: Measured) -> Rows:
    """Stage 1: the bind network and the gates learn, the decoder passes gradients through."""
    with torch.device("meta"):
        bind = BindNetwork(SIZE, int(plan.decoder_width), BindConfig())
    trained = sum(parameter.numel() for parameter in bind.parameters())
    # Forward, and backward to the inputs: no gradients of the decoder's own weights.
    sample = 4 * plan.decoder_parameters * plan.tokens + 6 * trained
    step = plan.batch * sample / (plan.gpus * plan.gpu_rate * plan.decoder_share)
    # A sum over all GPUs sends and receives everything once each.
    gradients = 2 * 4 * trained / plan.network_rate
    own = plan.batch / plan.gpus
    # About 34 bytes of activations for each number of the residual stream, kept at every layer.
    activations = 34 * own * plan.tokens * plan.decoder_width * plan.decoder_layers
    memory = 2 * plan.decoder_parameters + 16 * trained + activations
    return [
        ("steps", f"{steps(plan):,.0f}"),
        ("trained parameters", f"{trained / 1e6:,.0f} million"),
        ("operations for a sample", f"{sample / 1e12:.2f} TFLOP"),
        ("a step, computing", _time(step)),
        ("a step, summing gradients in float32", _time(gradients)),
        ("GPU-hours", f"{steps(plan) * step * plan.gpus / 3600:,.0f}"),
        (
            f"{plan.gpus:.0f} GPUs, sums overlapped with computing",
            _time(steps(plan) * max(step, gradients)),
        ),
        (f"{plan.gpus:.0f} GPUs, without overlap", _time(steps(plan) * (step + gradients))),
        ("embeddings read in a step", _bytes(plan.batch * 4 * SIZE)),
        (f"memory on a GPU: decoder, trained parameters, activations of {own:.0f} samples", _bytes(memory)),
        ("share of the GPU's memory", f"{memory / plan.gpu_bytes:.0%}"),
    ]


def cache_table(plan: Assumptions, found: Measured) -> Rows:
    """The size of the cache by kind of index: from the largest one measured here, else computed."""
    rows = [(f"`choose({plan.cached:,.0f}, {SIZE})`", ", ".join(choose(int(plan.cached), SIZE)))]
    for kind, words, own in (
        ("exact", "Flat", 4 * SIZE),
        ("half", "SQfp16", 2 * SIZE),
        ("graph", "HNSW32 over SQfp16", 2 * SIZE + 4 * 64 + 8),
        ("lists", "inverted lists over SQ8", SIZE + 8),
    ):
        cells = [row for row in _cells() if row["kind"] == kind]
        largest = max(cells, key=lambda row: row["count"], default=None)
        size = largest["bytes"] / largest["count"] if largest else own + KEY_BYTES
        seen = f"measured at {largest['count']:,}" if largest else "computed"
        rows.append((
            f"{words}: {size:,.0f} bytes a row, {seen}",
            f"{_bytes(plan.cached * size)}; all pairs: {_bytes(plan.pairs * size)}",
        ))  # fmt: skip
        if largest and kind == "lists":
            rows += [
                ("... building it here", _time(plan.cached * largest["build_seconds"] / largest["count"])),
                ("... one query here, searching the same number of rows", _time(
                    plan.cached / largest["count"] / largest["queries_per_second_b1"]
                )),
            ]  # fmt: skip
    return rows


def _cells() -> list[dict]:
    file = RESULTS / "cache.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return [row for row in rows if row["machine"] == machine_kind()]


def _metric(name: str) -> float | None:
    file = RESULTS / f"{machine_kind()}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return next((row["value"] for row in rows if row["name"] == name), None)


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _time(length: float) -> str:
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if length >= 2 * size:
            return f"{length / size:,.3g} {unit}"
    return f"{length * 1000:,.3g} ms"


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in fields(Assumptions):
        parser.add_argument(f"--{part.name}", type=float, default=part.default, help=part.metadata["words"])
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE}")
    options = vars(parser.parse_args())
    write = options.pop("write")
    plan = Assumptions(**options)
    found = measure(plan)
    parts = [
        _markdown("assumption", assumptions_table(plan)),
        _markdown("embedding", embedding_table(plan, found)),
        _markdown("the store", store_table(plan, found)),
        _markdown("training", training_table(plan, found)),
        _markdown("the cache", cache_table(plan, found)),
    ]
    if cells := _cells():
        parts.append(cells_table(sorted(cells, key=lambda row: row["count"])))
    text = "\n\n".join(parts)
    if not write:
        print(text)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE} lacks the marks {START} and {END}")
    with atomic_file(PAGE) as part:
        part.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def _markdown(title: str, rows: Rows) -> str:
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {words} | {value} |" for words, value in rows)])


if __name__ == "__main__":
    main()
