"""Which shards a pattern names, what a shard holds, and what becomes of damaged ones."""

import http.server
import io
import json
import os
import tarfile
import threading
from contextlib import nullcontext
from typing import ClassVar

import pytest

import bindllm.data.stream.shards as remote
from bindllm.data.stream.shards import ShardError, expand_shards, is_stream, read_shard
from bindllm.errors import InputError
from stream_parts import captioned, tar_bytes, write_shard, write_shards


@pytest.mark.parametrize(
    ("path", "streamed"),
    [
        ("data/a.tar", True),
        ("data/{00000..00331}.tar", True),
        ("data/*.tar", True),
        ("https://example.org/a.tar?download=1", True),
        ("data/a.tar.gz", False),
        ("https://example.org/a.jsonl", False),
        ("data/tar", False),
    ],
)
def test_what_is_streamed(path, streamed):
    assert is_stream(path) is streamed


def test_ranges_choices_and_wildcards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-008", "a-009", "a-010", "b-009", "c-1"):
        write_shard(tmp_path / f"{name}.tar", captioned(0))
    assert expand_shards("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_shards("{a,b}-{9..9}.tar".replace("9..9", "009..009")) == ["a-009.tar", "b-009.tar"]
    assert expand_shards("{b,a}-*.tar") == ["b-009.tar", "a-008.tar", "a-009.tar", "a-010.tar"]
    # A shard that is missing may come: it is reported where the stream meets it.
    assert expand_shards("a-{010..011}.tar") == ["a-010.tar", "a-011.tar"]
    assert expand_shards("https://example.org/{8..10}.tar")[-1] == "https://example.org/10.tar"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-{0..3}.tar", "names no shard that exists in .*, the working directory"),
        ("{3..1}.tar", r"goes backwards; write \{1\.\.3\}"),
        ("{0..1000000}.tar", "more than 1,000,000 shards"),
        ("http://x/{0..1999}{0..1999}.tar", "4,000,000 shards"),
    ],
)
def test_patterns_that_name_nothing_or_too_much(pattern, message):
    with pytest.raises(InputError, match=message):
        expand_shards(pattern)


def test_samples_are_members_with_the_same_key(tmp_path):
    members = [
        ("a/001.jpg", b"1"),
        ("a/001.JSON", b"{}"),
        ("README", b"no sample"),
        ("._001.jpg", b"hidden"),
        ("__meta__.json", b"{}"),
        ("b/001.seg.png", b"2"),
        ("b/001.jpg", b"3"),
        ("c.jpg", b"4"),
        ("c.jpg", b"5"),
    ]
    shard = str(write_shard(tmp_path / "0.tar", members))
    one, two, three = read_shard(shard)
    assert (one.key, one.members, one.number) == ("a/001", {"jpg": b"1", "json": b"{}"}, 0)
    assert (two.key, two.members, two.number) == ("b/001", {"seg.png": b"2", "jpg": b"3"}, 1)
    assert (three.key, three.problem) == ("c", "two members .jpg")
    assert one.name == f"{shard} sample 1 (a/001)"
    assert [sample.key for sample in read_shard(shard, skip=2)] == ["c"]
    assert list(read_shard(shard, skip=3)) == []


def test_long_names_and_folders_are_read(tmp_path):
    name = "folder/" + "n" * 300
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        entry = tarfile.TarInfo(f"{name}.txt")
        tar.addfile(entry)
    assert [(sample.key, sample.members) for sample in read_shard(str(shard))] == [(name, {"txt": b""})]


@pytest.mark.parametrize("cut", ["in a member", "at a member", "in a header", "no end"])
def test_a_truncated_shard_gives_what_comes_before(tmp_path, cut):
    shard = tmp_path / "0.tar"
    write_shard(shard, [member for n in range(4) for member in captioned(n)])
    with tarfile.open(shard) as tar:
        entry = tar.getmembers()[6]
        end = tar.getmembers()[-1].offset_data + 512
    size = {
        "in a member": entry.offset_data + 5,
        "at a member": entry.offset,
        "in a header": entry.offset + 100,
        "no end": end,
    }[cut]
    with shard.open("r+b") as stream:
        stream.truncate(size)
    seen = []
    with pytest.raises(ShardError, match=r"0\.tar: truncated or damaged after \d samples"):
        for sample in read_shard(str(shard)):
            seen.append(sample.number)
    # The last sample before the cut may lack members, so it is not given either.
    assert seen == {"in a member": [0, 1], "no end": [0, 1, 2]}.get(cut, [0])


@pytest.mark.parametrize("rest", ["whole", "cut", "zeros only"])
def test_shards_that_were_joined_as_files_are_read_to_the_end(tmp_path, rest):
    one, two = (tar_bytes([member for n in part for member in captioned(n)]) for part in ((0, 1), (2, 3)))
    two = {"whole": two, "cut": two[: two.index(b"00003.txt")], "zeros only": bytes(len(two))}[rest]
    (tmp_path / "0.tar").write_bytes(one + two)
    found = []
    with pytest.raises(ShardError, match="truncated") if rest == "cut" else nullcontext():
        found.extend(sample.key for sample in read_shard(str(tmp_path / "0.tar")))
    assert found == [f"{n:05}" for n in range({"whole": 4, "cut": 3, "zeros only": 2}[rest])]


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path):
    shard = tmp_path / "0.tar"
    write_shard(shard, [member for n in range(4) for member in captioned(n)])
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[6].offset
    with shard.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff" * 512)
    with pytest.raises(ShardError, match="truncated or damaged after 1 samples"):
        list(read_shard(str(shard)))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100])
def test_what_is_no_tar_file(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ShardError, match="damaged after 0 samples"):
        list(read_shard(str(tmp_path / "0.tar")))
    with pytest.raises(ShardError, match=r"1\.tar: cannot be opened \(No such file"):
        list(read_shard(str(tmp_path / "1.tar")))


def test_members_of_a_sample_may_be_anywhere_in_a_file(tmp_path):
    rows = [(f"{n}.json", b"{%d}" % n) for n in range(3)]
    images = [(f"{n}.jpg", b"J%d" % n) for n in (2, 0, 1)]
    shard = str(write_shard(tmp_path / "0.tar", [*rows, *images]))
    whole = [{"json": b"{%d}" % n, "jpg": b"J%d" % n} for n in range(3)]
    assert [(sample.key, sample.members) for sample in read_shard(shard)] == list(
        zip("012", whole, strict=True)
    )
    assert [sample.number for sample in read_shard(shard, skip=1)] == [1, 2]
    # Shards that were joined use their keys twice.
    joined = [member for _ in range(2) for n in (0, 1) for member in (rows[n], (f"{n}.jpg", b"J%d" % n))]
    found = list(read_shard(str(write_shard(tmp_path / "1.tar", joined))))
    assert [(sample.key, sample.members) for sample in found] == list(zip("0101", whole[:2] * 2, strict=True))
    # Without an order, every sample of a damaged shard may lack members.
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[: 5 * 1024 + 100])
    with pytest.raises(ShardError, match="damaged after 0 samples"):
        list(read_shard(shard))


def test_a_link_is_not_taken_for_the_file(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"J")
    (tmp_path / "0.json").write_bytes(b"{}")
    (tmp_path / "1.jpg").hardlink_to(tmp_path / "0.jpg")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("0.jpg", "0.json", "1.jpg"):
            tar.add(tmp_path / name, name)
    first, second = read_shard(str(tmp_path / "0.tar"))
    assert (first.problem, second.problem[:28]) == ("", "its member .jpg is a link or")


def test_a_sample_has_a_limit_for_all_of_its_members(tmp_path, monkeypatch):
    monkeypatch.setattr("bindllm.data.stream.shards.MAX_SAMPLE_BYTES", 110)
    members = [("a.jpg", b"x" * 101), ("b.jpg", b"y" * 60), ("b.png", b"y" * 60), ("c.jpg", b"y" * 100)]
    a, b, c = read_shard(str(write_shard(tmp_path / "0.tar", [*members, ("a.png", b"x")])))
    assert a.problem == b.problem == "a sample of more than 0 MiB"
    assert (c.problem, len(c.members["jpg"])) == ("", 100)


def header(kind: bytes, length: int, **pax) -> bytes:
    """A header without its content; with ``pax``, after a pax header."""
    entry = tarfile.TarInfo("x.jpg")
    entry.type, entry.size, entry.pax_headers = kind, length, pax
    return entry.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header(tarfile.GNUTYPE_LONGNAME, 1 << 40), "an extended header of 1,099,511,627,776 bytes"),
        (header(tarfile.XHDTYPE, 1 << 30), "an extended header of 1,073,741,824 bytes"),
        (header(tarfile.XGLTYPE, 1 << 30), "an extended header of"),
        (header(tarfile.GNUTYPE_SPARSE, 0), "is sparse"),
        (header(tarfile.REGTYPE, 512, **{"GNU.sparse.map": "0,1,9999999999,1"}), "is sparse"),
        (header(tarfile.REGTYPE, 0, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "is sparse"),
        (header(tarfile.REGTYPE, 0, size="-1024"), "a member of -1,024 bytes"),
        (header(tarfile.REGTYPE, 0, size=str(1 << 80)), "a member of 1,208,925,.* bytes"),
        # Each long name belongs to the next header, so tarfile reads them inside each other.
        ((header(tarfile.GNUTYPE_LONGNAME, 1) + b"a".ljust(512, b"\0")) * 2000, "damaged"),
    ],
)
def test_headers_cannot_take_all_memory(tmp_path, content, problem):
    shard = write_shard(tmp_path / "0.tar", [("a.jpg", b"J"), ("b.jpg", b"K")])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2048] + content + whole[2048:])
    seen = []
    with pytest.raises(ShardError, match=problem):
        seen += [sample.key for sample in read_shard(str(shard))]
    with pytest.raises(ShardError, match=problem):
        seen += list(remote._read_url("0.tar", io.BytesIO(shard.read_bytes()), 0))


def test_a_pipe_or_a_device_is_not_a_shard(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    (tmp_path / "1.tar").symlink_to("/dev/zero")
    for name in ("0.tar", "1.tar"):
        with pytest.raises(ShardError, match="cannot be opened .not a regular file"):
            next(read_shard(str(tmp_path / name)))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves files; breaks the first connection to each of them, or answers as ``behave`` says."""

    files: ClassVar[dict[str, bytes]] = {}
    ranges = True
    broken: ClassVar[list[str]] = []
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        if self.path == "/busy.tar" and len([path for path, _ in self.asked if path == self.path]) < 3:
            self.send_error(503)
            return
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if self.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.path not in self.broken and self.path != "/busy.tar":
            self.broken.append(self.path)
            self.wfile.write(content[start : len(content) // 2])
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    write_shards(tmp_path, [6, 6])
    files = {
        f"/{name}.tar": (tmp_path / f"{n:03}.tar").read_bytes() for n, name in enumerate(("one", "busy"))
    }
    behaviour = type("Behaviour", (Server,), {"files": files, "broken": [], "asked": []})
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), behaviour)
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    yield f"http://127.0.0.1:{serving.server_port}", behaviour
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(server, tmp_path, ranges):
    address, behaviour = server
    behaviour.ranges = ranges
    fetched = list(read_shard(f"{address}/one.tar"))
    own = list(read_shard(str(tmp_path / "000.tar")))
    assert [sample.members for sample in fetched] == [sample.members for sample in own]
    half = len(behaviour.files["/one.tar"]) // 2
    assert behaviour.asked == [("/one.tar", None), ("/one.tar", f"bytes={half}-")]
    assert json.loads(fetched[0].members["json"])["key"] == "00000"


def test_a_server_must_send_sorted_shards(server, tmp_path):
    address, behaviour = server
    rows, images = [(f"{n}.txt", b"t") for n in range(3)], [(f"{n}.jpg", b"J") for n in range(3)]
    behaviour.files["/apart.tar"] = write_shard(tmp_path / "apart.tar", [*images, *rows]).read_bytes()
    found = []
    with pytest.raises(
        ShardError, match=r"apart\.tar: not sorted, the members of 0 do not follow.*--sort=name"
    ):
        for sample in read_shard(f"{address}/apart.tar"):
            found.append(sample.key)
    assert found == ["0", "1"]
    joined = [member for _ in range(2) for pair in zip(rows, images, strict=True) for member in pair]
    behaviour.files["/joined.tar"] = write_shard(tmp_path / "joined.tar", joined).read_bytes()
    assert [sample.key for sample in read_shard(f"{address}/joined.tar")] == list("012012")


def test_a_busy_server_is_asked_again_and_a_missing_shard_is_not(server):
    address, behaviour = server
    assert len(list(read_shard(f"{address}/busy.tar"))) == 6
    with pytest.raises(ShardError, match=r"none\.tar: cannot be opened \(the server answers 404"):
        list(read_shard(f"{address}/none.tar"))
    assert [path for path, _ in behaviour.asked] == ["/busy.tar"] * 3 + ["/none.tar"]


def test_a_server_that_is_gone_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    with pytest.raises(ShardError, match="2 tries failed"):
        list(read_shard("http://127.0.0.1:9/0.tar"))
