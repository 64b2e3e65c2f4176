"""Kinds of Faiss index (https://arxiv.org/abs/2401.08281): choosing, making, training, filling, and search settings."""

from __future__ import annotations

import math
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bindllm.errors import InputError, MissingExtraError, StoreError

EXACT_FLOATS = 100_000 * 1024
"""Up to this many floats (vectors times width) the exact search is fast enough."""

ROWS_PER_CENTROID = 32
"""Training rows of each centroid; with half of them recall was the same (docs/scale.md)."""

TRAIN_ROUNDS = 6
"""Rounds of k-means over the lists, which is most of a build's time; more rounds did not raise recall."""

TRAIN_BYTES = 1 << 30
"""Memory limit of the training rows."""

CHUNK = 8192
"""Rows that are read and added at once: 32 MiB at E = 1,024."""

Read = Callable[[np.ndarray], np.ndarray]
"""Returns the unit vectors [N, E] of keys [N]."""

# Instruction set, as torch names it -> a processor that has it, as OpenBLAS names it.
_KERNELS = {"AVX2": "HASWELL", "AVX512": "SKYLAKEX"}
# Centroids of a product quantizer for each part of a vector: one byte.
_CODEBOOK = 256


def choose(count: int, embedding_size: int) -> tuple[str, str]:
    """Return the kind of index and its search settings that fit so many vectors of this width.

    Exact search while that is fast, then inverted lists of 8-bit vectors. Half precision ("SQfp16") is never chosen:
    it halves the memory, but Faiss has no fast kernel for batches of queries.

    Examples:
        >>> choose(10_000, 1024), choose(1_000_000, 1024)
        (('Flat', ''), ('IVF4096,SQ8', 'nprobe=16'))
    """
    if count * embedding_size <= EXACT_FLOATS:
        return "Flat", ""
    # About 4 sqrt(N) lists balance the search for the nearest centroids and the scan of their lists.
    num_lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    factory = f"IVF{num_lists},SQ8"
    return factory, default_search(factory)


def default_search(factory: str) -> str:
    """Return search settings for a kind of index, because the defaults of Faiss find too few neighbors.

    Examples:
        >>> default_search("IVF1024,PQ32x4fs,Refine(SQfp16)"), default_search("Flat")
        ('nprobe=16,k_factor_rf=8', '')
    """
    settings = []
    if lists := re.search(r"(?:^|,)IVF(\d+)", factory):
        # Never fewer than 16 lists: the neighbors of a query near a border are spread over several.
        settings.append(f"nprobe={min(int(lists[1]), max(16, int(lists[1]) // 256))}")
    elif re.match("HNSW", factory):
        settings.append("efSearch=64")
    if re.search(r",(RFlat$|Refine\()", factory):
        settings.append("k_factor_rf=8")
    return ",".join(settings)


def make_index(factory: str, embedding_size: int) -> Any:
    """Return an empty index of inner product.

    Raises:
        InputError: Faiss does not know the factory, or it does not fit this width.
    """
    faiss = load_faiss()
    try:
        index = faiss.index_factory(embedding_size, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"Faiss cannot build an index {factory!r} of inner product with {embedding_size} dimensions "
            f"({reason(error)}); 'Flat' is exact and always works"
        ) from error
    # Faiss prints a warning for fewer than 39 rows per centroid.
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.cp.niter = TRAIN_ROUNDS
        inverted.cp.min_points_per_centroid = 1
    quantized = faiss.downcast_index(index if inverted is None else inverted)
    # A product quantizer trains with a k-means of its own, which prints the same warning.
    if isinstance(quantized, faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan | faiss.IndexPQ):
        quantized.pq.cp.min_points_per_centroid = 1
    return index


def check_factory(factory: str, search: str, embedding_size: int) -> None:
    """Check a kind of index and its search settings before long work.

    Args:
        factory: As for `make_index`, or "auto".
        search: As for `set_search`, or "auto". With the factory "auto" they are checked later.
        embedding_size: E.

    Raises:
        InputError: Faiss does not know the factory, or this kind does not have the setting.
        MissingExtraError: Faiss is not installed.
    """
    index = make_index("Flat" if factory == "auto" else factory, embedding_size)
    if factory != "auto" and search != "auto":
        set_search(index, search)


def train_count(index: Any, count: int) -> int:
    """Return the number of training rows for an index of so many rows; 0 if it needs no training."""
    if index.is_trained:
        return 0
    inverted = load_faiss().try_extract_index_ivf(index)
    # K-means needs more rows than centroids, of the lists and of the codebooks.
    centroids = max(_CODEBOOK, inverted.nlist if inverted is not None else 0)
    fitting = max(_CODEBOOK, TRAIN_BYTES // (4 * index.d))
    return min(count, centroids * ROWS_PER_CENTROID, fitting)


def check_index(index: Any, source: str) -> Any | None:
    """Check that an index can serve a cache, and return its inverted file if that must be mapped for reconstruction.

    An inverted file looks vectors up through a map of 8 bytes a row, made by ``make_direct_map``. A refining index
    keeps the vectors in order and needs none.

    Raises:
        StoreError: The index is empty, has another metric, or cannot reconstruct its vectors.
    """
    faiss = load_faiss()
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise StoreError(f"{source} is a Faiss index of another metric, expected one of inner product")
    if not index.ntotal:
        raise StoreError(f"{source} is an empty index; fill it with the embeddings of images first")
    inverted = None if isinstance(index, faiss.IndexRefine) else faiss.try_extract_index_ivf(index)
    try:
        if inverted is None:
            index.reconstruct(0)
        elif isinstance(faiss.downcast_index(inverted), faiss.IndexIVFFastScan):
            # Faiss does not refuse, it crashes.
            raise RuntimeError("fast scan")
        else:
            # Any filled list gives a vector by its offset, so the test needs no direct map.
            lists, vector = inverted.invlists, np.zeros(inverted.d, np.float32)
            filled = next(number for number in range(inverted.nlist) if lists.list_size(number))
            inverted.reconstruct_from_offset(filled, 0, faiss.swig_ptr(vector))
    except (RuntimeError, StopIteration) as error:
        raise StoreError(
            f"{source}: an index of the type {type(index).__name__} cannot reconstruct its vectors, which a cache "
            "needs; build it with another factory, such as 'Flat'"
        ) from error
    return inverted


def set_search(index: Any, search: str) -> None:
    """Set how thoroughly an index searches, including an index inside a refining or transforming one.

    Args:
        index: A Faiss index.
        search: Settings of Faiss's ``ParameterSpace``, such as ``"nprobe=32,k_factor_rf=8"``; "" changes nothing.

    Raises:
        InputError: Not such a list, a number that is not above 0, or a setting that this kind does not have.
    """
    for part in filter(None, search.split(",")):
        name, _, value = part.partition("=")
        if not re.fullmatch(r"\d*\.?\d+", value) or float(value) <= 0:
            raise InputError(
                f"the search setting {part!r} is not of the form name=number with a number above 0, as in 'nprobe=32'"
            )
        try:
            load_faiss().ParameterSpace().set_index_parameter(index, name, float(value))
        except RuntimeError as error:
            raise InputError(
                f"an index of the type {type(index).__name__} has no search setting {name!r} ({reason(error)}); "
                "inverted files have nprobe, refining indexes k_factor_rf, graphs efSearch, and exact ones none"
            ) from error


def train(factory: str, embedding_size: int, keys: np.ndarray, read: Read) -> Any:
    """Return an empty index, trained on vectors that are evenly spread over the keys if the kind needs it."""
    index = make_index(factory, embedding_size)
    count = train_count(index, len(keys))
    if count:
        # Keys are sorted hashes: evenly spread ones are a fair sample, and the same one in every build.
        some = keys[np.arange(count) * len(keys) // count]
        rows = np.empty((count, embedding_size), np.float32)
        for start in range(0, count, CHUNK):
            rows[start : start + CHUNK] = read(some[start : start + CHUNK])
        try:
            index.train(rows)
        except RuntimeError as error:
            raise _cannot_build(factory, len(keys), error) from error
    return index


def write(index: Any, factory: str, keys: np.ndarray, read: Read, file: Path) -> None:
    """Write a file with the vectors of the keys; the empty index has the kind and the trained parts."""
    faiss = load_faiss()
    chunks = (read(keys[start : start + CHUNK]) for start in range(0, len(keys), CHUNK))
    try:
        # The code of a row depends on no other row in these kinds, so the file can be written in chunks.
        if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            _write_codes(index, len(keys), chunks, file)
            return
        for rows in chunks:
            index.add(rows)
    except RuntimeError as error:
        raise _cannot_build(factory, len(keys), error) from error
    faiss.write_index(index, str(file))


def _write_codes(index: Any, count: int, chunks: Iterator[np.ndarray], file: Path) -> None:
    """Append the code of each row to the file of an empty index, so that memory holds one chunk.

    Faiss writes these kinds as: type (4 bytes), width (4 bytes), number of rows (8 bytes), ..., number of values
    (8 bytes), values. A value of "Flat" is a float32, one of a scalar quantizer is a byte.
    """
    faiss = load_faiss()
    faiss.write_index(index, str(file))
    with file.open("r+b") as stream:
        start = stream.seek(0, os.SEEK_END)
        for rows in chunks:
            stream.write(index.sa_encode(rows).data)
        values = (stream.tell() - start) // (4 if isinstance(index, faiss.IndexFlat) else 1)
        # The header was written for an empty index; both counts in it are known only now.
        stream.seek(start - 8)
        stream.write(struct.pack("<Q", values))
        stream.seek(8)
        stream.write(struct.pack("<q", count))


def _cannot_build(factory: str, count: int, error: Exception) -> InputError:
    """Return the error for a failure of Faiss while it trains or adds."""
    return InputError(
        f"Faiss cannot build an index {factory!r} of {count} vectors ({reason(error)}); 'auto' chooses one that "
        "fits, and 'Flat' always works"
    )


def reason(error: Exception) -> str:
    """Return the message of a system error, or of a Faiss error without its C++ signature."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rpartition(": ")[2].strip()


def limit_threads() -> None:
    """Let Faiss use as many threads as torch; it has its own OpenMP, whose limit belongs to the calling thread."""
    import torch

    load_faiss().omp_set_num_threads(torch.get_num_threads())


def load_faiss() -> Any:
    """Return the module, loaded with the fastest kernels for this processor.

    Faiss has its own OpenBLAS. If that is older than the processor it uses its slowest kernels (a fifth of the speed on
    the machine of docs/scale.md), unless an environment variable names better ones while it loads.

    Raises:
        MissingExtraError: Faiss is not installed.
    """
    # Once Faiss is loaded its kernels are fixed.
    if (loaded := sys.modules.get("faiss")) is not None:
        return loaded
    import torch

    kernels = _KERNELS.get(torch.backends.cpu.get_cpu_capability())
    chosen = "OPENBLAS_CORETYPE" not in os.environ and kernels is not None
    if chosen:
        os.environ["OPENBLAS_CORETYPE"] = kernels
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss-cpu", extra="cache", purpose="search a visual cache") from error
    finally:
        # Removed again, because other libraries with OpenBLAS read the same variable.
        if chosen:
            del os.environ["OPENBLAS_CORETYPE"]
    return faiss
