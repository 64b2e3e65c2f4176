"""Limits on the media of one request: sizes before and while decoding, time, memory, and texts that are searched."""

import io
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bombs
from bindllm.conversation.messages import RecordMedia, parse_messages
from bindllm.embeddings.embedder import embed_groups
from bindllm.errors import InputError, MediaError
from bindllm.media import Media, limits, open_image
from bindllm.media.audio import cut_audio
from bindllm.media.limits import MediaLimits, current_budget, decoding_one, limited
from bindllm.media.maps import open_depth
from bindllm.media.motion import open_imu
from bindllm.media.points import open_points
from bindllm.media.video import read_frames
from recordings import numbered, sound_file, video_file, wav
from tiny import ColorEncoder


def png(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


def whole_audio(source):
    return cut_audio(source, rate=8000, cut=lambda length: [(0, length)])


def whole_video(source):
    return list(read_frames(source, pick=lambda count, rate: range(count)))


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


VIDEO = video_file("mp4", "mpeg4", [numbered(n) for n in range(10)])
# Loader, file, a limit that it just keeps, and one that it passes.
CASES = [
    pytest.param(open_image, png(30, 20), {"pixels": 600}, {"pixels": 599}, id="image"),
    pytest.param(open_image, np.zeros((20, 30), np.uint8), {"pixels": 600}, {"pixels": 599}, id="array"),
    pytest.param(
        open_image,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        {"mib": 41 / 2**20},
        {"mib": 40 / 2**20},
        id="svg",
    ),
    pytest.param(
        whole_audio, wav(np.zeros((1, 8000), np.int16), 8000), {"seconds": 1}, {"seconds": 0.9}, id="wav"
    ),
    pytest.param(whole_video, VIDEO, {"frames": 10}, {"frames": 9}, id="frames"),
    pytest.param(whole_video, VIDEO, {"seconds": 0.4}, {"seconds": 0.3}, id="seconds"),
    pytest.param(whole_video, VIDEO, {"pixels": 10 * 64 * 96}, {"pixels": 64 * 96 - 1}, id="frame"),
    pytest.param(
        open_points, npy(np.zeros((10, 3), "f4")), {"mib": 120 / 2**20}, {"mib": 119 / 2**20}, id="points"
    ),
    pytest.param(open_depth, npy(np.ones((10, 3), "f4")), {"pixels": 30}, {"pixels": 29}, id="depth"),
    pytest.param(
        lambda s: open_imu(s, steps=5), npy(np.ones((10, 6))), {"points": 10}, {"points": 9}, id="imu"
    ),
    pytest.param(
        lambda s: open_imu(s, steps=5), b"1,2,3,4,5,6\n" * 10, {"points": 10}, {"points": 9}, id="imu table"
    ),
]


@pytest.mark.parametrize(("load", "source", "enough", "too_low"), CASES)
def test_each_limit_is_exact_and_ends_with_its_block(load, source, enough, too_low):
    with limited(MediaLimits(**enough)):
        load(source)
    with limited(MediaLimits(**too_low)), pytest.raises(MediaError):
        load(source)
    load(source)


def test_a_limit_above_that_of_the_loader_changes_nothing():
    with limited(MediaLimits(pixels=10**12)), pytest.raises(MediaError, match="at most 100,000,000"):
        open_image(bombs.png_of(60_000, 60_000))


def test_limits_reach_the_threads_that_prepare_media():
    encoders = [ColorEncoder()]
    groups = [[Media.image(png(30, 20))], [Media.image(png(20, 20))]]
    with limited(MediaLimits(pixels=400)), pytest.raises(MediaError, match="30 x 20 pixels; at most 400"):
        embed_groups(groups, encoders, device="cpu")
    assert embed_groups(groups, encoders, device="cpu").embeddings.shape[0] == 2


def test_decoding_time_is_that_of_all_media_of_a_request():
    with limited(MediaLimits(work=0.15)):
        budget = current_budget()
        for _ in range(2):
            with decoding_one(budget):
                time.sleep(0.1)
        with pytest.raises(MediaError, match="more than 0.15 seconds"), decoding_one(budget):
            raise AssertionError("its time is over")
    # Another request has its own.
    with limited(MediaLimits(work=0.15)), decoding_one(current_budget()):
        open_image(png(3, 2))


def test_long_decoding_is_stopped(monkeypatch):
    with limited(MediaLimits(work=1e-9)):
        budget = current_budget()
        monkeypatch.setattr(limits, "check_time", lambda: None)
        with decoding_one(budget):
            for load, source in ((whole_video, VIDEO), (whole_audio, wav(np.zeros((1, 9), np.int16), 8000))):
                with pytest.raises(MediaError, match="decoding the media of this request takes more than"):
                    load(source)


def test_few_media_of_limited_requests_are_decoded_at_a_time():
    running, most, lock = 0, 0, threading.Lock()

    def work(budget):
        nonlocal running, most
        with decoding_one(budget):
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1

    with limited(MediaLimits()):
        threads = [threading.Thread(target=work, args=(current_budget(),)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most <= limits.AT_ONCE


@pytest.mark.parametrize("name", ["pixels", "seconds", "frames", "points", "mib", "work"])
def test_limits_are_above_zero(name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        MediaLimits(**{name: 0})


# --- headers that claim too much, for every user of the loaders ---


@pytest.mark.parametrize(
    "content",
    [
        bombs.mp4(*bombs.tables(50_000_000)),
        bombs.mp4(*bombs.tables(50_000_000, duration=2), is_audio=True),
        # Chunks of billions of samples; and fragments whose samples have no entries.
        bombs.mp4(*bombs.tables(4_000_000_000, chunks=10), is_audio=True),
        bombs.mp4() + bombs.box(b"moof", bombs.box(b"traf", bombs.full_box(b"trun", b"\xff" * 4))),
        # Edits that each repeat the track.
        bombs.mp4(*bombs.tables(100_000), bombs.full_box(b"elst", b"\0\0\x10\0", bytes(12 * 4096))),
        bombs.mp4(
            *bombs.tables(1000, chunks=10),
            bombs.full_box(b"stsc", b"\0\0\0\2" + b"\0\0\0\1" * 4 + b"\xff" * 4 + bytes(4)),
            is_audio=True,
        ),
        # Inside a box that is said to be empty space.
        bombs.mp4() + bombs.box(b"free", bombs.box(b"trak", *bombs.tables(50_000_000))),
        # A size of 8 bytes, and one up to the end of the file.
        bombs.mp4() + b"\0\0\0\1trak" + (1000).to_bytes(8, "big") + b"".join(bombs.tables(50_000_000)),
        bombs.mp4() + b"\0\0\0\0trak" + b"".join(bombs.tables(50_000_000)),
    ],
)
def test_samples_that_a_header_claims_are_counted_before_they_are_listed(content):
    for load in (whole_video, whole_audio):
        with pytest.raises(MediaError, match=r"its header claims [0-9,]+ samples; at most 20,000,000"):
            load(content)


def test_packed_headers_of_old_mov_files_are_refused():
    with pytest.raises(MediaError, match="packed header"):
        whole_video(bombs.box(b"ftyp", b"qt  ") + bombs.box(b"moov", bombs.box(b"cmov", bytes(8))))


@pytest.mark.parametrize(("container", "codec"), [("mov", "pcm_s16le"), ("mov", "aac"), ("mp4", "aac")])
def test_long_recordings_of_plain_samples_are_still_read(container, codec):
    """Each sample of PCM counts in the header: a minute has millions, and is 60 seconds all the same."""
    form = "s16" if codec.startswith("pcm") else "fltp"
    content = sound_file(container, codec, np.zeros((1, 48_000 * 10)), 48_000, form=form)
    with limited(MediaLimits(frames=50)):
        (samples,) = whole_audio(content)
    assert samples.shape[1] == pytest.approx(80_000, abs=400)


def test_progressive_images_of_a_few_scans_are_read():
    assert open_image(bombs.jpeg_of_scans(64, 64)).size == (64, 64)
    with pytest.raises(MediaError, match="a JPEG of 65 scans; at most 64"):
        open_image(bombs.jpeg_of_scans(64, 65))


def test_scans_are_counted_across_blocks(monkeypatch):
    monkeypatch.setattr("bindllm.media.images.CHUNK", 1)
    with pytest.raises(MediaError, match="a JPEG of 65 scans"):
        open_image(bombs.jpeg_of_scans(64, 65))


# --- texts that were searched again from each of their characters ---


@pytest.mark.parametrize(
    "search",
    [
        lambda: parse_messages([{"role": "user", "content": "x" + " " * 200_000 + "<b"}], RecordMedia(Media)),
        lambda: open_imu(b"#" + b"(" * 4000 + b"\n1,2,3,4,5,6\n", steps=4),
        lambda: open_points(b"# x\n" + (b"#" + b"(" * 60_000 + b"\n") * 3 + b"1 2 3\n"),
    ],
    ids=["placeholder", "imu", "points"],
)
def test_long_rows_of_one_character_are_read_at_once(search):
    started = time.monotonic()
    with suppress(MediaError):
        search()
    assert time.monotonic() - started < 2


# --- all together ---

_ALL = """
import resource, sys, time
sys.path[:0] = sys.argv[1:]
import bombs
from PIL import Image
from bindllm.errors import MediaError
from bindllm.media.limits import MediaLimits, current_budget, decoding_one, limited

cases = bombs.small_bombs()
bombs.LOADERS["image"](bombs.svg_of_entities().replace(b"&a10;", b""))
bombs.LOADERS["video"](bombs.gif_of(1))
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
for number, (modality, content) in enumerate(cases):
    with limited(MediaLimits()), decoding_one(current_budget()):
        try:
            found = bombs.LOADERS[modality](content)
        except MediaError:
            continue
    raise AssertionError(f"bomb {number} ({modality}) was read: {found}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.monotonic() - started)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss differ")
def test_memory_and_time_stay_small_while_bombs_are_refused():
    folders = [str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", _ALL, *folders], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 250
    assert seconds < 60
