"""Several processes share one store; here they are threads, each with its own store and encoder."""

import threading
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.embeddings import precompute as precompute_module
from bindllm.errors import InputError
from bindllm.parallel import Processes
from side_by_side import together
from store_parts import CountingEncoder, counts, expected, image_bytes, stored, write_images
from store_parts import run as run_one
from tiny import ColorEncoder


class RowwiseEncoder(CountingEncoder):
    """Embeds one by one: a matrix product's bits may depend on how many rows it has."""

    def embed(self, modality, inputs):
        self.batches.append(len(inputs))
        self.before_embed()
        return torch.cat([ColorEncoder.embed(self, modality, [one]) for one in inputs])


def run(folder, media, encoder=None, **options):
    return run_one(folder, media, encoder or RowwiseEncoder(), **options)


def rows(folder: Path) -> list[tuple[bytes, bytes]]:
    """Key and bits of the embedding of every row in all shards, sorted: a key that is there twice is seen twice."""
    found = []
    for shard in folder.rglob("embeddings-*.arrow"):
        table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
        embeddings = torch.tensor(table["embedding"].to_pylist())
        found += zip(table["key"].to_pylist(), (row.numpy().tobytes() for row in embeddings), strict=True)
    return sorted(found)


@pytest.fixture
def mixed(tmp_path):
    """20 images, the first 5 again under another name, one twice, and 4 files that fail (two of one content)."""
    media = write_images(tmp_path / "in", 20)
    copies = write_images(tmp_path / "copies", 5)
    empty, truncated, again, missing = (
        tmp_path / f"{n}.png" for n in ("empty", "truncated", "again", "none")
    )
    empty.write_bytes(b"")
    truncated.write_bytes(image_bytes(7)[:60])
    again.write_bytes(image_bytes(7)[:60])
    bad = [Media.image(path) for path in (empty, truncated, again, missing)]
    return [*media[:7], bad[0], *copies, *bad[1:], *media[7:], media[3]]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_store_the_same_rows_as_one(count, tmp_path, mixed, hashed):
    alone = run(tmp_path / "one", mixed)
    hashed.clear()
    encoders = [RowwiseEncoder() for _ in range(count)]
    reports = together(
        count, lambda processes: run(tmp_path / "many", mixed, encoders[processes.rank], processes=processes)
    )
    assert rows(tmp_path / "many") == rows(tmp_path / "one")
    assert len(rows(tmp_path / "many")) == 20
    for report in reports:
        assert counts(report) == counts(alone) == (20, 0, 7, 3)
        assert sorted(report.failed) == sorted(alone.failed)
    assert all(encoder.batches for encoder in encoders), "each has a part of the work"
    whole = {item.name for item in mixed if item.source.parent != tmp_path} - {mixed[-1].name}
    assert all(hashed.count(name) == 1 for name in whole), "each file was read by one process"
    prepared = [name for encoder in encoders for name in encoder.prepared]
    assert len(prepared) == 20


def test_a_second_run_reads_and_embeds_nothing(tmp_path, mixed, hashed):
    good = mixed[:7]
    run(tmp_path / "store", good)
    hashed.clear()
    encoders = [RowwiseEncoder() for _ in range(3)]
    reports = together(
        3, lambda processes: run(tmp_path / "store", good, encoders[processes.rank], processes=processes)
    )
    assert [counts(report) for report in reports] == [(0, 7, 0, 0)] * 3
    assert hashed == []
    assert not any(encoder.batches for encoder in encoders)


def test_more_processes_than_media(tmp_path):
    media = write_images(tmp_path / "in", 2)
    reports = together(5, lambda processes: run(tmp_path / "store", iter(media), processes=processes))
    assert [counts(report) for report in reports] == [(2, 0, 0, 0)] * 5
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


def test_media_from_memory_and_fresh_files_have_one_owner(tmp_path):
    """Their hashes are in no file record: every process finds them by itself."""
    media = [Media.image(image_bytes(n % 6)) for n in range(12)]
    fresh = tmp_path / "fresh.png"
    fresh.write_bytes(image_bytes(3))
    reports = together(
        3, lambda processes: run(tmp_path / "store", [*media, Media.image(fresh)], processes=processes)
    )
    assert counts(reports[0]) == (6, 0, 7, 0)
    assert len(rows(tmp_path / "store")) == 6


class Failing(RowwiseEncoder):
    """Fails from its second batch on."""

    def before_embed(self):
        if len(self.batches) >= 2:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("next_count", [1, 3])
def test_rows_of_a_stopped_run_are_kept_for_any_number_of_processes(next_count, tmp_path):
    media = write_images(tmp_path / "in", 40)
    ends = together(
        2,
        lambda processes: run(
            tmp_path / "store", media, Failing() if processes.rank else RowwiseEncoder(), processes=processes
        ),
    )
    assert isinstance(ends[0], threading.BrokenBarrierError)
    assert str(ends[1]) == "out of memory"
    before = len(rows(tmp_path / "store"))
    shares = [sum(Processes(n, 2).owns(item.content_hash()) for item in media) for n in range(2)]
    assert before == shares[0] + 4, "all of the first process, and one batch of the second"
    reports = together(next_count, lambda processes: run(tmp_path / "store", media, processes=processes))
    assert counts(reports[0]) == (40 - before, before, 0, 0)
    run(tmp_path / "one", media)
    assert rows(tmp_path / "store") == rows(tmp_path / "one")


def test_one_process_merges_the_shards_of_all(tmp_path, monkeypatch):
    compacting: set[str] = set()
    original = EmbeddingStore.compact

    def compact(self):
        compacting.add(threading.current_thread().name)
        original(self)

    monkeypatch.setattr(EmbeddingStore, "compact", compact)
    media = write_images(tmp_path / "in", 60)
    together(
        3, lambda processes: run(tmp_path / "store", media, batch_size=1, flush_rows=1, processes=processes)
    )
    assert len(compacting) == 1
    for kind in ("embeddings", "files"):
        assert len(list((tmp_path / "store").rglob(f"{kind}-*.arrow"))) <= 17
    assert len(rows(tmp_path / "store")) == 60


def test_hashed_files_are_written_while_others_are_still_read(tmp_path, monkeypatch):
    monkeypatch.setattr(precompute_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(precompute_module, "HASH_CHUNK", 2)
    records: list[int] = []
    original = EmbeddingStore.save_files

    def save_files(self):
        records.append(len(self._hashed))
        original(self)

    monkeypatch.setattr(EmbeddingStore, "save_files", save_files)
    run(
        tmp_path / "store", write_images(tmp_path / "in", 8), processes=Processes(1, 2, lambda value: [value])
    )
    assert records[0] >= 2
    assert records[1] <= 2


def test_every_process_refuses_media_that_the_encoder_does_not_serve(tmp_path):
    ends = together(
        2, lambda processes: run(tmp_path / "store", [Media.text("a dog")] * 2, processes=processes)
    )
    assert any(isinstance(end, InputError) for end in ends)
