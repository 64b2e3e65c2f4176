"""Synthetic unit vectors distributed like joint embeddings, any number of them, generated in chunks.

Uniform noise has no near neighbors, so an index over it does not behave like one over images. Here a vector is

    unit(mean + offsets of a path down a tree of clusters + a spread of its own + noise in all directions)

- The tree has seven levels; the sizes of siblings fall as in Zipf's law, so a few clusters hold most of the rows.
- Offsets and spread have 128 dimensions whose variance falls as a power law. Each cluster stretches them in its own
  way (anisotropy) and has its own width. A tenth of the variance is noise in all E dimensions.
- The mean is shared, so that any two rows lie in one cone (arXiv 2203.02053).

The numbers below were chosen until 1,885 rows of size 1024 looked like the 1,885 OpenMoji drawings as
EfficientNet-Lite0 embeds them. `python -m benchmarks.clusters` prints both in one table: the cosine of random
pairs and its spread, the length of the mean, the cosine to the 1st, 10th and 100th neighbor, the participation
ratio of the spectrum and its largest shares, the local dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

CHUNK = 8192
"""Rows drawn together: 32 MB at 1,024 numbers each. Row n does not depend on the number of rows requested."""

DIMENSIONS, DECAY = 128, 0.8
"""Dimensions in which clusters differ, and the exponent by which their variance falls."""

BRANCHES, ZIPF = (20, 8, 8, 8, 8, 8, 8), 1.2
"""Children of a cluster, level by level, and the exponent of their sizes."""

SHRINK, LEAST = 0.68, 0.06
"""Share of the variance that remains below each level, and the minimum that remains for a single row."""

NOISE, CONE = 0.10, 0.39
"""Share of the centered variance that is isotropic; squared length of the mean before scaling."""

STRETCH, TIGHTNESS = 0.5, 0.25
"""Variation of the clusters' shape and width: standard deviations of logarithms."""

GAP, DIALECT = 1.1, 0.35
"""The modality gap of queries: the length of an offset shared by all queries, orthogonal to the differences of rows,
and the share of the variance of the 128 dimensions that is the query's own. The distance from the mean query to the
mean row is then about 0.8, as between CLIP's texts and images (arXiv 2203.02053 figure 1)."""

_TABLE = 1 << 14
"""Offsets drawn for a level. Nodes of deep levels share them, below different parents."""


class ClusteredVectors:
    """A space of clustered unit vectors, and queries of another modality.

    Args:
        size: E, numbers of a vector; more than 130.
        seed: another seed is another space.

    Example:
        >>> space = ClusteredVectors(size=256)
        >>> space.rows(8000, 8500).shape, space.queries(3).dtype
        ((500, 256), dtype('float32'))
    """

    def __init__(self, size: int = 1024, *, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        rng = self._rng("space")
        axes = np.arange(1, DIMENSIONS + 1) ** (-DECAY / 2)
        self._axes = (axes / np.linalg.norm(axes)).astype(np.float32)
        basis = np.linalg.qr(rng.standard_normal((size, DIMENSIONS + 2)))[0].astype(np.float32)
        self._basis, self._mean, self._gap = basis[:, :-2].T.copy(), basis[:, -2], basis[:, -1]

    @cached_property
    def _tables(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each level: offsets of nodes, and the stretch that a node applies to the levels below it."""
        rng = self._rng("tree")
        tables = []
        for _ in range(len(BRANCHES) + 1):
            offsets = rng.standard_normal((_TABLE, DIMENSIONS), dtype=np.float32)
            stretch = np.exp(STRETCH * rng.standard_normal((_TABLE, DIMENSIONS), dtype=np.float32))
            # Only the shape: the width is drawn separately.
            stretch /= np.sqrt(np.square(stretch * self._axes).sum(axis=1, keepdims=True))
            width = np.exp(TIGHTNESS * rng.standard_normal((_TABLE, 1), dtype=np.float32))
            tables.append((offsets, stretch * width))
        return tables

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop, float32 [stop - start, E], unit norm."""
        parts = []
        for chunk in range(start // CHUNK, -(-stop // CHUNK)):
            first = chunk * CHUNK
            parts.append(self._chunk(chunk)[max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.zeros((0, self.size), np.float32)

    def chunks(self, count: int) -> Iterator[np.ndarray]:
        """Yield the first ``count`` rows, at most `CHUNK` at a time."""
        for start in range(0, count, CHUNK):
            yield self.rows(start, min(start + CHUNK, count))

    def queries(self, count: int, *, foreign: bool = True) -> np.ndarray:
        """Return vectors that are not among the rows, float32 [count, E], unit norm.

        Args:
            count: number of vectors.
            foreign: shift them like another modality (`GAP`, `DIALECT`), else draw from the distribution of the rows.
        """
        rng = self._rng("queries")
        latent = self._latent(rng, count)
        if not foreign:
            return self._finish(rng, latent)
        own = rng.standard_normal(latent.shape, dtype=np.float32) * self._axes
        return self._finish(rng, np.sqrt(1 - DIALECT) * latent + np.sqrt(DIALECT) * own, gap=GAP)

    def _chunk(self, number: int) -> np.ndarray:
        rng = self._rng("rows", number)
        return self._finish(rng, self._latent(rng, CHUNK))

    def _latent(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Walk down the tree: float32 [count, DIMENSIONS], of unit total variance."""
        node = np.zeros(count, np.uint64)
        latent = np.zeros((count, DIMENSIONS), np.float32)
        left = 1.0
        for (offsets, stretch), branches in zip(self._tables, BRANCHES, strict=False):
            sizes = np.arange(1, branches + 1) ** -ZIPF
            shape = stretch[_position(node)]
            node = _child(node, rng.choice(branches, count, p=sizes / sizes.sum()))
            below = max(left * SHRINK, LEAST)
            latent += np.float32(np.sqrt(left - below)) * offsets[_position(node)] * shape
            left = below
        own = rng.standard_normal(latent.shape, dtype=np.float32)
        latent += np.float32(np.sqrt(left)) * own * self._tables[-1][1][_position(node)]
        return latent * self._axes

    def _finish(self, rng: np.random.Generator, latent: np.ndarray, *, gap: float = 0.0) -> np.ndarray:
        """Turn latent positions into unit vectors: mean, gap, noise."""
        centered = 1 - CONE
        rows = rng.standard_normal((len(latent), self.size), dtype=np.float32)
        rows *= np.float32(np.sqrt(centered * NOISE / self.size))
        rows += np.float32(np.sqrt(centered * (1 - NOISE))) * (latent @ self._basis)
        rows += np.float32(np.sqrt(CONE)) * self._mean + np.float32(gap) * self._gap
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows

    def _rng(self, purpose: str, number: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose.encode(), number])


def _child(node: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Return ids of the children of nodes: a mix of bits, so that they look random."""
    mixed = (node + choice.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _position(node: np.ndarray) -> np.ndarray:
    """Return the positions of nodes in a table."""
    return node >> np.uint64(64 - (_TABLE - 1).bit_length())


def statistics_of(rows: np.ndarray) -> dict[str, float]:
    """Return the matched statistics of unit vectors [N, E], with N of at most some thousands."""
    cosines = rows @ rows.T
    pairs = cosines[np.triu_indices(len(rows), 1)]
    np.fill_diagonal(cosines, -2)
    nearest = -np.sort(-cosines, axis=1)[:, :100]
    mean = rows.mean(axis=0)
    variances = np.linalg.svd(rows - mean, compute_uv=False) ** 2
    shares = np.cumsum(variances) / variances.sum()
    found = {
        "random pairs": pairs.mean(),
        "their spread": pairs.std(),
        "length of the mean": np.linalg.norm(mean),
    }
    for rank in (1, 10, 100):
        for low in (10, 50, 90):
            found[f"neighbor {rank}, {low} %"] = np.percentile(nearest[:, rank - 1], low)
    found["participation ratio"] = variances.sum() ** 2 / np.square(variances).sum()
    for number in (1, 10, 50, 100, 200):
        found[f"share of {number} components"] = shares[number - 1]
    # Levina and Bickel's estimate from 20 neighbors.
    distances = np.sqrt(np.maximum(2 - 2 * nearest[:, :20], 1e-12))
    found["local dimension"] = np.median(1 / np.log(distances[:, -1:] / distances[:, :-1]).mean(axis=1))
    return {name: float(value) for name, value in found.items()}


def stored_images(folder: str = "data/store") -> np.ndarray:
    """Return the embeddings of the OpenMoji drawings at unit length, [N, E]; `recipes/openmoji.yaml` stores them."""
    import pyarrow as pa

    tables = [
        pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        for file in sorted(Path(folder).glob("*/embeddings-*.arrow"))
    ]
    if not tables:
        raise SystemExit(f"{folder} holds no embeddings: run `make train` first")
    columns = [table.column("embedding").combine_chunks() for table in tables]
    rows = np.concatenate([column.values.to_numpy().reshape(len(column), -1) for column in columns])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def main() -> None:
    """Print the statistics of the OpenMoji drawings and of the same number of synthetic rows."""
    real = stored_images()
    space = ClusteredVectors()
    made = space.rows(0, len(real))
    images, ours = statistics_of(real), statistics_of(made)
    print("| statistic | OpenMoji | synthetic |\n|---|---|---|")
    for name, value in images.items():
        print(f"| {name} | {value:.3f} | {ours[name]:.3f} |")
    queries = space.queries(len(real))
    print(f"\nqueries: {np.linalg.norm(queries.mean(0) - made.mean(0)):.2f} from mean to mean, ", end="")
    print(f"cosine to the nearest row {np.median((queries @ made.T).max(axis=1)):.2f}")


if __name__ == "__main__":
    main()
