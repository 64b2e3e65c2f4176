"""Which kind of index is chosen, and its search settings."""

import pytest

from bindllm.cache import factories

faiss = pytest.importorskip("faiss")


@pytest.mark.parametrize("embedding_size", [32, 384, 1024, 1280])
@pytest.mark.parametrize("count", [1, 100, 10_000, 100_000, 299_999, 300_001, 10**6, 3 * 10**6, 10**8])
def test_the_choice_can_be_built_and_trained(count, embedding_size):
    factory, search = factories.choose(count, embedding_size)
    index = factories.make_index(factory, embedding_size)
    factories.set_search(index, search)
    if not index.is_trained:
        # Every centroid gets enough training rows, within the memory limit.
        rows = factories.train_count(index, count)
        lists = faiss.try_extract_index_ivf(index).nlist
        assert rows >= min(32 * lists, factories.TRAIN_BYTES // (4 * embedding_size))
        assert rows * 4 * embedding_size <= factories.TRAIN_BYTES


def test_the_choice_by_size():
    assert factories.choose(100_000, 1024)[0] == factories.choose(1_000_000, 64)[0] == "Flat"
    assert factories.choose(100_001, 1024)[0] == "IVF1024,SQ8"
    assert factories.choose(1_000_000, 1024)[0].startswith("IVF4096,")
    assert factories.choose(3_000_000, 1024)[0].startswith("IVF8192,")


@pytest.mark.parametrize(
    ("factory", "search"),
    [
        ("Flat", ""),
        ("IVF4,Flat", "nprobe=4"),
        ("IVF256,SQ8", "nprobe=16"),
        ("OPQ16,IVF4096,PQ16x4fs,RFlat", "nprobe=16,k_factor_rf=8"),
        ("IVF1024_HNSW32,SQ8", "nprobe=16"),
        ("HNSW32_SQfp16", "efSearch=64"),
        ("SQfp16,RFlat", "k_factor_rf=8"),
    ],
)
def test_default_settings_are_of_the_kind(factory, search):
    assert factories.default_search(factory) == search
    factories.set_search(factories.make_index(factory, 32), search)
