"""The visual cache: the published formula to the last digit, whatever the batch, and the inputs that it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bindllm import BindLLM, EmbeddingStore, Media, VisualCache
from bindllm.cache.blend import CacheConfig, unit_rows
from bindllm.errors import InputError, StoreError
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig
from cache_parts import Multimodal
from goldens import fill_input, golden
from store_parts import FINGERPRINT, expected, run, write_images
from tiny import ColorEncoder, save_tiny_decoder

faiss = pytest.importorskip("faiss")

PUBLISHED_NORM = np.float32(1 / (1 + 1e-6))


def write_bare(file: Path, rows: np.ndarray, factory: str = "Flat") -> Path:
    index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    faiss.write_index(index, str(file))
    return file


def random_rows(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, size)))


def open_cache(tmp_path: Path, rows: np.ndarray, factory: str = "Flat", **settings) -> VisualCache:
    return VisualCache.open_bare(write_bare(tmp_path / "a.index", rows, factory), FINGERPRINT, **settings)


def by_hand(query, rows, *, top_k=10, temperature=100.0, weight=0.5, formula="released") -> np.ndarray:
    """One query, in double precision, straight from the text of the formula."""
    query, rows = query.astype(np.float64), rows.astype(np.float64)
    query = query / np.linalg.norm(query)
    nearest = np.argsort(-(rows @ query), kind="stable")[:top_k]
    shares = rows[nearest] @ query
    if formula == "released":
        shares = np.exp(temperature * shares) / np.exp(temperature * shares).sum()
    retrieved = shares @ rows[nearest]
    mixed = (1 - weight) * query + weight * retrieved / np.linalg.norm(retrieved)
    return mixed / np.linalg.norm(mixed)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[VisualCache, torch.Tensor]:
    rows = unit_rows(fill_input("cache_index", (200, 1024), -1, 1).numpy())
    queries = fill_input("cache_query", (3, 1024), -1, 1).numpy() + 14 * rows[[5, 60, 121]]
    file = write_bare(tmp_path_factory.mktemp("published") / "knn.index", rows)
    return VisualCache.open_bare(file, FINGERPRINT), torch.from_numpy(unit_rows(queries) * PUBLISHED_NORM)


def test_the_published_feature_and_neighbors(published):
    cache, queries = published
    expected = golden("imagebind_llm_tiny")
    assert np.array_equal(cache.neighbors(queries).numpy(), expected["cache/neighbours"])
    found = cache.blend(queries, temperature=20.0)
    np.testing.assert_allclose(found.numpy(), expected["cache/feature"], atol=1e-7, rtol=0)
    one_by_one = torch.cat([cache.blend(query[None], temperature=20.0) for query in queries])
    assert torch.equal(found, one_by_one)


@pytest.mark.parametrize("formula", ["released", "paper"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_the_formula_by_hand(tmp_path, formula, weight, top_k):
    rows, queries = random_rows(40), random_rows(5, seed=1)
    settings = {"top_k": top_k, "temperature": 7.0, "weight": weight, "formula": formula}
    found = open_cache(tmp_path, rows).blend(torch.from_numpy(queries), **settings)
    again = open_cache(tmp_path, rows, **settings).blend(torch.from_numpy(queries))
    assert torch.equal(found, again)
    for row, query in zip(found.numpy(), queries, strict=True):
        np.testing.assert_allclose(row, by_hand(query, rows, **settings), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "factory", ["Flat", "SQfp16", "HNSW32", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ32x4fs,Refine(SQfp16)"]
)
def test_a_row_does_not_depend_on_its_batch(tmp_path, factory, monkeypatch):
    # Twelve different rows at the same angle to each query: rounding alone decides which nine are its nearest.
    queries = random_rows(40, 64)
    aside = np.random.default_rng(1).standard_normal((40, 12, 64))
    aside -= (aside * queries[:, None]).sum(axis=-1, keepdims=True) * queries[:, None]
    rows = 0.9 * queries[:, None] + 0.4 * unit_rows(aside)
    cache = open_cache(tmp_path, unit_rows(rows.reshape(-1, 64)), factory)
    queries = torch.from_numpy(queries)
    whole = cache.blend(queries, top_k=9)
    # Enough for Faiss to multiply matrices, which rounds otherwise.
    assert torch.equal(cache.blend(queries.repeat(50, 1), top_k=9), whole.repeat(50, 1))
    monkeypatch.setattr("bindllm.cache.visual_cache._FLOATS", 64 * 17 * 7)
    assert torch.equal(cache.blend(queries, top_k=9), whole)
    assert torch.equal(torch.cat([cache.blend(query[None], top_k=9) for query in queries]), whole)
    assert torch.equal(cache.blend(queries.flip(0), top_k=9).flip(0), whole)


def test_equal_neighbors_come_in_the_order_of_their_numbers(tmp_path):
    cache = open_cache(tmp_path, np.repeat(random_rows(2), 6, axis=0)[::-1].copy())
    queries = torch.from_numpy(random_rows(2).repeat(15, axis=0))
    assert cache.neighbors(queries, 4).tolist() == [[6, 7, 8, 9]] * 15 + [[0, 1, 2, 3]] * 15


def test_what_was_not_found_comes_last_also_where_all_else_points_away(tmp_path, monkeypatch):
    rows = random_rows(20)
    cache = open_cache(tmp_path, rows)
    query = -rows[4:5] - 0.1 * rows[7:8]
    monkeypatch.setattr(type(cache.index), "search", lambda *_: np.array([[-1, 4, -1, 7]]))
    assert cache.neighbors(torch.from_numpy(query), 3)[0].tolist() == [7, 4, -1]
    found = cache.blend(torch.from_numpy(query), top_k=2, weight=0.3)
    np.testing.assert_allclose(found[0], by_hand(query[0], rows[[4, 7]], weight=0.3), atol=1e-7, rtol=0)


def test_fewer_rows_than_neighbors(tmp_path):
    rows, query = random_rows(3), random_rows(1, seed=1)
    cache = open_cache(tmp_path, rows)
    np.testing.assert_allclose(
        cache.blend(torch.from_numpy(query))[0], by_hand(query[0], rows), atol=1e-7, rtol=0
    )
    assert sorted(cache.neighbors(torch.from_numpy(query))[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("formula", ["released", "paper"])
def test_neighbors_that_an_inverted_file_does_not_find_are_masked(tmp_path, formula):
    rows, queries = random_rows(64), random_rows(6, seed=1)
    cache = open_cache(tmp_path, rows, "IVF16,Flat")
    numbers = cache.neighbors(torch.from_numpy(queries), 20)
    assert (numbers == -1).any(dim=1).all()
    found = cache.blend(torch.from_numpy(queries), top_k=20, formula=formula)
    for query, row, ids in zip(queries, found, numbers, strict=True):
        hits = rows[ids[ids >= 0].numpy()]
        np.testing.assert_allclose(row, by_hand(query, hits, top_k=20, formula=formula), atol=1e-7, rtol=0)


def test_a_query_that_finds_nothing_stays_itself_and_is_counted(tmp_path, monkeypatch, caplog):
    rows, queries = random_rows(30), torch.from_numpy(random_rows(2, seed=1))
    cache = open_cache(tmp_path, rows)
    original = type(cache.index).search

    def search(index, found, count):
        numbers = original(index, found, count)
        numbers[1] = -1
        return numbers

    expected = cache.blend(queries)
    monkeypatch.setattr(type(cache.index), "search", search)
    blended = cache.blend(queries)
    assert torch.equal(blended[0], expected[0])
    torch.testing.assert_close(blended[1], queries[1], atol=1e-7, rtol=0)
    assert "1 of 2 queries" in caplog.text


def test_a_query_that_its_neighbour_cancels_out_stays_itself(tmp_path, caplog):
    row = random_rows(1)
    cache = open_cache(tmp_path, row)
    torch.testing.assert_close(cache.blend(torch.from_numpy(-row)), torch.from_numpy(-row), atol=1e-7, rtol=0)
    assert "1 of 1 queries" in caplog.text


def test_weight_zero_is_the_identity_bit_for_bit(published):
    cache, queries = published
    queries = queries * 3
    found = cache.blend(queries, weight=0)
    assert torch.equal(found, queries)
    found.zero_()
    assert queries.any()
    assert cache.blend(queries[:0]).shape == (0, 1024)
    assert cache.neighbors(queries[:0]).shape == (0, 10)


def test_the_length_of_a_query_does_not_matter(published):
    cache, queries = published
    expected = cache.blend(queries)
    for scale in (0.7, 20.0, 1e-30, 1e30):
        torch.testing.assert_close(cache.blend(queries * scale), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
)
def test_other_dtypes_come_back_as_they_came(published, dtype, error):
    cache, queries = published
    found = cache.blend(queries.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - cache.blend(queries)).abs().max() < error


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "row 1 is not finite"), (float("inf"), "row 1 is not finite"), (0.0, "row 1 is zero")],
)
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_queries_without_direction(tmp_path, value, message, weight):
    cache = open_cache(tmp_path, random_rows(20))
    queries = torch.from_numpy(random_rows(3, seed=1))
    queries[1] = value
    with pytest.raises(InputError, match=f"1 of 3 queries.*{message}"):
        cache.blend(queries, weight=weight)


@pytest.mark.parametrize(
    "queries", [torch.ones(2, 23), torch.ones(24), torch.ones(1, 2, 24), torch.ones(2, 24).long()]
)
def test_queries_of_another_shape_or_kind(tmp_path, queries):
    with pytest.raises(InputError, match=r"takes embeddings \[N, 24\]"):
        open_cache(tmp_path, random_rows(20)).blend(queries)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"weight": 1.1}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"formula": "relased"}, "Did you mean 'released'"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, message):
    cache = open_cache(tmp_path, random_rows(20))
    with pytest.raises(InputError, match=message):
        cache.blend(torch.ones(1, 24), **settings)
    with pytest.raises(InputError, match=message):
        VisualCache(cache.index, **settings)
    with pytest.raises(InputError, match=message):
        CacheConfig("caches/a", **settings)


def test_large_temperatures_do_not_overflow(tmp_path):
    rows = random_rows(20)
    found = open_cache(tmp_path, rows).blend(torch.from_numpy(rows[:2]), temperature=1e6, weight=1.0)
    torch.testing.assert_close(found, torch.from_numpy(rows[:2]), atol=1e-7, rtol=0)


@pytest.fixture
def built(tmp_path) -> VisualCache:
    media = write_images(tmp_path / "pictures", 12)
    run(tmp_path / "store", media)
    store = EmbeddingStore.for_encoder(tmp_path / "store", ColorEncoder())
    return VisualCache.build(tmp_path / "cache", store, top_k=3)


def test_a_cache_is_built_from_a_store_and_opened_again(built, tmp_path):
    rows = expected(write_images(tmp_path / "pictures", 12))
    query = torch.from_numpy(random_rows(1, 16, seed=4))
    again = VisualCache.open(tmp_path / "cache", top_k=3)
    assert torch.equal(again.blend(query), built.blend(query))
    np.testing.assert_allclose(
        built.blend(query)[0], by_hand(query[0].numpy(), rows.numpy(), top_k=3), atol=3e-7
    )
    assert len(again) == 12
    next((tmp_path / "cache").glob("vectors-*.faiss")).write_bytes(b"")
    with pytest.raises(StoreError, match=r"vectors-[0-9a-f]+\.faiss is not the file"):
        VisualCache.open(tmp_path / "cache")


def test_groups_with_a_picture_stay_as_they_are_unless_asked(built, tmp_path):
    picture, text = write_images(tmp_path / "pictures", 1)[0], Media.text("a dog")
    groups = [[picture], [text], [picture, text]]
    embeddings = nn.functional.normalize(
        torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    blended = built.blend(embeddings)
    found = built.blend_groups(embeddings, groups, [Multimodal()])
    assert torch.equal(found, torch.stack([embeddings[0], blended[1], embeddings[2]]))
    every = VisualCache(built.index, top_k=3, skip=())
    assert torch.equal(every.blend_groups(embeddings, groups, [Multimodal()]), blended)
    with pytest.raises(InputError, match=r"write \['image'\]"):
        VisualCache(built.index, skip="image")


def test_a_cache_of_another_encoder_is_refused(built):
    with pytest.raises(StoreError, match=f"{ColorEncoder().fingerprint()[:16]}, the model has"):
        built.blend_groups(torch.ones(1, 16), [[Media.text("a")]], [ColorEncoder(grid=3)])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> BindLLM:
    torch.manual_seed(0)
    folder = str(save_tiny_decoder(tmp_path_factory.mktemp("decoder")))
    parts = {"encoders": [Multimodal()], "bind": BindConfig(depth=1, expansion=2)}
    model = BindLLM.build(DecoderConfig(folder, dtype="float32"), device="cpu", **parts)
    nn.init.normal_(model.injection.gates, std=2.0)
    return model.eval()


def test_the_model_answers_from_the_blended_embedding(model, built, tmp_path, monkeypatch):
    picture, text = write_images(tmp_path / "pictures", 1)[0], Media.text("a dog")
    plain, blended = model.encode([picture, text]), model.encode([picture, text], cache=built)
    assert torch.equal(blended[0], plain[0])
    assert torch.equal(blended[1:], built.blend(plain[1:]))
    seen = []
    original = model.generate_from
    monkeypatch.setattr(
        model, "generate_from", lambda *batch, **options: seen.append(batch[3]) or original(*batch, **options)
    )
    answers = [model.generate("?", media=[text], cache=cache, max_new_tokens=8) for cache in (None, built)]
    assert answers[0] != answers[1]
    rows = model.generate(["?", "?"], media=[[picture], [text]], cache=built, max_new_tokens=8)
    assert rows[1] == answers[1]
    assert "".join(model.stream("?", media=[text], cache=built, max_new_tokens=8)).strip() == answers[1]
    assert torch.equal(seen[0][0], plain[1:])
    assert torch.equal(seen[1][0], blended[1:])
    assert torch.equal(seen[2][:, 0], blended)
    assert torch.equal(seen[3][0], blended[1:])
    assert model.generate("?", cache=built, max_new_tokens=4) == model.generate("?", max_new_tokens=4)


def test_the_model_refuses_a_cache_of_another_encoder(model, tmp_path):
    cache = open_cache(tmp_path, random_rows(20, 16))
    with pytest.raises(StoreError, match=r"a\.index was built with the encoder a1a1"):
        model.generate("?", media=[Media.text("a dog")], cache=cache)
