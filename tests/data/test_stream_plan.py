"""The order of streamed samples, and resuming it at any position."""

import tarfile
from collections import Counter
from itertools import islice, pairwise

import pytest

from bindllm.data.stream.plan import Mixture, Position, ShardStream, StreamState, group_by_length
from bindllm.data.stream.shards import expand_shards
from bindllm.errors import InputError
from stream_parts import captioned, write_shard, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """21 samples in 5 shards."""
    return expand_shards(str(write_shards(tmp_path_factory.mktemp("shards"), [4, 5, 3, 6, 3])))


def keys(stream, count, position=Position()):  # noqa: B008 (frozen)
    return [sample.key for sample, _ in islice(stream.read(position, []), count)]


def test_each_pass_gives_every_sample_once_in_another_order_of_shards(shards):
    stream = ShardStream("s", shards, seed=1)
    seen = keys(stream, 63)
    passes = [seen[n : n + 21] for n in (0, 21, 42)]
    assert all(sorted(part) == [f"{n:05}" for n in range(21)] for part in passes)
    assert len({tuple(part) for part in passes}) == 3
    assert keys(ShardStream("s", shards, seed=1), 63) == seen
    assert keys(ShardStream("s", shards, seed=2), 63) != seen


def test_processes_have_disjoint_shares_that_cover_each_pass(shards):
    streams = [ShardStream("s", shards, seed=1, world_size=2, rank=rank) for rank in (0, 1)]
    for pass_index in range(3):
        first, second = (stream.shard_order(pass_index) for stream in streams)
        assert not set(first) & set(second)
        assert sorted(first + second) == sorted(shards)
        assert (len(first), len(second)) == (3, 2)
    assert streams[0].shard_order(0) != streams[0].shard_order(1)


def test_reading_continues_from_any_place(shards):
    stream = ShardStream("s", shards, seed=1)
    read = list(islice(stream.read(Position(), []), 50))
    for done in (1, 3, 4, 20, 21, 22, 45):
        position = read[done - 1][1]
        assert position.drawn == done
        assert [sample.key for sample, _ in islice(stream.read(position, []), 5)] == [
            sample.key for sample, _ in read[done : done + 5]
        ]


def test_bad_shards_are_reported_and_skipped(shards, tmp_path, caplog):
    cut = tmp_path / "cut.tar"
    write_shard(cut, [member for n in range(100, 103) for member in captioned(n)])
    with tarfile.open(cut) as tar:
        size = tar.getmembers()[-1].offset
    cut.write_bytes(cut.read_bytes()[:size])
    bad: list[str] = []
    stream = ShardStream("s", [*shards, str(cut), str(tmp_path / "none.tar")])
    seen = Counter(
        sample.key for sample, position in islice(stream.read(Position(), bad), 63) if position.pass_index < 2
    )
    assert len(caplog.records) == 2
    assert "the stream continues with the next shard" in caplog.text
    assert set(seen.values()) == {2}
    # Of the three samples the last one is cut off.
    assert len(seen) == 21 + 2
    assert sum("none.tar: cannot be opened" in message for message in bad) in (2, 3)
    assert sum("cut.tar: truncated" in message for message in bad) in (2, 3)


def test_a_pass_that_gives_nothing_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    write_shard(tmp_path / "b.tar", [("README", b"")])
    stream = ShardStream("data/*.tar", [str(tmp_path / name) for name in ("a.tar", "b.tar")])
    with pytest.raises(
        InputError, match=r"data/\*\.tar: none of its 2 shards gives a sample.*a\.tar: truncated"
    ):
        next(stream.read(Position(), []))


def test_each_process_needs_a_shard(shards):
    with pytest.raises(InputError, match="has 5 shards for 6 processes"):
        ShardStream("s", shards, world_size=6)


def test_streams_are_mixed_by_weight_at_any_moment(shards, tmp_path):
    other = expand_shards(str(write_shards(tmp_path, [4, 4], first=100)))
    mixture = Mixture([ShardStream("a", shards), ShardStream("b", other, source=1)], [3, 1])
    drawn = list(islice(mixture.read((Position(),) * 2, []), 40))
    numbers = [number for number, _, _ in drawn]
    assert all(abs(numbers[:n].count(1) - n / 4) <= 0.75 for n in range(41))
    for number, sample, _ in drawn:
        assert (int(sample.key) >= 100) == (number == 1)
    for done in (1, 13, 26):
        rest = islice(mixture.read(drawn[done - 1][2], []), 10)
        assert [sample.key for _, sample, _ in rest] == [
            sample.key for _, sample, _ in drawn[done : done + 10]
        ]


def test_batches_have_like_lengths_and_equal_sizes():
    lengths = [n * 7 % 50 for n in range(50)]
    batches = group_by_length(lengths, batch_size=8, seed=[3])
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert {len(batch) for batch in batches} == {7, 8}
    ranges = sorted((min(lengths[n] for n in batch), max(lengths[n] for n in batch)) for batch in batches)
    assert all(first[1] <= second[0] for first, second in pairwise(ranges))
    assert batches == group_by_length(lengths, batch_size=8, seed=[3])
    assert batches != group_by_length(lengths, batch_size=8, seed=[4])
    assert group_by_length([], batch_size=8, seed=[0]) == []


def test_bookmarks_survive_being_saved():
    state = StreamState(3, 7, (Position(1, 2, 3, 4), Position(5, 6, 7, 8)))
    assert StreamState.from_dict(state.as_dict()) == state
