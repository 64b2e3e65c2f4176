"""Kinds of Faiss index (arXiv 2401.08281): which one fits, how it is made and trained, how wide it searches."""

from __future__ import annotations

import math
import os
import re
import sys
from typing import Any

import numpy as np

from bindllm.errors import InputError, MissingExtraError

EXACT_NUMBERS = 100_000 * 1024
"""Up to this many numbers (vectors times width) the exact search is fast enough."""

ROWS_PER_CENTROID = 32
"""Rows that a list's centroid is trained on: with half of them recall was the same (docs/scale.md)."""

TRAIN_ROUNDS = 6
"""Rounds of k-means over the lists: it is most of a build's time, and more of them found no more."""

TRAIN_BYTES = 1 << 30
"""Memory that training rows take at most."""

_KERNELS = {"AVX2": "HASWELL", "AVX512": "SKYLAKEX"}
_CODEBOOK = 256
_GRAPH_BYTES = 512


def choose(count: int, embedding_size: int) -> tuple[str, str]:
    """Return the kind of index, and its search settings, that fit so many vectors of this width.

    All are compared, exactly, while that is fast; then those of the nearest lists, in 8 bits. Half precision ("SQfp16")
    is never chosen: it halves the memory, but Faiss has no fast way to compare it in batches.

    Example:
        >>> choose(10_000, 1024), choose(1_000_000, 1024)
        (('Flat', ''), ('IVF4096,SQ8', 'nprobe=16'))
    """
    if count * embedding_size <= EXACT_NUMBERS:
        return "Flat", ""
    num_lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    factory = f"IVF{num_lists},SQ8"
    return factory, default_search(factory)


def default_search(factory: str) -> str:
    """Return search settings for a kind of index whose own defaults find too little.

    Example:
        >>> default_search("IVF1024,PQ32x4fs,Refine(SQfp16)"), default_search("Flat")
        ('nprobe=16,k_factor_rf=8', '')
    """
    settings = []
    if lists := re.search(r"(?:^|,)IVF(\d+)", factory):
        settings.append(f"nprobe={min(int(lists[1]), max(16, int(lists[1]) // 256))}")
    elif re.match("HNSW", factory):
        settings.append("efSearch=64")
    if re.search(r",(RFlat$|Refine\()", factory):
        settings.append("k_factor_rf=8")
    return ",".join(settings)


def make_index(factory: str, embedding_size: int) -> Any:
    """Return an empty index of inner product.

    Raises:
        InputError: Faiss does not know such a factory for this width.
    """
    faiss = load_faiss()
    try:
        index = faiss.index_factory(embedding_size, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"Faiss builds no index {factory!r} of inner product over {embedding_size} numbers "
            f"({reason(error)}); 'Flat' is exact and always works"
        ) from error
    # Below 39 rows a centroid Faiss would print a warning.
    if (inverted := faiss.try_extract_index_ivf(index)) is not None:
        inverted.cp.niter = TRAIN_ROUNDS
        inverted.cp.min_points_per_centroid = 1
    quantised = faiss.downcast_index(index if inverted is None else inverted)
    if isinstance(quantised, faiss.IndexIVFPQ | faiss.IndexIVFPQFastScan | faiss.IndexPQ):
        quantised.pq.cp.min_points_per_centroid = 1
    return index


def check_factory(factory: str, search: str, embedding_size: int) -> None:
    """Refuse a kind of index or its search settings ahead of long work, so that a mistake shows at once.

    Args:
        factory: as for `make_index`, or "auto".
        search: as for `set_search`, or "auto"; with the factory "auto" they cannot be known to fit yet.
        embedding_size: E.

    Raises:
        InputError: Faiss does not know such a kind for this width, or it has no such settings.
        MissingExtraError: Faiss is not installed.
    """
    index = make_index("Flat" if factory == "auto" else factory, embedding_size)
    if factory != "auto" and search != "auto":
        set_search(index, search)


def train_count(index: Any, count: int) -> int:
    """Return on how many of so many rows an index is trained; 0 where there is nothing to train."""
    if index.is_trained:
        return 0
    inverted = load_faiss().try_extract_index_ivf(index)
    centroids = max(_CODEBOOK, inverted.nlist if inverted is not None else 0)
    fitting = max(_CODEBOOK, TRAIN_BYTES // (4 * index.d))
    return min(count, centroids * ROWS_PER_CENTROID, fitting)


def bytes_per_row(index: Any) -> int:
    """Return what one vector takes in an index, about; never too little by much."""
    try:
        size = index.sa_code_size()
    except RuntimeError:
        # Graphs do not tell: their vectors in full, and their links.
        return 4 * index.d + _GRAPH_BYTES
    return size + (8 if load_faiss().try_extract_index_ivf(index) is not None else 0)


def set_search(index: Any, search: str) -> None:
    """Set how wide an index searches, also inside a refining or transforming one.

    Args:
        index: of the kind that the settings are for.
        search: names and numbers as Faiss's ``ParameterSpace`` takes them, such as ``"nprobe=32,k_factor_rf=8"``; ""
            leaves all as they are.

    Raises:
        InputError: not such a list, a number that is not above 0, or a setting that this kind has not.
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
                "inverted files have nprobe, refining ones k_factor_rf, graphs efSearch, and exact ones none"
            ) from error


def cannot_build(factory: str, count: int, error: Exception) -> InputError:
    """Return the error for what Faiss says while it trains or adds."""
    return InputError(
        f"Faiss cannot build an index {factory!r} of {count} vectors ({reason(error)}); 'auto' chooses one that "
        "fits, and 'Flat' always works"
    )


def spread(keys: np.ndarray, count: int) -> np.ndarray:
    """Return so many of the keys, evenly spread."""
    return keys[np.arange(count) * len(keys) // max(1, count)]


def reason(error: Exception) -> str:
    """Return what an error of the system says, or one of Faiss without the C++ signature ahead of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rpartition(": ")[2].strip()


def limit_threads() -> None:
    """Let Faiss use as many threads as torch: it brings an OpenMP of its own, which counts for each thread."""
    import torch

    load_faiss().omp_set_num_threads(torch.get_num_threads())


def load_faiss() -> Any:
    """Return the module, its matrix products as fast as this processor allows.

    Faiss brings an OpenBLAS of its own. Where that is older than the processor it takes its slowest kernels (a fifth of
    the speed, on the machine of docs/scale.md), unless its environment names the right ones while it loads.

    Raises:
        MissingExtraError: it is not installed.
    """
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
        if chosen:
            del os.environ["OPENBLAS_CORETYPE"]
    return faiss
