"""The datastore: records that are found by the embeddings of other media."""

import json
import os

import pytest
import torch

from bindllm.embeddings.datastore import Datastore, Record
from bindllm.errors import InputError, StoreError
from tiny import ColorEncoder

FINGERPRINT = ColorEncoder().fingerprint()


def record(name, *keys, texts=()):
    return Record(keys, name, "image", texts or (name,))


@pytest.fixture
def store():
    angles = torch.tensor([0.0, 0.2, 0.2, 0.9, 1.5])
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    return Datastore(
        vectors,
        [record("a", "k0"), record("b", "k1"), record("c"), record("d", "k3", "k4"), record("e")],
        [FINGERPRINT],
    )


def test_the_nearest_come_first_and_of_equal_ones_the_first(store):
    found = store.search(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 3)
    # A query of zeros is padding.
    assert found.ids.tolist() == [[0, 1, 2], [4, 3, 1], [-1, -1, -1]]
    assert store.search(torch.tensor([[1.0, 0.0]]), 9).ids.tolist() == [[0, 1, 2, 3, 4]]
    assert store.search(torch.zeros(0, 2), 2).ids.shape == (0, 2)


def test_many_equal_scores_keep_their_order():
    """As a stable sort of all scores, also if more records are equal than asked for."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randint(-1, 2, (300, 3), generator=generator) + 0.5, dim=1)
    store = Datastore(vectors, [record(str(n)) for n in range(300)], [FINGERPRINT])
    queries = vectors[:20]
    scores = (queries @ vectors.T).round(decimals=6)
    for count in (0, 1, 7, 150, 300):
        expected = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        assert torch.equal(store.search(queries, count).ids, expected)


def test_itself_and_equal_embeddings_are_excluded_and_counted(store):
    queries = torch.stack([store.embeddings[1], store.embeddings[3]])
    found = store.search(queries, 4, keys=[["k1"], ["other", "k4"]], exclude_equal=True)
    assert found.ids.tolist() == [[0, 3, 4, -1], [4, 1, 2, 0]]
    assert found.itself.tolist() == [1, 1]
    assert found.equal.tolist() == [1, 0]


def test_scores_are_comparable_between_datastores(store):
    """In standard deviations over the whole datastore, whatever the length of its embeddings and the exclusions."""
    query = torch.tensor([[1.0, 0.0]])
    inner = (query @ store.embeddings.T)[0]
    expected = (inner - inner.mean()) / inner.std(correction=0)
    found = store.search(query, 3, keys=[["k0"]])
    torch.testing.assert_close(found.scores[0], expected[found.ids[0]], rtol=1e-4, atol=1e-4)
    longer = Datastore(9 * store.embeddings, store.records, store.fingerprints)
    torch.testing.assert_close(
        longer.search(query, 5).scores, store.search(query, 5).scores, rtol=1e-4, atol=1e-4
    )
    # One record has no spread, and an excluded one has no score.
    one = Datastore(store.embeddings[:1], store.records[:1], store.fingerprints)
    assert one.search(query, 2).scores.tolist() == [[0.0]]
    assert one.search(query, 2, keys=[["k0"]]).scores.tolist() == [[0.0]]


def test_chunks_of_queries_give_the_same(store, monkeypatch):
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(7, 2), dim=1)
    keys = [["k0"], [], ["k1"], [], [], ["k3"], []]
    whole = store.search(queries, 3, keys=keys)
    monkeypatch.setattr("bindllm.embeddings.datastore._CHUNK", 10)
    for one, other in zip(store.search(queries, 3, keys=keys), whole, strict=True):
        # Products of other shapes may differ in the last digit.
        torch.testing.assert_close(one, other)


def test_a_saved_datastore_is_the_same(store, tmp_path):
    store.save(tmp_path / "store")
    store.save(tmp_path / "store")
    opened = Datastore.open(tmp_path / "store")
    assert torch.equal(opened.embeddings, store.embeddings)
    assert (opened.records, opened.fingerprints) == (store.records, store.fingerprints)
    opened.check_encoders([ColorEncoder(grid=2), ColorEncoder()])
    with pytest.raises(StoreError, match=f"{tmp_path / 'store'} was built with the encoder"):
        opened.check_encoders([ColorEncoder(grid=2)])


def test_names_of_files_that_are_not_utf8_are_kept(tmp_path):
    odd = record(os.fsdecode(b"caf\xe9.png"), texts=("Käse\u2028\r\n",))
    Datastore(torch.ones(1, 2), [odd], [FINGERPRINT]).save(tmp_path / "store")
    assert Datastore.open(tmp_path / "store").records == (odd,)


def test_a_folder_of_something_else_is_kept(store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not a datastore"):
        store.save(tmp_path)
    with pytest.raises(StoreError, match="bindllm datastore"):
        Datastore.open(tmp_path)


def damage(folder, kind):
    manifest = json.loads((folder / "datastore.json").read_text())
    if kind == "text":
        file = folder / "records.jsonl"
        file.write_text(file.read_text().replace('"a"', '"z"'))
    elif kind == "embeddings":
        (folder / "embeddings.safetensors").write_bytes(b"nonsense")
    elif kind == "pipe":
        (folder / "records.jsonl").unlink()
        os.mkfifo(folder / "records.jsonl")
    elif kind == "encoders":
        (folder / "datastore.json").write_text(json.dumps({**manifest, "fingerprints": [1]}))
    elif kind == "format":
        (folder / "datastore.json").write_text(json.dumps({**manifest, "format": 99}))
    else:
        (folder / "datastore.json").write_text("[]")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "damaged"),
        ("embeddings", "embeddings"),
        ("pipe", "not a regular file"),
        ("encoders", "fingerprints"),
        ("format", "update bindllm"),
        ("manifest", "damaged"),
    ],
)
def test_a_damaged_datastore_is_refused(store, tmp_path, kind, message):
    store.save(tmp_path / "store")
    damage(tmp_path / "store", kind)
    with pytest.raises(StoreError, match=message):
        Datastore.open(tmp_path / "store")


def test_records_that_cannot_be_searched(store):
    with pytest.raises(InputError, match="at least one record"):
        Datastore(torch.zeros(0, 2), [], [FINGERPRINT])
    with pytest.raises(InputError, match="must be finite"):
        Datastore(torch.full((1, 2), torch.nan), [record("a")], [FINGERPRINT])
    with pytest.raises(InputError, match="must be finite"):
        Datastore(torch.full((1, 2), 1e300, dtype=torch.float64), [record("a")], [FINGERPRINT])
    for fingerprints in (FINGERPRINT, [], [None]):
        with pytest.raises(InputError, match=r"\[encoder\.fingerprint\(\)\]"):
            Datastore(torch.ones(1, 2), [record("a")], fingerprints)
    with pytest.raises(InputError, match="queries"):
        store.search(torch.zeros(1, 3), 1)
