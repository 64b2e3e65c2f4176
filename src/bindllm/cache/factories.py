"""Kinds of Faiss index (https://arxiv.org/abs/2401.08281): choosing, making, training, filling, and search settings."""

from __future__ import annotations

import math
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bindllm.errors import InputError, StoreError, needs_extra

EXACT_FLOATS = 100_000 * 1024
"""Up to this many floats (vectors times width) the exact search is fast enough."""

ROWS_PER_CENTROID = 32
"""Training rows of each centroid; with half of them recall was the same (docs/scale.md)."""

TRAIN_ROUNDS = 6
"""Rounds of k-means over the lists, which is most of a build's time; more rounds did not raise recall."""

TRAIN_BYTES = 1 << 30
"""Memory limit of the training rows."""

MAX_SEARCH = 1 << 20
"""Largest search setting: more lists or candidates than any index of a useful size has."""

CHUNK = 8192
"""Rows that are read and added at once: 32 MiB at E = 1,024."""

Read = Callable[[np.ndarray], np.ndarray]
"""Returns the unit vectors [N, E] of keys [N]."""

# Instruction set, as torch names it -> a processor that has it, as OpenBLAS names it.
_KERNELS = {"AVX2": "HASWELL", "AVX512": "SKYLAKEX"}
_loading = threading.Lock()
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

    Raises:
        InputError: Faiss does not know the factory, a cache cannot use it, or this kind does not have the setting.
        MissingExtraError: Faiss is not installed.
    """
    index = make_index("Flat" if factory == "auto" else factory, embedding_size)
    # Faiss builds kinds that a cache cannot use: it reads the vectors of neighbors back to mix them in.
    if reason := _unusable(index):
        raise InputError(
            f"an index {factory!r} {reason}, which a cache needs; 'Flat' is exact and always works"
        )
    if factory != "auto" and search != "auto":
        set_search(index, search)


def nodes(index: Any) -> Iterator[Any]:
    """Yield an index and the indexes inside it; the innermost last one gives the vectors back."""
    faiss = load_faiss()
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexRefine):
        yield from nodes(index.base_index)
        yield from nodes(index.refine_index)
    elif isinstance(index, faiss.IndexPreTransform):
        yield from nodes(index.index)


def leaves(index: Any) -> list[Any]:
    """Return the innermost indexes, which hold the codes of the rows, in the order of their bytes in a whole code."""
    faiss = load_faiss()
    return [
        node for node in nodes(index) if not isinstance(node, faiss.IndexRefine | faiss.IndexPreTransform)
    ]


def _unusable(index: Any) -> str:
    """Return the reason why an index cannot serve a cache, "" if it can."""
    faiss = load_faiss()
    leaf = leaves(index)[-1]
    if {index.metric_type, leaf.metric_type} != {faiss.METRIC_INNER_PRODUCT}:
        return "compares by another metric than the inner product"
    # Faiss does not refuse to reconstruct from inverted lists of fast scan, it crashes.
    others = faiss.IndexFastScan | faiss.IndexHNSW | faiss.IndexNSG
    if (_has_codes(leaf) and not isinstance(leaf, faiss.IndexLattice)) or (
        isinstance(leaf, others) and not isinstance(leaf, faiss.IndexIVF)
    ):
        return ""
    return f"(of the type {type(leaf).__name__}) cannot reconstruct its vectors"


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

    An inverted file looks vectors up through a map of 8 bytes a row, made by ``make_direct_map``.

    Raises:
        StoreError: The index is empty, has another metric, or cannot reconstruct its vectors.
    """
    faiss = load_faiss()
    if reason := _unusable(index):
        raise StoreError(
            f"{source}: the index {reason}, which a cache needs; build it with another factory, such as 'Flat'"
        )
    if not index.ntotal:
        raise StoreError(f"{source} is an empty index; fill it with the embeddings of images first")
    leaf = leaves(index)[-1]
    return leaf if isinstance(leaf, faiss.IndexIVF) else None


def set_search(index: Any, search: str) -> None:
    """Set how thoroughly an index searches, including an index inside a refining or transforming one.

    Args:
        search: Settings of Faiss's ``ParameterSpace``, such as ``"nprobe=32,k_factor_rf=8"``; "" changes nothing.

    Raises:
        InputError: Not such a list, a number out of range, or a setting that this kind does not have.
    """
    for part in filter(None, search.split(",")):
        name, _, value = part.partition("=")
        # Faiss converts a larger number to a meaningless one, and finds other neighbors without an error.
        if not re.fullmatch(r"\d*\.?\d+", value) or not 0 < float(value) <= MAX_SEARCH:
            raise InputError(
                f"the search setting {part!r} is not of the form name=number, as in 'nprobe=32', with a number above 0 "
                f"and up to {MAX_SEARCH:,}"
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
    # K-means needs all of its vectors at once, so `train_count` bounds their number.
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
            raise InputError(
                f"Faiss cannot build an index {factory!r} of {len(keys)} vectors ({reason(error)}); 'auto' chooses one "
                "that fits, and 'Flat' always works"
            ) from error
    return index


def write(index: Any, keys: np.ndarray, read: Read, file: Path, *, held: Held | None = None) -> None:
    """Write a file with the vectors of the keys.

    Args:
        index: Empty, with the kind and the trained parts.
        keys: Content hashes of the rows, [rows].
        held: Rows whose codes are copied instead of computed from their vectors.

    Raises:
        OSError, RuntimeError: The disk.
    """
    faiss = load_faiss()
    parts = (keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK))
    if not has_codes(index):
        for part in parts:
            index.add(read(part))
    else:
        chunks = (_encode(index, part, read, held) for part in parts)
        # These can be written in chunks, so that memory holds one chunk.
        if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            _write_codes(index, len(keys), chunks, file)
            return
        for codes in chunks:
            _add_codes(index, codes)
    faiss.write_index(index, str(file))


class Held(NamedTuple):
    """The rows of an index: sorted content hashes [rows], and codes [rows, bytes]."""

    keys: np.ndarray
    codes: list[np.ndarray]


def has_codes(index: Any) -> bool:
    """Return whether a row is a code of its own, which can be copied; a graph or a block of fast scan is not."""
    return all(map(_has_codes, leaves(index)))


def _has_codes(leaf: Any) -> bool:
    faiss = load_faiss()
    return isinstance(leaf, faiss.IndexFlatCodes | faiss.IndexIVF) and not isinstance(
        leaf, faiss.IndexIVFFastScan
    )


def codes_of(index: Any) -> list[np.ndarray]:
    """Return the codes of all rows, uint8 [rows, bytes], one array for each of the `leaves`."""
    faiss = load_faiss()
    found = []
    for leaf in leaves(index):
        if isinstance(leaf, faiss.IndexFlatCodes):
            # A view: the codes of a mapped file stay in the file.
            codes = faiss.rev_swig_ptr(leaf.codes.data(), leaf.ntotal * leaf.code_size).reshape(
                leaf.ntotal, -1
            )
        else:
            codes = np.empty((leaf.ntotal, leaf.sa_code_size()), np.uint8)
            # A whole code starts with the number of its list, the lowest byte first.
            width = leaf.coarse_code_size()
            for number in range(leaf.nlist):
                if size := leaf.invlists.list_size(number):
                    rows = faiss.rev_swig_ptr(leaf.invlists.get_ids(number), size)
                    inside = faiss.rev_swig_ptr(leaf.invlists.get_codes(number), size * leaf.code_size)
                    codes[rows, :width] = np.frombuffer(number.to_bytes(width, "little"), np.uint8)
                    codes[rows, width:] = inside.reshape(size, -1)
        found.append(codes)
    return found


def _encode(index: Any, keys: np.ndarray, read: Read, held: Held | None) -> np.ndarray:
    """Return the codes of keys, uint8 [N, bytes].

    The code of a vector can depend on the others that are encoded in the same call: through rounding in a matrix
    product, or through random numbers. Copying keeps the vectors of all other images when some are added or removed.
    """
    codes = np.empty((len(keys), index.sa_code_size()), np.uint8)
    is_held = np.isin(keys, held.keys, assume_unique=True) if held is not None else np.zeros(len(keys), bool)
    if held is not None:
        rows = np.searchsorted(held.keys, keys[is_held])
        codes[is_held] = np.concatenate([part[rows] for part in held.codes], axis=1)
    if not is_held.all():
        codes[~is_held] = index.sa_encode(read(keys[~is_held]))
    return codes


def _add_codes(index: Any, codes: np.ndarray) -> None:
    """Add rows by their codes [N, bytes]."""
    ids = np.arange(index.ntotal, index.ntotal + len(codes))
    start = 0
    for leaf in leaves(index):
        end = start + leaf.sa_code_size()
        leaf.add_sa_codes(np.ascontiguousarray(codes[:, start:end]), ids)
        start = end
    # Faiss counts the rows of a leaf, and of an index around it only in `add`.
    for node in nodes(index):
        node.ntotal = int(ids[-1]) + 1


def _write_codes(index: Any, count: int, chunks: Iterator[np.ndarray], file: Path) -> None:
    """Append codes to the file of an empty index.

    Faiss writes these kinds as: type (4 bytes), width (4 bytes), number of rows (8 bytes), ..., number of values
    (8 bytes), values. A value of "Flat" is a float32, one of a scalar quantizer is a byte.
    """
    faiss = load_faiss()
    faiss.write_index(index, str(file))
    with file.open("r+b") as stream:
        start = stream.seek(0, os.SEEK_END)
        for codes in chunks:
            stream.write(codes.data)
        values = (stream.tell() - start) // (4 if isinstance(index, faiss.IndexFlat) else 1)
        # The header was written for an empty index; both counts in it are known only now.
        stream.seek(start - 8)
        stream.write(struct.pack("<Q", values))
        stream.seek(8)
        stream.write(struct.pack("<q", count))


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
    import torch

    kernels = _KERNELS.get(torch.backends.cpu.get_cpu_capability())
    # Two threads may need Faiss first: `sys.modules` has half a module while one imports it, and the import waits.
    with _loading:
        # Once Faiss is loaded its kernels are fixed.
        chosen = kernels is not None and "faiss" not in sys.modules and "OPENBLAS_CORETYPE" not in os.environ
        if chosen:
            os.environ["OPENBLAS_CORETYPE"] = kernels
        try:
            with needs_extra("faiss-cpu", extra="cache", purpose="search a visual cache"):
                import faiss
        finally:
            # Removed again, because other libraries with OpenBLAS read the same variable.
            if chosen:
                del os.environ["OPENBLAS_CORETYPE"]
    return faiss
