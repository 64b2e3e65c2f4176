"""An interrupted run (Ctrl-C, an error, a full disk, kill -9) keeps its rows, and the next one resumes."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.embeddings.shards import Shards
from bindllm.errors import StoreError
from store_parts import CountingEncoder, counts, expected, run, stored, write_images
from tiny import TokenEncoder


def test_ctrl_c_keeps_all_embeddings(tmp_path):
    class Interrupted(CountingEncoder):
        def before_embed(self):
            if len(self.batches) == 3:
                signal.raise_signal(signal.SIGINT)

    media = write_images(tmp_path / "in", 20)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "store", media, Interrupted())
    torch.testing.assert_close(stored(tmp_path / "store", media[:8]), expected(media[:8]))
    assert counts(run(tmp_path / "store", media)) == (12, 8, 0, 0)


def test_ctrl_c_at_the_end_of_a_write_doubles_no_row(tmp_path, monkeypatch):
    original = Shards.refresh

    def interrupted(self):
        """The shard has its name already, and this process has not seen it yet."""
        if list(self._folder.glob("embeddings-*.arrow")) and not self._shards:
            monkeypatch.setattr(Shards, "refresh", original)
            signal.raise_signal(signal.SIGINT)
        original(self)

    media = write_images(tmp_path / "in", 12)
    monkeypatch.setattr(Shards, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "store", media, flush_rows=4)
    shards = list((tmp_path / "store").rglob("embeddings-*.arrow"))
    assert sum(pa.ipc.open_file(str(shard)).get_batch(0).num_rows for shard in shards) == 4
    assert counts(run(tmp_path / "store", media)) == (8, 4, 0, 0)


def test_an_error_of_the_encoder_keeps_embeddings_and_names_its_batch(tmp_path):
    class Failing(CountingEncoder):
        def before_embed(self):
            if len(self.batches) >= 2:
                raise RuntimeError("out of memory")

    media = write_images(tmp_path / "in", 12)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        run(tmp_path / "store", media, Failing())
    names = ", ".join(item.name for item in media[4:8])
    assert caught.value.__notes__ == [f"while embedding {names}"]
    assert counts(run(tmp_path / "store", write_images(tmp_path / "in", 12))) == (8, 4, 0, 0)


def test_a_full_disk_reports_how_much_is_stored(tmp_path, monkeypatch):
    media = write_images(tmp_path / "in", 20)
    original = pa.ipc.RecordBatchFileWriter.write_table

    def full(self, table, *args, **options):
        full.attempts += "embedding" in table.column_names
        if full.attempts > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, table, *args, **options)

    full.attempts = 0
    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc.RecordBatchFileWriter, "write_table", full)
        with pytest.raises(
            StoreError, match="No space left.*8 embeddings of this run are stored, 4 are lost"
        ):
            run(tmp_path / "store", media, flush_rows=4)
    assert full.attempts == 3, "a failed write is not tried again"
    assert not list((tmp_path / "store").rglob("*.part"))
    torch.testing.assert_close(stored(tmp_path / "store", media[:8]), expected(media[:8]))
    assert counts(run(tmp_path / "store", media)) == (12, 8, 0, 0)


def in_process(function, *args) -> multiprocessing.Process:
    """Start a function in another process, as a data loader starts its workers."""

    def start() -> None:
        torch.set_num_threads(1)
        function(*args)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def killed_while_writing(folder: Path, media: list[Media], column: str, *options: str) -> None:
    """Fill, and die by SIGKILL while the third shard with a column is half written."""
    original = pa.ipc.RecordBatchFileWriter.write_table
    shards = 0

    def write_table(self, table, *args, **options):
        nonlocal shards
        shards += column in table.column_names
        if shards == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, table, *args, **options)

    pa.ipc.RecordBatchFileWriter.write_table = write_table
    run(folder, media, TokenEncoder(), flush_rows=4, token_modalities=options)


def test_kill_9_loses_only_what_was_not_flushed(tmp_path):
    media = write_images(tmp_path / "in", 20)
    process = in_process(killed_while_writing, tmp_path / "store", media, "embedding")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "store").rglob("*.part")), "it died in the middle of a write"
    before = stored(tmp_path / "store", media[:8], TokenEncoder())
    assert counts(run(tmp_path / "store", media, TokenEncoder())) == (12, 8, 0, 0)
    run(tmp_path / "whole", media, TokenEncoder())
    whole = stored(tmp_path / "whole", media, TokenEncoder())
    assert torch.equal(stored(tmp_path / "store", media, TokenEncoder()), whole)
    assert torch.equal(whole[:8], before)


@pytest.mark.parametrize("column", ["values", "embedding"])
def test_kill_9_between_tokens_and_embeddings_loses_no_more(tmp_path, column):
    """Tokens are written first, so a killed run may have a shard of tokens without embeddings."""
    media = write_images(tmp_path / "in", 20)
    process = in_process(killed_while_writing, tmp_path / "store", media, column, "image")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = EmbeddingStore.for_encoder(tmp_path / "store", TokenEncoder())
    keys = [store.key_of(item) for item in media]
    assert store.has(keys, tokens=[True] * 20).sum() == 8
    report = run(tmp_path / "store", media, TokenEncoder(), token_modalities=["image"])
    assert counts(report) == (12, 8, 0, 0)
    run(tmp_path / "whole", media, TokenEncoder(), token_modalities=["image"])
    whole = EmbeddingStore.for_encoder(tmp_path / "whole", TokenEncoder())
    assert torch.equal(store.get(keys), whole.get(keys))
    assert all(
        torch.equal(*pair) for pair in zip(store.get_tokens(keys), whole.get_tokens(keys), strict=True)
    )


def test_two_independent_runs_at_the_same_time(tmp_path):
    media = write_images(tmp_path / "in", 40)
    halves = media[:30], media[10:]
    processes = [in_process(run, tmp_path / "store", half, None) for half in halves]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert counts(run(tmp_path / "store", media)) == (0, 40, 0, 0)
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))
