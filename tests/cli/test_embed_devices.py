"""`bindllm embed` in several processes: the store of one process, whatever becomes of them on the way."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from tiny import color_images, save_tiny_decoder
from tiny_run import tiny_recipe, write_recipe

pytestmark = pytest.mark.slow
SECONDS = 400


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """40 pictures of two modalities, a copy of 4 of them, and two files that cannot be read."""
    folder = tmp_path_factory.mktemp("parts")
    save_tiny_decoder(folder / "decoder")
    color_images(folder / "pictures", per_color=10, split=False)
    images = folder / "pictures/images"
    (images / "empty.png").write_bytes(b"")
    (images / "broken.png").write_bytes((images / "red0.png").read_bytes()[:70])
    with (folder / "pictures/captions.jsonl").open("a") as table:
        for n in range(4):
            (images / f"copy{n}.png").write_bytes((images / f"blue{n}.png").read_bytes())
        for name in ("empty", "broken", *(f"copy{n}" for n in range(4))):
            table.write(json.dumps({"image": f"images/{name}.png", "caption": name}) + "\n")
    (folder / "heat").mkdir()
    rows = [{"thermal": f"../pictures/images/green{n}.png", "caption": "warm"} for n in range(10)]
    (folder / "heat/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in images.iterdir():
        os.utime(file, ns=(10**18, 10**18))
    return folder


def recipe_in(folder, parts):
    """Go to an empty folder, and write the recipe there."""
    recipe = tiny_recipe(parts)
    recipe["data"]["sources"].append({"path": str(parts / "heat"), "modality": "thermal"})
    recipe["model"]["encoders"] = [
        {"class_path": f"slow_encoders.{kind}Encoder"} for kind in ("Slow", "Heat")
    ]
    os.chdir(folder)
    write_recipe(recipe)


@pytest.fixture(autouse=True)
def place(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe_in(tmp_path, parts)
    return tmp_path


def start(*options, **variables):
    command = [sys.executable, "-m", "bindllm.cli", "embed", "--config", "recipe.yaml", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"EMBED_AT_ONCE": "yes", **variables}
    # A machine without a network still has this one.
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    told, errors = process.communicate(timeout=SECONDS)
    return process.returncode, told, errors


def embed(*options, **variables):
    """Run to the end, and return what was encoded, what came from the store, and all that was printed."""
    code, told, errors = finish(start(*options, **variables))
    assert code == 0, errors[-4000:]
    (counts,) = re.findall(r"(\d+) encoded, (\d+) from the store", told)
    return *map(int, counts), told


def rows(folder="."):
    """All rows of all shards, sorted: encoder, key and embedding; a key that is there twice is seen twice."""
    found = []
    for shard in Path(folder, "data/store").rglob("embeddings-*.arrow"):
        table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
        found += [(shard.parent.name, row["key"], tuple(row["embedding"])) for row in table.to_pylist()]
    return sorted(found)


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """The rows that one process stores, and what it says."""
    folder, here = tmp_path_factory.mktemp("alone"), Path.cwd()
    recipe_in(folder, parts)
    encoded, reused, told = embed()
    os.chdir(here)
    found = rows(folder)
    assert (encoded, reused, len(found)) == (50, 4, 50)
    return found, told


def until_written(count):
    """Wait until this many shards are in the stores."""
    deadline = time.monotonic() + SECONDS
    while len(list(Path("data/store").rglob("embeddings-*.arrow"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def number_of(rank):
    return int(Path(f"process-{rank}").read_text())


def until_gone(number):
    deadline = time.monotonic() + 60
    while (
        Path(f"/proc/{number}/stat").exists() and Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def without_seconds(told):
    return re.sub(r"seconds.*", "", told)


@pytest.mark.parametrize("devices", [2, 3])
def test_several_processes_store_and_say_what_one_does(devices, alone):
    stored, told_alone = alone
    *_, told = embed("--trainer.devices", str(devices))
    assert rows() == stored
    assert without_seconds(told) == without_seconds(told_alone)
    assert "2 x media that cannot be embedded" in told
    assert len({number_of(rank) for rank in range(devices)}) == devices
    assert embed("--trainer.devices", "2")[:2] == (0, 54)
    assert rows() == stored


def test_killed_processes_leave_their_rows_to_any_number_of_others(alone):
    """First one of two is killed, then the process that has started both."""
    running = start("--trainer.devices", "2", SLOW_SECONDS="0.3")
    until_written(6)
    os.kill(number_of(1), signal.SIGKILL)
    code, told, errors = finish(running)
    assert (code, told) == (1, "")
    assert "process 1 terminated with signal SIGKILL" in errors
    assert "run the same command again" in errors
    first = len(rows())
    assert 6 <= first < 40
    running = start("--trainer.devices", "2", SLOW_SECONDS="0.3")
    until_written(min(first, 16) + 4)
    others = [number_of(rank) for rank in (0, 1)]
    os.kill(running.pid, signal.SIGKILL)
    assert finish(running)[0] == -signal.SIGKILL
    for other in others:
        until_gone(other)
    second = len(rows())
    assert first < second < 50
    encoded, reused, _ = embed("--trainer.devices", "3")
    assert (encoded, reused) == (50 - second, 4 + second)
    assert rows() == alone[0]


def test_a_process_that_fails_says_why_and_stops_the_others(alone):
    running = start("--trainer.devices", "2", SLOW_SECONDS="0.3", FAILING_RANK="1")
    code, told, errors = finish(running)
    assert (code, told) == (1, "")
    assert "error in process 1: this device is broken" in errors
    assert "error: process 1 terminated with exit code 1. Finished work is stored" in errors
    before = len(rows())
    assert before >= 2, "what it had embedded"
    assert embed()[0] == 50 - before
    assert rows() == alone[0]


def test_the_first_process_fails_while_the_others_wait(alone):
    running = start("--trainer.devices", "3", SLOW_SECONDS="0.1", FAILING_RANK="0")
    code, told, errors = finish(running)
    assert (code, told) == (1, "")
    assert "error in process 0: this device is broken" in errors
    for rank in (1, 2):
        until_gone(number_of(rank))
    before = len(rows())
    assert embed("--trainer.devices", "2")[0] == 50 - before < 49
    assert rows() == alone[0]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "scheduler"])
def test_asked_to_stop_all_processes_write_what_they_have(stop, alone):
    running = start("--trainer.devices", "2", SLOW_SECONDS="0.3")
    until_written(5)
    # A terminal sends Ctrl-C to every process, a scheduler's request goes to the one that it has started.
    os.killpg(running.pid, stop) if stop == signal.SIGINT else running.send_signal(stop)
    code, told, errors = finish(running)
    assert (code, told) == (130, "")
    assert errors.count("stopped; finished work is kept") == 1
    before = len(rows())
    assert embed()[0] == 50 - before < 46
    assert rows() == alone[0]


def test_two_nodes_started_by_hand(alone):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    options = ("--trainer.num_nodes", "2", "--trainer.devices", "1")
    nodes = [
        start(*options, NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)
    ]
    (code, told, errors), (other_code, other_told, _) = [finish(node) for node in nodes]
    assert (code, other_code) == (0, 0), errors[-4000:]
    assert without_seconds(told) == without_seconds(alone[1])
    assert other_told == "", "one process reports"
    assert rows() == alone[0]
