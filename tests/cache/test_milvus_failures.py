"""A Milvus that is down, slow, lost in the middle or incomplete gives an error in time, and no part of an answer."""

import logging
import socket
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from milvus_parts import WIDTH, Proxy, expected_rows, image_store, unit_queries

from bindllm import VisualCache
from bindllm.cache import milvus
from bindllm.cache.milvus import MilvusIndex, MilvusInfo
from bindllm.cache.milvus_server import MilvusServer
from bindllm.errors import StoreError
from store_parts import FINGERPRINT

grpc = pytest.importorskip("grpc")
pymilvus = pytest.importorskip("pymilvus")
server_manager = pytest.importorskip("milvus_lite.server_manager")


# ---- A client that answers as it is told


class Client:
    """Answers each call with the next of its answers; an exception is raised."""

    def __init__(self, *answers) -> None:
        self.answers, self.asked, self.opened, self.closed = list(answers), [], 0, 0

    def __getattr__(self, name: str):
        def answer(*_, **options):
            self.asked.append((name, options))
            found = self.answers.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        return answer

    def close(self) -> None:
        self.closed += 1


class Lost(grpc.RpcError):
    def __init__(self, code: str) -> None:
        self._code = grpc.StatusCode[code]

    def code(self):
        return self._code

    def details(self) -> str:
        return "the wire is\n cut"


def wrapped(code: str) -> Exception:
    """What pymilvus makes of an error of gRPC."""
    try:
        try:
            raise Lost(code)
        except Lost as error:
            raise pymilvus.MilvusException(code=2, message="Fail connecting") from error
    except pymilvus.MilvusException as error:
        return error


@pytest.fixture
def answering(monkeypatch):
    """Make a server whose client is a `Client`."""

    def make(*answers, count: int = 30, index_type: str = "FLAT"):
        client = Client(*answers)

        def opened(*_, **options):
            client.opened += 1
            client.options = options
            return client

        monkeypatch.setattr(pymilvus, "MilvusClient", opened)
        server = MilvusServer("http://me:secret@far:19530/db", timeout=6.0)
        index = MilvusIndex(server, "a_1", MilvusInfo(FINGERPRINT, count, WIDTH, "image", index_type))
        return client, server, index

    return make


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Lost("UNAVAILABLE"), "UNAVAILABLE: the wire is cut"),
        (wrapped("PERMISSION_DENIED"), "PERMISSION_DENIED: the wire is cut"),
        (pymilvus.MilvusException(code=100, message="no such\n collection"), "no such collection"),
        (pymilvus.MilvusException(message="Cannot invoke RPC on closed channel!"), "closed channel"),
    ],
    ids=str,
)
def test_a_failure_is_one_error_without_the_password_and_the_next_request_connects_again(
    answering, failure, message
):
    client, server, _ = answering(failure, ["a"])
    with pytest.raises(
        StoreError, match=rf"^http://far:19530/db: Milvus did not answer .*{message}"
    ) as error:
        server.call("list_collections")
    assert "secret" not in str(error.value)
    assert server.call("list_collections") == ["a"]
    assert (client.opened, client.closed) == (2, 1)
    assert [options for _, options in client.asked] == [{"timeout": 6.0}] * 2
    assert client.options == {"token": "", "timeout": 6.0, "dedicated": True}


def hits(*numbers: int) -> list[dict]:
    return [{"id": number, "distance": 1.0} for number in numbers]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([hits(1, 2)], "answered 1 of 2 queries; nothing was used"),
        ([], "answered 0 of 2 queries"),
        ([hits(1, 2)] * 3, "answered 3 of 2 queries"),
        ([hits(1, 2), hits(1, 2, 3)], "answered 2 of 2 queries"),
        ([hits(1, 2), hits(1)], "found 1 of 2 neighbors although its index is exact"),
        ([hits(1, 2), []], "found 0 of 2 neighbors"),
        ([hits(1, 2), hits(1, 30)], "returned the id 30 of 30"),
    ],
)
def test_an_incomplete_answer_is_refused(answering, answers, message):
    _, _, index = answering(answers)
    with pytest.raises(StoreError, match=message):
        index.search(unit_queries(2), 2)


def test_an_approximate_index_may_find_fewer(answering):
    _, _, index = answering([hits(1, 2), hits(4), []], index_type="IVF_FLAT")
    assert index.search(unit_queries(3), 2).tolist() == [[1, 2], [4, -1], [-1, -1]]


def test_rows_that_are_missing_are_refused(answering):
    rows = [{"id": n, "vector": [0.0] * WIDTH, "key": "ab"} for n in (1, 2)]
    _, _, index = answering(rows[:1], rows[1:], [])
    for ask, count in ((index.vectors, 1), (index.keys, 1), (index.vectors, 0)):
        with pytest.raises(StoreError, match=f"a_1 returned {count} of 2 rows"):
            ask(np.array([[2, -1], [1, 1]]))


# ---- Real servers, and lost ones


def elapsed(ask) -> float:
    start = time.monotonic()
    with pytest.raises(StoreError, match="Milvus did not answer") as error:
        ask()
    assert "http://127.0.0.1:" in str(error.value)
    return time.monotonic() - start


def test_a_server_that_is_down_is_told_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert elapsed(lambda: MilvusIndex.open(uri, timeout=1.0)) < 4.0


def test_a_server_that_never_answers_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert 0.9 < elapsed(lambda: MilvusIndex.open(uri, timeout=1.0)) < 6.0


@pytest.fixture
def proxied(tmp_path):
    """A store, and a proxy in front of an embedded Milvus that holds a cache of it."""
    store = image_store(tmp_path / "store", 60)
    with MilvusIndex.build(tmp_path / "a.db", store):
        uri = server_manager.server_manager_instance.start_and_get_uri(str(tmp_path / "a.db"))
        with Proxy(int(uri.rpartition(":")[2])) as proxy:
            yield store, proxy


def test_a_connection_that_is_cut_gives_the_whole_answer_or_an_error_and_the_next_request_works(
    proxied, monkeypatch
):
    store, proxy = proxied
    monkeypatch.setattr(milvus, "_rows_at_once", lambda size: 16)
    with MilvusIndex.open(proxy.uri, timeout=9.0) as index:
        for after in (0, 1000, 4000):
            proxy.cut_after = after
            with suppress(StoreError):
                assert np.array_equal(index.vectors(np.arange(60)), expected_rows(store))
            assert proxy.cut_after is None
            assert np.array_equal(index.vectors(np.arange(60)), expected_rows(store))
        numbers = index.search(expected_rows(store), 3)
        assert numbers[:, 0].tolist() == list(range(60))


def test_a_server_that_is_lost_or_stalls_in_use_gives_an_error_and_no_part_of_an_answer(proxied):
    _, proxy = proxied
    queries = torch.from_numpy(unit_queries(4))
    with MilvusIndex.open(proxy.uri, timeout=1.5) as index:
        cache = VisualCache(index)
        before = cache.blend(queries)
        proxy.stall()
        assert 1.0 < elapsed(lambda: cache.blend(queries)) < 8.0
        proxy.close()
        assert elapsed(lambda: cache.blend(queries)) < 8.0
    assert before.isfinite().all()


def test_a_build_over_a_connection_that_is_cut_has_every_row_once_or_is_an_error(proxied, monkeypatch):
    """pymilvus sends some lost requests again, so a row may arrive twice; others it gives up."""
    _, proxy = proxied
    store = image_store(proxied[0].root.parent / "more", 200, start=100)
    monkeypatch.setattr(milvus, "_rows_at_once", lambda size: 16)

    def has_every_row() -> bool:
        with MilvusIndex.build(proxy.uri, store, collection="more", timeout=9.0) as index:
            return np.array_equal(index.vectors(np.arange(200)), expected_rows(store))

    proxy.cut_after = 12_000
    with suppress(StoreError):
        assert has_every_row()
    assert proxy.cut_after is None
    assert has_every_row()


def test_a_build_that_loses_its_server_leaves_the_old_collection(proxied, monkeypatch, caplog):
    store, proxy = proxied
    more = image_store(store.root, 30, start=100)
    with monkeypatch.context() as patch:
        patch.setattr(milvus, "_load", lambda *_: proxy.close() or MilvusServer.call(_[0], "query", _[1]))
        assert elapsed(lambda: MilvusIndex.build(proxy.uri, more, timeout=1.0)) < 20.0
    uri = server_manager.server_manager_instance.start_and_get_uri(str(store.root.parent / "a.db"))
    with MilvusIndex.open(uri) as index:
        assert len(index) == 60
    # Another build may be writing it, so it is left alone for a day.
    with caplog.at_level(logging.WARNING), MilvusIndex.build(uri, more) as index:
        assert len(index) == 90
        assert len(index._server.call("list_collections")) == 2
    assert "is kept because another build may be writing it" in caplog.text
    monkeypatch.setattr(milvus, "ABANDONED", milvus.timedelta(0))
    with MilvusIndex.build(uri, more) as index:
        assert len(index) == 90
        assert len(index._server.call("list_collections")) == 1
