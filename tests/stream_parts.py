"""Small tar shards of colored images with captions, written as WebDataset writes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tiny import COLORS


def write_shard(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar file with these members, in this order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(tar_bytes(members))
    return file


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar file with these members, in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def image_bytes(color: str, number: int) -> bytes:
    """A PNG of noise around a color, another one for each number."""
    rng = np.random.default_rng([number])
    pixels = np.clip(rng.normal(COLORS[color], 12, (16, 16, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def captioned(number: int) -> list[tuple[str, bytes]]:
    """The members of a sample: an image, a caption that names it, and JSON as img2dataset writes it."""
    color = list(COLORS)[number % len(COLORS)]
    caption = f"{color} square {'x' * (number % 7)}{number}"
    facts = {"key": f"{number:05}", "caption": caption, "status": "success"}
    return [
        (f"{number:05}.png", image_bytes(color, number)),
        (f"{number:05}.txt", caption.encode()),
        (f"{number:05}.json", json.dumps(facts).encode()),
    ]


def write_shards(folder: Path, counts: Sequence[int], *, first: int = 0) -> Path:
    """Write a shard for each count of samples, and return the pattern that names them all."""
    number = first
    for n, count in enumerate(counts):
        members = [member for k in range(number, number + count) for member in captioned(k)]
        write_shard(folder / f"{n:03}.tar", members)
        number += count
    return folder / f"{{000..{len(counts) - 1:03}}}.tar"


def described(shard: Path, rows: Mapping[str, object], images: Mapping[str, bytes]) -> Path:
    """Write a shard whose samples are JSON alone or JSON with an image of the same key."""
    members = []
    for key, row in rows.items():
        members += [(f"{key}.jpg", images[key])] if key in images else []
        members.append((f"{key}.json", json.dumps(row).encode()))
    return write_shard(shard, members)
