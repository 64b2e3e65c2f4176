"""Properties of shards that hold for any members and any bytes."""

import io
import json
import tarfile
from contextlib import suppress

from hypothesis import example, given, settings
from hypothesis import strategies as st

from bindllm.data.formats import FORMATS
from bindllm.data.source_config import SourceConfig
from bindllm.data.stream.samples import read_row
from bindllm.data.stream.shards import ShardError, TarSample, _read_file, _read_url
from bindllm.errors import InputError
from format_rows import TRUE_ROWS
from stream_parts import tar_bytes

KEYS = st.sampled_from(["a", "b", "folder/a", "ä"])
ENDS = st.sampled_from(["json", "txt", "jpg", "PNG", "left.jpg", "wav"])
MEMBERS = st.lists(st.tuples(KEYS, ENDS, st.binary(max_size=20)), max_size=12)
BYTES = st.binary(max_size=600)


def samples(content: bytes) -> list[TarSample]:
    return list(_read_file("0.tar", io.BytesIO(content), 0))


@given(MEMBERS)
def test_every_member_is_in_a_sample_or_its_sample_has_a_problem(members):
    found = samples(tar_bytes([(f"{key}.{end}", content) for key, end, content in members]))
    read = [(one.key, end, content) for one in found for end, content in one.members.items()]
    if not any(one.problem for one in found):
        assert sorted(read) == sorted((key, end.lower(), content) for key, end, content in members)
    assert [one.number for one in found] == list(range(len(found)))


@given(MEMBERS)
def test_a_file_and_a_server_give_the_same_samples_of_a_sorted_shard(members):
    content = tar_bytes(
        [(f"{key}.{end}", data) for key, end, data in sorted(members, key=lambda one: one[0])]
    )
    assert samples(content) == list(_read_url("0.tar", io.BytesIO(content), 0))


@given(MEMBERS, st.integers(0, 5))
def test_skipping_gives_the_rest(members, skip):
    content = tar_bytes([(f"{key}.{end}", data) for key, end, data in members])
    assert list(_read_file("0.tar", io.BytesIO(content), skip)) == samples(content)[skip:]


@given(MEMBERS, st.booleans(), st.integers(0, 20_000), BYTES)
@example([("a", "jpg", b"")] * 2, False, 124, b"\x80" + b"\xff" * 11)
@example([("a", "jpg", b""), ("b", "jpg", b""), ("folder/a", "jpg", b"")], True, 1030, b"\xff")
@settings(max_examples=200)
def test_damaged_bytes_raise_only_an_error_of_the_shard_after_the_samples_before(
    members, is_sorted, position, damage
):
    members = sorted(members, key=lambda one: one[0]) if is_sorted else members
    content = tar_bytes([(f"{key}.{end}", data) for key, end, data in members])
    position %= len(content)
    damaged = content[:position] + damage + content[position + len(damage) :]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        begun = {entry.name.partition(".")[0] for entry in tar if entry.offset_data <= position}
    # The last one begun may lack members. In a shard without an order, every sample may.
    before = samples(content)[: max(0, len(begun) - 1)] if is_sorted else []
    for read in (_read_file, _read_url):
        found = []
        with suppress(ShardError):
            for sample in read("0.tar", io.BytesIO(damaged), 0):
                found.append(sample)
        assert found[: len(before)] == before
        assert [sample.number for sample in found] == list(range(len(found)))


@given(st.sampled_from(list(FORMATS)), st.dictionaries(ENDS.map(str.lower), BYTES), st.booleans())
def test_a_sample_becomes_a_row_or_an_error_and_no_media_are_lost(format, members, is_true):
    if is_true:
        record = {key: value for key, value in TRUE_ROWS[format].items() if key != "image"}
        members = {**members, "json": json.dumps(record).encode()}
    sample = TarSample("0.tar", "a", 0, members)
    try:
        row = read_row(sample, SourceConfig("0.tar", format), 0)
    except InputError:
        return
    used = [media.source for media in row.media]
    for end, content in members.items():
        if end not in ("json", "txt"):
            assert content in used or f".{end}" in "".join(row.remarks)
