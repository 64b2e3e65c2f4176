"""Precomputing embeddings: content is embedded once, bad media are reported, memory stays bounded."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bindllm import EmbeddingStore, Media
from bindllm.embeddings import embedder as embedder_module
from bindllm.embeddings import precompute as precompute_module
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.encoders.tokens import reduce_tokens
from bindllm.errors import InputError, StoreError
from bindllm.parallel import Processes
from store_parts import (
    CLOCK_TICK,
    CountingEncoder,
    counts,
    expected,
    image_bytes,
    run,
    stored,
    write_images,
    write_settled,
)
from tiny import ColorEncoder, TokenEncoder


def test_content_is_embedded_once(tmp_path, hashed):
    media = write_images(tmp_path / "in", 10)
    first = CountingEncoder()
    report = run(tmp_path / "store", media, first)
    assert counts(report) == (10, 0, 0, 0)
    assert 0 < report.seconds < 60
    assert first.batches == [4, 4, 2]
    assert len(hashed) == 10
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))

    second = CountingEncoder()
    assert counts(run(tmp_path / "store", media, second)) == (0, 10, 0, 0)
    assert (second.prepared, second.batches) == ([], [])
    assert len(hashed) == 10, "unchanged files are not even read"


def test_a_touched_or_renamed_file_is_read_but_not_embedded_again(tmp_path, hashed):
    media = write_images(tmp_path / "in", 2)
    run(tmp_path / "store", media)
    os.utime(media[0].source, (10**9, 10**9 + 5))
    renamed = tmp_path / "in" / "renamed.png"
    media[1].source.rename(renamed)
    hashed.clear()
    moved = [media[0], Media.image(renamed)]
    for reads in (2, 0):
        encoder = CountingEncoder()
        assert counts(run(tmp_path / "store", moved, encoder)) == (0, 2, 0, 0)
        assert encoder.prepared == []
        assert len(hashed) == reads
        hashed.clear()


def test_a_changed_file_is_embedded_again(tmp_path):
    media = write_images(tmp_path / "in", 2)
    run(tmp_path / "store", media)
    media[0].source.write_bytes(image_bytes(99))
    assert counts(run(tmp_path / "store", media)) == (1, 1, 0, 0)
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


def test_equal_content_is_prepared_and_embedded_once(tmp_path):
    (one,) = write_images(tmp_path / "in", 1)
    media = [one, Media.image(image_bytes(0)), one, Media.image(str(one.source))]
    encoder = CountingEncoder()
    assert counts(run(tmp_path / "store", media, encoder)) == (1, 0, 3, 0)
    assert len(encoder.prepared) == 1
    assert counts(run(tmp_path / "store", media)) == (0, 1, 3, 0)


def test_another_encoder_embeds_for_itself(tmp_path):
    media = write_images(tmp_path / "in", 2)
    run(tmp_path / "store", media)
    assert counts(run(tmp_path / "store", media, CountingEncoder(grid=2))) == (2, 0, 0, 0)
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


def test_a_store_of_another_encoder_is_refused(tmp_path):
    store = EmbeddingStore.for_encoder(tmp_path, ColorEncoder(grid=2))
    with pytest.raises(StoreError, match="the store belongs to the encoder"):
        precompute_embeddings(store, ColorEncoder(), [], progress=False)


def test_bad_media_are_named_and_the_others_are_embedded(tmp_path):
    good = write_images(tmp_path / "in", 5)
    empty, truncated, missing = (tmp_path / f"{name}.png" for name in ("empty", "truncated", "missing"))
    empty.write_bytes(b"")
    truncated.write_bytes(image_bytes(7)[:60])
    bad = [Media.image(path) for path in (empty, truncated, missing)]
    report = run(tmp_path / "store", [good[0], bad[0], *good[1:4], bad[1], bad[2], good[4]])
    assert counts(report) == (5, 0, 0, 3)
    assert sorted(name for name, _ in report.failed) == sorted(str(item.source) for item in bad)
    assert all(name in reason for name, reason in report.failed)
    torch.testing.assert_close(stored(tmp_path / "store", good), expected(good))
    assert counts(run(tmp_path / "store", [*good, *bad])) == (0, 5, 0, 3)


def test_an_embedding_that_is_not_finite_does_not_stop_the_run(tmp_path):
    class Broken(CountingEncoder):
        def embed(self, modality, inputs):
            embeddings = super().embed(modality, inputs)
            embeddings[1, 0] = float("nan")
            return embeddings

    media = write_images(tmp_path / "in", 3)
    report = run(tmp_path / "store", media, Broken())
    assert counts(report) == (2, 0, 0, 1)
    name = str(media[1].source)
    assert report.failed == ((name, f"{name}: its embedding is not finite"),)


@pytest.mark.parametrize("change", ["written", "mv", "cp -p", "there and back"])
def test_a_file_that_changes_while_it_is_read_is_not_stored(tmp_path, change):
    """Also with the same size and time, and if the first file is back when the encoder has read another one."""
    media = write_images(tmp_path / "in", 3)
    other = write_settled(tmp_path / "other.png", image_bytes(55))

    class Meanwhile(CountingEncoder):
        def prepare(self, item):
            if item is not media[1]:
                return super().prepare(item)
            time.sleep(CLOCK_TICK)
            aside = Path(item.source).rename(tmp_path / "aside.png")
            if change == "written":
                item.source.write_bytes(image_bytes(55))
            elif change == "mv":
                other.rename(item.source)
            else:
                shutil.copy2(other, item.source)
            inputs = super().prepare(item)
            if change == "there and back":
                aside.rename(item.source)
            return inputs

    report = run(tmp_path / "store", media, Meanwhile())
    assert counts(report) == (2, 0, 0, 1)
    assert "changed while it was read" in report.failed[0][1]
    assert counts(run(tmp_path / "store", media)) == (1, 2, 0, 0)
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


def test_modalities_are_embedded_apart_and_unknown_ones_refused(tmp_path):
    class TwoModalities(CountingEncoder):
        modalities = ("image", "thermal")

        def embed(self, modality, inputs):
            self.seen = [*getattr(self, "seen", []), (modality, len(inputs))]
            return super().embed(modality, inputs)

    encoder = TwoModalities()
    media = [kind(image_bytes(n)) for n in range(3) for kind in (Media.image, Media.thermal)]
    assert counts(run(tmp_path / "store", media, encoder, batch_size=2)) == (6, 0, 0, 0)
    assert encoder.seen == [("image", 2), ("thermal", 2), ("image", 1), ("thermal", 1)]
    with pytest.raises(InputError, match="'text'; the encoders here serve: image, thermal(.|\\n)*'a dog'"):
        run(tmp_path / "store", [Media.text("a dog")], encoder)


def test_a_generator_is_read_little_by_little(tmp_path):
    given = 0
    ahead: list[int] = []

    def endless() -> Iterator[Media]:
        nonlocal given
        for given in range(1, 401):
            yield Media.image(image_bytes(given))

    class Watching(CountingEncoder):
        def before_embed(self):
            ahead.append(given - sum(self.batches))

    run(tmp_path / "store", endless(), Watching(), batch_size=4)
    # Three chunks waiting to be hashed, one in use, and the window of prepared media.
    assert max(ahead) <= 4 * precompute_module.HASH_CHUNK + 6
    assert given == 400


def test_a_path_with_a_zero_byte_is_one_bad_file(tmp_path):
    good = write_images(tmp_path / "in", 1)
    report = run(tmp_path / "store", [Media.image("a\0b.png"), *good])
    assert counts(report) == (1, 0, 0, 1)
    assert "a?b.png: cannot be opened (embedded null byte)" in report.failed[0][1]


@pytest.mark.parametrize(("fitting", "batches"), [(3, [3, 3, 3, 3]), (0.5, [1] * 12), (100, [8, 4])])
def test_large_inputs_are_held_and_embedded_few_at_a_time(fitting, batches, tmp_path, monkeypatch):
    media = write_images(tmp_path / "in", 12)
    size = ColorEncoder().prepare(media[0]).nbytes
    monkeypatch.setattr(embedder_module, "PREPARED_BYTES", int(2 * fitting * size))
    held: list[int] = []

    class Watching(CountingEncoder):
        def before_embed(self):
            held.append(len(self.prepared) - sum(self.batches[:-1]))

    encoder = Watching()
    report = run(tmp_path / "store", media, encoder, batch_size=8, processes=Processes(threads=4))
    assert counts(report) == (12, 0, 0, 0)
    assert encoder.batches == batches
    # The batch and the media that wait for the next one; two are in work before the first size is known.
    assert max(held) <= max(2, 2 * fitting)
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


def test_files_are_prepared_in_several_threads(tmp_path):
    together = threading.Barrier(2, timeout=20)

    class Meeting(CountingEncoder):
        def prepare(self, media):
            together.wait()
            return super().prepare(media)

    assert counts(run(tmp_path / "store", write_images(tmp_path / "in", 2), Meeting())) == (2, 0, 0, 0)


def test_rows_are_written_when_it_is_time(tmp_path, monkeypatch):
    monkeypatch.setattr(precompute_module, "FLUSH_SECONDS", 0.0)
    written: list[int] = []
    original = EmbeddingStore.append
    monkeypatch.setattr(
        EmbeddingStore,
        "append",
        lambda self, keys, *rest, **more: (written.append(len(keys)), original(self, keys, *rest, **more))[1],
    )
    run(tmp_path / "store", write_images(tmp_path / "in", 5))
    assert written == [1, 1, 1, 1, 1]


def test_rows_of_a_damaged_shard_are_embedded_again(tmp_path):
    media = write_images(tmp_path / "in", 12)
    run(tmp_path / "store", media, flush_rows=4)
    shard = next((tmp_path / "store").rglob("embeddings-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=f"{shard.name} is damaged"):
        report = run(tmp_path / "store", media)
    assert counts(report) == (4, 8, 0, 0)
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


def test_many_flushes_leave_few_shards(tmp_path):
    media = write_images(tmp_path / "in", 40)
    run(tmp_path / "store", media, batch_size=1, flush_rows=1)
    (folder,) = (tmp_path / "store").iterdir()
    assert len(list(folder.glob("embeddings-*.arrow"))) <= 17
    assert len(list(folder.glob("files-*.arrow"))) <= 17
    torch.testing.assert_close(stored(tmp_path / "store", media), expected(media))


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_counts_every_media(tmp_path, capsys, shown):
    media = write_images(tmp_path / "in", 3)
    run(tmp_path / "store", [*media, media[0], Media.image(tmp_path / "missing.png")], progress=shown)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("5/5" in captured.err) == shown


class CountingTokens(TokenEncoder):
    """Notes for each batch whether it was asked for tokens."""

    def __init__(self, **changes) -> None:
        super().__init__(**changes)
        self.asked: list[bool] = []

    def embed(self, modality, inputs, *, tokens=False):
        self.asked.append(tokens)
        self.before_embed()
        return super().embed(modality, inputs, tokens=tokens)

    def before_embed(self) -> None:
        """Overridden by a test."""


def test_tokens_are_stored_only_if_they_are_asked_for(tmp_path):
    media = write_images(tmp_path / "in", 5)
    pooled = CountingTokens()
    assert counts(run(tmp_path / "store", media, pooled)) == (5, 0, 0, 0)
    assert pooled.asked == [False, False]
    assert not list((tmp_path / "store").rglob("tokens-*"))
    before = [path.read_bytes() for path in (tmp_path / "store").rglob("embeddings-*")]

    # Embeddings without their tokens count as missing, and stay as they are.
    encoder = CountingTokens()
    report = run(tmp_path / "store", media, encoder, token_modalities=["image"])
    assert counts(report) == (5, 0, 0, 0)
    assert encoder.asked == [True, True]
    assert [path.read_bytes() for path in (tmp_path / "store").rglob("embeddings-*")] == before
    store = EmbeddingStore.for_encoder(tmp_path / "store", encoder)
    found = store.get_tokens([store.key_of(item) for item in media])
    own = encoder.embed("image", [encoder.prepare(item) for item in media], tokens=True).tokens
    assert all(torch.equal(a, reduce_tokens(b)) for a, b in zip(found, own, strict=True))

    for wanted in ((), ["image"], ["text"]):
        again = CountingTokens()
        assert counts(run(tmp_path / "store", media, again, token_modalities=wanted)) == (0, 5, 0, 0)
        assert again.asked == []


def test_tokens_that_take_much_memory_are_written_early(tmp_path, monkeypatch):
    monkeypatch.setattr(precompute_module, "FLUSH_BYTES", 2 * 4 * 4 * 8 * 2)
    media = write_images(tmp_path / "in", 5)
    run(tmp_path / "store", media, CountingTokens(), token_modalities=["image"])
    assert len(list((tmp_path / "store").rglob("tokens-*.arrow"))) == 3


def test_a_run_that_stops_keeps_tokens_with_their_embeddings(tmp_path):
    class Failing(CountingTokens):
        def before_embed(self):
            if len(self.asked) > 2:
                raise RuntimeError("out of memory")

    media = write_images(tmp_path / "in", 12)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "store", media, Failing(), token_modalities=["image"])
    again = run(tmp_path / "store", media, CountingTokens(), token_modalities=["image"])
    assert counts(again) == (4, 8, 0, 0)
